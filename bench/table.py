# SPDX-License-Identifier: Apache-2.0
"""What every benchmark here says: rows with a goal, as a table and as JSON with the machine.

Owns the form of a result. Knows nothing of what is measured or how.

`table.py NAME...` prints the rows of several results, results/NAME.json, one after another.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Guests and daemons are those of the tests.
sys.path.append(str(ROOT / "tests"))
RESULTS = Path(os.environ.get("BENCH_RESULTS") or ROOT / "bench/results").absolute()

MISSED = 3
"""Exit status, apart from that of a benchmark that failed."""


@dataclass(frozen=True)
class Row:
    """One measure beside what it is compared with. `goal` bounds `ratio`, or `ours` where there is
    nothing to compare with; None: shown for information."""

    measure: str
    unit: str
    ours: float
    reference: float | None = None
    against: str = ""
    """What the reference is: "floor", "QEMU", ..."""
    ratio: float | None = None
    low: float | None = None
    """`low` to `high` is the middle half of the runs' ratios (of the runs' values without one)."""
    high: float | None = None
    goal: float | None = None
    more_is_better: bool = False
    runs: int = 1
    note: str = ""

    @property
    def met(self) -> bool | None:
        value = self.ours if self.ratio is None else self.ratio
        if self.goal is None:
            return None
        return value >= self.goal if self.more_is_better else value <= self.goal


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles, by rank: of three runs the least and the most."""
    ordered = sorted(values)
    cut = len(ordered) // 4
    return ordered[cut], ordered[-1 - cut]


def paired(  # noqa: PLR0917
    measure: str,
    unit: str,
    ours: Sequence[float],
    reference: Sequence[float],
    against: str,
    goal: float | None,
    **more: Any,
) -> Row:
    """Runs taken in turns: the median of the ratios of neighbours, since machines wander."""
    ratios = [a / b if b else float("inf") for a, b in zip(ours, reference, strict=True)]
    low, high = middle_half(ratios)
    return Row(
        measure, unit, statistics.median(ours), statistics.median(reference), against,
        statistics.median(ratios), low, high, goal, runs=len(ratios), **more,
    )  # fmt: skip


def single(
    measure: str, unit: str, values: Sequence[float], goal: float | None = None, **more: Any
) -> Row:
    """A measure whose goal is a figure and not a ratio."""
    low, high = middle_half(values)
    return Row(measure, unit, statistics.median(values), low=low, high=high, goal=goal,
               runs=len(values), **more)  # fmt: skip


def warm(size: int) -> None:
    """Touches so many bytes of this machine's memory and gives them back, to be taken next.

    In a virtual machine the first touch of a page is its host's work, and slow: 20 GiB took 58 s
    the first time and 16 s after that. Who comes first would pay for all.
    """
    piece = bytes(1 << 20)
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        for _ in range(size >> 20):
            file.write(piece)


def machine(**more: Any) -> dict[str, Any]:
    """What the figures were taken on; `more` names versions."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    commit = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "kvm": os.access("/dev/kvm", os.R_OK | os.W_OK),
        "congestion": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "python": platform.python_version(),
        "postcopyd": commit.stdout.strip() or "unknown",
        "load": round(os.getloadavg()[0], 2),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **more,
    }


def save(name: str, rows: Sequence[Row], about: dict[str, Any], data: Any) -> Path:
    """results/NAME.json: the machine before and after, rows, and `data` for the pictures."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    about = about | {"load_after": round(os.getloadavg()[0], 2)}
    path = RESULTS / f"{name}.json"
    shown = [asdict(row) | {"met": row.met} for row in rows]
    # The samples on one line: nobody reads them, and there are hundred thousands.
    read = json.dumps({"machine": about, "rows": shown}, indent=1).removesuffix("\n}")
    samples = json.dumps(data, separators=(",", ":"))
    path.write_text(f'{read},\n "data": {samples}\n}}\n')
    return path


def load(name: str) -> dict[str, Any] | None:
    """What `save` wrote; None where that benchmark has not run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def show(rows: Sequence[Row], about: dict[str, Any]) -> None:
    """The table, on stdout."""
    width = max(len(row.measure) for row in rows)
    title = f"{'measure':{width}}  {'unit':8}{'ours':>9}{'theirs':>9} {'':6}{'ratio':>7}  "
    title += f"{'spread':15}{'goal':>8}  "
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    print(title + "met")
    for row in rows:
        spread = "-" if row.low is None else f"{_figure(row.low)} - {_figure(row.high)}"
        sign = ">=" if row.more_is_better else "<="
        goal = "-" if row.goal is None else f"{sign} {row.goal:g}"
        met = {True: "yes", False: "NO", None: ""}[row.met]
        print(
            f"{row.measure:{width}}  {row.unit:8}{_figure(row.ours):>9}"
            f"{_figure(row.reference):>9} {row.against:6}{_figure(row.ratio):>7}  "
            f"{spread:15}{goal:>8}  {met}{'  ' if row.note else ''}{row.note}"
        )
    print(flush=True)


def finish(name: str, rows: Sequence[Row], about: dict[str, Any], data: Any) -> int:
    """Saves and shows; the exit status: MISSED when a goal is."""
    path = save(name, rows, about, data)
    show(rows, about)
    print(f"written: {os.path.relpath(path)}\n", flush=True)
    return MISSED if any(row.met is False for row in rows) else 0


def noted(row: Row, note: str) -> Row:
    return replace(row, note=note)


def main() -> int:
    """Every result's rows under its machine; what is missed comes again at the end."""
    missed, count = [], 0
    for name in sys.argv[1:]:
        result = load(name)
        if result is None:
            print(f"== {name}: not measured\n")
            continue
        rows = [Row(**{k: v for k, v in row.items() if k != "met"}) for row in result["rows"]]
        print(f"== {name}")
        show(rows, result["machine"])
        missed += [row.measure for row in rows if row.met is False]
        count += sum(row.met is not None for row in rows)
    print(f"goals met: {count - len(missed)} of {count}; missed: {'; '.join(missed) or 'none'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
