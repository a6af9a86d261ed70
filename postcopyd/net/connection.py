# SPDX-License-Identifier: Apache-2.0
"""Every connection between two daemons is made here, and the control connection is driven here.

Owns sockets until they are closed or, for data connections, given away to a native engine with
`detach`. Knows the first bytes of a connection and how messages become bytes (protocol.py); knows
nothing of migrations. TLS (tls.py) goes between the kind of a connection and its first message, or
its first frame.
"""

from __future__ import annotations

import math
import os
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import trio

from postcopyd import __version__
from postcopyd import protocol as p
from postcopyd._native import lib
from postcopyd.config.options import DEFAULT_PORT, Address, Peer, parse_address
from postcopyd.errors import NoResources, PostcopydError, shortage
from postcopyd.handover import Machine
from postcopyd.net import tls
from postcopyd.net.resolver import RESOLVER
from postcopyd.protocol import Codec, RemoteProtocolError

M = TypeVar("M", bound=p.Message)

CONNECT_S = 10.0
"""How long connecting and greeting may take: a host that is up answers within milliseconds."""

FAREWELL_S = 1.0
"""How long a peer may take to read why its connection was refused."""

GOODBYE_S = 0.2
"""How long the end of a connection may take to be said: close_notify, with TLS."""

BUFFER = 256 << 10
"""Bytes taken from the control socket at a time: several pieces of device state."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """This daemon as its peers see it, and what it knows of them."""

    tls: tls.Tls | None = None
    """None where `--tls off` was said."""
    peers: tuple[Peer, ...] = ()
    instance: str = field(default_factory=lambda: secrets.token_hex(8))
    """Of this start of the daemon."""
    daemon: p.DaemonId | None = None
    """Through all of its starts."""


class ConnectionLost(PostcopydError):
    """The peer went away, or the way to it."""

    name = tls.LOST


class PeerError(PostcopydError):
    """The peer said what went wrong on its side; `name` is the name it gave."""


class NotTrusted(ConnectionLost):
    """The peer ended TLS for a reason that time alone does not mend."""

    name = "TlsFailed"


def peer_of(to: str, us: Endpoint) -> tuple[Address, str]:
    """Where `to` (HOST[:PORT], or a name of [peers]) is dialled, and the name that its certificate
    must have. Raises PostcopydError."""
    said = parse_address(to)
    for peer in us.peers:
        if tls.normal(peer.name) == tls.normal(said.host) and peer.address is not None:
            port = said.port if said.port != DEFAULT_PORT else peer.address.port
            return Address(peer.address.host, port), peer.name
    return said, said.host


async def dial_control(to: str, machine: Machine, us: Endpoint) -> Channel:
    """A control connection to a peer that has shown who it is, and is not greeted yet. Raises
    PostcopydError."""
    address, name = peer_of(to, us)
    kind = p.CONTROL if us.tls is None else p.CONTROL_TLS
    stream = await dial(address.host, address.port, kind)
    peer = f"postcopyd at {to}"
    if us.tls is None:
        return Channel(stream, machine, peer, instance=us.instance, daemon=us.daemon)
    noted = Noted(stream)
    try:
        secure = us.tls.client(noted, name)
        with trio.fail_after(CONNECT_S):
            names = await tls.handshake(secure, peer)
    except tls.TlsFailed:
        await trio.aclose_forcefully(stream)
        if what := p.other_program(noted.first, tls=True):
            raise _somebody_else(peer, what) from None
        raise
    except trio.TooSlowError:
        await trio.aclose_forcefully(stream)
        raise ConnectionLost(f"{peer} did not finish TLS within {CONNECT_S:.0f} s") from None
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return Channel(secure, machine, peer, names, instance=us.instance, daemon=us.daemon)


class Wire(NamedTuple):
    """A data connection for a native engine, which takes over both: a descriptor, and its TLS (a
    struct pc_tls; None: without)."""

    fd: int
    tls: Any = None

    def close(self) -> None:
        if self.tls is not None:
            lib.pc_tls_free(self.tls)
        os.close(self.fd)


async def dial_data(to: str, us: Endpoint, migration: str, token: bytes, *, urgent: bool) -> Wire:
    """A data connection that its destination has taken. Raises PostcopydError."""
    address, _ = peer_of(to, us)
    secure = us.tls is not None
    hello = p.DataHello(migration, b"" if secure else token, urgent)
    stream = await dial(address.host, address.port, p.DATA_TLS if secure else p.DATA)
    try:
        await stream.send_all(p.pack(hello))
        await receive_object(stream, p.DataWelcome)
        if not secure:
            return Wire(detach(stream))
        return await detach_keyed(stream, token, hello, server=False)
    except BaseException as error:  # and otherwise no await: a descriptor would be lost in it
        await trio.aclose_forcefully(stream)
        if isinstance(error, trio.BrokenResourceError | trio.TooSlowError):
            raise ConnectionLost(f"{to} refused a data connection") from None
        raise


async def detach_keyed(
    stream: trio.SocketStream, key: bytes, hello: p.DataHello, *, server: bool
) -> Wire:
    """As `detach`, once both sides have shown by TLS that they have the key. Raises PostcopydError;
    OSError when no descriptors are left."""
    fd = os.dup(stream.socket.fileno())  # from here on the engine's, whatever becomes of the stream
    try:
        with trio.fail_after(CONNECT_S):
            made = await tls.keyed(fd, server=server, key=key, identity=hello.psk_identity)
        stream.socket.close()
        return Wire(fd, made)
    except BaseException as error:
        trio.lowlevel.notify_closing(fd)
        os.close(fd)
        if isinstance(error, trio.TooSlowError):
            raise tls.TlsFailed(
                f"TLS of a data connection: it was not finished within {CONNECT_S:.0f} s", tls.LOST
            ) from None
        raise


async def hang_up(stream: trio.SocketStream) -> None:
    """Ends a connection whose peer is to read what was said last: bytes of it that nobody reads
    would have the kernel take that back."""
    with trio.move_on_after(FAREWELL_S):
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.send_eof()
            while await stream.receive_some(BUFFER):
                pass


async def dial(host: str, port: int, kind: str) -> trio.SocketStream:
    """Connects to a daemon and says what the connection is for. Raises PostcopydError."""
    RESOLVER.use()
    try:
        with trio.fail_after(CONNECT_S):
            stream = await trio.open_tcp_stream(host, port)
            try:
                tune(stream.socket)
                await stream.send_all(_kind_bytes(kind))
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
            return stream
    except trio.TooSlowError:
        raise _unreachable(host, port, f"no answer within {CONNECT_S:.0f} s") from None
    except trio.BrokenResourceError:
        raise _unreachable(host, port, "it was closed at once") from None
    except UnicodeError as error:  # of the codec for names of hosts, IDNA
        raise _unreachable(host, port, f"that cannot be the name of a host ({error})") from None
    except OSError as error:
        cause: BaseException = error.__cause__ or error
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        if isinstance(cause, OSError) and (short := shortage(cause)):
            raise NoResources(f"connecting to postcopyd on {host}: {short}") from None
        raise _unreachable(host, port, str(cause)) from None


def _unreachable(host: str, port: int, reason: str) -> PostcopydError:
    return PostcopydError(
        f"connecting to postcopyd on {host}, port {port}: {reason}; is `postcopyd serve` running "
        f"there and the port open?",
        "PeerUnreachable",
    )


def _somebody_else(peer: str, what: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"speaking with {peer}: {what} is there, and no postcopyd: say the port of `postcopyd "
        f"serve`, {DEFAULT_PORT} where nothing else was configured",
        "PeerUnreachable",
    )


def tune(sock: trio.socket.SocketType) -> None:
    """Small messages leave at once; a dead host is noticed by the kernel as well."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(p.DEAD_S * 1000))


