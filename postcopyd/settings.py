# SPDX-License-Identifier: Apache-2.0
"""What the sessions of a daemon share: its store, its hooks, its limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from postcopyd.store import Store


@dataclass(frozen=True)
class Settings:
    """`bandwidth` in bytes per second, 0 for no limit; `connections` are push connections."""

    store: Store
    hooks: Path | None = None
    bandwidth: int = 0
    connections: int = 2
