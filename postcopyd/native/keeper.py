# SPDX-License-Identifier: Apache-2.0
"""Keepers: processes that share the memory of a VMM and outlive it, so that guest RAM without a
file can still be read when the VMM has ended. adopt_keeper.c says how one is made, cloning.py by
whom.

Owns nothing between two calls. Whoever has made a keeper ends it, or puts it on record for somebody
who will, and calls `hold`. It ends by itself when nobody has for LEASE_S, or ever in UNRECORDED_S.
Each function works in a thread of its own.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import trio

from postcopyd._native import lib
from postcopyd.errors import PostcopydError, shortage
from postcopyd.host import procfs
from postcopyd.native import cloning
from postcopyd.native.adoption import AdoptionError, call
from postcopyd.native.cloning import NAME, PAGE
from postcopyd.tasks import threads

LEASE_S = 86400
"""How long a keeper waits for a daemon that never comes back."""

UNRECORDED_S = 600
"""How long one waits that nobody may know of."""

HOLD_S = 3600
"""How often `hold` is to be called."""

READY_S, ENDED_S = 2.0, 5.0

PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, NO_FILE = 3, 0x22, (1 << 64) - 1
CLOCK_NANOSLEEP = 230
WAIT_NO_HANG_ALL = 1 | 0x40000000  # WNOHANG, __WALL


class Keeper(NamedTuple):
    """`page` is the address of the memory that it needs for itself, in the memory that it keeps."""

    pid: int
    started: int  # as procfs has it
    page: int

    def lives(self) -> bool:
        """Raises OSError when that cannot be known."""
        return procfs.started(self.pid) == self.started


async def make(vmm: int, *, allow_seccomp: bool) -> Keeper:
    """A keeper of a VMM's memory, in which earlier keepers of this VMM have ended. `allow_seccomp`:
    see `Vmm.forbids`. Raises PostcopydError; then nothing has changed, or there may be one that
    ends by itself."""
    with trio.CancelScope(shield=True):  # else nobody would know of it
        try:
            made: Keeper = await trio.to_thread.run_sync(
                _make, vmm, allow_seccomp, limiter=threads.VMM
            )
        except OSError as error:
            raise shortage(error) or AdoptionError(
                f"making a keeper of process {vmm}: {error.strerror}"
            ) from None
    return made


async def end(keeper: Keeper, vmm: int) -> None:
    """Ends a keeper of the VMM, which may have ended. Fine if the keeper has. Raises PostcopydError
    when it may still be there."""
    with trio.CancelScope(shield=True):
        try:
            await trio.to_thread.run_sync(_end, keeper, vmm, limiter=threads.VMM)
        except OSError as error:
            why = shortage(error) or error.strerror
            raise PostcopydError(
                f"ending process {keeper.pid}, {NAME}, which keeps the memory of a guest that has "
                f"left: {why}; end it by hand"
            ) from None


def hold(keeper: Keeper) -> bool:
    """Has it wait for LEASE_S from now on. Returns whether it does: it may have ended."""
    return bool(lib.adopt_keeper_until(keeper.pid, keeper.page, _until(LEASE_S)) == 0)


def _until(seconds: int) -> int:
    return round(time.clock_gettime(time.CLOCK_BOOTTIME)) + seconds


def _make(vmm: int, allow_seccomp: bool) -> Keeper:
    if not allow_seccomp and procfs.status(vmm).get("Seccomp") == "2":
        raise AdoptionError(
            f"making a keeper of process {vmm}: it has a seccomp filter, which may end it for "
            f"that; guest RAM in a file needs no keeper"
        )
    for pid in children(vmm):  # of a daemon that was killed before it could record them
        if procfs.status(pid).get("Name") == NAME:
            _end(Keeper(pid, procfs.started(pid), 0), vmm)
    arguments = (0, PAGE, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, NO_FILE, 0)
    page = call(vmm, "mmap", arguments, allow_seccomp)
    try:
        pid = _here(vmm, cloning.begin(vmm, page, _until(UNRECORDED_S)))
    except cloning.Unclear:  # so the page has to stay
        raise
    except BaseException:
        with suppress(PostcopydError, PermissionError):
            call(vmm, "munmap", (page, PAGE), allow_seccomp)
        raise
    keeper = Keeper(pid, procfs.started(pid), page)
    try:
        _must_be_ready(keeper)
    except BaseException:
        _end(keeper, vmm)
        raise
    with suppress(OSError):
        _join_us(pid)
    return keeper


def _here(vmm: int, number: int) -> int:
    """The number that a child of the VMM has in our PID namespace."""
    for pid in children(vmm):
        if procfs.status(pid).get("NSpid", "").split()[-1:] == [str(number)]:
            return pid
    raise AdoptionError(f"making a keeper of process {vmm}: it ended at once; see dmesg for why")


def children(parent: int) -> Iterator[int]:
    """Of all threads of a process."""
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{parent}/task"):
            yield from map(int, Path(f"/proc/{parent}/task/{thread}/children").read_text().split())


def _must_be_ready(keeper: Keeper) -> None:
    """Waits until it has done all that it does before it sleeps, and looks whether that was so. A
    keeper with descriptors would hold the VMM's disks."""
    deadline = time.monotonic() + READY_S
    sleeps = f"{CLOCK_NANOSLEEP} "
    proc = Path(f"/proc/{keeper.pid}")
    try:
        while not (proc / "syscall").read_text().startswith(sleeps):
            if time.monotonic() > deadline:
                raise AdoptionError(f"making a keeper: process {keeper.pid} does not get to work")
            time.sleep(0.0002)
        if not os.listdir(proc / "fd") and (proc / "comm").read_text().strip() == NAME:
            return
    except OSError as error:
        raise AdoptionError(f"making a keeper: process {keeper.pid}: {error.strerror}") from None
    raise AdoptionError(f"making a keeper: process {keeper.pid} could not close its descriptors")


def outlives_group(keeper: Keeper) -> bool:
    """Whether the end of the VMM's cgroup is not its end, as it is in our own of every hierarchy.
    False if that cannot be known."""
    try:
        ours, its = (Path(f"/proc/{who}/cgroup").read_text() for who in ("self", keeper.pid))
    except OSError:
        return False
    return ours == its


def _join_us(pid: int) -> None:
    """Moves it into our cgroup: the end of the VMM's cgroup would be its end. Raises OSError."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            Path(f"/sys/fs/cgroup{line[3:]}/cgroup.procs").write_text(str(pid))


def _end(keeper: Keeper, vmm: int) -> None:
    started = procfs.started(keeper.pid)  # raises where that cannot be known
    fields = procfs.status(keeper.pid)
    if fields.get("Name") != NAME or started not in (0, keeper.started):
        return
    child = fields["PPid"] == str(vmm)
    _kill(keeper.pid, wait=child)  # the last one that has the memory takes long to give it back
    if not child:
        return
    # Its parent has not asked for a child, and would leave a zombie. Whoever takes that away gives
    # the page back, so that this happens once: the VMM may use the address for something else.
    number = int(fields["NSpid"].split()[-1])
    with suppress(PostcopydError, PermissionError):
        if call(vmm, "wait4", (number, 0, WAIT_NO_HANG_ALL, 0), True) == number and keeper.page:
            call(vmm, "munmap", (keeper.page, PAGE), True)


def _kill(pid: int, wait: bool) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return  # it has ended
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        waits = select.poll()
        waits.register(pidfd, select.POLLIN)
        if wait and not waits.poll(ENDED_S * 1000):
            raise OSError(errno.ETIMEDOUT, "it does not end")
    finally:
        os.close(pidfd)
