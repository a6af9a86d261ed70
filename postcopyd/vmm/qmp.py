# SPDX-License-Identifier: Apache-2.0
"""A client for QMP, QEMU's monitor protocol (docs/interop/qmp-spec in QEMU's tree).

Owns one connection to one monitor: greeting, commands and their replies, events, descriptors
passed with a command. Knows nothing of migration; what a command means is `qemu.py`'s business.

There is no reader task. Whoever waits for something reads the socket for everybody and wakes the
others when a message has come, so nothing outlives the calls that use it.
"""

from __future__ import annotations

import array
import collections
import errno
import itertools
import json
import math
import socket as stdlib_socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import trio

from postcopyd.names import plain
from postcopyd.vmm import VmmError, VmmGone, VmmProtocolError

T = TypeVar("T")
Json = dict[str, Any]

# QEMU greets within a millisecond when its main loop runs. One client at a time is all it serves:
# the next one is connected by the kernel and then hears nothing.
GREETING_SECONDS = 3.0

# The largest replies known are property lists of a CPU (some 60 KiB). 16 MiB is QEMU's own limit in
# the other direction (MAX_TOKEN_SIZE is 64 MiB, and no client of it needs that).
MAX_MESSAGE_BYTES = 16 << 20
RECEIVE_BYTES = 64 << 10

# Events a subscriber has not taken yet. A migration makes a few dozen.
MAX_QUEUED_EVENTS = 1024


class QmpUnreachable(VmmGone):
    """Nobody listens at the socket."""


class QmpBusy(VmmError):
    """Somebody listens but does not greet: the monitor has another client, or QEMU is stuck."""

    name = "Busy"


class QmpClosed(VmmGone):
    """The connection ended. `unsent`: nothing of the command in question left this process."""

    def __init__(self, sentence: str, unsent: bool = False) -> None:
        super().__init__(sentence)
        self.unsent = unsent


class QmpProtocolError(VmmProtocolError):
    """What came is not QMP."""


class QmpRefused(VmmError):
    """QEMU answered a command with an error; `reason` is its own sentence."""

    def __init__(self, command: str, error: Json) -> None:
        self.reason = plain(str(error.get("desc", error))).rstrip(".")
        self.missing = error.get("class") == "CommandNotFound"
        super().__init__(f"QEMU refused `{command}`: {self.reason}.")


class Events:
    """The events of some kinds since the subscription, oldest first."""

    def __init__(self, qmp: Qmp, kinds: tuple[str, ...]) -> None:
        self._qmp = qmp
        self.kinds = kinds
        self.queue: collections.deque[Json] = collections.deque(maxlen=MAX_QUEUED_EVENTS)

    def take(self) -> Json | None:
        """The next event that has been read already, or None."""
        return self.queue.popleft() if self.queue else None

    async def next(self) -> Json:
        """The next event (`event`, `data`, `timestamp`). Raises QmpClosed when none can come."""
        return await self._qmp._until(self.take, "waiting for an event")


