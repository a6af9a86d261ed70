# SPDX-License-Identifier: Apache-2.0
"""VMMs that are made for tests of the sessions, and one guest's truth: where it ran, and when.

A `FakeVmm` has real guest RAM (a memfd, at the destination mapped in this process with a real
userfaultfd), so that the engines are the real ones. It outlives daemons; a `FakeDriver` is one
daemon's connection to it. At each step that tells a `reach` function, which may raise, wait, or
break something elsewhere. `Guest` sees both VMMs and writes down what must never happen.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import struct
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Self

import trio
from needs import missing

from postcopyd.vmm import Disk, Region, Role, Shape, State, Vmm, VmmError, VmmGone

PAGE = 4096
PAGES = (24, 8)  # of each region
DEVICE_STATE = (b"registers", b"and devices")
USERFAULTFD, USER_MODE_ONLY = 323, 1
UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00


class Killed(BaseException):
    """Ends whatever a daemon was doing that was killed: nothing may catch it."""


class Life:
    """One daemon's process: it does nothing any more once it is `over`. `sessions` are all that it
    made."""

    def __init__(self) -> None:
        self.over = False
        self.sessions: list[Any] = []

    def check(self) -> None:
        if self.over:
            raise Killed


class Guest:
    """Both copies of one guest. `broken` has each rule that was broken, in words."""

    def __init__(self) -> None:
        self.runs: set[Role] = set()
        self.granted = self.ran_there = False
        self.given_up = False  # by a person, who says that the destination is dead
        self.elsewhere = False  # moved from the source by somebody else: it runs at a third host
        self.broken: list[str] = []
        self.vmms: dict[Role, FakeVmm] = {}
        self.recorded: Callable[[Role], str] = lambda role: ""  # the word on that host's disk

    def run(self, role: Role) -> None:
        there = self.vmms["destination"]
        if role == "source":
            self.never(self.ran_there and not self.given_up, "a stale guest ran at the source")
            self.never(self.elsewhere, "two guests ran, one of them at a third host")
            self.never(
                self.granted and there.state != "ended" and not self.given_up,
                "the source ran a guest that it had granted",
            )
        else:
            self.never(self.recorded("source") != "granted", "run without a grant")
            self.never(self.recorded("destination") != "owned", "run without a record of it")
            self.never(there.state != "loaded", f"run while {there.state}")
            self.ran_there = True
        self.runs.add(role)
        self.never(len(self.runs) == 2, "two guests ran")

    def record(self, role: Role, before: str, after: str) -> None:
        """What is about to be written on that host's disk."""
        there = self.vmms["destination"]
        if role == "destination":
            self.never(
                after == "owned" and self.recorded("source") != "granted", "owned without a grant"
            )
            self.never(after == "declined" and there.state == "running", "declined a running guest")
        else:
            self.never(
                (before, after) == ("granted", "held")
                and there.state != "ended"
                and not self.given_up,
                "taken back from a destination that has it",
            )
        self.granted |= after == "granted"

    def stop(self, role: Role) -> None:
        self.runs.discard(role)

    def never(self, broken: bool, rule: str) -> None:
        if broken:
            self.broken.append(rule)


