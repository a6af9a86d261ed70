# SPDX-License-Identifier: Apache-2.0
"""Copies the memory that was kept into the VMM that was made for a guest that is taken back.

Reads the keeper, and RAM in files by the session's descriptors, as the engine does; writes to
/proc/PID/mem of the VMM, whose RAM is empty. Owns the descriptors it opens. Holes and pages of
zeros are left out, so the guest stays as sparse as it was. No guest runs meanwhile. A page that
cannot be read takes no other with it: the caller makes a memory error of it.
"""

from __future__ import annotations

import errno
import os
import signal
from array import array
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import trio

from postcopyd.errors import PostcopydError, shortage
from postcopyd.host import procfs
from postcopyd.sessions import headroom
from postcopyd.tasks import threads
from postcopyd.vmm import Region, Shape

SMALL = 4096
BLOCK = 2 << 20
AT_ONCE = 32  # blocks
ZEROS = bytes(BLOCK)
LOST = (errno.EIO, 133)  # EHWPOISON, asm-generic/errno.h
"""The errors of one page, as the engine has them (ram.c)."""


async def copy(was: Shape, to: Shape) -> list[Region]:
    """`was` is the guest, with its keeper's pid. Returns the pages that could not be read, as parts
    of `to`. Raises PostcopydError, also where there is no room for it."""
    try:
        return await _copy(was, to)
    except OSError as error:
        raise shortage(error) or PostcopydError(
            f"copying the guest's memory, which process {was.pid} keeps: {error.strerror}"
        ) from None


async def _copy(was: Shape, to: Shape) -> list[Region]:
    pairs = list(zip(was.regions, to.regions, strict=True))
    found = [
        await trio.to_thread.run_sync(_all_data, was.pid, old, limiter=threads.WALKS)
        for old, _ in pairs
    ]
    needed = [
        replace(new, pages=-(-sum(size for _, size in blocks) // new.page_size))
        for (_, new), blocks in zip(pairs, found, strict=True)
    ]
    arrival = headroom.Arrival(to.pid, needed)
    seen = await trio.to_thread.run_sync(headroom.maps, arrival, limiter=threads.WALKS)
    if problems := headroom.problems(arrival, seen):
        raise PostcopydError(" ".join(problems), "Refused")
    lost: list[Region] = []
    source, target = _memory(was.pid, os.O_RDONLY), -1
    try:
        target = _memory(to.pid, os.O_WRONLY)
        for (old, new), blocks in zip(pairs, found, strict=True):
            starts = iter(sorted({at - at % BLOCK for at, _ in blocks}))
            while some := list(islice(starts, AT_ONCE)):
                lost += await trio.to_thread.run_sync(
                    _blocks, source, target, old, new, some, limiter=threads.WALKS
                )
    finally:
        os.close(source)
        if target >= 0:
            os.close(target)
    if lost and _ends(was.pid):
        raise OSError(errno.ESRCH, "it was killed meanwhile")
    return lost


def _ends(pid: int) -> bool:
    """Whether a process has ended or is being killed: the OOM killer may take its memory away page
    by page then, which reads as errors (`ends` in ram.c)."""
    status = procfs.status(pid)
    pending = int(status.get("SigPnd", "0"), 16) | int(status.get("ShdPnd", "0"), 16)
    return status.get("State", "X")[0] in "ZX" or bool(pending >> (signal.SIGKILL - 1) & 1)


def _memory(pid: int, how: int) -> int:
    return os.open(f"/proc/{pid}/mem", how | os.O_CLOEXEC)


def data(pid: int, region: Region) -> Iterator[tuple[int, int]]:
    """Where a region has data, as offset and size, in order: each within one BLOCK."""
    stretches = _of_file(region) if region.fd is not None else _of_process(pid, region)
    for at, end in stretches:
        for first in range(at - at % BLOCK, end, BLOCK):
            yield max(at, first), min(end, first + BLOCK) - max(at, first)


def _all_data(pid: int, region: Region) -> list[tuple[int, int]]:
    return [*data(pid, region)]


def _of_file(region: Region) -> Iterator[tuple[int, int]]:
    """Where each stretch begins and ends. By SEEK_DATA; a file system without holes is all data."""
    fd, first, at = region.fd, region.offset, region.offset
    assert fd is not None
    end = first + region.size
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
            hole = os.lseek(fd, at, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole
                return
            hole = end
        if at < end:
            yield at - first, min(hole, end) - first
        at = max(hole, at + 1)


def _of_process(pid: int, region: Region) -> Iterator[tuple[int, int]]:
    """By the page map: 64 bits a page, 63 present, 62 swapped. Of each BLOCK its start and how much
    of it is there, wherever in it: it is read whole."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for at in range(0, region.size, BLOCK):
            count = min(BLOCK, region.size - at) // SMALL
            place = (region.address + at) // SMALL * 8
            entries = array("Q", os.pread(pagemap.fileno(), count * 8, place))
            if there := sum(1 for entry in entries if entry >> 62):
                yield at, at + there * SMALL


def _blocks(source: int, target: int, old: Region, new: Region, starts: list[int]) -> list[Region]:
    """Returns the pages that could not be read, of which nothing is written."""
    lost = []
    for at in starts:
        size = min(BLOCK, old.size - at)
        block = _read(source, old, at, size)
        if block is None or len(block) != size:
            block, without = _by_page(source, old, at, size)
            lost += [
                Region(new.name, 1, new.page_size, new.address + page, new.fd, new.offset + page)
                for page in without
            ]
        if block == ZEROS[:size]:
            continue
        for first, last in _written(block):
            piece = block[first:last]
            if os.pwrite(target, piece, new.address + at + first) != len(piece):
                raise OSError(errno.EIO, "the new VMM takes only a part of it")
    return lost


def _read(source: int, region: Region, at: int, size: int) -> bytes | None:
    """None if the first page of it cannot be read, and less than `size` if a later one. Raises
    OSError."""
    try:
        if region.fd is not None:
            return os.pread(region.fd, size, region.offset + at) or None
        if data := os.pread(source, size, region.address + at):
            return data
    except OSError as error:
        if error.errno in LOST:
            return None
        raise
    raise OSError(errno.ESRCH, "it has ended")


def _by_page(source: int, region: Region, at: int, size: int) -> tuple[bytes, list[int]]:
    """With zeros for the pages that cannot be read, and where those are. Raises OSError."""
    pieces, lost = [], []
    for page in range(at, at + size, region.page_size):
        piece = _read(source, region, page, region.page_size)
        if piece is None or len(piece) != region.page_size:
            lost.append(page)
            piece = bytes(region.page_size)
        pieces.append(piece)
    return b"".join(pieces), lost


def _written(block: bytes) -> Iterator[tuple[int, int]]:
    """Stretches of pages that are not zeros."""
    zeros, first = ZEROS[:SMALL], None
    for at in range(0, len(block), SMALL):
        empty = block[at : at + SMALL] == zeros
        if empty and first is not None:
            yield first, at
            first = None
        elif not empty and first is None:
            first = at
    if first is not None:
        yield first, len(block)
