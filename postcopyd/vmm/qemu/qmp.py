# SPDX-License-Identifier: Apache-2.0
"""A client for QMP, QEMU's monitor protocol (docs/interop/qmp-spec in QEMU's tree).

Owns one connection to one monitor: greeting, commands and their replies, events, descriptors
passed with a command. Knows nothing of migration; what a command means is the driver's business.

There is no reader task. One of the tasks that wait for something reads the socket for all, and
wakes the others when a message has come; so nothing outlives the calls that use it.

QEMU's own library for Python, qemu.qmp, is for asyncio and cannot be used.
"""

from __future__ import annotations

import array
import errno
import itertools
import json
import math
import socket as stdlib_socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import trio

from postcopyd.names import plain
from postcopyd.vmm import VmmError, VmmGone, VmmProtocolError, VmmTimeout
from postcopyd.vmm.qemu.events import Events, Last

T = TypeVar("T")
Json = dict[str, Any]

# QEMU greets within a millisecond when its main loop runs. It serves one client at a time: the
# kernel connects the next one, which then hears nothing.
GREETING_SECONDS = 3.0

# The largest replies known are property lists of a CPU (some 60 KiB).
MAX_MESSAGE_BYTES = 4 << 20
RECEIVE_BYTES = 64 << 10

# QEMU answers questions and most commands in milliseconds, unless its main loop is stuck.
ANSWER_SECONDS = 10.0

CREDENTIALS_ROOM = stdlib_socket.CMSG_SPACE(12)
"""Room for struct ucred, which comes first. Descriptors that come with a message find no room, and
the kernel drops them."""

MAX_REASON = 1000  # characters of a sentence of QEMU's


class QmpUnreachable(VmmGone):
    """No process listens at the socket."""


class QmpBusy(VmmError):
    """A process listens but does not greet: the monitor has another client, or QEMU still starts,
    or is stuck."""

    name = "Busy"


class QmpClosed(VmmGone):
    """The connection ended. `unsent`: nothing of the command in question left this process."""

    def __init__(self, sentence: str, unsent: bool = False) -> None:
        super().__init__(sentence)
        self.unsent = unsent


class QmpProtocolError(VmmProtocolError):
    """QEMU sent something that is not QMP."""


class QmpRefused(VmmError):
    """QEMU answered a command with an error; `reason` is its own sentence."""

    def __init__(self, command: str, error: Any) -> None:
        told = error if isinstance(error, dict) else {}
        self.reason = plain(str(told.get("desc", error))[:MAX_REASON]).rstrip(".")
        self.missing = told.get("class") == "CommandNotFound"
        super().__init__(f"QEMU refused `{command}`: {self.reason}.")


class _Numbers(msgspec.Struct):
    major: int
    minor: int
    micro: int


class _Version(msgspec.Struct):
    qemu: _Numbers


class Greeting(msgspec.Struct):
    """The part that matters of a monitor's first message."""

    version: _Version


