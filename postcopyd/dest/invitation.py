# SPDX-License-Identifier: Apache-2.0
"""The data connections of one control connection, which the source may make after `ready`.

Owns the token that each of them shows, which is valid for this control connection only. Owns a data
connection from when it is let in until the engine takes it. The daemon brings data connections that
name the migration. The session takes the invitation back (`withdraw`) when the control connection
or the engine is over, and sends another one for the next.
"""

from __future__ import annotations

import hmac
import secrets

import trio

from postcopyd import protocol as p
from postcopyd.dest.engine import DestinationEngine
from postcopyd.dest.migration import Migration
from postcopyd.errors import PostcopydError
from postcopyd.net.codec import pack
from postcopyd.net.connection import Wire, detach, detach_keyed
from postcopyd.protocol import RemoteProtocolError
from postcopyd.tasks.nursery import open_nursery

CONNECTIONS_S = 30.0
"""How long the source may take to make its data connections; they take milliseconds."""


class Invitation:
    """`token` is 32 random bytes that only the source is told."""

    def __init__(self, m: Migration, engine: DestinationEngine) -> None:
        self.token = secrets.token_bytes(32)
        self._engine = engine
        self._channel = m.channel
        self._secure = m.shared.tls is not None
        self._lacking = [True, *[False] * m.offer.connections]  # urgent or not
        self._made = trio.Event()
        self._withdrawn = False

    async def send(self) -> None:
        await self._channel.send(p.Ready(self.token))

    async def taken_up(self) -> None:
        """Returns when all data connections are there. Raises PostcopydError, also if one is lost
        meanwhile."""
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(self._engine.watch)
                with trio.fail_after(CONNECTIONS_S):
                    await self._made.wait()
                nursery.cancel_scope.cancel()
        except trio.TooSlowError:
            raise PostcopydError(
                f"{self._channel.peer} made no data connections within {CONNECTIONS_S:.0f} s",
                "ConnectionLost",
            ) from None

    def withdraw(self) -> None:
        self._withdrawn = True

    async def take(self, stream: trio.SocketStream, hello: p.DataHello) -> None:
        """Takes a data connection that names this migration. Raises PostcopydError, OSError."""
        if not hmac.compare_digest(hello.token, b"" if self._secure else self.token):
            raise wrong_token(hello)
        if hello.urgent not in self._lacking:
            raise RemoteProtocolError(
                f"a data connection too many came for migration {hello.migration}"
            )
        await stream.send_all(pack(p.DataWelcome(hello.migration)))
        try:
            if self._secure:  # takes no place until it has shown that it has the key
                wire = await detach_keyed(stream, self.token, hello, server=True)
            else:
                wire = Wire(detach(stream))
        except OSError:
            await self._channel.aclose()  # or each side would wait for the other
            raise
        if self._withdrawn or hello.urgent not in self._lacking:
            wire.close()  # called off or lost meanwhile, or another was faster
            return
        self._lacking.remove(hello.urgent)
        self._engine.connect(wire.fd, tls=wire.tls, urgent=hello.urgent)
        if not self._lacking:
            self._made.set()


def wrong_token(hello: p.DataHello) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"a data connection named migration {hello.migration} with a wrong token"
    )
