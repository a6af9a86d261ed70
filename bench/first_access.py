# SPDX-License-Identifier: Apache-2.0
"""What a guest waits at the first access to a page that came in a pass, after it runs here.

`first_access.py [--rounds N] [--mb MB]`

The engine places no page by itself here (no `pc_dest_settle`), as for a guest so large that this
takes longer than the guest can wait.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import table
from dirty import Run, measure
from engine_vs_floor import BENCH, ENGINE, HEADERS, compile_to

SOURCES = [BENCH / "first_access.c", ENGINE / "uffd_native.c", *sorted(HEADERS.glob("*.c"))]
GOAL_US = 5.0  # in the median
MEMORY = {"file": 1, "private memory": 0}


def rows(kind: str, runs: list[Run]) -> list[table.Row]:
    gib = runs[0]["mb"] / 1024
    return [
        table.single(f"first access p50, {kind}", "us", [r["p50_us"] for r in runs], GOAL_US),
        table.single(f"first access p99, {kind}", "us", [r["p99_us"] for r in runs]),
        table.single(f"first accesses that wait, {kind}", "of 1", [r["waited"] for r in runs]),
        table.single(
            f"CPU of all first accesses, {kind}", "s/GiB", [r["cpu_s"] / gib for r in runs]
        ),
    ]


def main() -> int:
    """The exit status: table.MISSED when a goal is missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mb", type=int, default=256)
    options = parser.parse_args()
    about = table.machine(rounds=options.rounds, mb=options.mb)
    runs: dict[str, list[Run]] = {kind: [] for kind in MEMORY}
    table.warm(options.mb << 21)
    with tempfile.TemporaryDirectory() as folder:
        program = compile_to(Path(folder) / "first_access", SOURCES)
        for _ in range(options.rounds):
            for kind, shared in MEMORY.items():
                runs[kind].append(measure(program, options.mb, 1, shared, 0))
    found = [row for kind, each in runs.items() for row in rows(kind, each)]
    return table.finish("first_access", found, about, runs)


if __name__ == "__main__":
    raise SystemExit(main())
