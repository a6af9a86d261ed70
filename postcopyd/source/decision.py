# SPDX-License-Identifier: Apache-2.0
"""What a person has decided about a departure that is paused, and what came of it. No I/O.

The session looks at it between two attempts to ask the destination, never in the middle of one: a
destination that answers just then has the last word. Whoever asked waits for the outcome, so that
nobody is told of a success that was none.
"""

from __future__ import annotations

from typing import Literal

import trio

from postcopyd.errors import PostcopydError
from postcopyd.protocol import LOST

TAKE_BACK_S = 10.0
"""How long a destination that a person calls dead is asked all the same before its guest is run
here: a daemon that is only started again says nothing for a second or two."""

UNKNOWN = frozenset({"NotMigrating", "NoSuchVm"})
"""Names of errors by which a destination says that it knows nothing of the guest."""

GIVEN_UP = UNKNOWN | {LOST}
"""Names of errors by which a destination says that it has nothing of the guest any more. Any other
word of it shows that it is not dead."""

SILENT = frozenset({"PeerUnreachable", "ConnectionLost"})
"""Names of errors of an attempt in which nothing was heard. Of others too a destination may be
alive: one that is not trusted, one that could not be asked for want of descriptors here."""

Choice = Literal["kill", "take_back"]


class Decision:
    """`until`: a destination that has said nothing by then, on the clock of trio, is dead."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.until = trio.current_time() + TAKE_BACK_S
        self._over = trio.Event()
        self._error: PostcopydError | None = None

    def done(self, error: PostcopydError | None = None) -> None:
        """It was carried out, or why not. The first word counts."""
        if not self._over.is_set():
            self._error = error
            self._over.set()

    async def outcome(self) -> None:
        """Returns when it was carried out. Raises PostcopydError when it was not."""
        await self._over.wait()
        if self._error is not None:
            raise self._error


class Person:
    """What a person has said to a migration that is paused: to ask at once, or a decision. There is
    one decision at a time."""

    def __init__(self) -> None:
        self.decision: Decision | None = None
        self._spoke = trio.Event()

    def wants_it_asked(self) -> None:
        """The destination, at once."""
        self._spoke.set()

    def decides(self, choice: Choice) -> Decision:
        self.decision = Decision(choice)
        self._spoke.set()
        return self.decision

    def heard(self) -> Decision | None:
        """What is decided so far; `listen` waits for what is said from here on."""
        self._spoke = trio.Event()
        return self.decision

    async def listen(self) -> None:
        await self._spoke.wait()


def still_there(name: str, peer: str, choice: Choice, said: str) -> PostcopydError:
    """Why a guest is not decided about whose destination may live."""
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
