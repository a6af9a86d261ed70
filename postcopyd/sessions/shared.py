# SPDX-License-Identifier: Apache-2.0
"""What the sessions of a daemon share: its store, its hooks, its limits, and who is arriving."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from postcopyd.net.connection import Endpoint
from postcopyd.records.store import Store
from postcopyd.sessions.limits import Limits
from postcopyd.vmm import Shape


@dataclass(frozen=True)
class Shared(Endpoint):
    """`bandwidth` is that of one migration at most, in bytes per second, 0 for no limit;
    `connections` are push connections."""

    store: Store
    hooks: Path | None = None
    bandwidth: int = 0
    connections: int = 2
    arriving: dict[str, Shape] = field(default_factory=dict)
    """Guests that are on their way here, by VM name: memory that they lack is theirs already."""
    limits: Limits = field(default_factory=Limits)
