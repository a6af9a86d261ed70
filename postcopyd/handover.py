# SPDX-License-Identifier: Apache-2.0
"""Ownership of a guest, and the order of a migration, for both roles. No I/O.

Everything that decides who may run the guest is in this file, as two tables of
(state, event) -> state. An event is a message that this side sends or receives, or something that
happens to it. What the table does not have is not allowed: a `Machine` raises LocalProtocolError
for our own bug and RemoteProtocolError for the peer's. The tables do not know how messages travel
or what a VMM is.

Ownership is one token with an epoch, *held* by the source until GRANT. The source records GRANTED
before it sends the grant. From then on it never runs the guest, unless the destination says
*declined*, or a person says that the destination is dead. The destination may decline only if its
VMM has ended and no vCPU has run. The destination runs only what was granted. Between the grant and
the answer the source does not know whether the guest runs there: it waits.

A connection lost before the grant ends the migration with the guest at the source. A destination
that loses it before it has the grant ends its VMM and has declined, whatever the source may have
recorded: no vCPU has run there, and a source that has granted asks until it is told so.

A connection lost after the grant pauses the migration. The source dials again and asks (Resume);
the destination says what became of the guest. A record outlives a daemon (vm.py): the session of a
restarted daemon begins in GRANTED_LOST or RUNNING_LOST.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from postcopyd import protocol as p
from postcopyd.protocol import LocalProtocolError, RemoteProtocolError


class Source(Enum):
    """States of the source. The guest may run here unless the state is in SOURCE_GAVE_AWAY."""

    GREETING = "greeting"
    OFFERING = "offering"
    ASKED = "asked"
    CONNECTING = "connecting"
    SERVING = "serving"
    PASSING = "passing"
    SAVING = "saving"
    SAVED = "saved"
    LOADED = "loaded"
    GRANTED = "granted"
    RAN = "ran"
    DRAINED = "drained"
    CHECKED = "checked"
    DECLINED = "declined"
    ROLLED_BACK = "rolled back"
    GRANTED_LOST = "granted, connection lost"
    GRANTED_ASKS = "granted, asks"
    RAN_LOST = "ran, connection lost"
    RAN_ASKS = "ran, asks"
    TAKEN_BACK = "taken back"


class Destination(Enum):
    """States of the destination. The guest may run here only in DESTINATION_RUNS."""

    GREETING = "greeting"
    WAITING = "waiting"
    OFFERED = "offered"
    CONNECTING = "connecting"
    SERVING = "serving"
    COUNTING = "counting"
    RECEIVING = "receiving"
    LOADING = "loading"
    LOADED = "loaded"
    GRANTED = "granted"
    RUNNING = "running"
    DRAINED = "drained"
    DONE = "done"
    CHECKED = "checked"
    DECLINED = "declined"
    CALLED_OFF = "called off"
    RUNNING_LOST = "running, connection lost"
    RESUMED = "running, resumed"
    ASKED_LATER = "asked later"


class Sent:
    """Event: this side sends a message of this type. Compared by that type."""

    def __init__(self, message: type[p.Message]) -> None:
        self.message = message

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.message is self.message

    def __hash__(self) -> int:
        return hash((type(self), self.message))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message.__name__})"


class Received(Sent):
    """Event: this side receives a message of this type."""


class Happened(Enum):
    """Events that are not messages."""

    LOST = "the connection was lost"
    FAILED = "something failed here"
    MISCOUNTED = "the destination counts other pages than the guest has"
    TAKEN_BACK = "a person says that the destination is certainly dead"


State = Source | Destination
Event = Sent | Received | Happened

_ERROR = Received(p.Error)
_SOURCE_GIVES_UP: dict[Event, Source] = {
    _ERROR: Source.ROLLED_BACK,
    Sent(p.Cancel): Source.ROLLED_BACK,
    Sent(p.Error): Source.ROLLED_BACK,
    Happened.LOST: Source.ROLLED_BACK,
    Happened.FAILED: Source.ROLLED_BACK,
}

SOURCE: Mapping[Source, Mapping[Event, Source]] = {
    Source.GREETING: {Received(p.Hello): Source.OFFERING, **_SOURCE_GIVES_UP},
    Source.OFFERING: {
        Sent(p.Offer): Source.ASKED,
        Sent(p.Resume): Source.ASKED,  # only looks
        **_SOURCE_GIVES_UP,
    },
    Source.ASKED: {
        Received(p.Checked): Source.CHECKED,
        Received(p.Queued): Source.ASKED,
        Received(p.Ready): Source.CONNECTING,
        **_SOURCE_GIVES_UP,
    },
    Source.CONNECTING: {Received(p.Serving): Source.SERVING, **_SOURCE_GIVES_UP},
    Source.SERVING: {
        Sent(p.Pass): Source.PASSING,
        Sent(p.Handover): Source.SAVING,
        **_SOURCE_GIVES_UP,
    },
    Source.PASSING: {Received(p.Passed): Source.SERVING, **_SOURCE_GIVES_UP},
    Source.SAVING: {
        Sent(p.Device): Source.SAVING,
        Sent(p.Stale): Source.SAVING,
        Sent(p.DeviceEnd): Source.SAVED,
        **_SOURCE_GIVES_UP,
    },
    Source.SAVED: {
        Received(p.Serving): Source.SAVED,
        Received(p.Loaded): Source.LOADED,
        **_SOURCE_GIVES_UP,
    },
    Source.LOADED: {Sent(p.Grant): Source.GRANTED, **_SOURCE_GIVES_UP},
    Source.GRANTED: {
        Received(p.Ran): Source.RAN,
        Received(p.Declined): Source.DECLINED,
        _ERROR: Source.GRANTED_LOST,
        Happened.LOST: Source.GRANTED_LOST,
        Happened.FAILED: Source.GRANTED_LOST,
    },
    Source.RAN: {
        Received(p.Have): Source.RAN,
        Received(p.Serving): Source.RAN,
        Received(p.Progress): Source.RAN,
        Received(p.Drained): Source.DRAINED,
        _ERROR: Source.RAN_LOST,
        Happened.LOST: Source.RAN_LOST,
        Happened.FAILED: Source.RAN_LOST,
    },
    Source.DRAINED: {
        Sent(p.Acknowledged): Source.DRAINED,
        Happened.MISCOUNTED: Source.RAN_LOST,
        Happened.LOST: Source.DRAINED,
        Happened.FAILED: Source.DRAINED,
    },
    Source.CHECKED: {Happened.LOST: Source.CHECKED, Happened.FAILED: Source.CHECKED},
    Source.DECLINED: {Happened.LOST: Source.DECLINED, Happened.FAILED: Source.DECLINED},
    Source.ROLLED_BACK: {
        Sent(p.Cancel): Source.ROLLED_BACK,
        Sent(p.Error): Source.ROLLED_BACK,
        Happened.LOST: Source.ROLLED_BACK,
        Happened.FAILED: Source.ROLLED_BACK,
    },
    Source.GRANTED_LOST: {
        Received(p.Hello): Source.GRANTED_LOST,
        Sent(p.Resume): Source.GRANTED_ASKS,
        Happened.TAKEN_BACK: Source.TAKEN_BACK,
        _ERROR: Source.GRANTED_LOST,
        Happened.LOST: Source.GRANTED_LOST,
        Happened.FAILED: Source.GRANTED_LOST,
    },
    Source.GRANTED_ASKS: {
        Received(p.Ready): Source.GRANTED_ASKS,
        Received(p.Ran): Source.RAN,
        Received(p.Declined): Source.DECLINED,
        Received(p.Drained): Source.DRAINED,
        _ERROR: Source.GRANTED_LOST,
        Happened.LOST: Source.GRANTED_LOST,
        Happened.FAILED: Source.GRANTED_LOST,
    },
    Source.RAN_LOST: {
        Received(p.Hello): Source.RAN_LOST,
        Sent(p.Resume): Source.RAN_ASKS,
        Happened.TAKEN_BACK: Source.TAKEN_BACK,
        _ERROR: Source.RAN_LOST,
        Happened.LOST: Source.RAN_LOST,
        Happened.FAILED: Source.RAN_LOST,
    },
    Source.RAN_ASKS: {
        Received(p.Ready): Source.RAN_ASKS,
        Received(p.Ran): Source.RAN,
        Received(p.Drained): Source.DRAINED,
        _ERROR: Source.RAN_LOST,
        Happened.LOST: Source.RAN_LOST,
        Happened.FAILED: Source.RAN_LOST,
    },
    Source.TAKEN_BACK: {Happened.LOST: Source.TAKEN_BACK, Happened.FAILED: Source.TAKEN_BACK},
}

_DESTINATION_LETS_GO: dict[Event, Destination] = {
    Received(p.Cancel): Destination.CALLED_OFF,
    _ERROR: Destination.CALLED_OFF,
    Sent(p.Error): Destination.CALLED_OFF,
    Happened.LOST: Destination.CALLED_OFF,
    Happened.FAILED: Destination.CALLED_OFF,
}

DESTINATION: Mapping[Destination, Mapping[Event, Destination]] = {
    Destination.GREETING: {Received(p.Hello): Destination.WAITING, **_DESTINATION_LETS_GO},
    Destination.WAITING: {
        Received(p.Offer): Destination.OFFERED,
        Received(p.Resume): Destination.ASKED_LATER,
        **_DESTINATION_LETS_GO,
    },
    Destination.OFFERED: {
        Sent(p.Checked): Destination.CHECKED,
        Sent(p.Queued): Destination.OFFERED,
        Sent(p.Ready): Destination.CONNECTING,
        **_DESTINATION_LETS_GO,
    },
    Destination.CONNECTING: {Sent(p.Serving): Destination.SERVING, **_DESTINATION_LETS_GO},
    Destination.SERVING: {
        Received(p.Pass): Destination.COUNTING,
        Received(p.Handover): Destination.RECEIVING,
        **_DESTINATION_LETS_GO,
    },
    Destination.COUNTING: {Sent(p.Passed): Destination.SERVING, **_DESTINATION_LETS_GO},
    Destination.RECEIVING: {
        Received(p.Device): Destination.RECEIVING,
        Received(p.Stale): Destination.RECEIVING,
        Received(p.DeviceEnd): Destination.LOADING,
        **_DESTINATION_LETS_GO,
    },
    Destination.LOADING: {
        Sent(p.Serving): Destination.LOADING,
        Sent(p.Loaded): Destination.LOADED,
        **_DESTINATION_LETS_GO,
    },
    Destination.LOADED: {Received(p.Grant): Destination.GRANTED, **_DESTINATION_LETS_GO},
    Destination.GRANTED: {
        Sent(p.Ran): Destination.RUNNING,
        Sent(p.Declined): Destination.DECLINED,
        # The guest may run: a destination whose VMM did not answer `run` must not decline any more.
        _ERROR: Destination.RUNNING_LOST,
        Happened.LOST: Destination.RUNNING_LOST,
        Happened.FAILED: Destination.RUNNING_LOST,
    },
    Destination.RUNNING: {
        Sent(p.Have): Destination.RUNNING,
        Sent(p.Serving): Destination.RUNNING,
        Sent(p.Progress): Destination.RUNNING,
        Sent(p.Drained): Destination.DRAINED,
        _ERROR: Destination.RUNNING_LOST,
        Happened.LOST: Destination.RUNNING_LOST,
        Happened.FAILED: Destination.RUNNING_LOST,
    },
    # All of the guest is here: whatever happens to the connection, the migration is done.
    Destination.DRAINED: {
        Received(p.Acknowledged): Destination.DONE,
        _ERROR: Destination.DONE,
        Happened.LOST: Destination.DONE,
        Happened.FAILED: Destination.DONE,
    },
    Destination.DONE: {Happened.LOST: Destination.DONE, Happened.FAILED: Destination.DONE},
    Destination.CHECKED: {
        Happened.LOST: Destination.CHECKED,
        Happened.FAILED: Destination.CHECKED,
    },
    Destination.DECLINED: {
        Happened.LOST: Destination.DECLINED,
        Happened.FAILED: Destination.DECLINED,
    },
    Destination.CALLED_OFF: {
        Sent(p.Error): Destination.CALLED_OFF,
        Happened.LOST: Destination.CALLED_OFF,
        Happened.FAILED: Destination.CALLED_OFF,
    },
    Destination.RUNNING_LOST: {
        Received(p.Resume): Destination.RESUMED,
        # All pages had come already when the connection was lost.
        Sent(p.Drained): Destination.DRAINED,
        Happened.LOST: Destination.RUNNING_LOST,
        Happened.FAILED: Destination.RUNNING_LOST,
    },
    Destination.RESUMED: {
        Sent(p.Ready): Destination.RESUMED,
        Sent(p.Ran): Destination.RUNNING,
        _ERROR: Destination.RUNNING_LOST,
        Happened.LOST: Destination.RUNNING_LOST,
        Happened.FAILED: Destination.RUNNING_LOST,
    },
    # A connection that only asks. The answer was decided, and recorded, before.
    Destination.ASKED_LATER: {
        Sent(p.Checked): Destination.CHECKED,
        Sent(p.Drained): Destination.DRAINED,
        Sent(p.Declined): Destination.DECLINED,
        Sent(p.Error): Destination.CALLED_OFF,
        _ERROR: Destination.CALLED_OFF,
        Happened.LOST: Destination.CALLED_OFF,
        Happened.FAILED: Destination.CALLED_OFF,
    },
}

TABLES: Mapping[type[State], Mapping[Any, Mapping[Event, State]]] = {
    Source: SOURCE,
    Destination: DESTINATION,
}

SOURCE_GAVE_AWAY = frozenset(
    {
        Source.GRANTED,
        Source.GRANTED_LOST,
        Source.GRANTED_ASKS,
        Source.RAN,
        Source.RAN_LOST,
        Source.RAN_ASKS,
        Source.DRAINED,
    }
)
"""States in which the source never runs the guest."""

DESTINATION_RUNS = frozenset(
    {
        Destination.GRANTED,
        Destination.RUNNING,
        Destination.RUNNING_LOST,
        Destination.RESUMED,
        Destination.DRAINED,
        Destination.DONE,
    }
)
"""States in which the destination may run the guest, and must not end its VMM by itself."""


class Machine:
    """One side of one migration. Owned by its session, which tells it of every event first.

    `state` is the state; `went` has each state that was entered, for logs and tests.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.went: list[State] = [state]

    @property
    def gave_away(self) -> bool:
        return self.state in SOURCE_GAVE_AWAY

    def sending(self, message: p.Message) -> None:
        """Call it before sending. Raises LocalProtocolError if the message must not be sent now."""
        if not isinstance(message, p.Hello | p.Keepalive):
            self._go(Sent(type(message)), LocalProtocolError, "would send")

    def received(self, message: p.Message) -> None:
        """Call it on each message. Raises RemoteProtocolError if the message must not come now."""
        if not isinstance(message, p.Keepalive):
            self._go(Received(type(message)), RemoteProtocolError, "received")

    def happened(self, event: Happened) -> None:
        self._go(event, LocalProtocolError, "met")

    def _go(
        self, event: Event, error: type[LocalProtocolError | RemoteProtocolError], verb: str
    ) -> None:
        after = TABLES[type(self.state)][self.state].get(event)
        if after is None:
            what = event.message.__name__ if isinstance(event, Sent) else event.value
            raise error(
                f"the {type(self.state).__name__.lower()} {verb} {what!r}, which is not possible "
                f"while it is {self.state.value!r}"
            )
        if after is not self.state:
            self.went.append(after)
        self.state = after
