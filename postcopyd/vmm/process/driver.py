# SPDX-License-Identifier: Apache-2.0
"""The driver for a VMM that takes part: docs/VMM-PROTOCOL.md, the daemon's side.

It owns the verbs, the connection and a pidfd. It must not know what the device state means or
which VMM it is. The VMM is not trusted: everything it says is checked and everything it does is
bounded, in bytes, lines and seconds.

Any request that does not run to its end (a time limit, a rule broken, a cancellation) ends the
connection, because nobody could tell whose answer comes next. The next request makes a new one,
and the VMM has promised that a disconnect changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket as sockets
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Self

import trio

from postcopyd.errors import PostcopydError, shortage
from postcopyd.host import kernel, procfs
from postcopyd.names import plain
from postcopyd.tasks import threads
from postcopyd.vmm import (
    Declined,
    Region,
    Role,
    Shape,
    State,
    Vmm,
    VmmError,
    VmmGone,
    VmmProtocolError,
    VmmTimeout,
    process_ended,
    writers,
)
from postcopyd.vmm.process import mappings
from postcopyd.vmm.process.lines import Link, attributes, close_all, number

HELLO = "hello postcopyd 1"
STATES: dict[str, State] = {"running": "running", "paused": "paused", "incoming": "incoming"}
MAX_LINES = 256  # of data in one answer: a region each
MAX_FACTS = 64
FAREWELL_S = 1.0  # for the rest of what a VMM that has ended has said
PIPE_SIZE = 1 << 20  # bytes; the most that an unprivileged process may ask for by default


@dataclass(frozen=True)
class Limits:
    """How long a VMM may take, in seconds, and how much it may say."""

    hello: float = 5.0  # to connect and get the first answer
    answer: float = 30.0  # each later answer
    save: float = 30.0  # all waiting for pieces of the device state together
    load: float = 120.0  # taking the device state and loading it: faults may wait for the source
    quit: float = 5.0  # before SIGKILL
    state_bytes: int = 1 << 30  # of device state


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Bounds what the VMM does, and names what the operating system says of it."""
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