class Qmp:
    """One monitor. Any number of tasks may use it at once."""

    def __init__(self, path: str, pid: int = 0) -> None:
        """A monitor that is connected at its first use, or by `open`; it is of process `pid`, if
        that is known."""
        self._path = path
        self._known = pid
        self._socket: trio.socket.SocketType | None = None
        self._buffer = bytearray()
        self._scanned = 0  # bytes of the buffer in which no line ends
        self._lines = bytearray()  # of a message that has begun on a line of its own
        self._greeting: Json | None = None
        self._version = (0, 0, 0)
        self._pid = 0
        self._ready = False
        self._numbers = itertools.count(1)
        self._replies: dict[int, Json | None] = {}  # None until the reply has come
        self._subscribers: list[Events] = []
        self._opening = trio.Lock()
        self._sending = trio.Lock()
        self._reading = False
        self._others = trio.lowlevel.ParkingLot()
        self._failure: QmpClosed | QmpProtocolError | None = None

    async def open(self, patience: float = GREETING_SECONDS) -> None:
        """Connects and negotiates, unless that is done. After a failure it may be tried again.

        Raises QmpUnreachable, QmpBusy (after `patience` seconds), QmpProtocolError or QmpRefused.
        """
        try:
            with trio.fail_after(patience):
                async with self._opening:  # one that has all the time may wait in there
                    if not self._ready and self._failure is None:
                        await self._open()
        except trio.TooSlowError:
            raise QmpBusy(
                f"QMP socket {self._path} gave no greeting within {patience:g} s: another "
                f"client holds this monitor, or QEMU does not serve it yet (it still starts, which "
                f"takes long where it locks or preallocates its memory) or any more (it is stuck): "
                f"close the other client, give QEMU a second -qmp socket for postcopyd, or try "
                f"again when QEMU answers."
            ) from None

    async def _open(self) -> None:
        try:
            self._socket = await self._connected()
            greeting = await self._until(lambda: self._greeting, "waiting for its greeting")
            version = self.as_kind(Greeting, greeting["QMP"], "its greeting").version.qemu
            self._version = (version.major, version.minor, version.micro)
            if self._known not in (0, self._pid):
                raise VmmGone(
                    f"Process {self._pid} answers at {self._path} and not {self._known}, which was "
                    f"attached: detach that VM and attach it again."
                )
            (answer,) = await self._exchange([("qmp_capabilities", None)], None, math.inf)
            if isinstance(answer, QmpRefused):
                raise answer
            self._ready = True
        finally:
            if not self._ready:
                if self._socket is not None:
                    self._socket.close()
                self._socket = self._greeting = None
                self._buffer.clear()
                self._lines.clear()
                self._scanned = 0

    async def _connected(self) -> trio.socket.SocketType:
        """A socket at whose other end QMP is spoken, with SO_PASSCRED set; the caller's."""
        sock = trio.socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM)
        try:
            sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_PASSCRED, 1)
            await self._connect(sock)
        except BaseException:
            sock.close()
            raise
        return sock

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
        return self._version

    @property
    def pid(self) -> int:
        """The process that sent the greeting, by the kernel's word; 0 if it has no number here. The
        one that made the listening socket (SO_PEERCRED) may be another, as with libvirt."""
        return self._pid

    @contextmanager
    def events(self, *kinds: str) -> Iterator[Events]:
        """Events of these kinds that are read while the context is open; all others are dropped."""
        events = self.subscribe(*kinds)
        try:
            yield events
        finally:
            self.unsubscribe(events)

    def subscribe(self, *kinds: str) -> Events:
        """Like `events`, until `unsubscribe`."""
        events = Events(self._until, kinds)
        self._subscribers.append(events)
        return events

    def last(self, *kinds: str) -> Last:
        """The last event of these kinds, for as long as this monitor is connected."""
        events = Last(self._until, kinds)
        self._subscribers.append(events)
        return events

    def unsubscribe(self, events: Events) -> None:
        self._subscribers.remove(events)

    async def execute(
        self,
        command: str,
        arguments: Json | None = None,
        fd: int | None = None,
        patience: float = ANSWER_SECONDS,
    ) -> Any:
        """Runs one command and returns what it returned; `fd` is passed along (SCM_RIGHTS).

        Waits for `patience` seconds. Raises QmpRefused with QEMU's sentence, VmmTimeout, QmpClosed,
        QmpProtocolError, and what `open` raises.
        """
        (answer,) = await self.execute_all([(command, arguments)], fd, patience)
        if isinstance(answer, QmpRefused):
            raise answer
        return answer

    async def ask(self, kind: type[T], command: str, arguments: Json | None = None) -> T:
        """Runs one command. Raises QmpProtocolError if its answer is not of this kind."""
        return self.as_kind(kind, await self.execute(command, arguments), f"`{command}`")

    async def ask_all(self, *questions: tuple[str, Json | None, Any]) -> list[Any]:
        """Asks several questions in one piece, each with arguments and the kind of its answer.
        Raises QmpRefused."""
        answers = await self.execute_all([(command, about) for command, about, _ in questions])
        found = []
        for (command, _, kind), answer in zip(questions, answers, strict=True):
            if isinstance(answer, QmpRefused):
                raise answer
            found.append(self.as_kind(kind, answer, f"`{command}`"))
        return found

    def as_kind(self, kind: type[T], answer: Any, what: str) -> T:
        """Checks an answer; until then nothing indexes into it. Raises QmpProtocolError."""
        try:
            return msgspec.convert(answer, kind)
        except (msgspec.ValidationError, RecursionError) as error:
            raise QmpProtocolError(
                f"What answers at {self._path} is no QEMU that postcopyd knows: it answered {what} "
                f"with something else ({error})."
            ) from None

    @contextmanager
    def taking_apart(self) -> Iterator[None]:
        """For code that indexes into answers itself: errors in it become QmpProtocolError."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise QmpProtocolError(
                f"What answers at {self._path} is no QEMU that postcopyd knows: an answer of it "
                f"has another form ({type(error).__name__}: {error})."
            ) from error

    async def execute_all(
        self,
        commands: Sequence[tuple[str, Json | None]],
        fd: int | None = None,
        patience: float = ANSWER_SECONDS,
        unheard: Sequence[tuple[str, Json | None]] = (),
    ) -> list[Any]:
        """Sends commands to QEMU in one piece, even if this task is cancelled. Returns the answer
        or the QmpRefused of each. `fd` goes with the first. Another monitor's commands may come
        between. `unheard` are sent behind them, and their answers are not waited for."""
        if not self._ready:
            await self.open()
        return await self._exchange(commands, fd, patience, unheard)

    async def tell(self, command: str, arguments: Json) -> None:
        """Runs a command without waiting for its answer, so a refusal is not noticed."""
        await self._send(self._line(next(self._numbers), command, arguments), command, None)

    async def _exchange(
        self,
        commands: Sequence[tuple[str, Json | None]],
        fd: int | None,
        patience: float,
        unheard: Sequence[tuple[str, Json | None]] = (),
    ) -> list[Any]:
        names = "`, `".join(command for command, _ in commands)
        numbers = [next(self._numbers) for _ in commands]
        lines = b"".join(
            self._line(number, *each) for number, each in zip(numbers, commands, strict=True)
        )
        lines += b"".join(self._line(next(self._numbers), *each) for each in unheard)
        self._replies |= dict.fromkeys(numbers)
        try:
            with trio.fail_after(patience):
                await self._send(lines, names, fd)
                doing = f"executing `{names}`"
                replies = [await self._until(self._reply_to(n), doing) for n in numbers]
        except trio.TooSlowError:
            raise VmmTimeout(
                f"QEMU at {self._path} did not answer `{names}` for {patience:g} s: see whether it "
                f"is stopped (SIGSTOP), waits for its disks, or for pages of a migration."
            ) from None
        finally:
            for number in numbers:
                del self._replies[number]
        return [
            QmpRefused(command, reply["error"]) if "error" in reply else reply.get("return")
            for (command, _), reply in zip(commands, replies, strict=True)
        ]

    def _reply_to(self, number: int) -> Callable[[], Json | None]:
        return lambda: self._replies[number]

    @staticmethod
    def _line(number: int, command: str, arguments: Json | None) -> bytes:
        message: Json = {"execute": command, "id": number}
        if arguments:
            message["arguments"] = arguments
        return json.dumps(message).encode() + b"\n"

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
                if sent:  # half a command: QEMU would take the next one for its rest
                    self._fail(QmpClosed(f"`{command}` was cut off on its way to {self._path}."))
                raise

    async def _until(self, found: Callable[[], T | None], doing: str) -> T:
        """What `found` returns as soon as it is not None; reads messages meanwhile."""
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
        """Reads once and dispatches every whole message."""
        assert self._socket is not None
        try:
            data, about, _, _ = await self._socket.recvmsg(RECEIVE_BYTES, CREDENTIALS_ROOM)
        except trio.ClosedResourceError:  # `close` has told all tasks
            return
        except OSError as error:
            self._fail(self._ended(error))
            return
        if not data:
            self._fail(self._ended(None))
            return
        if self._greeting is None:
            for level, kind, value in about:
                if (level, kind) == (stdlib_socket.SOL_SOCKET, stdlib_socket.SCM_CREDENTIALS):
                    self._sent_by(struct.unpack("iII", value)[0])
        self._buffer += data
        while (end := self._buffer.find(b"\n", self._scanned)) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._scanned = 0
            self._take_line(line.rstrip(b"\r"))
        self._scanned = len(self._buffer)
        if len(self._lines) + self._scanned > MAX_MESSAGE_BYTES:
            self._fail(
                QmpProtocolError(f"{self._path} sent a message of over {MAX_MESSAGE_BYTES} bytes.")
            )

    def _sent_by(self, pid: int) -> None:
        """The greeting was sent by this process."""
        self._pid = pid

    def _take_line(self, line: bytes) -> None:
        """Takes a line, which is a message, unless it is an opening brace: a monitor made by
        -qmp-pretty then sends more lines; only the last of them begins with the closing brace."""
        if not self._lines and line != b"{":
            if line.strip():
                self._dispatch(line)
            return
        self._lines += line + b"\n"
        if line == b"}":
            message = bytes(self._lines)
            self._lines.clear()
            self._dispatch(message)

    def _dispatch(self, text: bytes) -> None:
        """Gives a message to the task that waits for it, drops it, or ends this connection. Never
        raises, as the task that reads may be any."""
        try:
            message = msgspec.json.decode(text)  # `json` would take lone surrogates
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self._fail(QmpProtocolError(f"{self._path} does not speak QMP: it sent {text[:40]!r}."))
            return
        number = message.get("id")
        if "event" in message:
            data = message.get("data")
            event = message | {"data": data if isinstance(data, dict) else {}}
            for events in self._subscribers:
                if message["event"] in events.kinds and not events.put(event, len(text)):
                    self._fail(QmpProtocolError(f"{self._path} sent too many events."))
        elif "QMP" in message and self._greeting is None:
            self._greeting = message
        elif type(number) is int and number in self._replies:
            self._replies[number] = message
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