class FakeVmm:
    """A VMM's process. `state` is running, paused, stopped, kept, taken (source; the last by
    somebody else, who has moved or paused it); incoming, loading,
    loaded (also when it is to stay paused), running (destination); ended."""

    at: ClassVar[dict[str, FakeVmm]] = {}
    numbers: ClassVar = itertools.count(1 << 23)  # of processes, beyond what Linux has

    def __init__(
        self, guest: Guest, role: Role, state: State, reach: Callable[[str], Awaitable[None]]
    ) -> None:
        self.socket, self.pid = f"/fake/{role}", next(self.numbers)
        self.guest, self.role = guest, role
        self.state: str = state
        self.reach = reach
        self.life = Life()  # the daemon that may connect
        self.problems: tuple[str, ...] = ()
        self.direct_io: str | None = None
        self.facts = {"version": "1"}
        self.disks: tuple[Disk, ...] = ()
        self.plugged = ""  # in short: the outline
        self.died = False  # by itself, which nobody answers for
        self.farewell: str | None = None
        self.received: list[bytes] = []
        self.writes = 0
        self.gone = trio.Event()
        self.uffd = -1
        self.files = [os.memfd_create(f"{role}{i}") for i in range(len(PAGES))]
        self.maps: list[mmap.mmap] = []
        for i, (fd, pages) in enumerate(zip(self.files, PAGES, strict=True)):
            os.ftruncate(fd, pages * PAGE)
            if role == "source":
                for page in range(1 + i, pages, 3):  # others are holes
                    os.pwrite(fd, bytes([i + 1, page]) * (PAGE // 2), page * PAGE)
            self.maps.append(mmap.mmap(fd, pages * PAGE))
        guest.vmms[role] = self
        self.at[self.socket] = self
        if state == "running":
            guest.runs.add(role)

    @classmethod
    def started(cls, pid: int) -> int:
        """As procfs.started."""
        return int(any(vmm.pid == pid and vmm.state != "ended" for vmm in cls.at.values()))

    @classmethod
    def locked(cls, pid: int) -> int:
        """As locks.process: what every daemon finds of this process, for flock(2)."""
        vmm = next(vmm for vmm in cls.at.values() if vmm.pid == pid)
        return os.open(f"/proc/self/fd/{vmm.files[0]}", os.O_RDONLY | os.O_CLOEXEC)

    def write(self) -> None:
        """The guest writes: to data, to a hole, and zeros to what was none, in both regions."""
        self.guest.never(self.state != "running", f"written while {self.state}")
        self.writes += 1
        byte = self.writes
        for region, page, what in ((0, 1, byte), (0, 7, byte), (0, 9, byte), (0, 13, 0), (1, 2, 1)):
            self.maps[region][page * PAGE : (page + 1) * PAGE] = bytes([what]) * PAGE

    def taken(self, *, away: bool) -> None:
        """Somebody else pauses the guest, or moves it away by the VMM's own means."""
        self.state = "taken"
        self.guest.stop(self.role)
        self.guest.elsewhere = away

    def unplug(self) -> None:
        """The last region goes, with the device that it was."""
        self.maps.pop().close()

    def same(self, other: FakeVmm) -> bool:
        """Whether both have the same memory, what is unplugged aside."""
        most = min(len(self.maps), len(other.maps))
        return self.memory()[:most] == other.memory()[:most]

    def die(self, farewell: str | None = None) -> None:
        """The VMM's process ends by itself, or as its guest, or somebody, had it do."""
        self.died, self.farewell = True, farewell
        self.ended()

    def ended(self) -> None:
        self.state = "ended"
        self.guest.stop(self.role)
        self.let_go()
        self.gone.set()

    def let_go(self) -> None:
        if self.uffd >= 0:
            os.close(self.uffd)
            self.uffd = -1

    def memory(self) -> list[bytes]:
        """Guest RAM as its files have it; reading those never waits for a page. Where one was cut
        short: zeros, as where the destination has a memory error."""
        return [
            os.pread(fd, n * PAGE, 0).ljust(n * PAGE, b"\0")
            for fd, n in zip(self.files, PAGES, strict=True)
        ]

    def registered(self) -> bool:
        """Whether an access to guest RAM may still wait for somebody."""
        other = userfaultfd()
        try:
            fcntl.ioctl(other, UFFDIO_API, struct.pack("QQQ", 0xAA, 0, 0))
            for memory in self.maps:
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
        self.let_go()
        for memory in self.maps:
            memory.close()
        for fd in self.files:
            os.close(fd)


class FakeDriver(Vmm):
    """One daemon's connection to a FakeVmm."""

    kind = "process"
    device_state = "as a fake one"

    def __init__(self, name: str, vmm: FakeVmm) -> None:
        self.name, self.socket, self.pid = name, vmm.socket, vmm.pid
        self.vmm, self.life = vmm, vmm.life

    @classmethod
    async def connect(cls, name: str, socket: str) -> Self:
        vmm = FakeVmm.at[socket]
        if vmm.state == "ended":
            raise VmmGone(f"nobody answers at {socket}")
        return cls(name, vmm)

    async def inspect(self, role: Role) -> Shape:
        await self._at("inspect")
        vmm = self.vmm
        states: dict[str, State] = {"running": "running", "incoming": "incoming"}
        regions = tuple(
            Region(f"ram{i}", pages, PAGE, address_of(memory), os.dup(fd), 0)
            for i, (fd, pages, memory) in enumerate(zip(vmm.files, PAGES, vmm.maps, strict=True))
        )
        return Shape(
            states.get(vmm.state, "paused"),
            os.getpid(),
            regions,
            vmm.facts,
            vmm.problems,
            direct_io=vmm.direct_io,
            disks=vmm.disks,
            outline=vmm.plugged,
        )

    async def outline(self) -> str:
        await self._at("outline")
        return self.vmm.plugged

    # --- source

    async def track(self) -> int:
        await self._at("track")
        return userfaultfd()

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        await self._at("still")
        vmm = self.vmm
        self._not_taken()
        if vmm.state != "running":
            yield
            return
        self.before, vmm.state = "running", "stopped"
        vmm.guest.stop("source")
        try:
            yield
            await self._at("still done")
        finally:
            if not self.life.over and vmm.state == "stopped":  # or rolled back by the next daemon
                with trio.CancelScope(shield=True):
                    await self._at("still over")  # may fail: then `rollback` is to be tried
                vmm.guest.run("source")
                self.before, vmm.state = None, "running"

    async def prepare(self) -> None:
        await self._at("prepare")
        self._not_taken()
        if self.vmm.state == "running":
            self.vmm.write()

    async def save(
        self, send: Callable[[bytes], Awaitable[None]], stopped: Callable[[], None]
    ) -> None:
        await self._at("save")
        self._not_taken()
        self.before = "running" if self.vmm.state == "running" else "paused"
        self.vmm.state = "stopped"
        self.vmm.guest.stop("source")
        stopped()
        await self._at("save stopped")
        for piece in DEVICE_STATE:
            await send(piece)
        await self._at("save sent")

    def _not_taken(self) -> None:
        if self.vmm.state == "taken":
            raise VmmError("somebody else has it")

    async def rollback(self) -> str:
        await self._at("rollback")
        vmm = self.vmm
        if vmm.state == "taken":
            return "somebody else has it"
        vmm.guest.never(vmm.state in ("kept", "ended"), "rolled back after the end")
        if self.before == "running" and vmm.state != "running":
            vmm.guest.run("source")
        vmm.state = self.before or vmm.state
        self.before = None
        await self._at("rollback done")
        return ""

    async def finish(self, keep: bool) -> None:
        await self._at("finish")
        vmm = self.vmm
        there = vmm.guest.vmms["destination"]
        needed = not there.same(vmm) and there.farewell is None
        vmm.guest.never(needed, "memory let go of too early")
        if keep:
            vmm.state = "kept"
        else:
            vmm.ended()
        await self._at("finish done", alive=False)

    # --- destination

    async def discard(self, shape: Shape) -> None:
        await self._at("discard")
        self.vmm.guest.never(self.vmm.state != "incoming", "memory taken from a guest")
        for memory in self.vmm.maps:
            memory.madvise(mmap.MADV_REMOVE)
        await self._at("discard done")

    async def adopt(self, shape: Shape) -> list[int]:
        await self._at("adopt")
        vmm = self.vmm
        vmm.let_go()
        vmm.uffd = userfaultfd()
        await self._at("adopt done")
        return [os.dup(vmm.uffd)]

    async def adopted(self) -> list[int]:
        await self._at("adopted")
        return [os.dup(self.vmm.uffd)] if self.vmm.uffd >= 0 else []

    async def load(self, receive: AsyncIterable[bytes]) -> None:
        self.vmm.state = "loading"
        await self._at("load")
        async for piece in receive:
            self.vmm.received.append(piece)
        await self._at("load done")
        self.vmm.state = "loaded"

    async def run(self) -> None:
        await self._at("run")
        if self.vmm.state != "running":
            self.vmm.guest.run("destination")
        self.vmm.state = "running"
        await self._at("run done")

    async def release(self) -> None:
        await self._at("release")
        vmm = self.vmm
        whole = vmm.same(vmm.guest.vmms["source"])
        vmm.guest.never(vmm.state not in ("incoming", "ended") and not whole, "zeros for pages")
        vmm.let_go()
        await self._at("release done")

    # --- both

    async def end(self) -> None:
        await self._at("end", alive=False)
        guest = self.vmm.guest
        ran = guest.ran_there and self.vmm.role == "destination"
        guest.never(ran and not guest.given_up, "a guest that ran was ended")
        self.vmm.ended()
        await self._at("end done", alive=False)

    async def gone(self) -> None:
        await self.vmm.gone.wait()
        self.farewell = self.vmm.farewell

    async def aclose(self) -> None:
        await self._at("aclose", alive=False)

    async def _at(self, step: str, *, alive: bool = True) -> None:
        self.life.check()
        await self.vmm.reach(f"{self.vmm.role}.{step}")
        self.life.check()
        if alive and self.vmm.state == "ended":
            raise VmmGone(f"the VMM of {self.name} has ended")


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
