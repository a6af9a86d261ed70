# SPDX-License-Identifier: Apache-2.0
"""A Varlink server on trio: messages in, calls dispatched in order, replies out.

Owns the connection: framing, limits, the message header's rules, file descriptors, who the peer
is, and the errors of `org.varlink.service`. Must not know what the methods do. After UAPI.20, the
Varlink specification; where it says that a server MUST close a connection, this one logs and does.

A connection holds at most one message and what has arrived behind it. Nothing is read on while a
reply cannot be sent, so a client that does not read costs one slot and no memory.
"""

from __future__ import annotations

import array
import contextlib
import json
import math
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog
import trio

from .idl import Interface, InvalidValue, parse_interface

# The largest message accepted, which is kept in memory for each client. systemd's limit is 16 MiB.
MAX_MESSAGE = 1024 * 1024
# Clients at a time, where a service says no other number.
MAX_CONNECTIONS = 64
# When there are so many: a client for which the server has waited so long, to say something or to
# read what it was told, loses its connection to one that comes. Others forget to close theirs.
IDLE_SECONDS = 1.0
# File descriptors with one message; the kernel drops those beyond.
MAX_FDS = 16

_RECEIVE = 64 * 1024
_FLAGS = ("oneway", "more", "upgrade")
_HEADER = frozenset({"method", "parameters", *_FLAGS})
# From <asm-generic/socket.h>; Python's socket module does not name it (Linux 4.13).
_SO_PEERGROUPS = 59

_SERVICE_INTERFACE = """\
# Describes the service and the interfaces it implements.
interface org.varlink.service

# What this service is and which interfaces it implements.
method GetInfo() -> (
  vendor: string, product: string, version: string, url: string, interfaces: []string
)

# The definition of one of the interfaces, with its comments.
method GetInterfaceDescription(interface: string) -> (description: string)

# The service does not implement this interface.
error InterfaceNotFound (interface: string)

# The interface does not define this method.
error MethodNotFound (method: string)

# The interface defines this method, but the service does not implement it in this way.
error MethodNotImplemented (method: string)

# A parameter is unknown, missing, or of another type than declared.
error InvalidParameter (parameter: string)

# The client may not do this.
error PermissionDenied ()

# The method has to be called with `more`.
error ExpectedMore ()

# The method has to be called with `upgrade`.
error ExpectedUpgrade ()
"""

log = structlog.get_logger()


