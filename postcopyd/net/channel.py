# SPDX-License-Identifier: Apache-2.0
"""A control connection: sends and receives messages, sends keepalives, notices when it breaks.

Owns its stream until `aclose`. The state machine that it is given (handover.py) says which message
may come when; it knows nothing else of migrations. connection.py dials and sets up TLS.
"""

from __future__ import annotations

import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import trio

from postcopyd import __version__
from postcopyd import protocol as p
from postcopyd.config.options import DEFAULT_PORT
from postcopyd.errors import PostcopydError
from postcopyd.handover import Machine
from postcopyd.net import tls
from postcopyd.net.codec import Codec, other_program, pack, parse_message
from postcopyd.protocol import RemoteProtocolError
from postcopyd.tasks.nursery import open_nursery

M = TypeVar("M", bound=p.Message)

CONNECT_S = 10.0
"""Limit for connecting and for greeting: a host that is up answers within milliseconds."""

GOODBYE_S = 0.2
"""How long saying the end of a connection may take: close_notify, with TLS."""

BUFFER = 256 << 10
"""Bytes taken from the socket at a time: several pieces of device state."""


class ConnectionLost(PostcopydError):
    """The peer, or the way to it, is gone."""

    name = tls.LOST


class PeerError(PostcopydError):
    """The peer reports an error on its side; `name` is the name that it gave."""


class NotTrusted(ConnectionLost):
    """The peer ended TLS for a reason that time alone does not mend."""

    name = "TlsFailed"


