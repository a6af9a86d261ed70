# SPDX-License-Identifier: Apache-2.0
"""Two QEMU guests that verify their memory, alike but for it: one has private RAM (`-m` alone), one
a shared file. postcopyd moves them by turns, each by postcopy and by hybrid migration.

`private.py [--runs N] [--memory MiB] [--test-mb MiB] [--watch S] [--accel A]`

While one is moved, the other rests. What of it is measured is qemu.py's.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import table
from guests import qemu as q
from movers import MIB, Daemons, guest_config
from qemu import REPORT_MS, Moving, measured

from postcopyd.demo.hosts import open_hosts

Run = dict[str, Any]
Runs = dict[str, dict[str, list[Run]]]
"""By mode and kind of RAM."""

KINDS = {"private": "plain", "file": "file"}
GOAL = 1.15


async def run(folder: Path, options: argparse.Namespace) -> Runs:
    work = q.Workload(test_mb=options.test_mb, report_ms=REPORT_MS)
    config = {"memory": options.memory * MIB, "workload": work, "accel": options.accel}
    runs: Runs = {mode: {kind: [] for kind in KINDS} for mode in ("postcopy", "hybrid")}
    async with open_hosts(folder) as hosts, contextlib.AsyncExitStack() as stack:
        guests = {}
        for kind, ram_kind in KINDS.items():
            (own := folder / kind).mkdir()
            guest = await stack.enter_async_context(q.Guest.open(own))
            made = guest_config(own, ram_kind=ram_kind, **config)
            moving = Moving(own, guest, made, options.watch)
            await stack.enter_async_context(contextlib.aclosing(moving))
            await moving.start()
            await guest.rate(0)
            guests[kind] = guest, moving
        for turn in range(options.runs):
            for mode, found in runs.items():
                for kind in sorted(KINDS, reverse=turn % 2 == 0):
                    guest, moving = guests[kind]
                    await guest.rate(-1)
                    mover = Daemons(hosts, mode=mode)
                    found[kind].append(await moving.move(f"{kind} {mode}", mover))
                    await guest.rate(0)
    return runs


def urgent(name: str, one: Run) -> float:
    return float(one["about"]["faults"][f"{name}Us"])


def rows_of(runs: Runs) -> list[table.Row]:
    rows: list[table.Row] = []

    def both(
        mode: str, measure: str, unit: str, get: Callable[[Run], float],
        goal: float | None = GOAL, *, more_is_better: bool = False,
    ) -> None:  # fmt: skip
        ours, theirs = ([get(one) for one in runs[mode][kind]] for kind in KINDS)
        rows.append(table.paired(f"{mode}: {measure}", unit, ours, theirs, "file", goal,
                                 more_is_better=more_is_better))  # fmt: skip

    for mode in runs:
        both(mode, "blackout", "ms", lambda one: one["blackout_ms"])
        both(mode, "lost guest work", "s", lambda one: one["lost_s"])
        if mode == "hybrid":
            both(mode, "lost work, passes and all", "s",
                 lambda one: one["lost_before_s"] + one["lost_s"])  # fmt: skip
            both(mode, "the guest's work from request to stop", "1/s",
                 lambda one: one["usual"] * (1 - one["lost_before_s"] / one["before_s"]),
                 0.87, more_is_better=True)  # fmt: skip
        for name in ("p50", "p99"):
            both(mode, f"urgent {name}, daemon's own figure", "us", partial(urgent, name))
        if mode == "postcopy":
            both(mode, "push rate, stop to drained", "MiB/s",
                 lambda one: one["sent"] / MIB / one["drained_s"], 0.87,
                 more_is_better=True)  # fmt: skip
        both(mode, "the guest's usual work", "1/s", lambda one: one["usual"], None)
    return rows


if __name__ == "__main__":
    raise SystemExit(measured("private", str(__doc__), 6, run, rows_of))
