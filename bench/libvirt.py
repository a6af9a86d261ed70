# SPDX-License-Identifier: Apache-2.0
"""One domain of libvirt that verifies its memory, moved between the same two libvirtd by postcopyd
and by `virsh migrate --postcopy` in turns.

`libvirt.py [--runs N] [--memory MiB] [--test-mb MiB] [--watch S] [--kind kvm] [--newest]`

Each moves the domain as its user would type it: by hybrid migration, and by libvirt's precopy of
one pass and its postcopy then. Both libvirtd and both daemons are those of the tests, on this
machine. What of a move is measured is qemu.py's.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import table
import trio
from guests import qemu as q
from movers import ABOUT, MIB, SECONDS, Move
from qemu import REPORT_MS, show, watched

sys.path.append(str(table.ROOT / "tests/system"))
import newest
from libvirt_hosts import VM, LibvirtHost, LibvirtPair, Version, libvirt_pair

Run = dict[str, Any]

OURS, THEIRS = "postcopyd", "virsh"
VIRSH = ("migrate", "--live", "--postcopy", "--postcopy-after-precopy", "--persistent",
         "--undefinesource", "--unsafe", "--migrateuri", "tcp://127.0.0.1")  # fmt: skip
POSTCOPY = Path("/proc/sys/vm/unprivileged_userfaultfd")
EVENT = re.compile(r"event (\w+) at (\d+\.\d+) for domain '.*?': (.*)")


class Heard:
    """QEMU's events at one host since it began to listen, as libvirt passes them on: each with
    QEMU's own time stamp, as seconds of `trio.current_time`."""

    def __init__(self) -> None:
        self.events: list[tuple[str, float, str]] = []

    async def listen(self, host: LibvirtHost) -> None:
        command = [*host.by, "stdbuf", "-oL", "virsh", "qemu-monitor-event", "--loop"]
        process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            text = ""
            async for data in process.stdout:
                *lines, text = (text + data.decode()).split("\n")
                for event in filter(None, map(EVENT.search, lines)):
                    at = float(event[2]) - time.time() + trio.current_time()
                    self.events.append((event[1], at, event[3]))
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    def times(self, name: str, since: float, about: str = "") -> list[float]:
        return [at for event, at, said in self.events
                if event == name and at >= since and about in said]  # fmt: skip


class Moving:
    """The domain on its way from host to host, and what both hosts' QEMUs say of it."""

    def __init__(self, pair: LibvirtPair, heard: dict[LibvirtHost, Heard]) -> None:
        self._pair, self._heard = pair, heard

    async def by(self, way: Callable[[LibvirtPair], Awaitable[dict[str, Any]]]) -> Move:
        """Follows the guest from the moment on at which a QEMU waits for it."""
        here, there = self._pair.here, self._pair.there
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow, there)
            begin = trio.current_time()
            about = await way(self._pair)
            drained = trio.current_time()
        self._pair.moves += 1
        heard = self._heard[there]
        with trio.fail_after(SECONDS):
            while not (resumes := heard.times("RESUME", begin)):
                await trio.sleep(0.01)
        about["postcopy"] = bool(heard.times("MIGRATION", begin, "postcopy-active"))
        # With direct I/O each pass of ours stops it for a moment: the last one is meant.
        stop = max(at for at in self._heard[here].times("STOP", begin) if at < resumes[0])
        return Move(begin, stop, resumes[0], drained, 0, 0, about)

    async def _follow(self, there: LibvirtHost) -> None:
        while not there.qemu:
            await trio.sleep(0.005)
        await self._pair.guest.follow(there)


async def ours(pair: LibvirtPair) -> dict[str, Any]:
    result = await pair.here.migrate(VM, pair.there)
    if result["event"] != "completed" or "warning" in result:
        raise SystemExit(f"the migration by postcopyd: {result}")
    return {k: result[k] for k in ABOUT if k in result}


