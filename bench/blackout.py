# SPDX-License-Identifier: Apache-2.0
"""Blackout by RAM size, and what a guest's RAM costs the daemons: postcopyd only.

`blackout.py [--runs N] [--sizes MiB,MiB,...]`

One guest of each size, all at once, each touching the same 128 MiB of its RAM and otherwise
sparse. They are moved in turns; all but the one that moves are idle.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import table
import trio
from guests import qemu as q
from movers import MIB, Daemons, Qemu, guest_config, started
from qemus import newest

from postcopyd.demo.hosts import Host, open_hosts

TOUCHED_MIB = 128
WORK_S = 1.0
IDLE_S = 3.0
PAGE = 4096


def peak_bytes(host: Host, reset: bool = False) -> int:
    """The most memory that the daemon had since the reset (proc(5): clear_refs, VmHWM)."""
    assert host.process is not None
    folder = Path(f"/proc/{host.process.pid}")
    if reset:
        (folder / "clear_refs").write_text("5")
    for line in (folder / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_s(host: Host) -> float:
    assert host.process is not None
    fields = Path(f"/proc/{host.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Mobile:
    """A guest of one size, wherever it is."""

    def __init__(self, guest: q.Guest, config: q.GuestConfig, hosts: list[Host]) -> None:
        self.guest, self.config, self.hosts = guest, config, hosts
        self.mib = config.memory // MIB
        self.move = Daemons(hosts, f"guest{self.mib}")
        self.count = 0
        self.holding = contextlib.AsyncExitStack()
        self.qemu: Qemu | None = None

    async def boot(self) -> None:
        name = f"m{self.mib}-0"
        self.qemu = await self.holding.enter_async_context(started(self.guest, self.config, name))
        await self.guest.ready()
        await self.guest.rate(0)

    async def aclose(self) -> None:
        await self.holding.aclose()

    async def once(self) -> tuple[float, int]:
        """Blackout in ms; bytes that both daemons grew by."""
        assert self.qemu is not None
        self.count += 1
        next_one = contextlib.AsyncExitStack()
        name = f"m{self.mib}-{self.count}"
        arriving = await next_one.enter_async_context(
            started(self.guest, self.config, name, incoming=True)
        )
        await self.guest.rate(-1)
        await trio.sleep(WORK_S)
        before = sum(peak_bytes(host, reset=True) for host in self.hosts)
        move = await self.move(self.qemu, arriving)
        grown = sum(peak_bytes(host) for host in self.hosts) - before
        sweep, report = await self.guest.sweep(), await self.guest.report()
        if sweep.bad or report.bad:
            raise SystemExit(f"the guest found {sweep.bad} bad pages: {self.guest.bad}")
        await self.guest.rate(0)
        await self.holding.aclose()
        self.holding, self.qemu = next_one, arriving
        return (move.resume - move.stop) * 1e3, grown


Found = tuple[dict[int, list[float]], dict[int, list[int]], float]


async def run(folder: Path, sizes: list[int], runs: int) -> Found:
    """By size in MiB: blackouts in ms, growth in bytes. And ms of CPU for each second idle."""
    blackouts: dict[int, list[float]] = defaultdict(list)
    memory: dict[int, list[int]] = defaultdict(list)
    work = q.Workload(test_mb=TOUCHED_MIB, report_ms=200)
    config = guest_config(folder, workload=work)
    async with contextlib.AsyncExitStack() as stack:
        hosts = await stack.enter_async_context(open_hosts(folder))
        mobiles = []
        for mib in sizes:
            guest = await stack.enter_async_context(q.Guest.open(folder))
            mobile = Mobile(guest, replace(config, memory=mib * MIB), hosts)
            stack.push_async_callback(mobile.aclose)
            await mobile.boot()
            mobiles.append(mobile)
        before = sum(map(cpu_s, hosts))
        await trio.sleep(IDLE_S)
        idle = (sum(map(cpu_s, hosts)) - before) / IDLE_S * 1e3
        for turn in range(runs):
            for mobile in mobiles if turn % 2 == 0 else reversed(mobiles):
                blackout, grown = await mobile.once()
                blackouts[mobile.mib].append(blackout)
                memory[mobile.mib].append(grown)
                print(f"{mobile.mib:6} MiB: blackout {blackout:.1f} ms, daemons grew by "
                      f"{grown / MIB:.1f} MiB", flush=True)  # fmt: skip
    return blackouts, memory, idle


def main() -> int:
    """The exit status: table.MISSED when a goal is missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sizes", default="256,1024,4096,16384")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    about = table.machine(qemu=str(newest()), accel=q.GuestConfig.accel, runs=options.runs)
    table.warm(2 << 30)
    with tempfile.TemporaryDirectory(prefix="pcb-", dir="/dev/shm") as folder:
        blackouts, memory, idle = trio.run(run, Path(folder), sizes, options.runs)
    rows = [
        table.single(f"blackout, {mib} MiB of RAM", "ms", blackouts[mib], 10.0) for mib in sizes
    ]
    small, large = min(sizes), max(sizes)
    if small < large:
        rows.append(
            table.paired(f"blackout, {large} against {small} MiB", "ms", blackouts[large],
                         blackouts[small], "small", 1.5)
        )  # fmt: skip
        more = (large - small) * MIB / PAGE
        # Not less than nothing: a small guest's move may be the one that first touches a buffer.
        each = [
            max(0.0, (much - little) / more)
            for much, little in zip(memory[large], memory[small], strict=True)
        ]
        rows.append(table.single("memory of both daemons for each page", "B", each, 2.0,
                                 note="destination 1 B, source 2 bits"))  # fmt: skip
    rows.append(table.single("CPU of both daemons while idle", "ms/s", [idle], 1.0))
    data = {"blackout_ms": blackouts, "memory_bytes": memory, "idle_ms_per_s": idle}
    return table.finish("blackout", rows, about, data)


if __name__ == "__main__":
    raise SystemExit(main())
