# SPDX-License-Identifier: Apache-2.0
"""The destination as the source reaches it: its address, its identity, and the connections to it.

Owns the control channel, one at a time: the previous one is closed before the next is made. The
phases borrow it. `session.py` closes the last one, when everything has been said. A data connection
belongs to the engine as soon as it is made.
"""

from __future__ import annotations

from contextlib import suppress

from postcopyd import protocol as p
from postcopyd.errors import PostcopydError
from postcopyd.handover import Machine, Source
from postcopyd.net.channel import Channel, PeerError
from postcopyd.net.connection import dial_control, dial_data
from postcopyd.net.tls import Names, same_peer
from postcopyd.sessions.shared import Shared
from postcopyd.source.decision import SILENT, UNKNOWN
from postcopyd.source.engine import SourceEngine
from postcopyd.source.granted import Granted, unknowing


class Peer:
    """`to` is the address to dial, which a person may change. `identity` has the names of its
    certificate, which every later connection must match. `granted` is the daemon that the guest
    goes to, `answers` the one that was greeted last."""

    def __init__(self, to: str, vm: str, machine: Machine, shared: Shared) -> None:
        self.to = to
        self.identity: Names = ()
        self.granted = self.answers = Granted(to)
        self._vm = vm
        self._machine = machine
        self._shared = shared
        self._channel: Channel | None = None

    async def greeted(self) -> Channel:
        """Dials the destination: a peer that may receive guests, and later the same peer again.
        Raises PostcopydError."""
        to = self.to  # a person may change it meanwhile
        channel = self._channel = await dial_control(to, self._machine, self._shared)
        if self._shared.tls is not None and not self.identity:
            self._shared.tls.allow(channel.names, "receive")
        same_peer(self.identity, channel.names, self._vm)
        self.identity = self.identity or channel.names
        self.answers = Granted.greeted(to, await channel.greet())
        return channel

    async def connect(
        self, channel: Channel, engine: SourceEngine, migration: str, token: bytes
    ) -> None:
        """Makes the data connections: one urgent, the others for pushing. Raises PostcopydError."""
        engine.tell_losses(p.LOSSES in channel.features)
        for urgent in (True, *[False] * self._shared.connections):
            wire = await dial_data(self.to, self._shared, migration, token, urgent=urgent)
            engine.connect(wire.fd, tls=wire.tls, urgent=urgent)

    async def told(self, channel: Channel) -> p.Message:
        """Receives what became of the guest. "Nothing is known of it" counts only from a daemon
        that would know. Raises PostcopydError."""
        try:
            return await channel.receive()
        except PeerError as error:
            if error.name in UNKNOWN and not self.granted.would_know(self.answers):
                raise unknowing(self._vm, self.granted, self.answers) from None
            raise

    async def where_granted(self) -> str:
        """Asks at the address where the guest was granted, as a person may have given a wrong one
        since (`recover`). Returns why the destination may be alive there; empty if it is silent."""
        at, name = self.granted.at, self._vm
        if at == self.to:
            return ""
        try:
            async with await dial_control(at, Machine(Source.GREETING), self._shared) as channel:
                answers = Granted.greeted(at, await channel.greet())
        except PostcopydError as error:
            return "" if error.name in SILENT else f"where {name} was granted: {error}"
        if not self.granted.would_know(answers):
            return ""
        return f"it answers at {at}, and `postcopyd recover {name} --to {at}` asks it there"

    async def tell_end(self, error: PostcopydError) -> None:
        """Tells the destination why the migration is over. Does not raise if that fails."""
        if self._channel is None:
            return
        if error.name != "Cancelled":
            await self._channel.tell_error(error)
            return
        with suppress(PostcopydError):
            await self._channel.send(p.Cancel(p.sentence(str(error))), within=1)

    async def aclose(self) -> None:
        """Closes the control channel. Idempotent."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.aclose()