class VarlinkError(Exception):
    """An error reply: its fully qualified name and its parameters."""

    def __init__(self, name: str, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(name)
        self.name = name
        self.parameters = dict(parameters or {})


class Malformed(Exception):
    """The client broke the protocol where no reply is defined: the connection has to end."""


class ClientGone(Exception):
    """The client closed the connection; apart from trio's errors, which a handler may raise."""


@dataclass(frozen=True)
class Peer:
    """The process that opened a connection, as the kernel recorded it."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int]

    @classmethod
    def of(cls, sock: trio.socket.SocketType) -> Peer:
        """The peer of a connected unix socket. Raises OSError."""
        ucred = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, gid = struct.unpack("3i", ucred)
        # NGROUPS_MAX is 65536, but who is in more than 1024 groups is looked up by gid alone.
        groups = array.array("I")
        with contextlib.suppress(OSError):
            groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * 1024))
        return cls(pid, uid, gid, frozenset({gid, *groups}))

    def may_use(self, path: str) -> bool:
        """Root, the server's own user, or whom the mode of the socket at `path` lets in."""
        if self.uid in (0, os.geteuid()):
            return True
        try:
            entry = os.stat(path)
        except OSError:
            return False
        in_group = bool(entry.st_mode & stat.S_IWGRP) and entry.st_gid in self.groups
        return in_group or bool(entry.st_mode & stat.S_IWOTH)


@dataclass
class Call:
    """One call as its handler sees it.

    `parameters` are checked and hold no nulls. `fds` are the file descriptors that came with it;
    a handler removes those that it keeps, the others are closed after it. `send` gives a further
    reply, for a streaming method; it waits while the client does not read.
    """

    method: str
    parameters: dict[str, Any]
    peer: Peer
    send: Callable[[Mapping[str, Any]], Awaitable[None]]
    fds: list[int] = field(default_factory=list)


Handler = Callable[[Call], Awaitable[Mapping[str, Any] | None]]


class Service:
    """Some interfaces and what does their work, by fully qualified method name.

    Methods in `streaming` send with `Call.send` and want `more`; they are cancelled when the
    client goes away, all others run to their end. Methods in `with_fds` may be given file
    descriptors. Those in `asking` change nothing, and are not worth an entry in an operator's log.
    A declared method without a handler is answered with MethodNotImplemented. A handler raises
    VarlinkError for the errors of its interface; whatever else it raises is logged, and answered
    with that interface's error Internal, whose `message` is a sentence.
    """

    def __init__(
        self,
        interfaces: Iterable[Interface],
        handlers: Mapping[str, Handler],
        *,
        product: str,
        version: str,
        url: str = "",
        streaming: Iterable[str] = (),
        with_fds: Iterable[str] = (),
        asking: Iterable[str] = (),
    ) -> None:
        own = parse_interface(_SERVICE_INTERFACE)
        self.interfaces = {interface.name: interface for interface in (own, *interfaces)}
        self.handlers = {
            "org.varlink.service.GetInfo": self._get_info,
            "org.varlink.service.GetInterfaceDescription": self._get_interface_description,
            **handlers,
        }
        self.streaming = frozenset(streaming)
        self.with_fds = frozenset(with_fds)
        self.asking = frozenset(asking) | {f"{own.name}.{method}" for method in own.methods}
        self._info = {"vendor": product, "product": product, "version": version, "url": url}

    async def _get_info(self, call: Call) -> dict[str, Any]:
        return {**self._info, "interfaces": sorted(self.interfaces)}

    async def _get_interface_description(self, call: Call) -> dict[str, Any]:
        name = call.parameters["interface"]
        if name not in self.interfaces:
            raise VarlinkError("org.varlink.service.InterfaceNotFound", {"interface": name})
        return {"description": self.interfaces[name].text}

    def prepare(self, message: Mapping[str, Any]) -> tuple[Handler, dict[str, Any]]:
        """What handles a call, and its checked parameters. Raises VarlinkError."""
        method = message["method"]
        interface_name, _, member = method.rpartition(".")
        interface = self.interfaces.get(interface_name)
        if interface is None:
            raise VarlinkError(
                "org.varlink.service.InterfaceNotFound", {"interface": interface_name}
            )
        if member not in interface.methods:
            raise VarlinkError("org.varlink.service.MethodNotFound", {"method": method})
        handler = self.handlers.get(method)
        if handler is None or message.get("upgrade"):
            raise VarlinkError("org.varlink.service.MethodNotImplemented", {"method": method})
        if method in self.streaming and not message.get("more"):
            raise VarlinkError("org.varlink.service.ExpectedMore")
        given = message.get("parameters")
        if not isinstance(given, dict | None):
            raise _invalid("parameters")
        try:
            return handler, interface.check(interface.methods[member].input, given or {})
        except InvalidValue as error:
            raise _invalid(error.parameter) from None


def _invalid(parameter: str) -> VarlinkError:
    return VarlinkError("org.varlink.service.InvalidParameter", {"parameter": parameter})


def parse_message(data: bytes | bytearray) -> dict[str, Any]:
    """One call message without its NUL. Raises Malformed where no reply is defined."""
    try:
        message = json.loads(data.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not a JSON message: {error}") from None
    if not isinstance(message, dict):
        raise Malformed("a message that is no object")
    if not isinstance(message.get("method"), str):
        raise Malformed("a message without a method")
    if unknown := [key for key in message if key not in _HEADER and "." not in key]:
        raise Malformed(f"unknown member {unknown[0][:64]!r}")
    flags = [message.get(flag) for flag in _FLAGS]
    if not all(isinstance(flag, bool | None) for flag in flags) or flags.count(True) > 1:
        raise Malformed("oneway, more and upgrade have to be true or false, one true at most")
    return message


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:32]} is too large")
    return value


def _encode(message: Mapping[str, Any]) -> bytes:
    # ASCII, so that a lone surrogate that a client sent can be named in the answer to it.
    text = json.dumps(message, allow_nan=False, separators=(",", ":"))
    return text.encode("ascii") + b"\0"


def _reply(parameters: Mapping[str, Any] | None, **header: Any) -> bytes:
    return _encode({**header, "parameters": parameters} if parameters else header)


