# SPDX-License-Identifier: Apache-2.0
"""One QEMU guest that verifies its memory, moved by postcopyd and by QEMU's own postcopy in turns.

`qemu.py [--runs N] [--memory MiB] [--test-mb MiB] [--watch S] [--accel A]`

The guest is the same all the time, and so are machine type, RAM size and RAM backend: it is moved
from QEMU to QEMU, one way and then the other, and checks all of its memory after each move. A bad
page ends everything: a fast wrong answer counts as none. What is measured: docs in README.md here.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import math
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import table
import trio
from guests import qemu as q
from movers import (
    MIB,
    Daemons,
    Move,
    Mover,
    Qemu,
    devices_only,
    guest_config,
    postcopy,
    started,
    unmoved,
)
from qemus import newest

from postcopyd.demo.hosts import open_hosts

USUAL_S = 2.0
"""Its speed is compared with the mean of so long before the migration was asked for."""
SETTLE_S = 1.0
"""After a check of its memory the guest works as usual again within less."""
BACK, BACK_S = 0.95, 0.5
"""It is back when it has kept this share of its speed for so long."""
MOST_S = 10.0
REPORT_MS = 10
SHOWN_S = (-4.0, 6.0)


@dataclass
class Figures:
    """One move as the guest felt it."""

    blackout_ms: float
    gap_ms: float
    """Longest time without a sign of progress from the guest, by this host's clock."""
    operation_ms: float
    """Longest single operation, by the guest's own clock, which stands still in the blackout."""
    lost_s: float
    lost_fixed_s: float
    """The same up to a fixed time, back or not: shows the noise of a shared machine."""
    back_s: float
    before_s: float
    """From the request to the stop; a hybrid's passes are in it."""
    lost_before_s: float
    drained_s: float
    usual: float
    """Operations per second."""
    after: float
    """Speed once all is over, as a share of the usual."""


def gap_ms(reports: list[q.Report], begin: float, end: float) -> float:
    """The longest time in [begin, end] between two reports of which the second shows progress, by
    their arrival here. It is never less than REPORT_MS."""
    longest, last = 0.0, reports[0]
    for report in reports[1:]:
        if report.operations > last.operations:
            if report.at > begin and last.at < end:
                longest = max(longest, report.at - last.at)
            last = report
    return longest * 1e3


def figures(
    reports: list[q.Report], move: Move, watch_s: float
) -> tuple[Figures, list[list[float]]]:
    """Figures, and the guest's speed over time as [seconds from the stop, share of the usual]."""
    times = [report.at for report in reports]

    def done(at: float) -> float:
        """Operations up to then: between two reports as if they had come evenly."""
        i = bisect.bisect_left(times, at)
        if i == 0 or i == len(times):
            return float(reports[min(i, len(times) - 1)].operations)
        a, b = reports[i - 1], reports[i]
        share = (at - a.at) / (b.at - a.at) if b.at > a.at else 1.0
        return float(a.operations + share * (b.operations - a.operations))

    usual = (done(move.begin) - done(move.begin - USUAL_S)) / USUAL_S

    def lost(until: float, since: float = move.stop) -> float:
        return until - since - (done(until) - done(since)) / usual

    back = move.stop + MOST_S
    for at in times:
        if move.resume <= at < back and done(at + BACK_S) - done(at) >= BACK * usual * BACK_S:
            back = at
            break
    longest = max((r.gap_us for r in reports if move.stop <= r.at <= back), default=0)
    step, curve = 0.02, []
    at = math.ceil(max(SHOWN_S[0], move.begin - USUAL_S - move.stop) / step) * step
    while at < min(SHOWN_S[1], times[-1] - move.stop):
        share = (done(move.stop + at + step) - done(move.stop + at)) / step / usual
        curve.append([round(at + step / 2, 3), round(share, 4)])
        at += step
    found = Figures(
        (move.resume - move.stop) * 1e3, gap_ms(reports, move.stop, back), longest / 1e3,
        lost(back), lost(move.stop + watch_s), back - move.stop, move.stop - move.begin,
        lost(move.stop, move.begin), move.drained - move.stop, usual,
        (done(times[-1]) - done(times[-1] - SETTLE_S)) / SETTLE_S / usual,
    )  # fmt: skip
    return found, curve