def _kind_bytes(kind: str) -> bytes:
    return bytes([0xA0 | len(kind)]) + kind.encode()


async def accepted_kind(stream: trio.SocketStream) -> str:
    """What a connection that came in is for, CONTROL or DATA, with TLS or not. Raises
    RemoteProtocolError."""
    known_kinds = (p.CONTROL, p.DATA, p.CONTROL_TLS, p.DATA_TLS)
    kinds = {_kind_bytes(kind): kind for kind in known_kinds}
    longest = max(map(len, kinds))
    got = b""
    try:
        with trio.fail_after(CONNECT_S):
            while len(got) < longest:
                more = await stream.receive_some(1)
                got += more
                if got in kinds:
                    return kinds[got]
                if not more or not any(known.startswith(got) for known in kinds):
                    break
    except (trio.TooSlowError, trio.BrokenResourceError):
        pass
    raise RemoteProtocolError(f"a connection began with {bytes(got)!r}, which is not postcopyd's")


async def receive_object(stream: trio.SocketStream, kind: type[Any]) -> Any:
    """One msgpack object from a data connection, and not a byte more: frames follow it, and are the
    engine's. So it is looked at in the socket first; what is not the whole object is all of it."""
    codec = Codec(first=p.MAX_DATA_FIRST)
    with trio.fail_after(CONNECT_S):
        while True:
            try:
                seen = await stream.socket.recv(p.MAX_DATA_FIRST + 1, socket.MSG_PEEK)
            except OSError as error:
                raise trio.BrokenResourceError from error
            if not seen:
                raise ConnectionLost("the peer closed a data connection while it was set up")
            codec.feed(seen)
            whole = [*islice(codec.objects(), 1)]
            await stream.socket.recv(len(seen) - (codec.beyond if whole else 0))
            if whole:
                return p.parse(whole[0], kind)