class ProcessVmm(Vmm):
    """A cooperating VMM; see `Vmm` for what each method promises."""

    kind = "process"

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
        self._ended: str | None = None  # why its guest has, if that is the last it has said
        self._ending = False  # by us

    @classmethod
    async def connect(cls, name: str, socket: str, limits: Limits | None = None) -> Self:
        vmm = cls(name, socket, limits or Limits())
        try:
            await vmm._hello()
        except BaseException:
            await vmm.aclose()
            raise
        return vmm

    # --- one request, one answer

    @contextlib.asynccontextmanager
    async def _exchange(self, verb: str) -> AsyncIterator[Link]:
        """A turn on the connection, which ends when anything goes wrong in it but a refusal.

        Errors of the VMM get said of whom and of what they are; others come through as they are.
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
        with _within(self.limits.hello):
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
                    # A unix socket whose queue is full cannot be waited for, only asked again.
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
        """Who answers: the same process always, or this is another VMM."""
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
        """The attributes of `ok`, and the lines before it; `VmmError` for `error`."""
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
        """Unasked, between any two answers. A VMM that goes on after it has not ended."""
        word, _, why = line.partition(" ")
        self._ended = (plain(why[:500]) or "its VMM ended it") if word == "ended" else None
        return word == "ended"

    async def _ask(self, link: Link, request: str) -> tuple[dict[str, str], list[str]]:
        with _within(self.limits.answer):
            await link.send(request)
            return await self._answer(link)

    async def _do(self, request: str) -> None:
        """A request whose answer is one word."""
        async with self._exchange(request.partition(" ")[0]) as link:
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

    # --- both sides

    async def inspect(self, role: Role) -> Shape:
        state, facts, regions = await self._hello(), await self._facts(), await self._regions()
        try:
            problems = await trio.to_thread.run_sync(
                mappings.problems, self.pid, regions, limiter=threads.WALKS
            )
            if role == "destination" and kernel.fills_holes():
                problems += await trio.to_thread.run_sync(
                    mappings.exposed, self.pid, regions, limiter=threads.WALKS
                )
            direct, unseen = await trio.to_thread.run_sync(
                self._writers, regions, limiter=threads.WALKS
            )
        except BaseException:
            Shape(state, self.pid, regions, facts, ()).close()
            raise
        if role == "source" and state == "incoming":
            problems.append(f"the VMM of {self.name} has no guest; attach the one that runs it")
        if role == "destination" and state != "incoming":
            problems.append(
                f"the VMM of {self.name} has a guest already ({state}); start one that waits for "
                "an incoming migration"
            )
        return Shape(
            state,
            self.pid,
            regions,
            facts,
            tuple(problems),
            direct_io=writers.direct_sentence(direct),
            untracked=writers.unseen_sentence(unseen),
        )

    def _writers(self, regions: tuple[Region, ...]) -> tuple[list[str], list[str]]:
        """What direct I/O reads, and what else writes guest RAM: by /proc and by its own word."""
        direct, unseen = writers.look(self.pid)
        if self._writes == "direct":
            direct.append(f"{self._vmm}, as it says,")
        elif self._writes != "seen":
            unseen.append(f"{self._vmm} says so")
        files = {procfs.file_id(region.fd) for region in regions if region.fd is not None}
        others = procfs.other_mappers(files, {self.pid, os.getpid()})
        return direct, unseen + [f"process {pid} ({command})" for pid, command in others]

    async def _facts(self) -> dict[str, str]:
        async with self._exchange("tell its facts") as link:
            _, lines = await self._ask(link, "facts")
            link.take(0)
            facts = {"vmm": self._vmm}
            for line in lines:
                word, key, value = [*line.split(" ", 2), "", ""][:3]
                if word != "fact" or not mappings.NAME.fullmatch(key) or key in facts:
                    raise VmmProtocolError(f"its line {line[:80]!r} is not a new fact")
                facts[key] = value
            if len(facts) > MAX_FACTS + 1:
                raise VmmProtocolError(f"it has more than {MAX_FACTS} facts")
            return facts

    async def _regions(self) -> tuple[Region, ...]:
        async with self._exchange("tell its regions") as link:
            _, lines = await self._ask(link, "regions")
            parsed = mappings.parse(lines)
            fds = link.take(sum(values["backing"] == "file" for values in parsed))
            try:
                return mappings.regions(parsed, fds)
            except BaseException:
                close_all(fds)
                raise

    async def end(self) -> None:
        self._ending = True
        with (
            trio.move_on_after(self.limits.quit),
            contextlib.suppress(VmmError, VmmProtocolError, VmmGone, VmmTimeout),
        ):
            await self._do("quit")
            await self.gone()
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass  # gone, and its parent knows
        except PermissionError:
            raise VmmError(
                f"ending the VMM of {self.name}: process {self.pid} does not quit and this daemon "
                "may not kill it; kill it as root"
            ) from None
        await self.gone()
        self._drop()

    async def gone(self) -> None:
        await process_ended(self._pidfd)
        with trio.move_on_after(FAREWELL_S):
            await self._hear_out()
        if self._ended is not None and not self._ending:
            self.farewell = self._ended

    async def _hear_out(self) -> None:
        """Reads to the end: what it has said last, nobody may have asked for."""
        async with self._turn:
            with contextlib.suppress(PostcopydError, OSError):
                while self._link is not None:
                    self._says_ended(await self._link.line())

    async def aclose(self) -> None:
        self._drop()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    # --- source

    async def prepare(self) -> None:
        if await self._hello() == "incoming":
            raise VmmError(f"the VMM of {self.name} has no guest; attach the one that runs it")

    async def save(
        self, send: Callable[[bytes], Awaitable[None]], stopped: Callable[[], None]
    ) -> None:
        state = await self._hello()
        if state == "incoming":
            raise VmmError(f"the VMM of {self.name} has no guest; attach the one that runs it")
        self.before = state
        await self._do("stop")
        stopped()
        async with self._exchange("save") as link:
            read_end, write_end = _pipe()
            async with trio.lowlevel.FdStream(read_end) as pipe:
                try:
                    with _within(self.limits.answer):
                        await link.send("save", write_end)
                finally:
                    os.close(write_end)
                total, left = 0, self.limits.save
                while True:
                    began = trio.current_time()
                    with _within(left):
                        piece = await pipe.receive_some(PIPE_SIZE)
                    left -= trio.current_time() - began
                    if not piece:
                        break
                    total += len(piece)
                    if total > self.limits.state_bytes:
                        raise VmmProtocolError(
                            f"its device state is longer than {self.limits.state_bytes} bytes"
                        )
                    await send(bytes(piece))
            with _within(self.limits.answer):
                said, _ = await self._answer(link)
            _check_moved(link, said, total)

    async def track(self) -> int:
        await self._do("release")  # of what a daemon that was killed in here has left
        try:
            (uffd,) = await self.adopted()
        except BaseException:
            with trio.CancelScope(shield=True), contextlib.suppress(PostcopydError):
                await self._do("release")
            raise
        try:
            with trio.CancelScope(shield=True):
                await self._do("release")
        except BaseException:
            os.close(uffd)
            raise
        return uffd

    @contextlib.asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        if await self._hello() != "running":
            yield
            return
        before, self.before = self.before, "running"
        try:
            with trio.CancelScope(shield=True):  # cut off, it could come after the `run`
                await self._do("stop")
            yield
        finally:
            await self._move_again()
            self.before = before

    async def _move_again(self) -> None:
        try:
            with trio.CancelScope(shield=True):
                await self._do("run")
        except PostcopydError as error:
            raise type(error)(
                f"the guest {self.name} was stopped for a moment and was not run again: {error}"
            ) from None

    async def rollback(self) -> str:
        """Such a VMM does not tell who has stopped its guest. So it is run if it ran when `save` or
        `still` stopped it, and never stopped: who has run it meanwhile was somebody else."""
        state, before = await self._hello(), self.before
        if state == "paused" and before == "running":
            await self._do("run")
        self.before = None
        with contextlib.suppress(PostcopydError):
            await self._do("release")
        if state == "running" and before == "paused":
            return "it was paused, and somebody else has run it meanwhile"
        return "its VMM waits for an incoming migration" if state == "incoming" else ""

    async def finish(self, keep: bool) -> None:
        if keep:
            await self._do("stop")
        else:
            await self.end()

    # --- destination

    async def adopt(self, shape: Shape) -> list[int]:
        await self._do("release")  # of an adoption that came to nothing
        await self.discard(shape)
        async with self._exchange("discard"):
            for region in shape.regions:
                if not await trio.to_thread.run_sync(
                    mappings.is_empty, self.pid, region, limiter=threads.WALKS
                ):
                    raise VmmProtocolError(f"{region.name} still has pages after discard")
        return await self.adopted()

    async def discard(self, shape: Shape) -> None:
        for region in shape.regions:
            await self._do(f"discard name={region.name} offset=0 length={region.size}")

    async def adopted(self) -> list[int]:
        async with self._exchange("hand over a userfaultfd") as link:
            await self._ask(link, "userfaultfd")
            fds = link.take(1)
            if os.readlink(f"/proc/self/fd/{fds[0]}") != "anon_inode:[userfaultfd]":
                close_all(fds)
                raise VmmProtocolError("the descriptor it sent is not a userfaultfd")
            os.set_blocking(fds[0], False)
            return fds

    async def load(self, receive: AsyncIterable[bytes]) -> None:
        async with self._exchange("load") as link:
            read_end, write_end = _pipe()
            total, left = 0, self.limits.load
            async with trio.lowlevel.FdStream(write_end) as pipe:
                try:
                    with _within(self.limits.answer):
                        await link.send("load", read_end)
                finally:
                    os.close(read_end)
                async for piece in receive:
                    began = trio.current_time()
                    with _within(left):
                        try:
                            await pipe.send_all(piece)
                        except trio.BrokenResourceError:
                            break  # it takes no more: its answer says why
                    left -= trio.current_time() - began
                    total += len(piece)
            with _within(left):
                said, _ = await self._answer(link)
            _check_moved(link, said, total)
        if (state := await self._hello()) != "paused":
            raise VmmError(f"the VMM of {self.name} is {state} after load; it has to be paused")

    async def run(self) -> None:
        try:
            await self._do("run")
        except VmmError as refusal:
            # An answered refusal promises that no vCPU ran; the state has to agree.
            if await self._hello() == "paused":
                raise Declined(str(refusal)) from None
            raise

    async def release(self) -> None:
        await self._do("release")


def _pipe() -> tuple[int, int]:
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    # Larger means fewer wake-ups in the blackout; a user over the system's limit does without.
    with contextlib.suppress(OSError):
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    return read_end, write_end


def _check_moved(link: Link, said: dict[str, str], moved: int) -> None:
    link.take(0)
    if (counted := number(said, "bytes")) != moved:
        raise VmmProtocolError(f"it counts {counted} bytes of device state, here were {moved}")
