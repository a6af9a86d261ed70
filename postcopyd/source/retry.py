# SPDX-License-Identifier: Apache-2.0
"""When a source that has lost its destination asks again, and when it is said that it waits. No
I/O.

Asking is cheap and a guest may wait, so it is done often as long as time alone may mend what is
wrong, and only there: a destination that answers each time and takes no page is asked more and more
seldom. What counts as going on is pages that have arrived, and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from postcopyd.protocol import LOST, POISONED

AGAIN_S = 0.1
"""How long after a failure the destination is asked again, in the first RESTLESS_S."""

RESTLESS_S = 600.0
SELDOM_S = 5.0
"""The same later, and for what time alone does not mend."""

PATIENCE_S = 10.0
"""How long a pause lasts before who waits for the migration is told that it is paused."""

MENDS = frozenset({"ConnectionLost", "PeerUnreachable", "EngineFailed", "NoResources", "Paused"})
"""Names of errors that time alone may mend, or a destination that is started again."""


@dataclass
class Retry:
    """`since` is when pages have last arrived, or the pause began; `told` from when on it is said
    that it waits; `pages` how many had arrived by then; `vain` how often the destination has gone
    on since, without a page."""

    since: float
    told: float
    pages: int = 0
    vain: int = 0

    def failed(self, name: str, now: float, pages: int, went_on: bool) -> float:
        """After an attempt that ended in the error `name`: how long to wait for the next one.
        `pages` have arrived in all; `went_on`: the destination had gone on with the migration."""
        if pages > self.pages:
            self.since, self.told, self.pages, self.vain = now, now + PATIENCE_S, pages, 0
        elif went_on:
            self.vain += 1
        if name in (LOST, POISONED):
            self.told = min(self.told, now)
            return math.inf
        if name not in MENDS or now - self.since >= RESTLESS_S:
            return SELDOM_S
        return min(AGAIN_S * 2.0 ** min(self.vain, 10), SELDOM_S)