class Channel:
    """A control connection; the state machine is told of each message first.

    One task receives; any may send. `receive` raises ConnectionLost when the peer is gone or has
    been silent for DEAD_S, PeerError when it sends Error, RemoteProtocolError when it breaks the
    protocol. Keepalives are sent within `alive`. `names` are those of the peer's certificate.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        machine: Machine,
        peer: str,
        names: tls.Names = (),
        *,
        instance: str = "",
        daemon: p.DaemonId | None = None,
    ) -> None:
        self._stream = stream
        self._instance = instance
        self._daemon = daemon
        self._first: bytes | None = b""  # the first bytes received; None after the first message
        self.machine = machine
        self.peer = peer
        self.names = names
        self.features: frozenset[str] = frozenset()  # those that both sides have
        self._codec = Codec(first=p.MAX_FIRST)
        self._sending = trio.Lock()
        self._last_sent = trio.current_time()
        self._objects: list[Any] = []
        self._torn = False

    async def send(self, message: p.Message, within: float = p.DEAD_S) -> None:
        """Tells the state machine and sends, within so many seconds. Raises ConnectionLost."""
        self.machine.sending(message)
        await self._send(pack(message), within)

    async def _send(self, data: bytes, within: float = p.DEAD_S) -> None:
        try:
            async with self._sending:
                if self._torn:
                    raise ConnectionLost(f"a message to {self.peer} was cut short")
                self._last_sent = trio.current_time()
                # A message goes out whole even if the task is cancelled: half of one tears it.
                with trio.move_on_after(within) as whole:
                    whole.shield = True
                    await self._stream.send_all(data)
                self._torn = whole.cancelled_caught
                if self._torn:
                    raise ConnectionLost(f"{self.peer} has taken nothing for {within:.0f} s")
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost(f"sending to {self.peer}: {error.__cause__ or error}") from None

    async def receive(self, within: float = math.inf) -> p.Message:
        """The next message that is not a keepalive. Raises ConnectionLost if none comes `within` so
        many seconds: a peer that only sends keepalives must not hold up the caller for ever."""
        with trio.move_on_after(within):
            while True:
                try:
                    message = parse_message(await self._next_object())
                except RemoteProtocolError as error:
                    if what := other_program(self._first or b"", tls=False):
                        raise somebody_else(self.peer, what) from None
                    raise RemoteProtocolError(f"speaking with {self.peer}: {error}") from None
                self._first = None
                self.machine.received(message)
                if isinstance(message, p.Error):
                    raise PeerError(f"{self.peer} said: {message.message}", message.name)
                if not isinstance(message, p.Keepalive):
                    return message
                await trio.lowlevel.checkpoint()  # one read may bring thousands of keepalives
        raise ConnectionLost(f"{self.peer} has not said within {within:.0f} s what it wants")

    async def expect(self, kind: type[M], within: float = math.inf) -> M:
        """The next message; the state machine allows only this kind here."""
        message = await self.receive(within)
        if not isinstance(message, kind):
            raise RemoteProtocolError(
                f"{self.peer} sent {type(message).__name__} where {kind.__name__} was due"
            )
        return message

    async def _next_object(self) -> Any:
        # For a whole message, as the peer sends one in that time: endless bytes are no life sign.
        deadline = trio.current_time() + p.DEAD_S
        while not self._objects:
            try:
                with trio.fail_at(deadline):
                    data = await self._stream.receive_some(min(BUFFER, self._codec.room))
            except trio.TooSlowError:
                raise ConnectionLost(f"{self.peer} has said nothing for {p.DEAD_S:.0f} s") from None
            except trio.ClosedResourceError:
                raise ConnectionLost(f"the connection to {self.peer} was closed here") from None
            except trio.BrokenResourceError as error:
                if tls.refusal(error):
                    raise NotTrusted(tls.explain(error, self.peer)) from None
                raise ConnectionLost(
                    f"the connection to {self.peer} broke: {error.__cause__ or error}"
                ) from None
            if not data:
                raise ConnectionLost(f"{self.peer} closed the connection")
            if self._first is not None:
                self._first += bytes(data[:64])
            self._codec.feed(bytes(data))
            self._objects.extend(self._codec.objects())
        return self._objects.pop(0)

    async def greet(self) -> p.Hello:
        """Exchanges hellos. Raises PostcopydError when the peer is of another version."""
        await self.send(
            p.Hello(
                version=p.VERSION,
                features=sorted(p.FEATURES),
                software=f"postcopyd {__version__}",
                host=socket.gethostname(),
                instance=self._instance,
                daemon=self._daemon,
            )
        )
        hello = await self.expect(p.Hello, CONNECT_S)
        check_hello(hello)
        if self._instance and hello.instance == self._instance:
            raise PostcopydError(
                f"{self.peer} is this daemon itself: name the host that the guest is to move to",
                "Refused",
            )
        self.features = p.FEATURES.intersection(hello.features)
        return hello

    async def tell_error(self, error: Exception) -> None:
        """Tells the peer why this side ends, as far as it still can; never raises."""
        name = error.name if isinstance(error, PostcopydError) else "InternalError"
        with trio.move_on_after(1) as scope, suppress(PostcopydError):
            scope.shield = True
            await self.send(p.Error(name=name, message=p.sentence(str(error))), within=1)

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """Sends keepalives while the body runs."""
        async with open_nursery() as nursery:
            nursery.start_soon(self._keepalive)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()

    async def _keepalive(self) -> None:
        while True:
            due = self._last_sent + p.KEEPALIVE_S
            if trio.current_time() < due:
                await trio.sleep_until(due)
            else:
                try:
                    await self._send(pack(p.Keepalive()))
                except ConnectionLost:
                    return  # the task that receives sees it too

    async def aclose(self) -> None:
        """Closes the connection, with close_notify under TLS; does not wait for the peer."""
        with trio.move_on_after(GOODBYE_S) as scope:
            scope.shield = True
            await self._stream.aclose()

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class Nobody(trio.abc.Stream):
    """The stream of a channel whose peer has not connected."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        raise trio.ClosedResourceError("it has not connected")

    async def wait_send_all_might_not_block(self) -> None:
        raise trio.ClosedResourceError("it has not connected")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        raise trio.ClosedResourceError("it has not connected")

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def somebody_else(peer: str, what: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"speaking with {peer}: {what} is there, and not postcopyd: give the port of `postcopyd "
        f"serve`, {DEFAULT_PORT} by default",
        "PeerUnreachable",
    )


def check_hello(hello: p.Hello) -> None:
    """Raises PostcopydError when the peer speaks another version."""
    if hello.version == p.VERSION:
        return
    which, older = (
        ("newer", "this host's") if hello.version > p.VERSION else ("older", "that host's")
    )
    raise PostcopydError(
        f"the peer {hello.host or ''} ({hello.software or 'unknown software'}) speaks protocol "
        f"version {hello.version}, which is {which} than version {p.VERSION} here: "
        f"upgrade {older} postcopyd",
        "VersionMismatch",
    )