async def watched(
    guest: q.Guest, moved: Callable[[], Awaitable[Move]], watch_s: float
) -> dict[str, Any]:
    """One move, and the guest followed until it works as usual again, for at least `watch_s`; its
    memory checked."""
    await trio.sleep(SETTLE_S + USUAL_S)
    first = len(guest.reports) - int((USUAL_S + 1) * 1000 / REPORT_MS)
    move = await moved()
    while True:
        await trio.sleep(0.25)
        reports = guest.reports[max(first, 0) :]
        found, curve = figures(reports, move, watch_s)
        since = trio.current_time() - move.stop
        if since > MOST_S or since > max(found.back_s + 2 * BACK_S, watch_s + BACK_S):
            break
    sweep, report = await guest.sweep(), await guest.report()
    if sweep.bad or report.bad:
        raise SystemExit(f"the guest found {sweep.bad} bad pages: {guest.bad}")
    return {**asdict(found), "verified_pages": sweep.pages, "sent": move.sent,
            "pages": move.pages, "about": move.about, "curve": curve}  # fmt: skip


class Moving:
    """One guest on its way from QEMU to QEMU, each with a new RAM file. `start` it; close it."""

    def __init__(self, folder: Path, guest: q.Guest, config: q.GuestConfig, watch_s: float) -> None:
        self._folder, self._guest, self._config = folder, guest, config
        self._watch_s = watch_s
        self._number = 0
        self._here = contextlib.AsyncExitStack()

    async def start(self) -> None:
        self._ram = self._folder / "ram0"
        self._leaving = await self._launch(self._here, self._ram)
        await self._guest.ready()

    async def move(self, way: str, mover: Mover, *, same_ram: bool = False) -> dict[str, Any]:
        """One move: its figures, and where the guest is then is where it leaves next."""
        self._number += 1
        ram = self._ram if same_ram else self._folder / f"ram{self._number}"
        there = contextlib.AsyncExitStack()
        arriving = await self._launch(there, ram, incoming=True)
        moved = partial(mover, self._leaving, arriving)
        found = await watched(self._guest, moved, self._watch_s)
        await self._here.aclose()
        if ram != self._ram:
            self._ram.unlink(missing_ok=True)  # there is none of private RAM
        self._here, self._leaving, self._ram = there, arriving, ram
        show(way, found)
        return found

    async def stay(self) -> dict[str, Any]:
        """The same figures of the guest unmoved."""
        found = await watched(self._guest, unmoved, self._watch_s)
        show("unmoved", found)
        return found

    async def aclose(self) -> None:
        await self._here.aclose()

    async def _launch(self, stack: contextlib.AsyncExitStack, ram: Path, **more: Any) -> Qemu:
        return await stack.enter_async_context(
            started(self._guest, self._config, f"q{self._number}", mem_paths=(str(ram),), **more)
        )


def show(way: str, found: dict[str, Any]) -> None:
    print(
        f"{way:7} blackout {found['blackout_ms']:.1f} ms, gap {found['gap_ms']:.0f} ms, operation "
        f"{found['operation_ms']:.0f} ms, {found['before_s']:.2f} s before the stop (lost "
        f"{found['lost_before_s']:.2f}), lost {found['lost_s']:.2f} s (in a fixed "
        f"time {found['lost_fixed_s']:.2f}), back {found['back_s']:.2f} s, drained "
        f"{found['drained_s']:.2f} s, usual {found['usual']:.0f}/s, after {found['after']:.2f}",
        flush=True,
    )


