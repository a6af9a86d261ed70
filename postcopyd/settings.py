# SPDX-License-Identifier: Apache-2.0
"""What the sessions of a daemon share: its store, its hooks, its limits, and who is arriving."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path

from postcopyd.config import Peer
from postcopyd.limits import Limits
from postcopyd.protocol import DaemonId
from postcopyd.store import Store
from postcopyd.tls import Tls
from postcopyd.vmm import Shape


@dataclass(frozen=True)
class Settings:
    """`bandwidth` is that of one migration at most, in bytes per second, 0 for no limit;
    `connections` are push connections."""

    store: Store
    hooks: Path | None = None
    bandwidth: int = 0
    connections: int = 2
    tls: Tls | None = None
    """None where `--tls off` was said."""
    peers: tuple[Peer, ...] = ()
    arriving: dict[str, Shape] = field(default_factory=dict)
    """Guests that are on their way here, by VM name: memory that they lack is theirs already."""
    limits: Limits = field(default_factory=Limits)
    instance: str = field(default_factory=lambda: secrets.token_hex(8))
    """Of this start of the daemon."""
    daemon: DaemonId | None = None
    """Through all of its starts."""
