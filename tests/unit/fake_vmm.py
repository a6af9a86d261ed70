# SPDX-License-Identifier: Apache-2.0
"""VMMs that are made for tests of the sessions, and one guest's truth: where it ran, and when.

A `FakeVmm` has real guest RAM (a memfd, at the destination mapped in this process with a real
userfaultfd), so that the engines are the real ones. At each step it tells a `reach` function, which
may raise, wait, or break something elsewhere. `Guest` sees both VMMs and writes down what must
never happen.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import ClassVar, Self

import trio
from needs import missing

from postcopyd.vmm import Region, Role, Shape, State, Vmm, VmmGone

PAGE = 4096
PAGES = (24, 8)  # of each region
DEVICE_STATE = (b"registers", b"and devices")
USERFAULTFD, USER_MODE_ONLY = 323, 1
UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00


class Guest:
    """Both copies of one guest. `broken` has each rule that was broken, in words."""

    def __init__(self) -> None:
        self.runs: set[Role] = set()
        self.granted = self.ran_there = False
        self.broken: list[str] = []
        self.vmms: dict[Role, FakeVmm] = {}
        self.recorded: Callable[[Role], str] = lambda role: ""  # the word on that host's disk

    def run(self, role: Role) -> None:
        there = self.vmms["destination"]
        if role == "source":
            self.never(self.ran_there, "a stale guest was resumed at the source")
            self.never(
                self.granted and there.state != "ended",
                "the source ran a guest that it had granted",
            )
        else:
            self.never(self.recorded("source") != "granted", "run without a grant")
            self.never(self.recorded("destination") != "owned", "run without a record of it")
            self.never(there.state != "loaded", f"run while {there.state}")
            self.ran_there = True
        self.runs.add(role)
        self.never(len(self.runs) == 2, "two guests ran")

    def stop(self, role: Role) -> None:
        self.runs.discard(role)

    def never(self, broken: bool, rule: str) -> None:
        if broken:
            self.broken.append(rule)


class FakeVmm(Vmm):
    """`state` is running, paused, stopped, kept (source); incoming, loading, loaded (also when it
    is to stay paused), running (destination); ended."""

    kind = "process"
    at: ClassVar[dict[str, FakeVmm]] = {}

    def __init__(
        self, guest: Guest, role: Role, state: State, reach: Callable[[str], Awaitable[None]]
    ) -> None:
        self.name, self.socket = "web1", f"/fake/{role}"
        self.guest, self.role = guest, role
        self.state: str = state
        self.reach = reach
        self.problems: tuple[str, ...] = ()
        self.died = False  # by itself, which nobody answers for
        self.releases = self.closed = 0
        self.received: list[bytes] = []
        self._gone = trio.Event()
        self._uffd = -1
        self._files = [os.memfd_create(f"{role}{i}") for i in range(len(PAGES))]
        self._maps: list[mmap.mmap] = []
        for i, (fd, pages) in enumerate(zip(self._files, PAGES, strict=True)):
            os.ftruncate(fd, pages * PAGE)
            if role == "source":
                for page in range(1 + i, pages, 3):  # others are holes
                    os.pwrite(fd, bytes([i + 1, page]) * (PAGE // 2), page * PAGE)
            self._maps.append(mmap.mmap(fd, pages * PAGE))
        guest.vmms[role] = self
        self.at[self.socket] = self
        if state == "running":
            guest.runs.add(role)

    @classmethod
    async def connect(cls, name: str, socket: str) -> Self:
        found = cls.at[socket]
        assert isinstance(found, cls)
        return found

    async def inspect(self, role: Role) -> Shape:
        await self._at("inspect")
        states: dict[str, State] = {"running": "running", "incoming": "incoming"}
        regions = tuple(
            Region(f"ram{i}", pages, PAGE, address_of(memory), os.dup(fd), 0)
            for i, (fd, pages, memory) in enumerate(
                zip(self._files, PAGES, self._maps, strict=True)
            )
        )
        return Shape(
            states.get(self.state, "paused"), os.getpid(), regions, {"version": "1"}, self.problems
        )

    # --- source

    async def prepare(self) -> None:
        await self._at("prepare")

    async def save(
        self, send: Callable[[bytes], Awaitable[None]], stopped: Callable[[], None]
    ) -> None:
        await self._at("save")
        self.before = "running" if self.state == "running" else "paused"
        self.state = "stopped"
        self.guest.stop("source")
        stopped()
        await self._at("save stopped")
        for piece in DEVICE_STATE:
            await send(piece)
        await self._at("save sent")

    async def rollback(self) -> None:
        await self._at("rollback")
        self.guest.never(self.state in ("kept", "ended"), "rolled back after the end")
        if self.before == "running":
            self.guest.run("source")
        self.state = self.before or self.state
        self.before = None

    async def finish(self, keep: bool) -> None:
        await self._at("finish")
        self.guest.never(
            self.guest.vmms["destination"].memory() != self.memory(), "memory let go of too early"
        )
        self.state = "kept" if keep else "ended"
        if not keep:
            self._gone.set()

    # --- destination

    async def adopt(self, shape: Shape) -> list[int]:
        await self._at("adopt")
        self._uffd = userfaultfd()
        return [os.dup(self._uffd)]

    async def load(self, receive: AsyncIterable[bytes]) -> None:
        self.state = "loading"
        await self._at("load")
        async for piece in receive:
            self.received.append(piece)
        await self._at("load done")
        self.state = "loaded"

    async def run(self) -> None:
        await self._at("run")
        self.guest.run("destination")
        self.state = "running"
        await self._at("run done")

    async def release(self) -> None:
        await self._at("release")
        self.releases += 1
        whole = self.guest.vmms["source"].memory() == self.memory()
        self.guest.never(self.state not in ("incoming", "ended") and not whole, "zeros for pages")
        self._let_go()

    # --- both

    async def end(self) -> None:
        await self._at("end", alive=False)
        self.guest.never(self.guest.ran_there, "a guest that ran was ended")
        self._ended()

    async def gone(self) -> None:
        await self._gone.wait()

    async def aclose(self) -> None:
        await self._at("aclose", alive=False)
        self.closed += 1

    # --- for tests

    def die(self) -> None:
        """The VMM's process ends by itself."""
        self.died = True
        self._ended()

    def memory(self) -> list[bytes]:
        """Guest RAM as its files have it; reading those never waits for a page."""
        return [os.pread(fd, n * PAGE, 0) for fd, n in zip(self._files, PAGES, strict=True)]

    def registered(self) -> bool:
        """Whether an access to guest RAM may still wait for somebody."""
        other = userfaultfd()
        try:
            fcntl.ioctl(other, UFFDIO_API, struct.pack("QQQ", 0xAA, 0, 0))
            for memory in self._maps:
                # Of each mapping, only one userfaultfd.
                what = struct.pack("QQQQ", address_of(memory), len(memory), 1, 0)
                fcntl.ioctl(other, UFFDIO_REGISTER, what)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return True
        finally:
            os.close(other)
        return False

    def free(self) -> None:
        """Everything of it goes, once no test looks at it any more."""
        self._let_go()
        for memory in self._maps:
            memory.close()
        for fd in self._files:
            os.close(fd)

    async def _at(self, step: str, *, alive: bool = True) -> None:
        await self.reach(f"{self.role}.{step}")
        if alive and self.state == "ended":
            raise VmmGone(f"the VMM of {self.name} has ended")

    def _ended(self) -> None:
        self.state = "ended"
        self.guest.stop(self.role)
        self._let_go()
        self._gone.set()

    def _let_go(self) -> None:
        if self._uffd >= 0:
            os.close(self._uffd)
            self._uffd = -1


def address_of(memory: mmap.mmap) -> int:
    anchor = ctypes.c_char.from_buffer(memory)
    return ctypes.addressof(anchor)


def userfaultfd() -> int:
    """Of this process, which no privilege is needed for."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY)
    if fd < 0:
        missing(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
    return fd
