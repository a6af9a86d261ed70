# SPDX-License-Identifier: Apache-2.0
"""Locks on what only one daemon of a host may have at a time: a folder of records, a VMM's process.

flock(2), because the kernel releases such a lock when its process ends, however it ends. For a VMM
the lock is on /proc/PID/fd: every daemon finds the same one, and it goes with the process. Only a
process that may look into the VMM may open it, so nobody else can keep a VMM from its daemon.
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
"""How long the kernel may take to clean up after a daemon that was killed just now."""

TRY_S = 0.05

log = structlog.get_logger()


class Taken(PostcopydError):
    """Another process has the lock."""

    name = "Busy"


@asynccontextmanager
async def folders(*paths: tuple[Path, str]) -> AsyncIterator[None]:
    """Locks these folders of records, each given with its option: daemons that share records would
    overwrite each other's. Raises PostcopydError when another daemon has one."""
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
        # Starts without the lock: guests may be waiting for this daemon. The disk may have become
        # full or read-only, or have lost its locks, since their records were written.
        log.error("records not locked: see that only one daemon has them", folder=str(path),
                  error=error.strerror)  # fmt: skip
        return -1


async def vmm(pid: int, name: str) -> int:
    """Locks the process of a VMM for the VM `name`; the descriptor holds the lock. Raises
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
        # This daemon may not look there, and then can do little with the VMM; or the VMM has ended,
        # which its driver will say.
        log.warning("VMM not locked", vm=name, pid=pid, error=error.strerror)
        return -1


def process(pid: int) -> int:
    """A descriptor of what is locked of a process. Raises OSError."""
    return _open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY)


def _open(path: str | Path, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


async def _locked(fd: int, taken: Callable[[int], str]) -> int:
    """Locks what the descriptor is of and returns it, or closes it. Raises OSError, and Taken with
    a sentence about the process that has the lock."""
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
    """The process that has the lock, by proc_locks(5); 0 if that does not tell."""
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
