# SPDX-License-Identifier: Apache-2.0
"""Makes the connections between two daemons: dials, accepts, and hands them on.

Owns a socket until it is closed, or a `Channel` (channel.py) owns it, or for a data connection a
native engine, by `detach`. Knows the first bytes of a connection; knows nothing of migrations. TLS
(tls.py) begins before a control connection's first message, or a data connection's first frame.
"""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import trio

from postcopyd import protocol as p
from postcopyd._native import lib
from postcopyd.config.options import DEFAULT_PORT, Address, Peer, parse_address
from postcopyd.errors import NoResources, PostcopydError, shortage
from postcopyd.handover import Machine
from postcopyd.net import tls
from postcopyd.net.channel import CONNECT_S, Channel, ConnectionLost, somebody_else
from postcopyd.net.codec import Codec, other_program, pack, parse
from postcopyd.net.resolver import RESOLVER
from postcopyd.protocol import RemoteProtocolError

FAREWELL_S = 1.0
"""How long a peer may take to read why its connection was refused."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """What this daemon is to its peers, and what it knows of them."""

    tls: tls.Tls | None = None
    """None with `--tls off`."""
    peers: tuple[Peer, ...] = ()
    instance: str = field(default_factory=lambda: secrets.token_hex(8))
    """Another one at each start of the daemon."""
    daemon: p.DaemonId | None = None
    """The same at every start of the daemon."""


def peer_of(to: str, us: Endpoint) -> tuple[Address, str]:
    """The address that `to` (HOST[:PORT], or a name in [peers]) is dialled at, and the name that
    its certificate must have. Raises PostcopydError."""
    said = parse_address(to)
    for peer in us.peers:
        if tls.normal(peer.name) == tls.normal(said.host) and peer.address is not None:
            port = said.port if said.port != DEFAULT_PORT else peer.address.port
            return Address(peer.address.host, port), peer.name
    return said, said.host


async def dial_control(to: str, machine: Machine, us: Endpoint) -> Channel:
    """A control connection to a peer whose TLS certificate was checked; it is not greeted yet.
    Raises PostcopydError."""
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
        if what := other_program(noted.first, tls=True):
            raise somebody_else(peer, what) from None
        raise
    except trio.TooSlowError:
        await trio.aclose_forcefully(stream)
        raise ConnectionLost(f"{peer} did not finish TLS within {CONNECT_S:.0f} s") from None
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return Channel(secure, machine, peer, names, instance=us.instance, daemon=us.daemon)


class Wire(NamedTuple):
    """A data connection for a native engine: a descriptor, and its TLS (a struct pc_tls; None:
    without). The engine takes over both."""

    fd: int
    tls: Any = None

    def close(self) -> None:
        if self.tls is not None:
            lib.pc_tls_free(self.tls)
        os.close(self.fd)


async def dial_data(to: str, us: Endpoint, migration: str, token: bytes, *, urgent: bool) -> Wire:
    """A data connection that the destination has accepted. Raises PostcopydError."""
    address, _ = peer_of(to, us)
    secure = us.tls is not None
    hello = p.DataHello(migration, b"" if secure else token, urgent)
    stream = await dial(address.host, address.port, p.DATA_TLS if secure else p.DATA)
    try:
        await stream.send_all(pack(hello))
        await receive_object(stream, p.DataWelcome)
        if not secure:
            return Wire(detach(stream))
        return await detach_keyed(stream, token, hello, server=False)
    except BaseException as error:  # no other await: cancelled there, it would lose a descriptor
        await trio.aclose_forcefully(stream)
        if isinstance(error, trio.BrokenResourceError | trio.TooSlowError):
            raise ConnectionLost(f"{to} refused a data connection") from None
        raise


async def detach_keyed(
    stream: trio.SocketStream, key: bytes, hello: p.DataHello, *, server: bool
) -> Wire:
    """Like `detach`, once both sides have shown by TLS that they have the key. Raises
    PostcopydError; OSError when no descriptors are left."""
    fd = os.dup(stream.socket.fileno())  # the engine's from here on; the stream may be closed
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
    """Ends a connection after the peer has read the last message: if bytes from the peer were left
    unread, the kernel would reset the connection and lose that message."""
    with trio.move_on_after(FAREWELL_S):
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.send_eof()
            while await stream.receive_some(64 << 10):
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
    except UnicodeError as error:  # from IDNA, the codec for names of hosts
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


def tune(sock: trio.socket.SocketType) -> None:
    """Sends small messages at once, and has the kernel notice a dead host as well."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(p.DEAD_S * 1000))


def _kind_bytes(kind: str) -> bytes:
    return bytes([0xA0 | len(kind)]) + kind.encode()


async def accepted_kind(stream: trio.SocketStream) -> str:
    """What an accepted connection is for: CONTROL or DATA, with TLS or not. Raises
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
    """Takes one msgpack object from a data connection, and no byte more: the frames behind it are
    the engine's. So it looks (MSG_PEEK) before it takes; an incomplete object is taken whole."""
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
                return parse(whole[0], kind)


def detach(stream: trio.SocketStream) -> int:
    """The blocking descriptor of a stream, for a native engine; the stream is closed. Raises
    OSError when no descriptors are left."""
    try:
        fd = os.dup(stream.socket.fileno())
    finally:
        stream.socket.close()
    os.set_blocking(fd, True)
    return fd


class Noted(trio.abc.Stream):
    """A connection that keeps its first bytes, by which another program can be recognised."""

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
