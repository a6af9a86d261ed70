# SPDX-License-Identifier: Apache-2.0
"""Decides after each pass, from what was measured, when to stop copying and hand over. No I/O.

A pass sends what the destination lacks while the guest runs on. What the guest writes meanwhile is
what the next pass would send. If the guest writes W pages a second and R are sent a second, the
next pass leaves W / R of what is left now. So passes shrink what is left if the guest writes less
than the link carries. If it writes more, they only slow the guest down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from postcopyd import model
from postcopyd.errors import PostcopydError

PAYS = 0.7
"""Another pass pays when it will leave at most this share of what is left now."""

SHORT_S = 0.02
"""If what is left takes no longer than this to send, it is not worth a pass: the scan before a pass
and the round trip after it take as long."""

MOST = 30
"""How many passes are made at most, whatever the figures say."""

STUCK = 3
"""If so many passes in a row left no less than the best one before them, `precopy` does not
converge."""


@dataclass(frozen=True)
class Pass:
    """One pass as it was measured."""

    pages: int  # sent, zero ones counted
    bytes: int  # on the wire
    seconds: float
    left: int  # pages that the destination lacks after it, or has an old copy of

    @property
    def rate(self) -> float:
        """Pages a second."""
        return self.pages / self.seconds if self.seconds else 0.0

    @property
    def written(self) -> float:
        """Pages a second that the guest has written; a page counts once, however often written."""
        return self.left / self.seconds if self.seconds else 0.0

    @property
    def left_s(self) -> float:
        """Seconds that it would take to send what is left at this pass's rate."""
        return self.left / self.rate if self.pages else 0.0

    def shown(self) -> model.Pass:
        """As results and status have it."""
        return model.Pass(
            pages=self.pages,
            bytes=self.bytes,
            ms=round(self.seconds * 1e3, 2),
            bytes_per_second=round(self.bytes / self.seconds) if self.seconds else 0,
            dirty_pages=self.left,
            dirty_pages_per_second=round(self.written),
        )


def why_now(
    mode: Literal["hybrid", "precopy"],
    passes: Sequence[Pass],
    most: int | None,
    max_downtime_s: float,
) -> str | None:
    """Why the guest is handed over now, as the end of a sentence; None: another pass first.

    `most` is the limit on the number of passes (None: MOST). Raises PostcopydError for a precopy
    that will not get what is left below `max_downtime_s`.
    """
    last = passes[-1]
    left = f"{last.left} pages are left"
    if mode == "precopy":
        if last.left_s <= max_downtime_s:
            return f"{left}, which take {last.left_s * 1e3:.0f} ms"
        lefts = [one.left for one in passes]
        stuck = len(lefts) > STUCK and min(lefts[-STUCK:]) >= min(lefts[:-STUCK])
        if stuck or len(passes) >= (MOST if most is None else most):
            raise PostcopydError(
                f"it does not converge: after {len(passes)} passes {left}, which take "
                f"{last.left_s * 1e3:.0f} ms and not {max_downtime_s * 1e3:.0f} ms (the guest "
                f"writes {last.written:.0f} pages a second, {last.rate:.0f} are sent): use --mode "
                f"hybrid, or a longer --max-downtime",
                "NotConverging",
            )
        return None
    if last.left_s <= SHORT_S:
        return f"{left}, which take {last.left_s * 1e3:.0f} ms"
    if last.left > PAYS * last.pages:
        return (
            f"another pass would not pay: the guest has written {last.left} pages again while "
            f"{last.pages} were sent"
        )
    most = MOST if most is None else most
    return (
        f"{left} after {most} passes, and no more were to be made" if len(passes) >= most else None
    )
