# SPDX-License-Identifier: Apache-2.0
"""Places for connections from other daemons: which stand at the door, which get in, which must go.

A connection stands at the door until it has shown who it is, with TLS, and has said what it wants.
The door has few places, but nobody can keep others out: when it is full, one connection must go. It
is the oldest of the address that has most of them; addresses that had a place before go last. A
connection that is let in has one of `max-peers` places. A source that asks about a guest of this
host always gets one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import trio

from postcopyd.errors import PostcopydError

DOOR = 64
"""Connections at the door. With TLS a connection stands there for some round trips."""

KNOWN = 1024
"""Addresses that are remembered, the last ones."""


class Visitor:
    """One connection, from its acceptance until it is served."""

    def __init__(self, peers: Peers, address: str) -> None:
        self._peers = peers
        self.net = net(address)
        self.scope = trio.CancelScope()
        """The scope of its task; cancelled when the connection must go."""

    def let_in(self, *, always: bool = False) -> None:
        """Gives the connection a place: it has shown who it is and what it wants. Raises
        PostcopydError when all places are taken, unless it gets one `always`."""
        self._peers.let_in(self, always)


class Peers:
    """All connections from other daemons. Counts them; closes none itself."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._door: dict[Visitor, None] = {}  # in order of arrival
        self._places: set[Visitor] = set()
        self._aside = 0
        self._known: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._door) + len(self._places)

    @contextmanager
    def visit(self, address: str) -> Iterator[Visitor]:
        """Counts a connection for as long as it lives."""
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
        # max() takes the first of equals, which is the oldest.
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
        """While an arrival waits for its turn, its connection takes no place."""
        self._aside += 1
        try:
            yield
        finally:
            self._aside -= 1


def net(address: str) -> str:
    """The part of an address that one host cannot choose: all of IPv4, the network of IPv6."""
    found = ip_address(address.partition("%")[0])
    return str(found) if found.version == 4 else found.exploded[:19]
