# SPDX-License-Identifier: Apache-2.0
"""Pictures of results/*.json: `charts.py` draws what has been measured, as results/*.svg."""

from __future__ import annotations

import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import table
from svg import Axis, Chart, Look, Point

OURS = Look("#1a5fb4", marker="circle")
THEIRS = Look("#c64600", dash="7 4", marker="square")
OTHER = Look("#2e7d32", dash="2 3", marker="circle")
SMOOTH_S = 0.1


def where(result: dict[str, Any]) -> str:
    """The conditions, under each title."""
    m = result["machine"]
    words = [m["cpu"], f"{m['cores']} cores", f"Linux {m['kernel']}"]
    if "qemu" in m:
        words.append(f"QEMU {m['qemu']}")
    if "accel" in m:  # as QEMU was told, such as "tcg,thread=multi"
        words.append(m["accel"].partition(",")[0].upper())
    return ", ".join([*words, "loopback"])


def draw(chart: Chart, name: str) -> None:
    path = table.RESULTS / f"{name}.svg"
    chart.write(path)
    print(f"written: {os.path.relpath(path)}")


def nice(most: float, steps: int = 5) -> list[float]:
    """Ticks from 0 to at least `most`, at 1, 2 or 5 times a power of ten."""
    raw = most / steps
    power = 10 ** math.floor(math.log10(raw))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(most / step - 1e-9) + 1)]


def thousands(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def speed(
    result: dict[str, Any],
    runs: dict[str, list[dict[str, Any]]],
    ways: Sequence[tuple[str, Look, str]],
    name: str,
    first_s: int,
) -> None:
    """Median of the runs' speeds at each moment, the single runs thin behind it."""
    x = Axis("seconds from the stop at the source", first_s, 5, range(first_s, 6))
    ticks = (0, 25, 50, 75, 100)
    y = Axis("guest's speed, % of before", 0, 120, ticks)
    about = result["machine"]
    size = f"{about['memory_mib']} MiB guest writing {about['writes_mib']} MiB at random"
    chart = Chart(f"{size} while it is moved",
                  f"{where(result)}; median and single runs", x, y)  # fmt: skip
    medians = []
    for way, look, words in ways:
        if not runs[way]:
            continue
        curves = [
            [point for point in smooth(run["curve"]) if x.low <= point[0] <= x.high]
            for run in runs[way]
        ]
        plain = replace(look, marker="", dash="")
        for curve in curves:
            chart.line(curve, replace(plain, width=0.8, opacity=0.25))
        at: dict[float, list[float]] = defaultdict(list)
        for curve in curves:
            for when, share in curve:
                at[when].append(share)
        middle = [
            (when, statistics.median(v))
            for when, v in sorted(at.items())
            if len(v) * 2 > len(curves)
        ]
        medians.append((middle, replace(look, marker=""), words))
    for middle, look, words in medians:
        chart.line(middle, look, words)
    chart.mark(0, "stop")
    draw(chart, name)


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
    ticks = [2**n for n in range(4, 15)]
    x = Axis("time an access to a missing page took, µs (log scale)", 16, 16384, ticks, log=True)
    y = Axis(
        "% of the accesses that took longer (log scale)", 0.1, 100, [0.1, 1, 10, 50, 100], True
    )
    chart = Chart("How long the guest waits for a missing page", where(result), x, y)
    data = result["data"]
    for workload, width, words in (
        ("faults 1", 2.2, "alone"),
        ("push beside 1", 1.4, "beside push"),
    ):
        for which, look, name in ((1, THEIRS, "floor"), (0, OURS, "postcopyd")):
            if workload in data:
                points = longer(pair[which] for pair in data[workload])
                dash = look.dash if words == "alone" else ("2 3" if which else "10 2 2 2")
                line = replace(look, marker="", width=width, dash=dash)
                chart.line(points, line, f"{name}, {words}")
    draw(chart, "fault-latency")


def by_number(
    result: dict[str, Any], kind: str, numbers: Sequence[int], value: str, *, title: str, x: str,
    y: str, name: str,
) -> None:  # fmt: skip
    """The engine and the floor by a number that doubles."""
    data = result["data"]
    here = [n for n in numbers if f"{kind} {n}" in data]
    if len(here) < 2:
        return
    values = [pair[i][value] for n in here for pair in data[f"{kind} {n}"] for i in (0, 1)]
    ticks = nice(max(values))
    axis = Axis(x, here[0] / 1.15, here[-1] * 1.15, here, log=True)
    chart = Chart(title, f"{where(result)}; median and single runs", axis,
                  Axis(y, 0, ticks[-1], ticks, label=thousands))  # fmt: skip
    for which, look, who in ((1, THEIRS, "floor: the least that sockets and userfaultfd can do"),
                             (0, OURS, "postcopyd")):  # fmt: skip
        runs = {n: [pair[which][value] for pair in data[f"{kind} {n}"]] for n in here}
        aside = 0.97 if which == 0 else 1.03
        chart.dots([(n * aside, v) for n in here for v in runs[n]], look)
        chart.line([(n, statistics.median(runs[n])) for n in here], look, who)
    draw(chart, name)


def blackout(result: dict[str, Any]) -> None:
    runs = {int(mib): values for mib, values in result["data"]["blackout_ms"].items()}
    sizes = sorted(runs)
    ticks = nice(max(12.0, *(v for values in runs.values() for v in values)))

    def label(mib: float) -> str:
        return f"{mib:g} MiB" if mib < 1024 else f"{mib / 1024:g} GiB"

    x = Axis("RAM of the guest (log scale)", sizes[0] / 1.3, sizes[-1] * 1.3, sizes, True, label)
    chart = Chart("Blackout by RAM size, STOP event to RESUME event",
                  f"{where(result)}; median and single runs", x,
                  Axis("milliseconds", 0, ticks[-1], ticks))  # fmt: skip
    chart.level(10, "goal: 10 ms")
    chart.dots([(mib * 1.06, v) for mib in sizes for v in runs[mib]], OURS)
    chart.line([(mib, statistics.median(runs[mib])) for mib in sizes], OURS, "postcopyd")
    draw(chart, "blackout-by-ram")


def link(result: dict[str, Any]) -> None:
    data = result["data"]
    trips = sorted({run["rtt_ms"] for run in data})
    x = Axis("round trip of the link without load, ms", 0, max(trips) * 1.1, trips)
    most = max(run["p99_us"] / 1e3 for run in data)
    ticks = nice(most)
    chart = Chart("Urgent latency while the push fills the link",
                  f"{where(result).replace('loopback', 'two network namespaces')}",
                  x, Axis("milliseconds", 0, ticks[-1], ticks))  # fmt: skip
    looks = {"1gbit": OURS, "10gbit": THEIRS}
    for rate, colour in looks.items():
        for percentile, width in (("p50_us", 2.2), ("p99_us", 1.0)):
            points = []
            for trip in trips:
                kind = (rate, trip, 1)
                values = [
                    run[percentile] / 1e3
                    for run in data
                    if (run["rate"], run["rtt_ms"], run["push"]) == kind
                ]
                if values:
                    points.append((trip, statistics.median(values)))
            look = replace(colour, width=width)
            chart.line(points, look, f"{rate}/s {percentile[:3]}")
    chart.line([(0, 0), (x.high, x.high)], Look("#777", dash="1 4", width=1.5), "round trip")
    draw(chart, "link-latency")


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
