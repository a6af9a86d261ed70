# SPDX-License-Identifier: Apache-2.0
"""The native engine beside the floor program, in turns on one machine.

`engine_vs_floor.py [--rounds N] [--mb MB] [--run PAGES] [--only WORDS] [--reference FLOOR.c]`

--run is for the floor only: the engine's push frames are its own (RUN_BYTES in order.h, 16
pages, which is also the default here). With --only, the result written has no other workloads.

The rows of TLS have the engine without it beside them, those of private memory the engine with
shared memory, and not the floor.

With --reference another floor program, with the same arguments and JSON, is measured beside ours
and nothing else is: is ours as low as that one?
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import table

BENCH = Path(__file__).parent
ENGINE = table.ROOT / "postcopyd"
FLOOR = [BENCH / "floor.c"]
HEADERS = ENGINE / "native"
SOURCES = [BENCH / "engine_bench.c", ENGINE / "uffd_native.c", *sorted(HEADERS.glob("*.c"))]
THREADS = (1, 2, 4, 8, 16, 32)
CONNECTIONS = (1, 2, 4)
Run = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """One figure of one workload; the goal is the ratio engine / floor."""

    name: str
    unit: str
    field: str
    goal: float | None
    more_is_better: bool = False


@dataclass(frozen=True)
class Workload:
    """Arguments of both programs: `floor MB THREADS RUN SHM PUSH`."""

    name: str
    threads: int
    push: int
    measures: tuple[Measure, ...]
    share: float = 1.0
    """Of --mb: with threads, each fault costs; without, time is needed to see a rate."""
    tls: bool = False
    """The engine with TLS, beside the engine without."""
    private: bool = False
    """The engine with private memory at both ends, beside the engine with memfds."""

    @property
    def against(self) -> str:
        return "plain" if self.tls else "shared" if self.private else ""


def workloads() -> list[Workload]:
    """What there are goals for and two processes can show."""
    latency = tuple(
        Measure(f"urgent {p}, nothing else running", "us", f"{p}_us", 1.25) for p in ("p50", "p99")
    )
    beside = [
        tuple(
            Measure(f"urgent {p} beside the push{more}", "us", f"{p}_us", goal)
            for p, goal in (("p50", 1.25), ("p99", 1.5))
        )
        for more in ("", ", 2 threads")
    ]
    rate = "push rate, 1 connection, {} asking"
    busy = Measure(rate.format("1 thread"), "GiB/s", "GB/s", 0.9, True)
    return [
        *(
            Workload(
                f"faults {n}", n, 0,
                (*(latency if n == 1 else ()),
                 Measure(f"faults/s, {n} thread{'s' * (n > 1)}", "1/s", "faults", 0.9, True)),
                0.25,
            )
            for n in THREADS
        ),
        Workload("push beside 1", 1, 1, (*beside[0], busy)),
        Workload("push beside 2", 2, 1, beside[1]),
        *(
            Workload(f"push {n}", 0, n, (Measure(f"push rate, {n} connection{'s' * (n > 1)}",
                     "GiB/s", "GB/s", 0.9 if n == 1 else None, True),), 2.0)
            for n in CONNECTIONS
        ),
        Workload(
            "private faults", 1, 0,
            tuple(Measure(f"urgent {p}, private memory", "us", f"{p}_us", 1.15)
                  for p in ("p50", "p99")),
            0.25, private=True,
        ),
        Workload(
            "private push", 0, 1,
            (Measure("push rate, private memory, 1 connection", "GiB/s", "GB/s", 0.87, True),),
            2.0, private=True,
        ),
        Workload(
            "TLS faults", 1, 0, (Measure("urgent p50 with TLS", "us", "p50_us", 1.3),), 0.25, True,
        ),
        Workload(
            "TLS push", 0, 1,
            (Measure("push rate with TLS, 1 connection", "GiB/s", "GB/s", 0.7, True),), 2.0, True,
        ),
    ]  # fmt: skip


def compile_to(program: Path, sources: list[Path]) -> Path:
    """Compiles C sources; raises CalledProcessError."""
    words = [os.environ.get("CC", "cc"), "-O2", "-std=gnu11", "-w", "-pthread", f"-I{HEADERS}"]
    subprocess.run(
        [*words, *map(str, sources), "-lssl", "-lcrypto", "-o", str(program)], check=True
    )
    return program


def measure(
    program: tuple[str, ...], mb: int, run: int, workload: Workload, *, shared: bool
) -> Run:
    """One run: what the program printed, and its faults per second."""
    arguments = [int(mb * workload.share), workload.threads, run, int(shared), workload.push]
    command = [*program, *map(str, arguments)]
    out = subprocess.run(command, check=True, capture_output=True, timeout=300)
    result: Run = json.loads(out.stdout)
    result["faults"] = result["stalls"] / result["guest_s"] if result["guest_s"] else 0.0
    return result


def rows_of(workload: Workload, pairs: list[list[Run]], against: str) -> list[table.Row]:
    return [
        table.paired(
            m.name, m.unit, [ours[m.field] for ours, _ in pairs],
            [theirs[m.field] for _, theirs in pairs], workload.against or against, m.goal,
            more_is_better=m.more_is_better,
        )
        for m in workload.measures
    ]  # fmt: skip


def growth(runs: dict[str, list[list[Run]]]) -> list[table.Row]:
    """What the engine gains or loses by itself: more threads, more connections."""
    rows = []
    for name, kinds, field, goal in (
        ("faults/s with more threads, least of", "faults", "faults", 0.95),
        ("push rate with more connections, least of", "push", "GB/s", 0.95),
    ):
        counts = THREADS if kinds == "faults" else CONNECTIONS
        if any(f"{kinds} {n}" not in runs for n in counts):
            continue
        figures = [[ours[field] for ours, _ in runs[f"{kinds} {n}"]] for n in counts]
        middles = [statistics.median(each) for each in figures]
        worst = min(range(1, len(counts)), key=lambda i: middles[i] / max(middles[:i]))
        best = max(range(worst), key=middles.__getitem__)
        row = table.paired(
            f"{name} {', '.join(map(str, counts[1:]))}", "GiB/s" if kinds == "push" else "1/s",
            figures[worst], figures[best], "fewer", goal, more_is_better=True,
        )  # fmt: skip
        rows.append(table.noted(row, f"{counts[worst]} against {counts[best]}"))
    return rows


def main() -> int:
    """The exit status: table.MISSED when a goal is missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--run", type=int, default=16, help="pages in a push frame of the floor")
    parser.add_argument("--only", default="", help="workloads whose name has this in it")
    parser.add_argument("--reference", type=Path, help="another floor.c, to hold ours against")
    options = parser.parse_args()
    against = "given" if options.reference else "floor"
    about = table.machine(rounds=options.rounds, mb=options.mb)
    runs: dict[str, list[list[Run]]] = defaultdict(list)
    rows: list[table.Row] = []
    chosen = [w for w in workloads() if options.only in w.name]
    if options.reference:
        chosen = [w for w in chosen if w.push <= 1 and not w.against]
    table.warm(4 * options.mb << 20)
    with tempfile.TemporaryDirectory() as folder:
        ours = compile_to(Path(folder) / "ours", FLOOR if options.reference else SOURCES)
        theirs = compile_to(
            Path(folder) / "theirs", [options.reference] if options.reference else FLOOR
        )
        for turn in range(options.rounds):
            for workload in chosen:
                ways: list[tuple[tuple[str, ...], bool]] = [((str(ours),), not workload.private)]
                ways.append(((str(ours if workload.against else theirs),), True))
                if workload.tls:
                    ways[0] = ((str(ours), "tls"), True)
                found = {
                    way: measure(way[0], options.mb, options.run, workload, shared=way[1])
                    for way in (ways if turn % 2 else ways[::-1])
                }
                runs[workload.name].append([found[way] for way in ways])
    for workload in chosen:
        rows += rows_of(workload, runs[workload.name], against)
    if options.reference:
        table.show(rows, about)
        return 0
    return table.finish("engine", rows + growth(runs), about, runs)


if __name__ == "__main__":
    raise SystemExit(main())
