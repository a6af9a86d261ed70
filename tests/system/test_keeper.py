# SPDX-License-Identifier: Apache-2.0
"""A source QEMU that is killed while its private memory follows: a keeper has the memory."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from guests import qemu as q
from pair import MIB, status_until, until
from qemu_pair import VM, QemuPair, qemu_pair
from qemus import EACH_QEMU

from postcopyd.errors import PostcopydError
from postcopyd.host import procfs
from postcopyd.native import keeper

SLOW = 8 * MIB
pytestmark = EACH_QEMU


class Mixed(q.GuestConfig):
    """Two nodes, the second of which is in a file."""

    def ram(self) -> list[str]:
        shared = [f"{o},share=on" if "id=ram1" in o else o for o in super().ram()]
        return [o.replace("ram,id=ram1", "memfd,id=ram1") for o in shared]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nobody": {"user": "nobody"},
    "mixed": {"ram_kind": "ram", "backends": 2},
}


def guest(qemu: q.QemuBinary, **changes: Any) -> dict[str, Any]:
    return {"qemu": qemu, "memory": 160 * MIB, "ram_kind": "plain", **changes}


def keepers(qemu: q.QemuProcess) -> list[int]:
    """All processes that keep the memory of this QEMU, which may have ended: its children, zombies
    too, and what has its command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        of_it = procfs.status(pid).get("PPid") == str(qemu.pid)
        of_it |= str(qemu.qmp_path) in " ".join(procfs.arguments(int(pid)))
        if of_it and procfs.command(int(pid)) == keeper.NAME:
            found.append(int(pid))
    return found


async def kept(pair: QemuPair, source: q.QemuProcess, mode: str = "postcopy") -> int:
    """The keeper of a guest whose memory follows, once it is on record."""
    here = pair.here
    started = await here.call(
        "Migrate", name=VM, to=pair.there.address, mode=mode, bandwidth=SLOW, precopyPasses=0
    )
    assert started
    record = here.state / f"{VM}.json"
    await until(lambda: '"keeper"' in record.read_text(), "a keeper on record", 60)
    (pid,) = keepers(source)
    assert str(pid) in record.read_text()
    return pid


async def arrived(pair: QemuPair, source: q.QemuProcess) -> None:
    """All of the guest is at the other host, and nothing is left of its memory here."""
    status = await status_until(pair.here, VM, lambda status: status.get("result"), 120)
    assert status["result"]["event"] == "completed", status
    assert status["result"]["memory"]["lostPages"] == 0
    await until(lambda: not keepers(source), "no keeper")
    await pair.check()


@pytest.mark.parametrize(
    "daemon",
    [pytest.param(False, marks=pytest.mark.long, id="alone"), pytest.param(True, id="with-daemon")],
)
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.long] if k != "plain" else []) for k in KINDS]
)
async def test_killed_while_memory_follows(
    qemu: q.QemuBinary, kind: str, daemon: bool, folder: Path, boot: tuple[Path, Path]
) -> None:
    """The guest gets all of its memory, also from a daemon that was started since."""
    async with qemu_pair(folder, boot, **guest(qemu, **KINDS[kind])) as pair:
        if kind == "mixed":
            fields = dataclasses.fields(pair.config)
            pair.config = Mixed(**{f.name: getattr(pair.config, f.name) for f in fields})
        source = await pair.boot()
        await pair.wait_for_it()
        await kept(pair, source)
        if daemon:
            await trio.to_thread.run_sync(pair.here.end, signal.SIGKILL)
        os.kill(source.pid, signal.SIGKILL)
        await source.wait()
        if daemon:
            await pair.here.start()
        await arrived(pair, source)


@pytest.mark.long
async def test_killed_after_passes(
    qemu: q.QemuBinary, folder: Path, boot: tuple[Path, Path]
) -> None:
    """The userfaultfd that tracked the guest's writes belongs to the memory that is kept."""
    async with qemu_pair(folder, boot, **guest(qemu)) as pair:
        source = await pair.boot()
        await pair.wait_for_it()
        await kept(pair, source, "hybrid")
        os.kill(source.pid, signal.SIGKILL)
        await arrived(pair, source)


