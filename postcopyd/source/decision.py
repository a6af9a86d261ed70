# SPDX-License-Identifier: Apache-2.0
"""A person's decision about a departure that is paused, and its outcome. No I/O.

The session looks at the decision between two attempts to ask the destination, never during one, so
that a destination that answers just then has the last word. The caller that decides waits for the
outcome, so that nobody is told of a success that did not happen.
"""

from __future__ import annotations

from typing import Literal

import trio

from postcopyd.errors import PostcopydError
from postcopyd.protocol import LOST

TAKE_BACK_S = 10.0
"""How long a destination that a person calls dead is still asked before its guest is run here: a
daemon that is only restarting says nothing for a second or two."""

UNKNOWN = frozenset({"NotMigrating", "NoSuchVm"})
"""Names of errors by which a destination says that it knows nothing of the guest."""

GIVEN_UP = UNKNOWN | {LOST}
"""Names of errors by which a destination says that it has nothing of the guest any more. Any other
answer shows that the destination is not dead."""

SILENT = frozenset({"PeerUnreachable", "ConnectionLost"})
"""Names of errors of an attempt in which nothing was heard. After any other error the destination
may be alive: it may not be trusted, or this host may lack the descriptors to ask it."""

Choice = Literal["kill", "take_back"]


class Decision:
    """A destination that has said nothing by the time `until` (trio's clock) counts as dead."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.until = trio.current_time() + TAKE_BACK_S
        self._over = trio.Event()
        self._error: PostcopydError | None = None

    def done(self, error: PostcopydError | None = None) -> None:
        """Notes that it was carried out, or why it was not. Only the first call counts."""
        if not self._over.is_set():
            self._error = error
            self._over.set()

    async def outcome(self) -> None:
        """Returns when it was carried out. Raises PostcopydError when it was not."""
        await self._over.wait()
        if self._error is not None:
            raise self._error


class Person:
    """What a person wants of a paused migration: that it asks the destination at once, or a
    decision. There is at most one decision at a time."""

    def __init__(self) -> None:
        self.decision: Decision | None = None
        self._spoke = trio.Event()

    def wants_it_asked(self) -> None:
        """Has the destination asked at once."""
        self._spoke.set()

    def decides(self, choice: Choice) -> Decision:
        self.decision = Decision(choice)
        self._spoke.set()
        return self.decision

    def heard(self) -> Decision | None:
        """The decision so far. `listen` waits for what a person says after this call."""
        self._spoke = trio.Event()
        return self.decision

    async def listen(self) -> None:
        await self._spoke.wait()


def still_there(name: str, peer: str, choice: Choice, said: str) -> PostcopydError:
    """The refusal of a decision about a guest whose destination may be alive."""
    what = "running it here again" if choice == "take_back" else "ending its VMM here"
    mend = (
        f"if it cannot go on there, `postcopyd resolve {name} --kill` there first, and then say "
        f"it again here"
        if choice == "take_back"
        else f"see `postcopyd status {name}`, and say it again if it is paused still"
    )
    return PostcopydError(
        f"{name}: {what} was refused, as {peer} is not known to be dead: {said}; {mend}", "Busy"
    )
