# SPDX-License-Identifier: Apache-2.0
"""The userfaultfds that a QEMU holds: makes them there, finds them, closes them there.

Owns the two ways to make one: the system call, or for a QEMU that may not make it the device, lent
by QMP. How a call is run inside QEMU is `adoption`'s business; what a userfaultfd is used for is
the engine's. QEMU's seccomp filter is a list of forbidden calls, and these are not on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import trio

from postcopyd.errors import PostcopydError
from postcopyd.host import procfs
from postcopyd.native import adoption
from postcopyd.vmm import VmmError
from postcopyd.vmm.qemu.qmp import Qmp

LINK = "anon_inode:[userfaultfd]"
DEVICE = "/dev/userfaultfd"
LENT = "postcopyd-userfaultfd"  # the device's name in QEMU's monitor
CLEAN_UP_SECONDS = 5.0  # for a QEMU that may be stuck


def numbers(pid: int) -> list[int]:
    """All that QEMU has, in order. Its own are for snapshots in the background."""
    return sorted(number for number, link in procfs.descriptors(pid).items() if link == LINK)


async def create(qmp: Qmp, pid: int) -> tuple[int, int]:
    """Makes one. Returns a duplicate, which the caller owns, and its number in QEMU. Raises
    PostcopydError."""
    with suppress(PermissionError):
        return await adoption.create_userfaultfd(pid, allow_seccomp=True)
    try:
        with _device(pid) as device:
            await qmp.execute("getfd", {"fdname": LENT}, fd=device)
        lent = [n for n, link in procfs.descriptors(pid).items() if link == DEVICE]
        if not lent:
            raise VmmError(f"QEMU {pid} did not keep {DEVICE}, which it was lent: see its log.")
        return await adoption.create_userfaultfd(pid, device_fd=lent[0], allow_seccomp=True)
    except PermissionError as error:
        raise _forbidden(pid, error) from None
    finally:
        with trio.move_on_after(CLEAN_UP_SECONDS, shield=True), suppress(PostcopydError):
            await qmp.execute("closefd", {"fdname": LENT})


async def borrow(qmp: Qmp, pid: int) -> int:
    """Makes one that QEMU does not keep: the duplicate, which the caller owns, is all that is left.
    Raises PostcopydError."""
    ours, number = await create(qmp, pid)
    try:
        with trio.CancelScope(shield=True):
            await adoption.close_in(pid, number, allow_seccomp=True)
    except BaseException:
        os.close(ours)
        raise
    return ours


async def create_alone(pid: int) -> tuple[int, int]:
    """`create`, for a QEMU whose monitor nobody can ask now. Raises PostcopydError."""
    with suppress(PermissionError):
        return await adoption.create_userfaultfd(pid, allow_seccomp=True)
    with _device(pid) as device:
        lent = await adoption.lend(pid, device)
    try:
        return await adoption.create_userfaultfd(pid, device_fd=lent, allow_seccomp=True)
    except PermissionError as error:
        raise _forbidden(pid, error) from None
    finally:
        with (
            trio.move_on_after(CLEAN_UP_SECONDS, shield=True),
            suppress(PostcopydError, PermissionError),
        ):
            await adoption.close_in(pid, lent, allow_seccomp=True)


@contextmanager
def _device(pid: int) -> Iterator[int]:
    """The device, open. Raises VmmError."""
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise VmmError(
            f"QEMU {pid} may not use userfaultfd and {DEVICE} could not be opened "
            f"({error.strerror}): set sysctl vm.unprivileged_userfaultfd=1, or let postcopyd open "
            f"the device."
        ) from None
    try:
        yield device
    finally:
        os.close(device)


def _forbidden(pid: int, error: OSError) -> VmmError:
    return VmmError(
        f"QEMU {pid} may not use userfaultfd even through {DEVICE} ({error.strerror}): see "
        f"what its security module (AppArmor, SELinux) forbids."
    )


def duplicates(pid: int) -> list[int]:
    """Duplicates of all that QEMU has, in the order of `numbers`. Raises PostcopydError."""
    with ExitStack() as taken:
        ours = []
        for number in numbers(pid):
            ours.append(adoption.duplicate(pid, number))
            taken.callback(os.close, ours[-1])
        taken.pop_all()
    return ours


async def close_all(pid: int) -> None:
    """Closes all of them in QEMU. Raises PostcopydError."""
    await close(pid, numbers(pid))


async def close(pid: int, made: list[int]) -> None:
    """Closes those of `made` that are still there: others may be QEMU's own, for a snapshot in the
    background. Raises PostcopydError."""
    for number in sorted(set(made) & set(numbers(pid))):
        await adoption.close_in(pid, number, allow_seccomp=True)
