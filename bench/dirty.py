# SPDX-License-Identifier: Apache-2.0
"""What it costs to see which pages a running guest writes: hybrid migration's looks.

`dirty.py [--rounds N] [--mb MB] [--sparse-mb MB] [--looks N]`

A child process of dirty.c plays the VMM. Looks arm what they find, as between passes, but for "at
the stop", which is part of a blackout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import table
from engine_vs_floor import BENCH, ENGINE, HEADERS, compile_to

SOURCES = [BENCH / "dirty.c", ENGINE / "uffd_native.c", *sorted(HEADERS.glob("*.c"))]
SPARSE_DATA_MB = 256
Run = dict[str, Any]


def measure(program: Path, *arguments: int) -> Run:
    """One run: what the program printed."""
    command = [str(program), *map(str, arguments)]
    out = subprocess.run(command, check=True, capture_output=True, timeout=300)
    result: Run = json.loads(out.stdout)
    return result


def rows(dense: list[Run], small: list[Run], sparse: list[Run], gib: float) -> list[table.Row]:
    def each(measure: str, field: str, goal: float | None) -> table.Row:
        values = [run[field] for run in dense]
        middles = [statistics.median(v) if isinstance(v, list) else v for v in values]
        return table.single(measure, "ms/GiB", [v / gib for v in middles], goal)

    def middles(runs: list[Run]) -> list[float]:
        return [statistics.median(run["few_ms"]) for run in runs]

    spread = sparse[0]["mb"] / 1024
    return [
        each("scan for dirty pages, few (1000/GiB)", "few_ms", 5),
        each("scan for dirty pages, none", "clean_ms", 5),
        each("scan for dirty pages, a tenth of all", "tenth_ms", 5),
        each("scan for dirty pages, all", "all_ms", None),
        each("scan for dirty pages, a tenth, at the stop", "last_ms", 5),
        each("first look, arms all", "first_ms", None),
        each("end of tracking", "untrack_ms", None),
        table.noted(
            table.paired(
                f"a look at {spread:g} GiB with {SPARSE_DATA_MB} MiB of data", "ms",
                middles(sparse), middles(small), "dense", None,
            ),
            "dense: as much RAM as data",
        ),
        table.single(
            f"the same: what its {spread:g} GiB add", "ms/GiB",
            [(a - b) / spread for a, b in zip(middles(sparse), middles(small), strict=True)], 0.5,
        ),
        table.single(
            "the same: page tables made for tracking", "KiB",
            [float(run["page_tables_kb"]) for run in sparse], 64,
        ),
        table.single("a write to a tracked page", "ns", [float(run["fault_ns"]) for run in dense]),
    ]  # fmt: skip


def main() -> int:
    """The exit status: table.MISSED when a goal is missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mb", type=int, default=1024, help="of a guest that is all data")
    parser.add_argument("--sparse-mb", type=int, default=16384, help="of one that is mostly holes")
    parser.add_argument("--looks", type=int, default=5, help="of each kind in a round")
    options = parser.parse_args()
    about = table.machine(rounds=options.rounds, mb=options.mb)
    runs: dict[str, list[Run]] = {"dense": [], "small": [], "sparse": []}
    table.warm(options.mb << 20)
    with tempfile.TemporaryDirectory() as folder:
        program = compile_to(Path(folder) / "dirty", SOURCES)
        for _ in range(options.rounds):
            for name, mb, data in (
                ("dense", options.mb, options.mb),
                ("small", SPARSE_DATA_MB, SPARSE_DATA_MB),
                ("sparse", options.sparse_mb, SPARSE_DATA_MB),
            ):
                runs[name].append(measure(program, mb, data, options.looks) | {"mb": mb})
    found = rows(runs["dense"], runs["small"], runs["sparse"], options.mb / 1024)
    return table.finish("dirty", found, about, runs)


if __name__ == "__main__":
    raise SystemExit(main())