class Connection:
    """One client: receives messages, has them answered one after the other."""

    def __init__(self, service: Service, stream: trio.SocketStream, peer: Peer) -> None:
        self._service = service
        self._stream = stream
        self.peer = peer
        self._buffer = bytearray()
        self._searched = 0
        self._fds: list[int] = []
        self.waits_since = math.inf
        """Since when the server waits for the client; infinity: it does not."""
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        """Serve until the client ends the stream. Raises ClientGone and Malformed."""
        try:
            while True:
                with self._waiting():
                    data = await self._next_message()
                if data is None:
                    break
                await self._answer(parse_message(data))
        finally:
            _close_all(self._fds)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self.waits_since = trio.current_time()
        try:
            yield
        finally:
            self.waits_since = math.inf

    async def _next_message(self) -> bytearray | None:
        while True:
            end = self._buffer.find(b"\0", self._searched)
            if (len(self._buffer) if end < 0 else end) > MAX_MESSAGE:
                raise Malformed(f"a message of more than {MAX_MESSAGE} bytes")
            if end >= 0:
                data = self._buffer[:end]
                del self._buffer[: end + 1]
                self._searched = 0
                return data
            # What has been searched is not searched again: one byte at a time stays cheap.
            self._searched = len(self._buffer)
            if not await self._receive():
                return None

    async def _receive(self) -> bool:
        """Read what is there into the buffer; False at the end of the stream."""
        try:
            if self._service.with_fds:
                data = await self._receive_with_fds()
            else:
                # Without room for ancillary data the kernel itself drops what a client passes.
                data = await self._stream.socket.recv(_RECEIVE)
        except OSError as error:
            raise ClientGone from error
        self._buffer += data
        return bool(data)

    async def _receive_with_fds(self) -> bytes:
        room = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
        data, ancillary, flags, _ = await self._stream.socket.recvmsg(
            _RECEIVE, room, socket.MSG_CMSG_CLOEXEC
        )
        fds = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if fds and (self._buffer or flags & socket.MSG_CTRUNC):
            _close_all(list(fds))
            raise Malformed("file descriptors beyond the limit, or not at a message's first byte")
        self._fds += fds
        return data

    async def _transmit(self, data: bytes) -> None:
        try:
            with self._waiting():
                await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ClientGone from error

    async def _answer(self, message: Mapping[str, Any]) -> None:
        method = message["method"]
        fds, self._fds = self._fds, []
        if method not in self._service.with_fds:
            _close_all(fds)
        failed = None
        try:
            handler, parameters = self._service.prepare(message)
            call = Call(method, parameters, self.peer, self._send_more, fds)
            if method in self._service.streaming:
                data = _reply(await self._while_listening(handler, call))
            else:
                data = _reply(await handler(call))
        except Exception as raised:
            error = _error_reply(raised, method)
            failed = error.name
            data = _reply(error.parameters, error=error.name)
        finally:
            # Before the reply: a client that does not read it must not hold them open here.
            _close_all(fds)
        say = log.debug if method in self._service.asking else log.info
        why = {"error": failed} if failed else {}
        say("Varlink call", method=method, pid=self.peer.pid, uid=self.peer.uid, **why)
        if not message.get("oneway"):
            await self._transmit(data)

    async def _send_more(self, parameters: Mapping[str, Any]) -> None:
        await self._transmit(_reply(parameters, continues=True))

    async def _while_listening(self, handler: Handler, call: Call) -> Mapping[str, Any] | None:
        """Run a streaming handler as long as the client is there. Raises ClientGone, Malformed."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._until_gone)
            result = await handler(call)
            nursery.cancel_scope.cancel()
        return result

    async def _until_gone(self) -> None:
        while await self._receive():
            if len(self._buffer) > MAX_MESSAGE:
                raise Malformed("too many calls behind a streaming one")
        raise ClientGone


def _error_reply(raised: Exception, method: str) -> VarlinkError:
    """The error to answer with; raises again what means that there is nobody to answer."""
    while isinstance(raised, ExceptionGroup):
        raised = raised.exceptions[0]
    if isinstance(raised, ClientGone | Malformed):
        raise raised
    if isinstance(raised, VarlinkError):
        return raised
    log.error("bug in a Varlink method", method=method, exc_info=raised)
    sentence = f"{method} failed inside the service ({type(raised).__name__}): its log says where"
    return VarlinkError(method.rpartition(".")[0] + ".Internal", {"message": sentence})


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


async def serve(
    listener: socket.socket,
    service: Service,
    *,
    max_connections: int = MAX_CONNECTIONS,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve clients of a listening unix socket, which this then owns, until cancelled."""
    path = listener.getsockname()
    connections: set[Connection] = set()

    def room() -> bool:
        """Whether there is some, if need be because a client that keeps us waiting has to go."""
        if len(connections) < max_connections:
            return True
        one = min(connections, key=lambda one: one.waits_since)
        if one.waits_since > trio.current_time() - IDLE_SECONDS:
            return False
        log.warning("Varlink client let go: too many", limit=max_connections, pid=one.peer.pid)
        connections.remove(one)
        one.scope.cancel()
        return True

    async def guarded(stream: trio.SocketStream) -> None:
        try:
            await serve_client(stream)
        except Exception:  # or trio would end all others too
            log.exception("bug in serving a Varlink client")

    async def serve_client(stream: trio.SocketStream) -> None:
        peer = Peer.of(stream.socket)
        if not room():
            log.warning("Varlink client refused: too many", limit=max_connections, pid=peer.pid)
            return
        connection = Connection(service, stream, peer)
        connections.add(connection)
        try:
            if peer.may_use(path):
                log.debug("Varlink client", pid=peer.pid, uid=peer.uid, gid=peer.gid)
                with connection.scope:
                    await connection.run()
            else:
                log.warning("Varlink client denied", pid=peer.pid, uid=peer.uid, gid=peer.gid)
                await stream.send_all(_reply(None, error="org.varlink.service.PermissionDenied"))
        except Malformed as error:
            log.warning("Varlink client broke the protocol", pid=peer.pid, why=str(error))
        except (ClientGone, trio.BrokenResourceError):
            log.debug("Varlink client went away", pid=peer.pid)
        finally:
            connections.discard(connection)

    listener.setblocking(False)
    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
    await trio.serve_listeners(guarded, listeners, task_status=task_status)