class Qmp:
    """One monitor. Any number of tasks may use it at once."""

    def __init__(self, path: str) -> None:
        """A monitor that is connected at its first use, or by `open`."""
        self._path = path
        self._socket: trio.socket.SocketType | None = None
        self._buffer = bytearray()
        self._scanned = 0  # of the buffer: no newline in these bytes
        self._greeting: Json | None = None
        self._ready = False
        self._numbers = itertools.count(1)
        self._replies: dict[int, Json | None] = {}  # None until it has come
        self._subscribers: list[Events] = []
        self._opening = trio.Lock()
        self._sending = trio.Lock()
        self._reading = False
        self._others = trio.lowlevel.ParkingLot()
        self._failure: QmpClosed | QmpProtocolError | None = None

    async def open(self, patience: float = GREETING_SECONDS) -> None:
        """Connect and negotiate, unless that is done. After a failure it may be tried again.

        Raises QmpUnreachable, QmpBusy (after `patience` seconds), QmpProtocolError or QmpRefused.
        """
        async with self._opening:
            if self._ready or self._failure is not None:
                return
            self._socket = trio.socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM)
            try:
                with trio.fail_after(patience):
                    await self._connect(self._socket)
                    await self._until(lambda: self._greeting, "waiting for its greeting")
                    await self._exchange("qmp_capabilities", {}, None)
                self._ready = True
            except trio.TooSlowError:
                raise QmpBusy(
                    f"QMP socket {self._path} gave no greeting within {patience:g} s: another "
                    f"client holds this monitor, or QEMU is stuck; close the other client, or give "
                    f"QEMU a second -qmp socket for postcopyd."
                ) from None
            finally:
                if not self._ready:
                    self._socket.close()
                    self._socket = self._greeting = None
                    self._buffer.clear()
                    self._scanned = 0

    async def _connect(self, sock: trio.socket.SocketType) -> None:
        try:
            await sock.connect(self._path)
            sock.getpeername()  # ENOTCONN: the listener's queue is full, and trio did not notice
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ENOTCONN):
                raise trio.TooSlowError from None
            raise QmpUnreachable(
                f"Nobody answers at QMP socket {self._path} ({error.strerror or error}): start "
                f"QEMU with -qmp unix:{self._path},server=on,wait=off, or name the right socket."
            ) from None

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version from the greeting, (10, 0, 2)."""
        version = (self._greeting or {}).get("QMP", {}).get("version", {}).get("qemu", {})
        return (version.get("major", 0), version.get("minor", 0), version.get("micro", 0))

    def peer_pid(self) -> int:
        """The process that made the listening socket: QEMU, if nobody made it for QEMU."""
        if self._socket is None:
            raise QmpClosed(f"{self._path} is not connected.", unsent=True)
        peer = self._socket.getsockopt(
            stdlib_socket.SOL_SOCKET, stdlib_socket.SO_PEERCRED, 12
        )  # struct ucred
        pid: int = struct.unpack("iII", peer)[0]
        return pid

    @contextmanager
    def events(self, *kinds: str) -> Iterator[Events]:
        """Events of these kinds that are read while the context is open; all others are dropped."""
        events = Events(self, kinds)
        self._subscribers.append(events)
        try:
            yield events
        finally:
            self._subscribers.remove(events)

    async def execute(
        self, command: str, arguments: Json | None = None, fd: int | None = None
    ) -> Any:
        """Run one command and return what it returned; `fd` is passed along (SCM_RIGHTS).

        Waits as long as QEMU takes. Raises QmpRefused with QEMU's sentence, QmpClosed,
        QmpProtocolError, and what `open` raises.
        """
        if not self._ready:
            await self.open()
        return await self._exchange(command, arguments, fd)

    async def _exchange(self, command: str, arguments: Json | None, fd: int | None) -> Any:
        number = next(self._numbers)
        message: Json = {"execute": command, "id": number}
        if arguments:
            message["arguments"] = arguments
        self._replies[number] = None
        try:
            await self._send(json.dumps(message).encode() + b"\n", command, fd)
            reply = await self._until(lambda: self._replies[number], f"executing `{command}`")
        finally:
            del self._replies[number]
        if "error" in reply:
            raise QmpRefused(command, reply["error"])
        return reply.get("return")

    async def drain(self) -> None:
        """Read (and drop what nobody asked for) until the connection ends, then raise QmpClosed.

        QEMU keeps in memory what its client does not read: an idle connection needs somebody here.
        """
        await self.open(math.inf)
        await self._until(lambda: None, "idle")

    def close(self) -> None:
        self._fail(QmpClosed(f"the connection to {self._path} was closed by postcopyd."))
        if self._socket is not None:
            self._socket.close()

    async def _send(self, line: bytes, command: str, fd: int | None) -> None:
        rights = []
        if fd is not None:
            descriptors = array.array("i", [fd]).tobytes()
            rights = [(stdlib_socket.SOL_SOCKET, stdlib_socket.SCM_RIGHTS, descriptors)]
        async with self._sending:
            if self._failure is not None or self._socket is None:
                raise QmpClosed(f"`{command}` could not be sent: {self._failure}", unsent=True)
            sent = 0
            try:
                sent = await self._socket.sendmsg([line], rights)
                while sent < len(line):
                    sent += await self._socket.send(line[sent:])
            except OSError as error:
                self._fail(self._ended(error))
                raise QmpClosed(str(self._failure), unsent=sent == 0) from None
            except BaseException:
                if sent:  # half a command: whatever follows would be read as its rest
                    self._fail(QmpClosed(f"`{command}` was cut off on its way to {self._path}."))
                raise

    async def _until(self, found: Callable[[], T | None], doing: str) -> T:
        """What `found` returns as soon as it is not None, reading messages meanwhile."""
        while (result := found()) is None:
            if self._failure is not None:
                raise type(self._failure)(f"While {doing}: {self._failure}")
            if self._reading:
                await self._others.park()
                continue
            self._reading = True
            try:
                await self._receive()
            finally:
                self._reading = False
                self._others.unpark_all()
        return result

    async def _receive(self) -> None:
        """Read once and dispatch every whole message."""
        assert self._socket is not None
        try:
            data = await self._socket.recv(RECEIVE_BYTES)
        except OSError as error:
            self._fail(self._ended(error))
            return
        if not data:
            self._fail(self._ended(None))
            return
        self._buffer += data
        while (end := self._buffer.find(b"\n", self._scanned)) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._scanned = 0
            if line.strip():
                self._dispatch(line)
        self._scanned = len(self._buffer)
        if self._scanned > MAX_MESSAGE_BYTES:
            self._fail(QmpProtocolError(f"{self._path} sent a message of over 16 MiB."))

    def _dispatch(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self._fail(QmpProtocolError(f"{self._path} does not speak QMP: it sent {line[:40]!r}."))
        elif "event" in message:
            for events in self._subscribers:
                if message["event"] in events.kinds:
                    events.queue.append(message)
        elif "QMP" in message and self._greeting is None:
            self._greeting = message
        elif message.get("id") in self._replies:
            self._replies[message["id"]] = message
        # else: the reply to a command whose caller was cancelled

    def _ended(self, error: OSError | None) -> QmpClosed:
        why = f" ({error.strerror})" if error is not None else ""
        return QmpClosed(
            f"QEMU closed its monitor {self._path}{why}: it has ended or is ending; its own log "
            f"says why."
        )

    def _fail(self, failure: QmpClosed | QmpProtocolError) -> None:
        if self._failure is None:
            self._failure = failure
        self._others.unpark_all()
