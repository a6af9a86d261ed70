# SPDX-License-Identifier: Apache-2.0
"""What this process has done since it started, in numbers that only grow: for metrics.py.

Counting is an addition, whether anybody asks or not, and needs no Prometheus. What engines count is
read from those that are, and added here for good when one ends, so that no sum goes backwards.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Any, Literal

SUMMED = ("faults", "answered", "transferred_bytes", "stalls")
"""Fields of struct pc_stats that only grow."""


class Histogram:
    """Observations by upper bound, the last count for what is above all of them."""

    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Engines:
    """All engines of one role. `living` are the statistics of those that are: struct pc_stats."""

    def __init__(self) -> None:
        self.living: list[Any] = []
        self._over: Counter[str] = Counter()
        self._latency = [0] * 256

    def began(self, stats: Any) -> None:
        self.living.append(stats)

    def ended(self, stats: Any) -> None:
        """While they can be read still."""
        self.living.remove(stats)
        self._over.update({field: getattr(stats, field) for field in SUMMED})
        self._latency = _added(self._latency, stats)

    def total(self, field: str) -> int:
        """One of SUMMED, over all that there ever were."""
        living: int = sum(getattr(stats, field) for stats in self.living)
        return self._over[field] + living

    def latency(self) -> list[int]:
        """Faults by how long they waited, in the buckets of native.h."""
        sums = self._latency
        for stats in self.living:
            sums = _added(sums, stats)
        return sums


def _added(sums: list[int], stats: Any) -> list[int]:
    return [one + other for one, other in zip(sums, stats.latency, strict=True)]


Result = Literal["completed", "failed", "cancelled", "ended"]
"""How a migration is over; *ended*: its guest was, as was meant, while its memory followed."""

ended: Counter[tuple[str, str, Result]] = Counter()
"""Migrations that are over, by role, mode and result."""

recoveries: Counter[str] = Counter()
"""Migrations that went on after a pause, by role."""

failures: Counter[tuple[str, str]] = Counter()
"""Engines that have stopped working on their migration, by role and native.Failure."""

downtimes = Histogram(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10)
"""Of completed migrations from here, in seconds."""

engines = {"source": Engines(), "destination": Engines()}
