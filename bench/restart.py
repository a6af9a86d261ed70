# SPDX-License-Identifier: Apache-2.0
"""A daemon killed in the middle of a migration and started again: how long its guest waits.

`restart.py [--moves N] [--memory MiB] [--accel A]`

A QEMU guest and then a process guest, moved so slowly that most of their memory is missing all the
time. In each move each daemon is killed twice, in turns, and started again. The first fault
answered is the guest's first operation after it had come to a stop. All memory is checked after
each move.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import table
import trio
from guests import qemu as q
from guests.process import ProcessGuest
from movers import MIB, guest_config, started
from qemus import newest

from postcopyd.demo.hosts import Host, open_hosts

RATE = 500
"""Operations of the guest per second: what it touches must last until the last kill."""
MOVE_S = 12.0
"""How long pushing its memory takes, without kills."""
WORK_S = 0.8
"""Between two kills: it must have gone on for a while."""
STOPPED_S = 0.25
"""A guest that has done nothing for so long has come to a stop. Its operations are 2 ms apart; the
QEMU guest says each 10 ms how many it has done, the process guest each 100 ms."""
MOST_S = 30.0
PROCESS_MIB = 128
VM = "guest"
KILLS = ("destination", "source", "source", "destination")

Operations = Callable[[], Awaitable[tuple[float, int]]]
"""When the guest last said how many operations it has done, and how many."""


class Killed(dict[str, list[tuple[float, float, float]]]):
    """By guest and role what was seen, in seconds: from the start of the new daemon until a fault
    was answered, until it answered on its control socket, and all that the guest stood still."""

    def add(self, guest: str, role: str, found: tuple[float, float, float]) -> None:
        self.setdefault(f"{guest}, {role}", []).append(found)
        first, control, still = found
        print(
            f"{guest:8} {role:12} first fault answered {first:.3f} s after its start, control "
            f"socket {control:.3f} s, the guest stood still for {still:.3f} s",
            flush=True,
        )


async def moved_on(operations: Operations, than: int) -> float:
    """When the guest has done more."""
    with trio.fail_after(MOST_S):
        while True:
            at, count = await operations()
            if count > than:
                return at
            await trio.sleep(0.001)


async def stopped(operations: Operations) -> tuple[float, int]:
    """Since when it has stood still, and after how many operations."""
    with trio.fail_after(MOST_S):
        since, before = await operations()
        while trio.current_time() - since < STOPPED_S:
            at, count = await operations()
            if count > before:
                since, before = at, count
            await trio.sleep(0.005)
    return since, before


async def kill(host: Host, operations: Operations) -> tuple[float, float, float]:
    """One kill, and the start after it, once the guest has come to a stop: so no page that came
    before is taken for an answer."""
    host.end(signal.SIGKILL)
    still, before = await stopped(operations)
    began, answers = trio.current_time(), 0.0

    async def start() -> None:
        nonlocal answers
        await host.start()
        answers = trio.current_time() - began

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start)
        first = await moved_on(operations, before)
    return first - began, answers, first - still


async def move(  # noqa: PLR0917
    guest: str, hosts: list[Host], memory: int, operations: Operations, killed: Killed, turn: int
) -> None:
    """One migration with its kills, until all is there."""
    source, destination = hosts
    bandwidth = int(memory / MOVE_S)
    migration = await source.call(
        "Migrate", name=VM, to=destination.address, bandwidth=bandwidth, mode="postcopy"
    )
    with trio.fail_after(MOST_S):
        while (await destination.status(VM))["phase"] != "postcopy":
            await trio.sleep(0.01)
    for role in KILLS if turn % 2 == 0 else reversed(KILLS):
        await trio.sleep(WORK_S)
        killed.add(guest, role, await kill(hosts[role == "destination"], operations))
    with trio.fail_after(MOVE_S + MOST_S):
        while (status := await source.status(VM))["phase"] != "drained" or "result" not in status:
            await trio.sleep(0.1)
    result = status["result"]
    assert (result["event"], result["recoveries"]) == ("completed", len(KILLS)), result
    assert result["migration"] == migration["migration"]
    for host in hosts:
        await host.call("Detach", name=VM)


async def qemu(folder: Path, options: argparse.Namespace, killed: Killed) -> None:
    """Its guest is moved on from QEMU to QEMU."""
    work = q.Workload(test_mb=options.memory // 2, rate=RATE, report_ms=10)
    config = guest_config(folder, memory=options.memory * MIB, workload=work,
                          accel=options.accel)  # fmt: skip
    async with q.Guest.open(folder) as guest, contextlib.AsyncExitStack() as stack:
        leaving = await stack.enter_async_context(started(guest, config, "q0"))
        await guest.ready()

        async def operations() -> tuple[float, int]:
            last = guest.reports[-1]
            return last.at, last.operations

        async with open_hosts(folder) as hosts:
            for turn in range(options.moves):
                there = started(guest, config, f"q{turn + 1}", incoming=True)
                arriving = await stack.enter_async_context(there)
                await guest.report()
                for host, vmm in zip(hosts, (leaving, arriving), strict=True):
                    await host.attach(VM, "qemu", vmm.process.qmp_path)
                await move("QEMU", hosts, options.memory * MIB, operations, killed, turn)
                sweep, report = await guest.sweep(), await guest.report()
                if sweep.bad or report.bad:
                    raise SystemExit(f"the guest found {sweep.bad} bad pages: {guest.bad}")
                leaving = arriving


async def process(folder: Path, options: argparse.Namespace, killed: Killed) -> None:
    """A new pair of VMMs for each move; its guest has filled its memory first."""
    words = ("--memory", f"{PROCESS_MIB}M", "--threads", "2", "--rate", "3000")
    async with open_hosts(folder) as hosts:
        for turn in range(options.moves):
            leaving = ProcessGuest(folder / f"p{turn}a", *words)
            arriving = ProcessGuest(folder / f"p{turn}b", *words, "--incoming")

            async def operations(arriving: ProcessGuest = arriving) -> tuple[float, int]:
                report = await trio.to_thread.run_sync(arriving.report)
                return trio.current_time(), int(report["ops"])

            try:
                with trio.fail_after(MOST_S):
                    while not (await trio.to_thread.run_sync(leaving.report))["sweeps"]:
                        pass
                for host, vmm in zip(hosts, (leaving, arriving), strict=True):
                    await host.attach(VM, "process", vmm.path)
                await move("process", hosts, PROCESS_MIB * MIB, operations, killed, turn)
                pages, bad = await trio.to_thread.run_sync(arriving.verify)
                if bad or not pages:
                    raise SystemExit(f"the guest found {bad} bad pages of {pages}")
            finally:
                leaving.kill()
                arriving.kill()


def rows_of(killed: Killed) -> list[table.Row]:
    rows = []
    for who, found in sorted(killed.items()):
        first, control, still = zip(*found, strict=True)
        name = f"{who} killed"
        rows += [
            table.single(f"{name}: start to first fault answered", "s", first, 1.0),
            table.single(f"{name}: the same, worst", "s", [max(first)], 1.0),
            table.single(f"{name}: start to control socket", "s", control),
            table.single(f"{name}: guest stood still", "s", still),
        ]
    return rows


def main() -> int:
    """The exit status: table.MISSED when a goal is missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--moves", type=int, default=5, help="of each guest")
    parser.add_argument("--memory", type=int, default=1024)
    parser.add_argument("--accel", default="tcg,thread=multi")
    options = parser.parse_args()
    about = table.machine(qemu=str(newest()), accel=options.accel, moves=options.moves,
                          memory_mib=options.memory)  # fmt: skip
    table.warm(2 * options.memory * MIB)
    killed = Killed()

    async def both(folder: Path) -> None:
        for guest in (qemu, process):
            (own := folder / guest.__name__).mkdir()
            await guest(own, options, killed)

    with tempfile.TemporaryDirectory(prefix="pcb-", dir="/dev/shm") as folder:
        trio.run(both, Path(folder))
    return table.finish("restart", rows_of(killed), about, killed)


if __name__ == "__main__":
    raise SystemExit(main())
