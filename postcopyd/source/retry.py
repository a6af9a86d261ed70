# SPDX-License-Identifier: Apache-2.0
"""When a source that has lost its destination asks again, and when people are told that it waits.
No I/O.

Asking is cheap and a guest may wait, so the source asks often as long as time alone may mend what
is wrong, and only then. If a destination answers each time and takes no page, it is asked more and
more seldom. Only pages that have arrived count as progress.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from postcopyd.protocol import LOST, POISONED

AGAIN_S = 0.1
"""How long after a failure the destination is asked again, in the first RESTLESS_S of a pause."""

RESTLESS_S = 600.0
SELDOM_S = 5.0
"""The same, after RESTLESS_S, and for errors that time alone does not mend."""

PATIENCE_S = 10.0
"""How long a pause lasts before clients that wait for the migration are told of it."""

GONE = "SourceVmmGone"
"""Name of the error that the memory here went with its VMM. A person has to decide."""

MENDS = frozenset({"ConnectionLost", "PeerUnreachable", "EngineFailed", "NoResources", "Paused"})
"""Names of errors that time alone, or a restart of the destination's daemon, may mend."""


@dataclass
class Retry:
    """`since` is when pages last arrived, or when the pause began. From `told` on, people are told
    that it waits. `pages` had arrived by `since`. `vain` counts how often the destination has
    resumed since then and no page arrived."""

    since: float
    told: float
    pages: int = 0
    vain: int = 0

    def failed(self, name: str, now: float, pages: int, went_on: bool) -> float:
        """How long to wait after an attempt that ended in the error `name`. `pages` have arrived in
        all; `went_on`: the destination had resumed the migration in this attempt."""
        if pages > self.pages:
            self.since, self.told, self.pages, self.vain = now, now + PATIENCE_S, pages, 0
        elif went_on:
            self.vain += 1
        if name in (LOST, POISONED, GONE):
            self.told = min(self.told, now)
            return math.inf
        if name not in MENDS or now - self.since >= RESTLESS_S:
            return SELDOM_S
        return min(AGAIN_S * 2.0 ** min(self.vain, 10), SELDOM_S)
