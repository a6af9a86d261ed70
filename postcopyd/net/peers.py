# SPDX-License-Identifier: Apache-2.0
"""Connections from other daemons: who stands at the door, who has a place, who has to go.

A connection stands at the door until it has shown who it is, with TLS, and has said what it wants.
The door has few places, and nobody can keep others out there: when it is full one has to go, of the
address that has most of them, the one that came first. Who is known (an address that had a place
before) goes last. Who was let in has one of `max-peers` places; a source that asks after a guest of
this host has one always.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import trio

from postcopyd.errors import PostcopydError

DOOR = 64
"""Connections at the door. With TLS one stands there for some round trips."""

KNOWN = 1024
"""Addresses that are remembered, the last ones."""


class Visitor:
    """One connection, from when it is accepted until it is served."""

    def __init__(self, peers: Peers, address: str) -> None:
        self._peers = peers
        self.net = net(address)
        self.scope = trio.CancelScope()
        """Of its task; cancelled when it has to go."""

    def let_in(self, *, always: bool = False) -> None:
        """It has shown who it is, and wants something. Raises PostcopydError when all places are
        taken, unless it is to have one `always`."""
        self._peers.let_in(self, always)


class Peers:
    """All of them. Counts; closes nothing itself."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._door: dict[Visitor, None] = {}  # in the order that they came
        self._places: set[Visitor] = set()
        self._aside = 0
        self._known: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._door) + len(self._places)

    @contextmanager
    def visit(self, address: str) -> Iterator[Visitor]:
        """For the life of a connection."""
        visitor = Visitor(self, address)
        if len(self._door) >= DOOR:
            goes = self._who_goes()
            del self._door[goes]
            goes.scope.cancel()
        self._door[visitor] = None
        try:
            yield visitor
        finally:
            self._door.pop(visitor, None)
            self._places.discard(visitor)

    def _who_goes(self) -> Visitor:
        count = Counter(visitor.net for visitor in self._door)
        # The first of equals: max takes that, and they are in the order that they came.
        return max(self._door, key=lambda one: (one.net not in self._known, count[one.net]))

    def let_in(self, visitor: Visitor, always: bool) -> None:
        if visitor not in self._door:
            raise PostcopydError("too many others connected at the same time: try again", "Busy")
        if len(self._places) - self._aside >= self.most and not always:
            raise PostcopydError(
                f"the destination speaks with {self.most} other daemons, and max-peers in its "
                f"configuration lets it speak with no more at a time: try again later, or raise it",
                "Busy",
            )
        del self._door[visitor]
        self._places.add(visitor)
        self._known.pop(visitor.net, None)
        self._known[visitor.net] = None
        if len(self._known) > KNOWN:
            del self._known[next(iter(self._known))]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The connection of an arrival that waits for its turn keeps no other one out."""
        self._aside += 1
        try:
            yield
        finally:
            self._aside -= 1


def net(address: str) -> str:
    """The part of an address that one host cannot choose: all of IPv4, the network of IPv6."""
    found = ip_address(address.partition("%")[0])
    return str(found) if found.version == 4 else found.exploded[:19]
