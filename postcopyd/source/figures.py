# SPDX-License-Identifier: Apache-2.0
"""Measurements of a migration, for the people who wait for it. Decides nothing.

Each phase writes here what it has measured. Decisions are based on two of these figures only: the
passes decide when to hand over (passes.py), and the number of pages that have arrived decides when
to ask again (retry.py).
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

from postcopyd import model
from postcopyd import protocol as p
from postcopyd._native import ffi
from postcopyd.source.passes import Pass
from postcopyd.vmm import Shape

NO_STATS = ffi.new("struct pc_stats *")
"""The statistics when there is no engine: all zero."""


class Figures:
    """Times are seconds of the monotonic clock, and 0.0 until they are known. `stats` is the
    engine's struct pc_stats while there is an engine."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.stopped_at = self.saved_at = self.loaded_at = self.ran_at = 0.0
        self.downtime_ms = 0.0
        self.downtime_parts: dict[str, float] = {}  # ms
        self.total_bytes = 0
        self.page_size = 4096
        self.stats: Any = NO_STATS
        self.passes: list[Pass] = []
        self.why_now = ""
        self.tracked: dict[str, float] = {}
        self.warnings: list[str] = []
        self.arrived = 0  # pages, as far as the destination has said
        self.faults = p.Faults()
        self.recoveries = 0

    def inspected(self, shape: Shape) -> None:
        """Notes how much memory the guest has, and what it leaves behind."""
        self.warnings += shape.stays
        self.total_bytes = sum(region.size for region in shape.regions)
        if shape.regions:
            self.page_size = shape.regions[0].page_size

    def ran(self) -> None:
        """Notes that the guest runs at the destination, and what its downtime was spent on: `save`
        is until the VMM here has given all device state, `load` until the VMM there has taken it,
        `run` until the guest runs there. `load` and `run` each include a round trip."""
        self.ran_at = time.monotonic()
        times = (self.stopped_at, self.saved_at, self.loaded_at, self.ran_at)
        parts = zip(("save", "load", "run"), pairwise(times), strict=True)
        self.downtime_parts = {
            name: round((after - before) * 1e3, 2) for name, (before, after) in parts
        }
        self.downtime_ms = round((self.ran_at - self.stopped_at) * 1e3, 2)

    def tell(self, result: model.Result, drained: p.Drained | None, at: float) -> None:
        """Puts all that is known into the result of a migration that ended at `at`."""
        since = at - self.ran_at if self.ran_at else 0.0
        since += sum(one.seconds for one in self.passes)
        moved = self.stats.transferred_bytes
        result.downtime_ms = self.downtime_ms
        result.downtime_parts_ms = self.downtime_parts
        result.total_ms = round((at - self.began) * 1e3, 2)
        result.brownout_ms = round(drained.brownout_ms, 2) if drained else 0.0
        result.memory = model.Memory(
            total_bytes=self.total_bytes,
            page_size=self.page_size,
            pages=self.stats.total_pages,
            zero_pages=drained.zero if drained else 0,
            precopy_pages=self.stats.precopied_pages,
            dirty_pages=self.stats.dirty_pages,
            pushed_pages=drained.placed - drained.urgent if drained else 0,
            urgent_pages=drained.urgent if drained else 0,
            duplicate_pages=drained.duplicate if drained else 0,
            lost_pages=drained.lost if drained else 0,
        )
        result.faults = self.shown_faults()
        result.transferred_bytes = moved
        result.bytes_per_second = round(moved / since) if since else 0
        result.recoveries = self.recoveries
        result.passes = [one.shown() for one in self.passes]

    def shown_faults(self) -> model.Faults:
        """The faults as results and status show them."""
        seen = self.faults
        return model.Faults(seen.count, seen.p50_us, seen.p99_us, seen.max_us, seen.histogram)
