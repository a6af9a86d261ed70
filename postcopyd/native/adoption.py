# SPDX-License-Identifier: Apache-2.0
"""Adoption of an unmodified VMM: makes a userfaultfd of the VMM's own, and duplicates it.

Wraps adopt.c, which runs one system call in the VMM by ptrace and leaves the VMM as it was. Each
function works in a thread of its own, because ptrace belongs to a thread, and takes milliseconds.
"""

from __future__ import annotations

import errno
import mmap
import os
import platform
import socket
import struct
from collections.abc import Callable

import trio

from postcopyd._native import ffi, lib
from postcopyd.errors import PostcopydError, shortage
from postcopyd.tasks import threads

TIMEOUT_MS = 5000
"""How long adoption looks for a thread of the VMM that stops; it takes 1 ms if none is stuck."""

USERFAULTFD_IOC_NEW = 0xAA00

_CALLS = {
    "x86_64": {
        "close": 3,
        "ioctl": 16,
        "madvise": 28,
        "mmap": 9,
        "munmap": 11,
        "prctl": 157,
        "recvmsg": 47,
        "socketpair": 53,
        "userfaultfd": 323,
        "wait4": 61,
    }
}
"""System call numbers; adopt.c knows which architectures it supports."""


class AdoptionError(PostcopydError):
    """The VMM cannot be adopted, and nothing was changed in it; the sentence says what to do."""

    name = "NotAdopted"


def call(pid: int, name: str, arguments: tuple[int, ...], allow_seccomp: bool) -> int:
    """One system call in the VMM. Raises AdoptionError and PermissionError."""
    numbers = _CALLS.get(platform.machine())
    if numbers is None:
        raise AdoptionError(
            f"adopting process {pid}: adoption does not know {platform.machine()} yet"
        )
    error = ffi.new("struct adopt_error *")
    result = ffi.new("long *")
    given = ffi.new("unsigned long[6]", list(arguments))
    failed = lib.adopt_syscall(pid, numbers[name], given, TIMEOUT_MS, allow_seccomp, result, error)
    if failed:
        raise AdoptionError(ffi.string(error.text).decode(errors="replace"))
    if result[0] == -errno.EPERM:
        raise PermissionError(errno.EPERM, f"{name} is not permitted to process {pid}")
    if result[0] < 0:
        raise AdoptionError(
            f"adopting process {pid}: {name} in it failed: {os.strerror(-result[0])}"
        )
    return int(result[0])


def _create(pid: int, device_fd: int | None, allow_seccomp: bool) -> tuple[int, int]:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    if device_fd is None:
        number = call(pid, "userfaultfd", (flags,), allow_seccomp)
    else:
        number = call(pid, "ioctl", (device_fd, USERFAULTFD_IOC_NEW, flags), allow_seccomp)
    try:
        return duplicate(pid, number), number
    except PostcopydError:
        call(pid, "close", (number,), allow_seccomp)
        raise


async def create_userfaultfd(
    pid: int, *, device_fd: int | None = None, allow_seccomp: bool
) -> tuple[int, int]:
    """Makes a userfaultfd in the VMM. Returns (this process's duplicate, its number in the VMM).

    `device_fd` is the number *in the VMM* of an open /dev/userfaultfd, for VMMs without the
    privilege. Raises AdoptionError, or PermissionError when the VMM may not make one.
    """
    return await trio.to_thread.run_sync(
        _create, pid, device_fd, allow_seccomp, limiter=threads.VMM
    )


async def close_in(pid: int, number: int, *, allow_seccomp: bool) -> None:
    """Closes a descriptor of the VMM. Raises AdoptionError."""
    await trio.to_thread.run_sync(call, pid, "close", (number,), allow_seccomp, limiter=threads.VMM)


async def prctl(pid: int, option: int, value: int) -> None:
    """prctl(option, value, 0, 0, 0) in the VMM. Raises AdoptionError."""
    try:
        await trio.to_thread.run_sync(
            call, pid, "prctl", (option, value, 0, 0, 0), True, limiter=threads.VMM
        )
    except PermissionError as error:
        raise AdoptionError(str(error)) from None


async def madvise(pid: int, address: int, size: int, advice: int) -> None:
    """madvise(address, size, advice) in the VMM. Raises AdoptionError."""
    try:
        await trio.to_thread.run_sync(
            call, pid, "madvise", (address, size, advice), True, limiter=threads.VMM
        )
    except PermissionError as error:
        raise AdoptionError(str(error)) from None


async def lend(pid: int, fd: int) -> int:
    """Gives the VMM a descriptor of this process. Returns its number in the VMM, where the caller
    has to close it. Raises AdoptionError."""
    return await trio.to_thread.run_sync(_lend, pid, fd, limiter=threads.VMM)


def _lend(pid: int, fd: int) -> int:
    """By a socket pair that the VMM makes: this process sends through a duplicate of one end, and
    the VMM receives at the other, into a page that it maps for that."""

    def run(name: str, *arguments: int) -> int:
        return call(pid, name, (*arguments, *[0] * (6 - len(arguments))), allow_seccomp=True)

    protection, private = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        page = run("mmap", 0, mmap.PAGESIZE, protection, private, (1 << 64) - 1)
        try:
            return _received(pid, fd, page, run)
        finally:
            run("munmap", page, mmap.PAGESIZE)
    except OSError as error:
        raise shortage(error) or AdoptionError(
            f"lending process {pid} a descriptor: {error.strerror}"
        ) from None


def _received(pid: int, fd: int, page: int, run: Callable[..., int]) -> int:
    """The number of the descriptor in the VMM; `page` is mapped there. Raises OSError."""
    byte, control, message = page + 64, page + 128, page + 256
    run("socketpair", socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0, page)
    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    ends: tuple[int, ...] = ()
    try:
        ends = struct.unpack("ii", os.pread(memory, 8, page))
        with socket.socket(fileno=duplicate(pid, ends[0])) as ours:
            socket.send_fds(ours, [b"."], [fd])
        # struct iovec, then struct msghdr (recvmsg(2)), as 64-bit architectures have them.
        os.pwrite(memory, struct.pack("QQ", byte, 1), page + 16)
        header = struct.pack("QIxxxxQQQQixxxx", 0, 0, page + 16, 1, control, socket.CMSG_LEN(4), 0)
        os.pwrite(memory, header, message)
        run("recvmsg", ends[1], message, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
        length, level, kind, number = struct.unpack("Qiii", os.pread(memory, 20, control))
        if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS) or length < 20:
            raise AdoptionError(
                f"lending process {pid} a descriptor: it was kept from it, perhaps by a security "
                f"module (AppArmor, SELinux); see its log"
            )
        return int(number)
    finally:
        os.close(memory)
        for end in ends:
            run("close", end)


def duplicate(pid: int, number: int) -> int:
    """A duplicate of a VMM's descriptor; the caller's. Raises AdoptionError, NoResources."""
    ours: int = lib.adopt_getfd(pid, number)
    if ours < 0:
        if short := shortage(OSError(-ours, "")):
            raise short
        raise AdoptionError(
            f"taking a duplicate of descriptor {number} of process {pid}: {os.strerror(-ours)}"
        )
    return ours
