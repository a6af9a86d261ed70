# SPDX-License-Identifier: Apache-2.0
"""Pictures of results/*.json: `charts.py` draws what has been measured, as results/*.svg."""

from __future__ import annotations

import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    NullLocator,
    ScalarFormatter,
)

Point = tuple[float, float]
Look = dict[str, Any]
"""How a line is told from others, with and without colour: arguments of `Axes.plot`."""

OURS: Look = {"color": "#1a5fb4", "linestyle": "-", "marker": "o"}
THEIRS: Look = {"color": "#c64600", "linestyle": "--", "marker": "s"}
OTHER: Look = {"color": "#2e7d32", "linestyle": ":", "marker": "o"}
SMOOTH_S = 0.1

mpl.rcParams.update(
    {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 11,
        "grid.color": "#ddd",
        "legend.frameon": False,
        "lines.linewidth": 2,
        "lines.markersize": 5,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "postcopyd",  # the same picture of the same figures
    }
)


def where(result: dict[str, Any]) -> str:
    """The conditions, under each title."""
    m = result["machine"]
    words = [m["cpu"], f"{m['cores']} cores", f"Linux {m['kernel']}"]
    if "qemu" in m:
        words.append(f"QEMU {m['qemu']}")
    if "accel" in m:  # as QEMU was told, such as "tcg,thread=multi"
        words.append(m["accel"].partition(",")[0].upper())
    return ", ".join([*words, "loopback"])


@contextmanager
def picture(name: str, title: str, conditions: str, *, x: str, y: str) -> Iterator[Axes]:
    """A picture to draw into, written as results/NAME.svg when it is left."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    axes = figure.subplots()
    axes.set_title(conditions, fontsize=9, color="#555")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    yield axes
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
    path = table.RESULTS / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    print(f"written: {os.path.relpath(path)}")


def ticks(axis: Any, at: Sequence[float], label: Any = None) -> None:
    """These and no others."""
    axis.set_major_locator(FixedLocator(list(at)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(label or ScalarFormatter())


def line(axes: Axes, points: Iterable[Point], look: Look, **more: Any) -> None:
    axes.plot(*zip(*points, strict=True), **(look | more))


def medians(axes: Axes, runs: dict[float, list[float]], look: Look, label: str) -> None:
    """A line through the medians of what was measured at each place, and each run as a dot."""
    line(axes, [(at, statistics.median(values)) for at, values in runs.items()], look, label=label)
    dots = [(at, value) for at, values in runs.items() for value in values]
    line(axes, dots, look, linestyle="", markersize=3, alpha=0.4)


def speed(
    result: dict[str, Any],
    runs: dict[str, list[dict[str, Any]]],
    ways: Sequence[tuple[str, Look, str]],
    name: str,
    first_s: int,
) -> None:
    """Median of the runs' speeds at each moment, the single runs thin behind it."""
    about = result["machine"]
    size = f"{about['memory_mib']} MiB guest writing {about['writes_mib']} MiB at random"
    with picture(
        name, f"{size} while it is moved", f"{where(result)}; median and single runs",
        x="seconds from the stop at the source", y="guest's speed, % of before",
    ) as axes:  # fmt: skip
        axes.set(xlim=(first_s, 5), ylim=(0, 120))
        for way, look, words in ways:
            curves = [
                [point for point in smooth(run["curve"]) if first_s <= point[0] <= 5]
                for run in runs[way]
            ]
            at: dict[float, list[float]] = defaultdict(list)
            for curve in curves:
                line(axes, curve, look, marker="", linestyle="-", linewidth=0.8, alpha=0.25)
                for when, share in curve:
                    at[when].append(share)
            middle = [
                (when, statistics.median(v))
                for when, v in sorted(at.items())
                if len(v) * 2 > len(curves)
            ]
            if middle:
                line(axes, middle, look, marker="", label=words)
        axes.axvline(0, color="#555", linewidth=1)
        axes.annotate(" stop", (0, 120), va="top", color="#555")


def smooth(curve: Sequence[Sequence[float]]) -> list[Point]:
    """Means over SMOOTH_S, which never mix what was before the stop with what came after it."""
    bins: dict[int, list[float]] = defaultdict(list)
    for when, share in curve:
        bins[math.floor(when / SMOOTH_S)].append(share)
    points = []
    for number, shares in sorted(bins.items()):
        points.append(((number + 0.5) * SMOOTH_S, 100 * statistics.fmean(shares)))
    return points


