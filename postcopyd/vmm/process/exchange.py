# SPDX-License-Identifier: Apache-2.0
"""One request and its answer: the connection to a cooperating VMM, and which process answers there.

Owns the connection and the pidfd. Any request that does not run to its end (a time limit, a broken
rule, a cancellation) ends the connection, because the next answer could belong to either request.
The next request makes a new connection. The VMM has promised that a disconnect changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket as sockets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Self

import trio

from postcopyd.errors import shortage
from postcopyd.names import plain
from postcopyd.vmm import (
    State,
    Vmm,
    VmmError,
    VmmGone,
    VmmProtocolError,
    VmmTimeout,
)
from postcopyd.vmm.process import mappings
from postcopyd.vmm.process.lines import Link, attributes

HELLO = "hello postcopyd 1"
STATES: dict[str, State] = {"running": "running", "paused": "paused", "incoming": "incoming"}
MAX_LINES = 256  # of data in one answer: one for each region


@dataclass(frozen=True)
class Limits:
    """How long a VMM may take, in seconds, and how much it may say."""

    hello: float = 5.0  # to connect and get the first answer
    answer: float = 30.0  # each later answer
    called_off: float = 2.0  # the answer to a stop that nobody wants any more
    save: float = 30.0  # waiting for pieces of the device state, added up
    load: float = 120.0  # taking the device state and loading it: faults may wait for the source
    quit: float = 5.0  # before SIGKILL
    state_bytes: int = 1 << 30  # of device state


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Limits the time of what the VMM does. Raises VmmTimeout; for an OSError VmmGone, or
    the shortage that it is."""
    try:
        with trio.fail_after(max(0.0, seconds)):
            yield
    except trio.TooSlowError:
        raise VmmTimeout(
            f"it did not answer within {seconds:.3g} s; see whether its process hangs or another "
            "client holds its socket"
        ) from None
    except (OSError, trio.BrokenResourceError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise shortage(error) or VmmGone(
            f"the connection broke ({why}); see whether its process ended"
        ) from None


class Asked(Vmm):
    """A VMM that answers requests."""

    def __init__(self, name: str, socket: str, limits: Limits) -> None:
        self.name = name
        self.socket = socket
        self.limits = limits
        self.pid = 0
        self._pidfd = -1
        self._vmm = ""
        self._writes = "seen"  # how tracking sees what is written to guest RAM
        self._link: Link | None = None
        self._turn = trio.Lock()  # one request at a time
        self._ended: str | None = None  # why its guest has, if it has said nothing since
        self._ending = False  # by this driver
        self._stopping = False  # it was told to stop its guest, and has not answered
        # The last stop by this driver did not reach it, or was refused: no stop is ours to undo.
        self._spared = False

    @classmethod
    async def connect(cls, name: str, socket: str, limits: Limits | None = None) -> Self:
        vmm = cls(name, socket, limits or Limits())
        try:
            await vmm._hello()
        except BaseException:
            await vmm.aclose()
            raise
        return vmm

    @contextlib.asynccontextmanager
    async def _exchange(self, verb: str) -> AsyncIterator[Link]:
        """A turn on the connection, which is closed if anything in it fails but by a refusal.

        The VMM's errors get a sentence with its name and the request; other errors pass unchanged.
        """
        async with self._turn:
            try:
                if self._link is None:
                    self._link = await self._dial()
                yield self._link
            except VmmError as refusal:
                raise VmmError(f"the VMM of {self.name} refused to {verb}: {refusal}") from None
            except (VmmProtocolError, VmmGone, VmmTimeout) as error:
                self._drop()
                raise type(error)(
                    f"asking the VMM of {self.name} at {self.socket} to {verb}: {error}"
                ) from None
            except BaseException:
                self._drop()
                raise

    async def _dial(self) -> Link:
        with within(self.limits.hello):
            link = Link(await self._open())
            try:
                await link.send(HELLO)
                said, _ = await self._answer(link)
                link.take(0)
                self._know(link.pid, said.get("vmm", ""))
            except BaseException:
                link.close()
                raise
        return link

    async def _open(self) -> trio.socket.SocketType:
        raw = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM | sockets.SOCK_NONBLOCK)
        try:
            raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_PASSCRED, 1)
            while True:
                try:
                    raw.connect(self.socket)
                    return trio.socket.from_stdlib_socket(raw)
                except BlockingIOError:
                    # A unix socket whose queue is full cannot be waited for, only tried again.
                    await trio.sleep(0.05)
        except OSError as error:
            raw.close()
            raise VmmGone(
                f"nobody answers there ({error.strerror or error}); start the VMM, or attach "
                "with the path of its socket"
            ) from None
        except BaseException:
            raw.close()
            raise

    def _know(self, pid: int, vmm: str) -> None:
        """Which process answers: always the same, or this is another VMM. Raises VmmGone."""
        if not mappings.NAME.fullmatch(vmm):
            raise VmmProtocolError("its answer to hello has no vmm=NAME")
        if pid <= 0:
            raise VmmGone("its process cannot be seen; run postcopyd in the host's pid namespace")
        if not self.pid:
            self._pidfd = os.pidfd_open(pid)
            self.pid, self._vmm = pid, vmm
        elif (pid, vmm) != (self.pid, self._vmm):
            raise VmmGone(
                f"process {pid} answers instead of {self.pid}; detach {self.name} and attach it "
                "again"
            )

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    async def _answer(self, link: Link) -> tuple[dict[str, str], list[str]]:
        """The attributes of `ok`, and the lines before it. Raises `VmmError` for `error`."""
        lines: list[str] = []
        while True:
            line = await link.line()
            if self._says_ended(line):
                continue
            word, _, rest = line.partition(" ")
            if word == "ok":
                return attributes(rest), lines
            if word == "error":
                link.take(0)
                raise VmmError(rest[:500])
            lines.append(line)
            if len(lines) > MAX_LINES:
                raise VmmProtocolError(f"it answered with more than {MAX_LINES} lines")

    def _says_ended(self, line: str) -> bool:
        """Whether this is `ended`, which comes unasked, between any two answers. A VMM that says
        anything after it has not ended."""
        word, _, why = line.partition(" ")
        self._ended = (plain(why[:500]) or "its VMM ended it") if word == "ended" else None
        return word == "ended"

    async def _ask(self, link: Link, request: str) -> tuple[dict[str, str], list[str]]:
        with within(self.limits.answer):
            await link.send(request)
            return await self._answer(link)

    async def _do(self, request: str) -> None:
        """Makes a request whose answer is a single `ok` or `error`."""
        async with self._exchange(request.partition(" ")[0]) as link:
            await self._ask_for_ok(link, request)

    async def _ask_for_ok(self, link: Link, request: str) -> None:
        _, lines = await self._ask(link, request)
        link.take(0)
        if lines:
            raise VmmProtocolError("it answered with lines that do not belong there")

    async def _hello(self) -> State:
        async with self._exchange("hello") as link:
            said, _ = await self._ask(link, HELLO)
            link.take(0)
            self._know(link.pid, said.get("vmm", ""))
            self._writes = said.get("writes", "seen")
            if (state := STATES.get(said.get("state", ""))) is None:
                raise VmmProtocolError("its answer to hello has no state= that is known")
            return state
