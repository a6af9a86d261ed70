# SPDX-License-Identifier: Apache-2.0
"""What only one daemon of a host may have at a time: a folder of records, a VMM's process.

flock(2), because the kernel gives such a lock back when its process ends, however that ends. For a
VMM it is taken on /proc/PID/fd: that is there for whichever daemon, goes with the process, and only
who may look into the process may open it, so that nobody else can keep a VMM from its daemon.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
import trio

from postcopyd.errors import PostcopydError, shortage
from postcopyd.host import procfs

WAIT_S = 2.0
"""How long it may take until the kernel has cleaned up after a daemon that was killed just now."""

TRY_S = 0.05

log = structlog.get_logger()


class Taken(PostcopydError):
    """Another has it."""

    name = "Busy"


@asynccontextmanager
async def folders(*paths: tuple[Path, str]) -> AsyncIterator[None]:
    """Has these folders of records, each with its option, to itself: daemons that share records
    would undo each other's. Raises PostcopydError when another daemon has one."""
    taken: dict[procfs.FileId, int] = {}
    try:
        for path, option in paths:
            if (which := procfs.file_id(str(path))) not in taken:
                taken[which] = await _folder(path, option)
        yield
    finally:
        for fd in taken.values():
            if fd >= 0:
                os.close(fd)


async def _folder(path: Path, option: str) -> int:
    def taken(holder: int) -> str:
        return (
            f"starting on the records in {path}: another postcopyd{_by(holder)} has them; stop "
            f"that one, or name another folder with {option}"
        )

    try:
        return await _locked(_open(path / ".lock", os.O_RDWR | os.O_CREAT), taken)
    except OSError as error:
        # Guests may be waiting for this daemon, and a disk that is full or read-only now, or that
        # has no locks, may have been none of this when their records were written.
        log.error("records not locked: see that only one daemon has them", folder=str(path),
                  error=error.strerror)  # fmt: skip
        return -1


async def vmm(pid: int, name: str) -> int:
    """Takes the process of a VMM for the VM `name`; the descriptor holds it. Raises
    PostcopydError."""

    def taken(holder: int) -> str:
        if holder == os.getpid():
            return (
                f"process {pid} is attached to this daemon under another name: one VMM has one "
                f"name, detach that one first"
            )
        return (
            f"process {pid} is attached to another postcopyd of this host{_by(holder)}: one VMM "
            f"has one daemon, detach it there or stop that one first"
        )

    try:
        return await _locked(process(pid), taken)
    except OSError as error:
        if short := shortage(error):
            raise short from None
        # Without the right to look there this daemon can do little with it; or it has ended, which
        # its driver will say.
        log.warning("VMM not locked", vm=name, pid=pid, error=error.strerror)
        return -1


def process(pid: int) -> int:
    """What is locked of a process. Raises OSError."""
    return _open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY)


def _open(path: str | Path, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


async def _locked(fd: int, taken: Callable[[int], str]) -> int:
    """The descriptor, with the lock on what it is of; closed otherwise. Raises OSError, and Taken
    with a sentence about the process that has the lock."""
    try:
        await _take(fd)
    except BlockingIOError:
        holder = _holder(fd)
        os.close(fd)
        raise Taken(taken(holder)) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


async def _take(fd: int) -> None:
    deadline = trio.current_time() + WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if trio.current_time() > deadline or _holder(fd) == os.getpid():
                raise
        await trio.sleep(TRY_S)


def _by(holder: int) -> str:
    return f" (process {holder})" if holder else ""


def _holder(fd: int) -> int:
    """The process that has the lock, by proc_locks(5); 0 when that does not tell."""
    found = os.fstat(fd)
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    try:
        with open("/proc/locks", encoding="ascii") as lines:
            for line in lines:
                words = line.split()
                if words[1] == "FLOCK" and words[5] == device:
                    return int(words[4])
    except (OSError, ValueError, IndexError):
        pass
    return 0