def bucket_us(bucket: int) -> float:
    """The upper bound of a latency bucket, microseconds (engine_latency in native/engine.c)."""
    if bucket < 8:
        return bucket + 1.0
    return float(2 ** (bucket // 8) * (1 + (bucket % 8 + 1) / 8))


def longer(runs: Iterable[dict[str, Any]]) -> list[Point]:
    """(microseconds, % of the accesses that took longer), of all runs together."""
    counts: dict[int, int] = defaultdict(int)
    for run in runs:
        for bucket, count in run["latency"].items():
            counts[int(bucket)] += count
    total, seen, points = sum(counts.values()), 0, []
    for bucket, count in sorted(counts.items()):
        seen += count
        points.append((bucket_us(bucket), 100 * (1 - seen / total)))
    return points


def latency(result: dict[str, Any]) -> None:
    with picture(
        "fault-latency", "How long the guest waits for a missing page", where(result),
        x="time an access to a missing page took, µs (log scale)",
        y="% of the accesses that took longer (log scale)",
    ) as axes:  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=(16, 16384), ylim=(0.1, 100))
        ticks(axes.xaxis, [2**n for n in range(4, 15)])
        ticks(axes.yaxis, [0.1, 1, 10, 50, 100], FuncFormatter("{:g}".format))
        data = result["data"]
        for workload, words, dashes, width in (
            ("faults 1", "alone", ("--", "-"), 2.2),
            ("push beside 1", "beside push", (":", "-."), 1.4),
        ):
            for which, look, name in ((1, THEIRS, "floor"), (0, OURS, "postcopyd")):
                if workload in data:
                    points = longer(pair[which] for pair in data[workload])
                    style = {"marker": "", "linestyle": dashes[1 - which], "linewidth": width}
                    line(axes, points, look | style, label=f"{name}, {words}")


def by_number(
    result: dict[str, Any], kind: str, numbers: Sequence[int], value: str, *, title: str, x: str,
    y: str, name: str,
) -> None:  # fmt: skip
    """The engine and the floor by a number that doubles."""
    data = result["data"]
    here = [n for n in numbers if f"{kind} {n}" in data]
    if len(here) < 2:
        return
    with picture(name, title, f"{where(result)}; median and single runs", x=x, y=y) as axes:
        axes.set_xscale("log", base=2)
        ticks(axes.xaxis, here)
        for which, look, who in (
            (1, THEIRS, "floor: the least that sockets and userfaultfd can do"),
            (0, OURS, "postcopyd"),
        ):
            runs = {float(n): [pair[which][value] for pair in data[f"{kind} {n}"]] for n in here}
            medians(axes, runs, look, who)
        axes.set_ylim(bottom=0)
        if axes.get_ylim()[1] > 1000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def ram(mib: float, _: object = None) -> str:
    return f"{mib:g} MiB" if mib < 1024 else f"{mib / 1024:g} GiB"


def blackout(result: dict[str, Any]) -> None:
    runs = {float(mib): values for mib, values in result["data"]["blackout_ms"].items()}
    with picture(
        "blackout-by-ram", "Blackout by RAM size, STOP event to RESUME event",
        f"{where(result)}; median and single runs",
        x="RAM of the guest (log scale)", y="milliseconds",
    ) as axes:  # fmt: skip
        axes.set_xscale("log", base=2)
        ticks(axes.xaxis, sorted(runs), FuncFormatter(ram))
        axes.axhline(10, color="#777", linestyle=":", label="goal: 10 ms")
        medians(axes, dict(sorted(runs.items())), OURS, "postcopyd")
        axes.set_ylim(bottom=0)


def link(result: dict[str, Any]) -> None:
    data = result["data"]
    trips = sorted({run["rtt_ms"] for run in data})
    with picture(
        "link-latency", "Urgent latency while the push fills the link",
        where(result).replace("loopback", "two network namespaces"),
        x="round trip of the link without load, ms", y="milliseconds",
    ) as axes:  # fmt: skip
        ticks(axes.xaxis, trips)
        for rate, look in (("1gbit", OURS), ("10gbit", THEIRS)):
            for percentile, width in (("p50_us", 2.2), ("p99_us", 1.0)):
                values: dict[float, list[float]] = defaultdict(list)
                for run in data:
                    if (run["rate"], run["push"]) == (rate, 1):
                        values[run["rtt_ms"]].append(run[percentile] / 1e3)
                points = [(trip, statistics.median(values[trip])) for trip in sorted(values)]
                if points:
                    words = f"{rate}/s {percentile[:3]}"
                    line(axes, points, look, linewidth=width, label=words)
        most = max(trips)
        line(axes, [(0, 0), (most, most)], {"color": "#777", "linestyle": ":"}, label="round trip")
        axes.set_ylim(bottom=0)


def main() -> int:
    if result := table.load("qemu"):
        ways = (("qemu", THEIRS, "QEMU's own postcopy (preempt)"), ("ours", OURS, "postcopyd"))
        speed(result, result["data"], ways, "guest-speed", -1)
    if result := table.load("hybrid"):
        ways = (
            ("postcopy", OTHER, "postcopyd, postcopy"),
            ("qemu", THEIRS, "QEMU's own hybrid (preempt)"),
            ("hybrid", OURS, "postcopyd, hybrid"),
        )
        speed(result, result["data"]["busy"], ways, "guest-speed-hybrid", -3)
    if result := table.load("engine"):
        latency(result)
        by_number(
            result, "faults", (1, 2, 4, 8, 16, 32), "faults", name="faults-by-threads",
            title="Faults answered per second, nothing pushed",
            x="faulting guest threads (log scale)", y="faults per second",
        )  # fmt: skip
        by_number(
            result, "push", (1, 2, 4), "GB/s", name="push-by-connections",
            title="Push rate by connections, no faults",
            x="push connections (log scale)", y="GiB per second",
        )  # fmt: skip
    if result := table.load("blackout"):
        blackout(result)
    if result := table.load("link"):
        link(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