async def theirs(pair: LibvirtPair) -> dict[str, Any]:
    there = f"qemu+unix:///system?socket={pair.there.root}/run/libvirt/libvirt-sock"
    command = [*pair.here.by, "virsh", *VIRSH, VM, there]
    done = await trio.run_process(
        command, capture_stdout=True, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        raise SystemExit(f"virsh migrate: {done.stdout.decode().strip()}")
    return {}


@contextlib.contextmanager
def postcopy_allowed() -> Iterator[None]:
    """QEMUs of users other than root may have what libvirt's postcopy needs, meanwhile."""
    before = POSTCOPY.read_text()
    POSTCOPY.write_text("1")
    try:
        yield
    finally:
        POSTCOPY.write_text(before)


async def run(
    folder: Path, options: argparse.Namespace, about: dict[str, Any]
) -> dict[str, list[Run]]:
    boot = q.boot(folder)
    (cache := folder / "cache").mkdir()
    (layers := folder / "layers").mkdir()
    version = Version(cache, newest.with_package(layers) if options.newest else "")
    work = q.Workload(test_mb=options.test_mb, report_ms=REPORT_MS, disk_rate=0)
    runs: dict[str, list[Run]] = {OURS: [], THEIRS: []}
    ways = {OURS: ours, THEIRS: theirs}
    async with (
        libvirt_pair(
            folder, boot, version, memory=options.memory, workload=work, kind=options.kind
        ) as pair,
        trio.open_nursery() as nursery,
    ):
        about |= re.findall(r"(?:library|hypervisor): (\S+) (\S+)", pair.here.virsh("version"))
        heard = {host: Heard() for host in pair.hosts}
        for host, listener in heard.items():
            nursery.start_soon(listener.listen, host)
        moving = Moving(pair, heard)
        for turn in range(options.runs):
            # Each goes as often first, and as often either way.
            for name in sorted(ways, reverse=turn % 2 == 1):
                found = await watched(pair.guest, partial(moving.by, ways[name]), options.watch)
                show(name, found)
                runs[name].append(found)
        nursery.cancel_scope.cancel()
    return runs


def rows_of(runs: dict[str, list[Run]]) -> list[table.Row]:
    def both(measure: str, unit: str, get: Callable[[Run], float]) -> table.Row:
        mine, other = ([get(one) for one in runs[way]] for way in (OURS, THEIRS))
        return table.paired(measure, unit, mine, other, THEIRS, None)

    return [
        both("blackout", "ms", lambda one: one["blackout_ms"]),
        both("longest gap of the guest", "ms", lambda one: one["gap_ms"]),
        both("longest operation", "ms", lambda one: one["operation_ms"]),
        both("lost work from the stop on", "s", lambda one: one["lost_s"]),
        both("lost work, passes and all", "s", lambda one: one["lost_before_s"] + one["lost_s"]),
        both("request to stop", "s", lambda one: one["before_s"]),
        both("speed from request to stop / before", "",
             lambda one: 1 - one["lost_before_s"] / one["before_s"]),
        both("drained, from the stop", "s", lambda one: one["drained_s"]),
        both("speed after / before", "", lambda one: one["after"]),
        table.single("virsh: moves that came to postcopy", "",
                     [one["about"]["postcopy"] for one in runs[THEIRS]]),
    ]  # fmt: skip


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--runs", type=int, default=6, help="an even number")
    parser.add_argument("--memory", type=int, default=1024)
    parser.add_argument("--test-mb", type=int, default=512)
    parser.add_argument("--watch", type=float, default=5.0, help="s after the stop, at least")
    parser.add_argument("--kind", default="qemu", choices=("qemu", "kvm"), help="of the domain")
    parser.add_argument(
        "--newest", action="store_true", help="tools/newest-libvirt's, not Debian's"
    )
    options = parser.parse_args()
    about = table.machine(
        kind=options.kind, runs=options.runs, memory_mib=options.memory,
        writes_mib=options.test_mb, watched_s=options.watch,
    )  # fmt: skip
    table.warm(4 * options.memory * MIB)
    with (
        tempfile.TemporaryDirectory(prefix="pcb-", dir="/dev/shm") as folder,
        postcopy_allowed(),
    ):
        runs = trio.run(run, Path(folder), options, about)
    return table.finish("libvirt", rows_of(runs), about, runs)


if __name__ == "__main__":
    raise SystemExit(main())
