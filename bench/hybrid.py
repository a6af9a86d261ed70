# SPDX-License-Identifier: Apache-2.0
"""One QEMU guest that verifies its memory, moved by turns by hybrid migration, by postcopy, by
QEMU's own hybrid (a precopy for as long as our passes took, then its postcopy), and with nothing to
move but the devices.

`hybrid.py [--runs N] [--memory MiB] [--test-mb MiB] [--rate N] [--watch S] [--skip ...]`

It writes less than the link carries in some moves (quiet), and as fast as it can in others (busy).
How it is moved and what of it is measured is qemu.py's.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import table
import trio
from guests import qemu as q
from movers import MIB, Daemons, Mover, devices_only, guest_config, postcopy
from qemu import REPORT_MS, Moving
from qemus import newest

from postcopyd.demo.hosts import open_hosts

Run = dict[str, Any]
Runs = dict[str, dict[str, list[Run]]]
"""By guest and way."""


def passes_s(run: Run) -> float:
    return float(sum(one["ms"] for one in run["about"]["passes"])) / 1e3


async def run(folder: Path, options: argparse.Namespace) -> Runs:
    work = q.Workload(test_mb=options.test_mb, report_ms=REPORT_MS)
    config = guest_config(folder, memory=options.memory * MIB, workload=work, accel=options.accel)
    ways = ("unmoved", "hybrid", "postcopy", "qemu", "devices")
    runs: Runs = {guest: {way: [] for way in ways} for guest in ("quiet", "busy")}
    async with (
        open_hosts(folder) as hosts,
        q.Guest.open(folder) as guest,
        contextlib.aclosing(Moving(folder, guest, config, options.watch)) as moving,
    ):
        await moving.start()
        for turn in range(options.runs):
            for kind, rate in (("quiet", options.rate), ("busy", -1)):
                await guest.rate(rate)
                found = runs[kind]
                if kind == "quiet":
                    found["unmoved"].append(await moving.stay())
                # QEMU leaves no holes behind: each comes after the one as often as after the other.
                last = ("qemu", "postcopy") if turn % 2 == 0 else ("postcopy", "qemu")
                for way in ("hybrid", *last, "devices"):
                    if any({*words.split()} <= {kind, way} for words in options.skip):
                        continue
                    mover: Mover = (
                        devices_only() if way == "devices"
                        else postcopy(passes_s(found["hybrid"][-1])) if way == "qemu"
                        else Daemons(hosts, mode=way)
                    )  # fmt: skip
                    same_ram = way == "devices"
                    found[way].append(await moving.move(f"{kind} {way}", mover, same_ram=same_ram))
    return runs


def rows_of_guest(kind: str, runs: dict[str, list[Run]]) -> list[table.Row]:
    """What is measured of both guests."""
    busy = kind == "busy"
    rows: list[table.Row] = []

    def single(
        measure: str, unit: str, get: Callable[[Run], float], goal: float | None = None
    ) -> None:
        values = [get(one) for one in runs["hybrid"]]
        rows.append(table.single(f"{kind}: {measure}", unit, values, goal))

    def both(
        way: str, measure: str, unit: str, get: Callable[[Run], float], goal: float | None = None
    ) -> None:
        ours, theirs = ([get(one) for one in runs[which]] for which in ("hybrid", way))
        against = {"qemu": "QEMU", "postcopy": "postc."}[way]
        if theirs:
            rows.append(table.paired(f"{kind}: {measure}", unit, ours, theirs, against, goal))

    def lost(one: Run) -> float:
        return float(one["lost_s"])

    def lost_in_all(one: Run) -> float:
        return float(one["lost_before_s"] + one["lost_s"])

    def speed(one: Run) -> float:
        return float(1 - one["lost_before_s"] / one["before_s"])

    def per_page(get: Callable[[Run], float]) -> Callable[[Run], float]:
        return lambda one: get(one["about"]) / float(one["pages"])

    single("blackout", "ms", lambda one: one["blackout_ms"], 10.0)
    both("qemu", "blackout", "ms", lambda one: one["blackout_ms"], 2.0)
    both("qemu", "longest gap of the guest", "ms", lambda one: one["gap_ms"])
    both("postcopy", "lost work from the stop on", "s", lost, 1.0 if busy else None)
    both("qemu", "lost work from the stop on", "s", lost, 1 / 3 if busy else None)
    if least := runs["devices"]:
        values = [lost(one) for one in least]
        rows.append(table.single(f"{kind}: lost work, only devices moved", "s", values))
    both("postcopy", "lost work, passes and all", "s", lost_in_all)
    both("qemu", "lost work, passes and all", "s", lost_in_all)
    both("qemu", "request to stop", "s", lambda one: one["before_s"])
    both("qemu", "speed from request to stop / before", "", speed)
    single("tracking's slowdown, by the daemon", "",
           lambda one: one["about"]["tracking"]["slowdown"])  # fmt: skip
    single("passes", "", lambda one: len(one["about"]["passes"]))
    single("left after them / non-zero pages", "",
           per_page(lambda about: about["passes"][-1]["dirtyPages"]))  # fmt: skip
    urgent = per_page(lambda about: about["memory"]["urgentPages"])
    single("urgent pages / non-zero pages", "", urgent, None if busy else 0.01)
    both("postcopy", "drained, from the stop", "s", lambda one: one["drained_s"])
    both("qemu", "bytes on the wire", "MiB", lambda one: one["sent"] / MIB)
    return rows


def rows_of(runs: Runs) -> list[table.Row]:
    quiet = runs["quiet"]
    above = [
        moved["lost_fixed_s"] - alone["lost_fixed_s"]
        for moved, alone in zip(quiet["hybrid"], quiet["unmoved"], strict=True)
    ]
    return [
        table.single("quiet: lost work above that unmoved", "s", above, 0.1),
        *rows_of_guest("quiet", quiet),
        *rows_of_guest("busy", runs["busy"]),
    ]


def main() -> int:
    """The exit status: table.MISSED when a goal is missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--runs", type=int, default=6, help="an even number")
    parser.add_argument("--memory", type=int, default=1024)
    parser.add_argument("--test-mb", type=int, default=512)
    parser.add_argument("--rate", type=int, default=2000, help="operations a second when quiet")
    parser.add_argument("--watch", type=float, default=5.0, help="s after the stop, at least")
    parser.add_argument("--skip", action="append", default=[], help='"devices", "quiet postcopy"')
    parser.add_argument("--accel", default="tcg,thread=multi")
    options = parser.parse_args()
    about = table.machine(
        qemu=str(newest()), accel=options.accel, runs=options.runs,
        memory_mib=options.memory, writes_mib=options.test_mb, quiet_rate=options.rate,
        watched_s=options.watch,
    )  # fmt: skip
    table.warm(4 * options.memory * MIB)
    with tempfile.TemporaryDirectory(prefix="pcb-", dir="/dev/shm") as folder:
        runs = trio.run(run, Path(folder), options)
    return table.finish("hybrid", rows_of(runs), about, runs)


if __name__ == "__main__":
    raise SystemExit(main())
