# SPDX-License-Identifier: Apache-2.0
"""What people and programs ask for and see: requests, status, results. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Status = dict[str, Any]
Decision = Literal["wait", "poison", "kill", "take_back"]


@dataclass(frozen=True)
class MigrateRequest:
    """A migration as asked for: `to` is HOST:PORT, `bandwidth` in bytes per second."""

    to: str
    mode: Literal["hybrid", "postcopy", "precopy"] = "hybrid"
    bandwidth: int | None = None
    precopy_passes: int | None = None
    max_downtime_ms: float | None = None
    keep_source: bool = False
    unsafe: bool = False
