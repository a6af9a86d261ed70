# SPDX-License-Identifier: Apache-2.0
"""Which daemon a guest was granted to, and whether to believe a daemon that knows nothing of the
guest. No I/O.

A daemon that has the guest on record is believed, whichever it is. But every other daemon in the
world knows nothing of the guest either. So that answer counts only from the daemon that the guest
was granted to, or from its machine after a reboot, as then nothing runs any more that ran there.
"""

from __future__ import annotations

from typing import Any

import msgspec

from postcopyd.errors import PostcopydError
from postcopyd.protocol import LOST, DaemonId, Hello
from postcopyd.records import schema
from postcopyd.source.decision import UNKNOWN


class Granted(msgspec.Struct, frozen=True):
    """`at` is the address where the daemon was dialled, HOST[:PORT]. `daemon` is None for an older
    version, which does not say which daemon it is."""

    at: str
    host: str = ""
    daemon: DaemonId | None = None

    @classmethod
    def greeted(cls, at: str, hello: Hello) -> Granted:
        return cls(at, hello.host, hello.daemon)

    @classmethod
    def of_record(cls, about: Any) -> Granted:
        """The inverse of `recorded`."""
        return msgspec.convert(about, cls)

    def recorded(self) -> schema.Granted:
        """The form that records and intents have."""
        found: schema.Granted = msgspec.to_builtins(self)
        return found

    def has_told(self, error: str) -> bool:
        """Whether an error of this name, which `Peer.told` has let through, certainly came from
        this daemon. An older version cannot be told from others, and silence proves nothing."""
        return error == LOST or (error in UNKNOWN and self.daemon is not None)

    def would_know(self, other: Granted) -> bool:
        """Whether `other` would know the guest if it still ran where it was granted: `other` is
        this daemon, or runs on its machine after a reboot. True for an older version, as nobody
        can tell."""
        granted, answers = self.daemon, other.daemon
        if granted is None or answers is None:
            return granted is None
        if granted.boot == answers.boot:
            return granted.state == answers.state
        return granted.machine == answers.machine != ""


def unknowing(vm: str, granted: Granted, other: Granted) -> PostcopydError:
    """The error that says why the answer of `other` does not count, and what to do."""
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
