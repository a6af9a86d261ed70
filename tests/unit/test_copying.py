# SPDX-License-Identifier: Apache-2.0
"""Memory that was kept is copied into another process; a page that cannot be read takes no other
with it, and is never zeros."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from needs import missing

from postcopyd.errors import PostcopydError
from postcopyd.native.poison import poison
from postcopyd.source import copying
from postcopyd.vmm import Region, Shape

PAGE = 4096
HUGE, MADV_COLLAPSE = 2 << 20, 25
SIZE = 2 * HUGE
USERFAULTFD, USER_MODE_ONLY = 323, 1

MAP_FIXED = 0x10

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


@contextmanager
def memory() -> Iterator[tuple[mmap.mmap, int]]:
    """Private memory, and where it is."""
    with mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as made:
        at = ctypes.c_char.from_buffer(made)
        try:
            yield made, ctypes.addressof(at)
        finally:
            del at


def shape(address: int, pid: int) -> Shape:
    region = Region("ram", SIZE // PAGE, PAGE, address, None, 0)
    return Shape("paused", pid, (region,), {}, ())


def lose(address: int) -> None:
    """Puts a part of a file there that the file does not have."""
    empty = os.memfd_create("empty")
    put = libc.mmap(
        ctypes.c_void_p(address), PAGE, mmap.PROT_READ, MAP_FIXED | mmap.MAP_PRIVATE, empty, 0
    )
    os.close(empty)
    assert put == address


@pytest.mark.parametrize("lost", [[], [0], [3, 4], [511, 512], [1023]])
async def test_pages_that_cannot_be_read(lost: list[int]) -> None:
    with memory() as (old, was), memory() as (new, to):
        for page in range(0, SIZE // PAGE, 2):
            old[page * PAGE] = 1 + page % 255
        expected = bytearray(old[:])
        for page in lost:
            lose(was + page * PAGE)
            expected[page * PAGE] = 0
        found = await copying.copy(shape(was, os.getpid()), shape(to, os.getpid()))
        assert [one.address for one in found] == [to + page * PAGE for page in lost]
        assert [one.size for one in found] == [PAGE] * len(lost)
        assert new[:] == expected


async def test_a_keeper_that_has_ended_is_no_lost_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads as nothing at all, and all of the guest would be lost."""
    with memory() as (old, was), memory() as (_, to):
        old[0] = 1
        monkeypatch.setattr(copying.os, "pread", lambda *_: b"")
        monkeypatch.setattr(copying, "data", lambda *_: [(0, PAGE)])
        with pytest.raises(PostcopydError, match="it has ended"):
            await copying.copy(shape(was, os.getpid()), shape(to, os.getpid()))


@pytest.mark.parametrize(
    "status", [{}, {"State": "Z (zombie)"}, {"State": "S (sleeping)", "ShdPnd": f"{1 << 8:x}"}]
)
async def test_a_keeper_that_is_killed_loses_no_single_pages(
    status: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes its memory away page by page, and each reads as an error."""
    with memory() as (old, was), memory() as (_, to):
        old[0] = old[PAGE] = 1
        lose(was + PAGE)
        monkeypatch.setattr(copying, "_memory", lambda *_: os.open("/proc/self/mem", os.O_RDWR))
        before = copying.procfs.status
        monkeypatch.setattr(
            copying.procfs, "status", lambda pid: status if pid == os.getpid() else before(pid)
        )
        with pytest.raises(PostcopydError, match="it was killed meanwhile"):
            await copying.copy(shape(was, os.getpid()), shape(to, os.getpid()))


def test_a_memory_error() -> None:
    """The page cannot be read, also when the userfaultfd is closed and the kernel is asked for a
    huge page there; what is beside it can be."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY
    userfaultfd = libc.syscall(USERFAULTFD, flags)
    if userfaultfd < 0:
        missing(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
    with memory() as (made, at), open("/proc/self/mem", "rb", buffering=0) as own:
        first = -at % HUGE
        made[first : first + HUGE] = b"1" * HUGE
        made.madvise(mmap.MADV_DONTNEED, first + PAGE, PAGE)
        try:
            poison(userfaultfd, [(at + first + PAGE, PAGE)])
        except OSError as error:
            missing(f"UFFDIO_POISON (Linux 6.6): {error}")
        finally:
            os.close(userfaultfd)
        with suppress(OSError):
            made.madvise(MADV_COLLAPSE, first, HUGE)
        for page in (0, 2):
            assert os.pread(own.fileno(), PAGE, at + first + page * PAGE) == b"1" * PAGE
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.pread(own.fileno(), PAGE, at + first + PAGE)
