# SPDX-License-Identifier: Apache-2.0
"""Compares the native engine with the floor program, in turns on one machine, and prints ratios.

`engine_vs_floor.py FLOOR.c [--rounds N] [--mb MB]`. Absolute figures wander from minute to minute;
the median of ratios of neighbouring runs does not. `spread` is the middle half of these ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ENGINE = Path(__file__).parents[1] / "postcopyd"
SOURCES = [
    Path(__file__).with_name("engine_bench.c"),
    *(ENGINE / f"{name}.c" for name in ("engine", "uffd_native", "source_native")),
]


@dataclass(frozen=True)
class Measure:
    """One figure of one workload; the goal is the ratio engine / floor."""

    name: str
    field: str
    goal: float
    more_is_better: bool = False


@dataclass(frozen=True)
class Workload:
    """Arguments of both programs: `floor MB THREADS RUN SHM PUSH`."""

    name: str
    threads: int
    push: int
    measures: tuple[Measure, ...]


def workloads() -> list[Workload]:
    """What docs/PERFORMANCE.md sets goals for and two processes can show."""
    rate = Measure("faults/s", "faults", 0.9, more_is_better=True)
    urgent = (Measure("urgent p50", "p50_us", 1.25), Measure("urgent p99", "p99_us", 1.25), rate)
    push = (
        Measure("push rate", "GB/s", 0.9, more_is_better=True),
        Measure("p50 beside push", "p50_us", 1.25),
        Measure("p99 beside push", "p99_us", 1.5),
    )
    return [
        Workload("urgent only, 1 thread", 1, 0, urgent),
        *(Workload(f"urgent only, {n} threads", n, 0, (rate,)) for n in (2, 4, 8, 16, 32)),
        Workload("push, 1 thread", 1, 1, push),
        Workload("push, 2 threads", 2, 1, push),
    ]


def compile_to(program: Path, sources: list[Path]) -> None:
    """Compiles C sources; raises CalledProcessError."""
    subprocess.run(
        [
            os.environ.get("CC", "cc"),
            "-O2",
            "-std=gnu11",
            "-w",
            "-pthread",
            f"-I{ENGINE}",
            *map(str, sources),
            "-o",
            str(program),
        ],
        check=True,
    )


def measure(program: Path, mb: int, run: int, workload: Workload) -> dict[str, float]:
    """One run: what the program printed, and its faults per second."""
    arguments = [mb, workload.threads, run, 1, workload.push]
    command = [program, *map(str, arguments)]
    out = subprocess.run(command, check=True, capture_output=True, timeout=120)
    result: dict[str, float] = json.loads(out.stdout)
    result["faults"] = result["stalls"] / result["guest_s"]
    return result


def main() -> int:
    """Exit status 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("floor", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--run", type=int, default=16, help="pages in a push frame of the floor")
    parser.add_argument("--only", default="", help="workloads whose name has this in it")
    options = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        floor, engine = Path(folder) / "floor", Path(folder) / "engine"
        compile_to(floor, [options.floor])
        compile_to(engine, SOURCES)
        for workload in workloads():
            if options.only not in workload.name:
                continue
            runs = [
                [measure(program, options.mb, options.run, workload) for program in (floor, engine)]
                for _ in range(options.rounds)
            ]
            for m in workload.measures:
                ratios = sorted(e[m.field] / max(f[m.field], 1e-9) for f, e in runs)
                middle = statistics.median(ratios)
                good = middle >= m.goal if m.more_is_better else middle <= m.goal
                missed += not good
                figures = [statistics.median(pair[i][m.field] for pair in runs) for i in (0, 1)]
                low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
                print(
                    f"{workload.name:24} {m.name:16} floor {figures[0]:10.2f} engine "
                    f"{figures[1]:10.2f} ratio {middle:5.2f} spread {low:.2f}-{high:.2f} "
                    f"goal {m.goal} {'' if good else 'MISSED'}",
                    flush=True,
                )
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
