# SPDX-License-Identifier: Apache-2.0
"""Where a QEMU's guest RAM is: from its memory backends to mappings, files and `Region`s.

Owns the rules which memory can be moved, the sentences for memory that cannot, and how it is
emptied. A backend is found by the address of its RAM block (blocks.py), and what is there by
/proc/PID/maps: a file that others may map too, or memory of QEMU's alone.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import trio

from postcopyd.host import procfs
from postcopyd.native import adoption
from postcopyd.tasks import threads
from postcopyd.vmm import Region, VmmError
from postcopyd.vmm.qemu.answers import Memdev
from postcopyd.vmm.qemu.blocks import Block
from postcopyd.vmm.qemu.qmp import Qmp, QmpRefused

T = TypeVar("T")

# Page sizes the engine places whole. A 1 GiB page would take its vCPU most of a second to arrive.
SMALL, HUGE = 4096, 2 << 20

MAP_NORESERVE = 0x4000  # the mmap module has it from Python 3.12 or later
# madvise(2); the mmap module has no number for memory that is locked.
MADV_DONTNEED, MADV_DONTNEED_LOCKED = 4, 24
# Emptying takes 75 ms for so much of it, and QEMU's thread that is borrowed does nothing else.
AT_ONCE = 1 << 30


@dataclass(frozen=True)
class Backend:
    """A memory backend as QEMU describes it, with the RAM block that it is."""

    id: str
    kind: str  # QOM type: memory-backend-file, -memfd, -ram ...
    size: int  # bytes
    read_only: bool
    block: Block


async def backends(qmp: Qmp, present: list[Block]) -> list[Backend]:
    """All memory backends that are in use by name, so that both hosts count them alike (QEMU's
    order varies)."""
    by_name = {block.name: block for block in present}
    found = []
    for number, backend in enumerate(await qmp.ask(list[Memdev], "query-memdev")):
        name = backend.id or f"memory{number}"

        async def get(key: str, default: T, name: str = name) -> T:
            what = {"path": f"/objects/{name}", "property": key}
            try:
                return await qmp.ask(type(default), "qom-get", what)
            except QmpRefused:
                return default

        block = by_name.get(name) or by_name.get(f"/objects/{name}")
        if block is not None:
            kind = await get("type", "memory-backend-ram")
            read_only = await get("readonly", False)
            found.append(Backend(name, kind, backend.size, read_only, block))
    return sorted(found, key=lambda backend: backend.id)


def regions(found: list[Backend], pid: int) -> tuple[list[Region], list[str]]:
    """The regions that can be moved (their descriptors are the caller's), and why others cannot.
    Raises OSError, and keeps no descriptor then."""
    regions: list[Region] = []
    problems: list[str] = []
    mappings = list(procfs.mappings(pid))
    with ExitStack() as opened:
        for backend in found:
            outcome = _region(backend, pid, mappings)
            if isinstance(outcome, str):
                problems.append(outcome)
                continue
            regions.append(outcome)
            if outcome.fd is not None:
                opened.callback(os.close, outcome.fd)
        opened.pop_all()
    if not found:
        problems.append("QEMU has no memory for a guest: start it with -m.")
    return regions, problems


def sharers(regions: list[Region], pid: int) -> list[str]:
    """A sentence for each other process that maps guest RAM (may take a while: run it in a thread).

    Its accesses would not fault through the VMM's userfaultfd and read zeros.
    """
    files = [procfs.file_id(region.fd) for region in regions if region.fd is not None]
    return [
        f"Process {other} ({command}) maps the guest's RAM too and would read zeros from pages "
        f"that have not arrived: stop it, or take its device (vhost-user, virtiofs) from the guest."
        for other, command in procfs.other_mappers(files, {pid, os.getpid()})
    ]


async def empty(regions: list[Region], pid: int) -> None:
    """Make every page of the regions missing. Raises VmmError when not all could be emptied."""
    for region in regions:
        doing = f"Emptying guest RAM '{region.name}' ({region.size} bytes)"
        try:
            if region.fd is not None:
                await trio.to_thread.run_sync(_punch, region, pid, limiter=threads.WALKS)
            else:
                await _forget(region, pid)
        except OSError as error:
            raise VmmError(
                f"{doing} failed ({error.strerror}): for huge pages see that the pool has enough "
                f"free ones (vm.nr_hugepages), and start this QEMU anew."
            ) from None


def _punch(region: Region, pid: int) -> None:
    """By MADV_REMOVE through a mapping of our own, which is fallocate(PUNCH_HOLE). A hole in a file
    of huge pages has lost its reservation, and mapping it again without MAP_NORESERVE makes it anew
    (mm/hugetlb.c, hugetlb_reserve_pages): for a mapping of QEMU's that had one."""
    assert region.fd is not None
    with mmap.mmap(
        region.fd, region.size, mmap.MAP_SHARED | MAP_NORESERVE, offset=region.offset
    ) as own:
        own.madvise(mmap.MADV_REMOVE)
    if region.page_size > mmap.PAGESIZE and procfs.reserves_huge_pages(pid, region.address):
        mmap.mmap(region.fd, region.size, mmap.MAP_SHARED, offset=region.offset).close()


async def _forget(region: Region, pid: int) -> None:
    """Of private memory QEMU alone can say that it is not needed: in a thread of its own."""
    locked = procfs.status(pid).get("VmLck", "0 kB") != "0 kB"  # mlockall, -overcommit mem-lock=on
    advice = MADV_DONTNEED_LOCKED if locked else MADV_DONTNEED
    for at in range(0, region.size, AT_ONCE):
        size = min(AT_ONCE, region.size - at)
        await adoption.madvise(pid, region.address + at, size, advice)


def _region(backend: Backend, pid: int, mappings: list[procfs.Mapping]) -> Region | str:
    """The region of a backend, with a descriptor of its own; or the sentence why not."""
    name = f"Guest RAM '{backend.id}' ({backend.kind}, {backend.size} bytes)"
    address, size = backend.block.address, backend.block.total
    if backend.read_only:
        return f"{name} is read-only: start QEMU without readonly=on for it."
    parts = [] if address is None else list(_parts(mappings, address, size))
    if address is None or not parts:
        return (
            f"{name} was not found in the memory of process {pid}, so it cannot be moved: if the "
            f"guest has it in use, tell those who make postcopyd, with QEMU's version."
        )
    first = parts[0]
    what = f"{name} in {first.path or 'anonymous memory'}"
    if not all(part.writable for part in parts):
        return f"{what} is mapped read-only by QEMU: start it without readonly=on for it."
    if len({(part.file, part.shared) for part in parts}) != 1:
        return f"{what} is mapped in parts of several kinds, which postcopyd does not know."
    if first.file == (0, 0):
        return Region(backend.id, size // SMALL, SMALL, address, None, 0)
    if not first.shared:
        # Of hugetlbfs the page size is the file system's block; others have large blocks as well.
        kind = procfs.file_system(pid, first.file) or "hugetlbfs"  # mounted nowhere: a memfd
        page_size = os.statvfs(procfs.mapped_path(pid, first)).f_bsize
        if kind != "hugetlbfs" or page_size == SMALL:
            return (
                f"{what} is a private mapping of a file, with which the guest's memory is mixed: "
                f"start QEMU with share=on for it, or with no file."
            )
        if page_size != HUGE:
            return _odd_pages(what, page_size)
        return Region(backend.id, size // HUGE, HUGE, address, None, 0)
    nameless = first.path.startswith(("/memfd:", "/dev/zero", "/SYSV"))
    kind = procfs.file_system(pid, first.file) or ("tmpfs" if nameless else "nothing mounted")
    if kind not in ("tmpfs", "hugetlbfs", "devtmpfs"):
        return (
            f"{what} is on {kind}, where missing pages cannot be waited for: put it on tmpfs or "
            f"hugetlbfs, such as mem-path=/dev/shm/{backend.id}."
        )
    try:
        fd = procfs.open_mapped(pid, first)
    except OSError as error:
        return (
            f"{what} could not be opened for writing ({error.strerror or error}): run postcopyd as "
            f"root."
        )
    page_size = os.fstatvfs(fd).f_bsize
    size = -(-size // page_size) * page_size
    offset = first.offset + address - first.start
    problem = None
    if page_size not in (SMALL, HUGE):
        problem = _odd_pages(what, page_size)
    elif os.fstat(fd).st_size < offset + size:
        problem = f"{what} is longer than its file: do not shrink the file of a running guest."
    if problem is not None:
        os.close(fd)
        return problem
    return Region(backend.id, size // page_size, page_size, address, fd, offset)


def _parts(mappings: list[procfs.Mapping], address: int, size: int) -> Iterator[procfs.Mapping]:
    """The mappings that the memory is in, which the kernel may have split; nothing, where part of
    it is in none."""
    covering = [m for m in mappings if m.start < address + size and address < m.end]
    at = address
    for mapping in covering:
        if mapping.start > at:
            return
        at = mapping.end
    if at >= address + size:
        yield from covering


def _odd_pages(what: str, page_size: int) -> str:
    return f"{what} has pages of {page_size} bytes: use pages of 4 KiB or 2 MiB."
