# SPDX-License-Identifier: Apache-2.0
"""The daemon that a guest was granted to, and what the word of one that knows nothing of the guest
is worth. No I/O.

Who has the guest on record is believed, whoever it is. That nothing is known of it is true of every
other daemon in the world as well: it counts only from the daemon that was granted, or from its
machine once that has restarted, as then nothing runs any more that ran there.
"""

from __future__ import annotations

from typing import Any

import msgspec

from postcopyd.errors import PostcopydError
from postcopyd.protocol import LOST, DaemonId, Hello
from postcopyd.records import schema
from postcopyd.source.decision import UNKNOWN


class Granted(msgspec.Struct, frozen=True):
    """`at` is where it was dialled, HOST[:PORT]; `daemon` is None of an older one, that has not
    said which it is."""

    at: str
    host: str = ""
    daemon: DaemonId | None = None

    @classmethod
    def greeted(cls, at: str, hello: Hello) -> Granted:
        return cls(at, hello.host, hello.daemon)

    @classmethod
    def known_again(cls, about: Any) -> Granted:
        """The one that `recorded` was written of."""
        return msgspec.convert(about, cls)

    def recorded(self) -> schema.Granted:
        """As records and intents have it."""
        found: schema.Granted = msgspec.to_builtins(self)
        return found

    def has_told(self, error: str) -> bool:
        """Whether an error of this name that was let through is of this daemon: of an older one
        nobody can tell, and silence is nobody's."""
        return error == LOST or (error in UNKNOWN and self.daemon is not None)

    def would_know(self, other: Granted) -> bool:
        """Whether a guest that `other` knows nothing of runs nowhere that this one knows."""
        granted, answers = self.daemon, other.daemon
        if granted is None or answers is None:
            return granted is None
        if granted.boot == answers.boot:
            return granted.state == answers.state
        return granted.machine == answers.machine != ""


def unknowing(vm: str, granted: Granted, other: Granted) -> PostcopydError:
    """Why the word of `other` does not count, and what to do."""
    one, two = granted.daemon, other.daemon
    if one and two and (one.machine, one.boot) == (two.machine, two.boot):
        who = f"another daemon of {granted.host}, with another --state-dir"
        mend = "start that with the --state-dir which it had"
    else:
        who = f"the postcopyd of {other.host or 'another host'}, which is not the same"
        mend = f"`postcopyd recover {vm} --to HOST` names the right host"
    return PostcopydError(
        f"{vm} was granted to the postcopyd of {granted.host} (then at {granted.at}), and at "
        f"{other.at} answers {who}: that it knows nothing of {vm} does not say that {vm} runs "
        f"nowhere; {mend}; where the one that was granted is gone for certain, stop the one that "
        f"answers before you decide",
        "OtherDaemon",
    )