async def run(folder: Path, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    work = q.Workload(test_mb=options.test_mb, report_ms=REPORT_MS)
    config = guest_config(folder, memory=options.memory * MIB, workload=work, accel=options.accel)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "qemu": [], "devices": []}
    async with (
        open_hosts(folder) as hosts,
        q.Guest.open(folder) as guest,
        contextlib.aclosing(Moving(folder, guest, config, options.watch)) as moving,
    ):
        movers: dict[str, Mover] = {
            "ours": Daemons(hosts), "qemu": postcopy(), "devices": devices_only(),
        }  # fmt: skip
        await moving.start()
        for turn in range(options.runs):
            # Each as often after the one as after the other: QEMU leaves no holes behind.
            ways = ("ours", "qemu") if turn % 2 == 0 else ("qemu", "ours", "devices")
            for way in ways:
                found = await moving.move(way, movers[way], same_ram=way == "devices")
                runs[way].append(found)
    return runs


def rows_of(runs: dict[str, list[dict[str, Any]]]) -> list[table.Row]:
    def both(
        measure: str, unit: str, get: Callable[[dict[str, Any]], float], goal: float | None = None
    ) -> table.Row:
        ours, theirs = ([get(run) for run in runs[way]] for way in ("ours", "qemu"))
        return table.paired(measure, unit, ours, theirs, "QEMU", goal)

    ours, least = runs["ours"], runs["devices"]
    rows = [
        table.single("blackout", "ms", [run["blackout_ms"] for run in ours], 10.0),
        both("blackout", "ms", lambda run: run["blackout_ms"], 2.0),
        both("longest gap of the guest", "ms", lambda run: run["gap_ms"], 0.2),
        table.single("longest gap, only devices moved", "ms", [r["gap_ms"] for r in least]),
        both("longest operation", "ms", lambda run: run["operation_ms"]),
        both("lost guest work", "s", lambda run: run["lost_s"], 0.25),
        both("lost in a fixed time", "s", lambda run: run["lost_fixed_s"]),
        table.single("lost guest work, only devices moved", "s", [r["lost_s"] for r in least]),
        table.single("speed after / before", "", [run["after"] for run in ours], 0.95,
                     more_is_better=True),
        both("back to 95 %", "s", lambda run: run["back_s"]),
        both("drained", "s", lambda run: run["drained_s"]),
        table.single("bytes on the wire / non-zero pages", "",
                     [run["sent"] / (run["pages"] * 4096) for run in ours], 1.01),
        both("bytes on the wire", "MiB", lambda run: run["sent"] / MIB),
    ]  # fmt: skip
    for name in ("p50", "p99"):
        values = [run["about"]["faults"][f"{name}Us"] for run in ours]
        rows.append(table.single(f"urgent {name}, daemon's own figure", "us", values))
    for key in ("postcopy-latency", "postcopy-blocktime"):
        if all(key in run["about"] for run in runs["qemu"]):
            values = [run["about"][key] / 1e3 for run in runs["qemu"]]
            rows.append(table.single(f"QEMU's {key}", "", values))
    return rows


def measured(
    name: str,
    does: str,
    runs: int,
    run: Callable[[Path, argparse.Namespace], Awaitable[Any]],
    rows_of: Callable[[Any], list[table.Row]],
) -> int:
    """Runs a benchmark that moves a QEMU guest `--runs` times, in a folder of its own. Returns the
    exit status: table.MISSED when a goal is missed."""
    parser = argparse.ArgumentParser(description=does.splitlines()[0])
    parser.add_argument("--runs", type=int, default=runs, help="an even number")
    parser.add_argument("--memory", type=int, default=1024)
    parser.add_argument("--test-mb", type=int, default=512)
    parser.add_argument("--watch", type=float, default=5.0, help="s after the stop, at least")
    parser.add_argument("--accel", default="tcg,thread=multi")
    options = parser.parse_args()
    about = table.machine(
        qemu=str(newest()), accel=options.accel, runs=options.runs,
        memory_mib=options.memory, writes_mib=options.test_mb, watched_s=options.watch,
    )  # fmt: skip
    table.warm(4 * options.memory * MIB)
    with tempfile.TemporaryDirectory(prefix="pcb-", dir="/dev/shm") as folder:
        found = trio.run(run, Path(folder), options)
    return table.finish(name, rows_of(found), about, found)


if __name__ == "__main__":
    raise SystemExit(measured("qemu", str(__doc__), 8, run, rows_of))