def detach(stream: trio.SocketStream) -> int:
    """The descriptor of a stream, blocking, for a native engine; the stream is over. Raises OSError
    when there are none left."""
    try:
        fd = os.dup(stream.socket.fileno())
    finally:
        stream.socket.close()
    os.set_blocking(fd, True)
    return fd


class Channel:
    """A control connection: messages both ways, each told to the state machine first.

    One task receives; any may send. `receive` raises ConnectionLost when the peer is gone or has
    been silent for DEAD_S, PeerError when it says Error, RemoteProtocolError when it breaks the
    protocol. `alive` is the context in which keepalives are sent. `names` are those of the peer's
    certificate.
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
        self._first: bytes | None = b""  # of what came, until that was a message
        self.machine = machine
        self.peer = peer
        self.names = names
        self.features: frozenset[str] = frozenset()  # those of both sides
        self._codec = Codec(first=p.MAX_FIRST)
        self._sending = trio.Lock()
        self._last_sent = trio.current_time()
        self._objects: list[Any] = []
        self._torn = False

    async def send(self, message: p.Message, within: float = p.DEAD_S) -> None:
        """Tells the machine and sends, in so many seconds; raises ConnectionLost."""
        self.machine.sending(message)
        await self._send(p.pack(message), within)

    async def _send(self, data: bytes, within: float = p.DEAD_S) -> None:
        try:
            async with self._sending:
                if self._torn:
                    raise ConnectionLost(f"a message to {self.peer} was cut short")
                self._last_sent = trio.current_time()
                # A message goes out whole, whoever is cancelled: the stream would be torn.
                with trio.move_on_after(within) as whole:
                    whole.shield = True
                    await self._stream.send_all(data)
                self._torn = whole.cancelled_caught
                if self._torn:
                    raise ConnectionLost(f"{self.peer} has taken nothing for {within:.0f} s")
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost(f"sending to {self.peer}: {error.__cause__ or error}") from None

    async def receive(self, within: float = math.inf) -> p.Message:
        """The next message that is not a keepalive; ConnectionLost after so many seconds of these,
        where a peer that is there and says nothing must not be waited for."""
        with trio.move_on_after(within):
            while True:
                try:
                    message = p.parse_message(await self._next_object())
                except RemoteProtocolError as error:
                    if what := p.other_program(self._first or b"", tls=False):
                        raise _somebody_else(self.peer, what) from None
                    raise RemoteProtocolError(f"speaking with {self.peer}: {error}") from None
                self._first = None
                self.machine.received(message)
                if isinstance(message, p.Error):
                    raise PeerError(f"{self.peer} said: {message.message}", message.name)
                if not isinstance(message, p.Keepalive):
                    return message
                await trio.lowlevel.checkpoint()  # thousands of them come by one read of a flood
        raise ConnectionLost(f"{self.peer} has not said within {within:.0f} s what it wants")

    async def expect(self, kind: type[M], within: float = math.inf) -> M:
        """The next message, which the machine allows only to be of this kind here."""
        message = await self.receive(within)
        if not isinstance(message, kind):
            raise RemoteProtocolError(
                f"{self.peer} sent {type(message).__name__} where {kind.__name__} was due"
            )
        return message

    async def _next_object(self) -> Any:
        # A whole message, as it is sent in that time: bytes of one that never ends are no life.
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
        p.check_hello(hello)
        if self._instance and hello.instance == self._instance:
            raise PostcopydError(
                f"{self.peer} is this daemon itself: say the other host, to which the guest shall "
                f"go",
                "Refused",
            )
        self.features = p.FEATURES.intersection(hello.features)
        return hello

    async def tell_error(self, error: Exception) -> None:
        """Tells the peer why this side ends, as well as it still can; never raises for it."""
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
                    await self._send(p.pack(p.Keepalive()))
                except ConnectionLost:
                    return  # who receives sees it too

    async def aclose(self) -> None:
        """Says that it ends, where TLS has a word for that, and does not wait for anybody."""
        with trio.move_on_after(GOODBYE_S) as scope:
            scope.shield = True
            await self._stream.aclose()

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class Noted(trio.abc.Stream):
    """A connection that notes what came first, for who has to say what is there."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.socket = stream.socket
        self.first = b""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(max_bytes)
        if not self.first:
            self.first = bytes(data[:64])
        return data

    async def aclose(self) -> None:
        await self._stream.aclose()


class Nobody(trio.abc.Stream):
    """The stream of a channel to a peer that has not connected."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        raise trio.ClosedResourceError("it has not connected")

    async def wait_send_all_might_not_block(self) -> None:
        raise trio.ClosedResourceError("it has not connected")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        raise trio.ClosedResourceError("it has not connected")

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery whose failure is the failure of its first task, not a group of one.

    A session has one thing that goes wrong first; what the others met while they were cancelled for
    it is of no use to an operator. Errors that are not ours (bugs) come first.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        leaves = _leaves(group)
        bugs = [error for error in leaves if not isinstance(error, PostcopydError)]
        raise (bugs or leaves)[0] from None


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return leaves
