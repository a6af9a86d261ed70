# SPDX-License-Identifier: Apache-2.0
"""What the sessions of a daemon share: its store, hooks and limits, and the guests that arrive."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from postcopyd.net.connection import Endpoint
from postcopyd.records.store import Store
from postcopyd.sessions.headroom import Arrival
from postcopyd.sessions.limits import Limits


@dataclass(frozen=True)
class Shared(Endpoint):
    """`bandwidth` is the most that one migration may send, in bytes per second, 0 for no limit;
    `connections` is how many push connections it makes."""

    store: Store
    hooks: Path | None = None
    bandwidth: int = 0
    connections: int = 2
    arriving: dict[str, Arrival] = field(default_factory=dict)
    """Guests on their way here, by VM name. The memory that they still lack is set aside."""
    libvirt: str = ""
    """The URI of this host's libvirt; empty: none."""
    limits: Limits = field(default_factory=Limits)
