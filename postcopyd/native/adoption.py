# SPDX-License-Identifier: Apache-2.0
"""Adoption of an unmodified VMM: makes a userfaultfd of the VMM's own, and duplicates it.

Wraps adopt.c, which runs one system call in the VMM by ptrace and leaves the VMM as it was. Each
function works in a thread of its own, because ptrace belongs to a thread, and takes milliseconds.
"""

from __future__ import annotations

import errno
import os
import platform

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