@pytest.mark.long
async def test_nobody_needs_the_memory_any_more(
    qemu: q.QemuBinary, folder: Path, boot: tuple[Path, Path]
) -> None:
    """A guest that is taken back, and later one whose QEMU stays: no keeper is left, no zombie."""
    async with qemu_pair(folder, boot, **guest(qemu)) as pair:
        source = await pair.boot()
        waiting = await pair.wait_for_it()
        await kept(pair, source)
        await trio.to_thread.run_sync(pair.there.end, signal.SIGKILL)
        waiting.kill()
        await status_until(pair.here, VM, lambda status: status["phase"] == "paused")
        await pair.here.call("Resolve", name=VM, decision="take_back")
        assert keepers(source) == []
        await pair.check()
        await pair.there.start()
        await pair.there.call("Resolve", name=VM, decision="kill")
        pair.moves += 2
        await pair.wait_for_it()
        await pair.move(keepSource=True)
        assert (keepers(source), source.process.poll()) == ([], None)


@pytest.mark.long
async def test_a_keeper_that_somebody_killed(
    qemu: q.QemuBinary, folder: Path, boot: tuple[Path, Path]
) -> None:
    """Nothing happens as long as the QEMU lives; then the memory is gone, and a person decides."""
    async with qemu_pair(folder, boot, **guest(qemu)) as pair:
        source = await pair.boot()
        await pair.wait_for_it()
        os.kill(await kept(pair, source), signal.SIGKILL)
        await trio.sleep(0.5)
        assert (await pair.here.status(VM))["phase"] == "postcopy"
        os.kill(source.pid, signal.SIGKILL)
        gone = await status_until(pair.here, VM, lambda status: status["phase"] == "paused")
        assert "what had not crossed of its memory is lost" in gone["message"]
        with trio.fail_after(60):
            while True:
                try:
                    await pair.here.call("Resolve", name=VM, decision="kill")
                    break
                except PostcopydError as refused:  # it was just asking the destination
                    if "say it again if it is paused still" not in str(refused):
                        raise
                    await trio.sleep(0.1)
        assert keepers(source) == []


@pytest.mark.long
async def test_whoever_makes_it_is_killed_at_any_moment(qemu: q.QemuBinary, folder: Path) -> None:
    """The filter of the QEMU, which forbids the call, never sees it. A keeper is whole or none, and
    the next one replaces it."""
    sandbox = "on,spawn=deny,resourcecontrol=deny"
    command = [str(qemu.path), *qemu.options, "-m", "64M", "-nodefaults", "-display", "none", "-S"]
    started = subprocess.Popen([*command, "-sandbox", sandbox, "-pidfile", str(folder / "pid")])
    await until(lambda: (folder / "pid").exists() and (folder / "pid").read_text(), "a QEMU")
    pid = int((folder / "pid").read_text())
    making = "import trio; from postcopyd.native.keeper import make; print(1, flush=True)"
    making += f"; trio.run(lambda: make({pid}, allow_seccomp=True))"
    try:
        for after_ms in range(100, 400, 12):
            maker = subprocess.Popen(
                [sys.executable, "-c", making], cwd=folder, stdout=subprocess.PIPE
            )
            assert maker.stdout is not None
            maker.stdout.readline()
            await trio.sleep(after_ms / 1e3)
            maker.kill()
            maker.communicate()
            assert procfs.started(pid), after_ms
        made = await keeper.make(pid, allow_seccomp=True)
        assert list(keeper.children(pid)) == [made.pid]
        await keeper.end(made, pid)
        assert list(keeper.children(pid)) == []
    finally:
        os.kill(pid, signal.SIGKILL)
        started.wait()
