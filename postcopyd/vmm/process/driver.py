# SPDX-License-Identifier: Apache-2.0
"""The driver for a cooperating VMM: the daemon's side of docs/VMM-PROTOCOL.md.

It owns the verbs (exchange.py has how one is asked and answered). It must not know what the device
state means or which VMM it is. The VMM is not trusted: everything it says is checked and everything
it does is bounded, in bytes, lines and seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable

import trio

from postcopyd.errors import PostcopydError
from postcopyd.host import kernel, procfs
from postcopyd.tasks import threads
from postcopyd.tasks.nursery import open_nursery
from postcopyd.vmm import (
    Declined,
    Region,
    Role,
    Shape,
    State,
    VmmError,
    VmmGone,
    VmmProtocolError,
    VmmTimeout,
    kill,
    looked_at,
    process_ended,
    writers,
)
from postcopyd.vmm.process import mappings
from postcopyd.vmm.process.exchange import Asked, within
from postcopyd.vmm.process.lines import Link, close_all, number

MAX_FACTS = 64
FAREWELL_S = 1.0  # to read what a VMM said before it ended
AGAIN_S = 0.5  # until a VMM that turned a rollback away is asked again
PIPE_SIZE = 1 << 20  # bytes; the most that an unprivileged process may ask for by default


class ProcessVmm(Asked):
    """A cooperating VMM; see `Vmm` for what each method promises."""

    kind = "process"
    device_state = "saved and loaded by the VMM itself"

    # --- both sides

    async def inspect(self, role: Role) -> Shape:
        state, facts, regions = await self._hello(), await self._facts(), await self._regions()
        try:
            with looked_at(self.name, self.pid):
                problems, direct, unseen = await self._look(role, regions)
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

    async def _look(
        self, role: Role, regions: tuple[Region, ...]
    ) -> tuple[list[str], list[str], list[str]]:
        """Problems, and the two lists of `_writers`. Raises OSError."""
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
        return problems, direct, unseen

    def _writers(self, regions: tuple[Region, ...]) -> tuple[list[str], list[str]]:
        """What reads into guest RAM by direct I/O, and what else writes it without tracking seeing
        it; by /proc and by the VMM's own word. Raises OSError."""
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
        kill(self._pidfd, self.name, self.pid)
        await self.gone()
        self._drop()

    async def gone(self) -> None:
        await process_ended(self._pidfd)
        with trio.move_on_after(FAREWELL_S):
            await self._hear_out()
        if self._ended is not None and not self._ending:
            self.farewell = self._ended

    async def _hear_out(self) -> None:
        """Reads to the end: its last line may have come unasked."""
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
        await self._stop()
        stopped()
        async with self._exchange("save") as link:
            read_end, write_end = _pipe()
            async with trio.lowlevel.FdStream(read_end) as pipe:
                try:
                    with within(self.limits.answer):
                        await link.send("save", write_end)
                finally:
                    os.close(write_end)
                total, left = 0, self.limits.save
                while True:
                    began = trio.current_time()
                    with within(left):
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
            with within(self.limits.answer):
                said, _ = await self._answer(link)
            _check_moved(link, said, total)

    async def track(self) -> int:
        await self._do("release")  # what a daemon that was killed here has left
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
            await self._stop()
            yield
        finally:
            await self._move_again()
            self.before = before

    async def _stop(self) -> None:
        """Stops the guest. If cancelled it still waits a moment for the answer, as the rollback
        must find the guest stopped."""
        self._spared = True
        async with open_nursery() as nursery:
            with trio.CancelScope(shield=True) as answer:
                nursery.start_soon(self._bound_when_cancelled, answer)
                async with self._exchange("stop") as link:
                    self._stopping, self._spared = True, False
                    try:
                        await self._ask_for_ok(link, "stop")
                    except VmmError:
                        self._stopping, self._spared = False, True
                        raise
                self._stopping = False
                nursery.cancel_scope.cancel()

    async def _bound_when_cancelled(self, answer: trio.CancelScope) -> None:
        try:
            await trio.sleep_forever()
        finally:
            answer.deadline = trio.current_time() + self.limits.called_off

    async def _stop_over(self) -> State:
        """The state. A VMM that was abandoned at its stop may turn requests away until it has
        stopped, so it is asked again. Raises VmmError and VmmTimeout."""
        until = trio.current_time() + self.limits.answer
        while True:
            try:
                return await self._hello()
            except (VmmError, VmmTimeout):
                if not self._stopping or trio.current_time() > until:
                    raise
            await trio.sleep(AGAIN_S)

    async def _run_again(self) -> None:
        await self._do("run")
        self._stopping = False

    async def _move_again(self) -> None:
        if self._spared:
            return
        try:
            with trio.CancelScope(shield=True):
                state = await self._stop_over()
                if state != "running" or self._stopping:
                    await self._run_again()
                    return
        except PostcopydError as error:
            raise type(error)(
                f"the guest {self.name} was stopped for a moment and was not run again: {error}"
            ) from None
        raise VmmError(
            f"the guest {self.name} was run by someone else while its written pages were looked "
            f"at: leave it alone and migrate again"
        )

    async def rollback(self) -> str:
        """Such a VMM does not tell who has stopped its guest. So the guest is run if it ran when
        `save` or `still` stopped it, and a stop of theirs may have reached the VMM. It is never
        stopped: somebody else may have run it."""
        state, before, spared = await self._stop_over(), self.before, self._spared
        # A VMM that has not answered to its stop may stop yet, whatever it says.
        if before == "running" and not spared and (state == "paused" or self._stopping):
            await self._run_again()
        self.before, self._spared = None, False
        with contextlib.suppress(PostcopydError):
            await self._do("release")
        if state == "running" and before == "paused":
            return "it was paused, and somebody else has run it meanwhile"
        if state == "paused" and before == "running" and spared:
            return "it is paused, by somebody else"
        return "its VMM waits for an incoming migration" if state == "incoming" else ""

    async def finish(self, keep: bool) -> None:
        if keep:
            await self._do("stop")
        else:
            await self.end()

    # --- destination

    async def adopt(self, shape: Shape) -> list[int]:
        await self._do("release")  # undoes an adoption that came to nothing
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
                    with within(self.limits.answer):
                        await link.send("load", read_end)
                finally:
                    os.close(read_end)
                async for piece in receive:
                    began = trio.current_time()
                    with within(left):
                        try:
                            await pipe.send_all(piece)
                        except trio.BrokenResourceError:
                            break  # it takes no more: its answer says why
                    left -= trio.current_time() - began
                    total += len(piece)
            with within(left):
                said, _ = await self._answer(link)
            _check_moved(link, said, total)
        if (state := await self._hello()) != "paused":
            raise VmmError(f"the VMM of {self.name} is {state} after load; it has to be paused")

    async def run(self) -> None:
        try:
            await self._do("run")
        except VmmError as refusal:
            # A refusal promises that no vCPU ran; the state has to agree.
            if await self._hello() == "paused":
                raise Declined(str(refusal)) from None
            raise

    async def release(self) -> None:
        await self._do("release")


def _pipe() -> tuple[int, int]:
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    # Larger means fewer wake-ups in the blackout. A user over the system's limit does without.
    with contextlib.suppress(OSError):
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    return read_end, write_end


def _check_moved(link: Link, said: dict[str, str], moved: int) -> None:
    link.take(0)
    if (counted := number(said, "bytes")) != moved:
        raise VmmProtocolError(f"it counts {counted} bytes of device state, here were {moved}")
