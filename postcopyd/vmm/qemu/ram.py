# SPDX-License-Identifier: Apache-2.0
"""Finds a QEMU's guest RAM: from its memory backends to mappings, files and `Region`s.

Owns the rules for which memory can be moved outside QEMU's own stream, and the sentences for memory
that cannot. Only asks and reads, but for `empty`.
"""

from __future__ import annotations

import mmap
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

from postcopyd.host import procfs
from postcopyd.vmm import Region, VmmError
from postcopyd.vmm.qemu.answers import Memdev, Text
from postcopyd.vmm.qemu.qmp import Qmp, QmpRefused

T = TypeVar("T")

# Page sizes that the engine places whole. A 1 GiB page would take most of a second to arrive.
PAGE_SIZES = (4096, 2 << 20)

# From this version on QEMU leaves only shared memory with a *name* out of its stream
# (qemu_ram_is_named_file); older versions leave out all shared memory.
NAMED_FILES_ONLY = (8, 1)

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{1,16}")

MAP_NORESERVE = 0x4000  # the mmap module has it from Python 3.12 or later

USE_A_FILE = (
    "give it -object memory-backend-file,id={id},size={size},mem-path=/dev/shm/{id},share=on "
    "and -machine memory-backend={id} (or -numa node,memdev={id})"
)


@dataclass(frozen=True)
class Backend:
    """A memory backend as QEMU describes it."""

    id: str
    kind: str  # QOM type: memory-backend-file, -memfd, -ram ...
    size: int  # bytes
    share: bool
    read_only: bool
    path: str  # mem-path, "" if it has none
    address: int | None  # in QEMU's address space, if this version tells

    @property
    def mend(self) -> str:
        return USE_A_FILE.format(id=self.id, size=self.size)


async def backends(qmp: Qmp) -> list[Backend]:
    """All memory backends, sorted by name so that both hosts agree (QEMU's order varies)."""
    addresses = _host_addresses((await qmp.ask(Text, "x-query-ramblock")).human_readable_text)
    found = []
    for number, backend in enumerate(await qmp.ask(list[Memdev], "query-memdev")):
        name = backend.id or f"memory{number}"

        async def get(key: str, default: T, name: str = name) -> T:
            what = {"path": f"/objects/{name}", "property": key}
            try:
                return await qmp.ask(type(default), "qom-get", what)
            except QmpRefused:
                return default

        found.append(
            Backend(
                name,
                await get("type", "memory-backend-ram"),
                backend.size,
                backend.share,
                await get("readonly", False),
                await get("mem-path", ""),
                addresses.get(name, addresses.get(f"/objects/{name}")),
            )
        )
    return sorted(found, key=lambda backend: backend.id)


def regions(
    found: list[Backend], pid: int, version: tuple[int, int, int]
) -> tuple[list[Region], list[str]]:
    """The regions that can be moved (the caller owns their descriptors), and sentences on why
    others cannot. Raises OSError, and then keeps no descriptor."""
    regions: list[Region] = []
    problems: list[str] = []
    mappings = procfs.merged(pid)
    with ExitStack() as opened:
        for backend in found:
            refusal = _refusal(backend, version)
            if refusal is not None:
                problems.append(refusal)
                continue
            candidates = _candidates(backend, pid, mappings)
            if len(candidates) != 1:
                problems.append(
                    f"The mapping of guest RAM '{backend.id}' ({backend.size} bytes) was not found "
                    f"among those of process {pid} ({len(candidates)} would fit): {backend.mend}."
                )
                continue
            outcome = _region(backend, pid, candidates[0])
            if isinstance(outcome, str):
                problems.append(outcome)
                continue
            regions.append(outcome)
            if outcome.fd is not None:
                opened.callback(os.close, outcome.fd)
        opened.pop_all()
    if not found:
        problems.append(
            "QEMU has no memory backend: give the guest its RAM by -object and -machine."
        )
    return regions, problems


def sharers(regions: list[Region], pid: int) -> list[str]:
    """A sentence for each other process that maps guest RAM. May take a while: use a thread.

    Its accesses would not fault through the VMM's userfaultfd, and would read zeros.
    """
    files = [procfs.file_id(region.fd) for region in regions if region.fd is not None]
    return [
        f"Process {other} ({command}) maps the guest's RAM too and would read zeros from pages "
        f"that have not arrived: stop it, or take its device (vhost-user, virtiofs) from the guest."
        for other, command in procfs.other_mappers(files, {pid, os.getpid()})
    ]


def empty(regions: list[Region], pid: int) -> None:
    """Makes every page of the regions missing. Raises VmmError when not all could be emptied.

    By MADV_REMOVE, which is fallocate(PUNCH_HOLE), through a mapping of this process. A hole in a
    file of huge pages loses its reservation. Mapping it again without MAP_NORESERVE restores that
    (mm/hugetlb.c, hugetlb_reserve_pages); it is done if QEMU's mapping had one.
    """
    for region in regions:
        doing = f"Emptying guest RAM '{region.name}' ({region.size} bytes)"
        if region.fd is None:
            raise VmmError(f"{doing} failed: it has no file that could be emptied from outside.")
        try:
            with mmap.mmap(
                region.fd, region.size, mmap.MAP_SHARED | MAP_NORESERVE, offset=region.offset
            ) as own:
                own.madvise(mmap.MADV_REMOVE)
            if region.page_size > mmap.PAGESIZE and procfs.reserves_huge_pages(pid, region.address):
                mmap.mmap(region.fd, region.size, mmap.MAP_SHARED, offset=region.offset).close()
        except OSError as error:
            raise VmmError(
                f"{doing} failed ({error.strerror}): for huge pages see that the pool has enough "
                f"free ones (vm.nr_hugepages), and start this QEMU anew."
            ) from None


def _refusal(backend: Backend, version: tuple[int, int, int]) -> str | None:
    """Why this backend cannot be moved, whatever its mapping is."""
    what = f"Guest RAM '{backend.id}' ({backend.kind})"
    if not backend.share:
        return f"{what} is private memory, which QEMU would send itself: {backend.mend}."
    if backend.read_only:
        return f"{what} is read-only: start QEMU without readonly=on for it."
    if backend.kind == "memory-backend-file":
        return None
    if backend.kind != "memory-backend-memfd":
        return f"{what} has no file that can be opened from outside: {backend.mend}."
    if version >= NAMED_FILES_ONLY:
        return (
            f"{what} would be sent by QEMU {version[0]}.{version[1]} itself, as only memory with a "
            f"named file is left out: {backend.mend}; mem-path=/proc/self/fd/N of a memfd will do."
        )
    return None


def _candidates(backend: Backend, pid: int, mappings: list[procfs.Mapping]) -> list[procfs.Mapping]:
    """The mappings that may be this backend's: exactly one, if all is well."""
    if backend.address is not None:
        return [m for m in mappings if m.start == backend.address]
    fitting = [m for m in mappings if 0 <= m.length - backend.size < (2 << 20)]
    if backend.kind == "memory-backend-memfd":
        return [m for m in fitting if m.path.startswith("/memfd:memory-backend-memfd")]
    try:
        file = procfs.file_id(_visible(backend.path, pid))
    except (OSError, ValueError):  # no such file, or not a path at all
        file = (0, 0)
    if exact := [m for m in fitting if m.file == file]:
        return exact
    # A folder as mem-path: QEMU makes a file in it and unlinks it. A file may be unlinked too.
    temporary = re.compile(
        re.escape(backend.path.rstrip("/"))
        + rf"(/qemu_back_mem\.(_objects_)?{re.escape(backend.id)}\.\w{{6}})? \(deleted\)"
    )
    descriptor = re.match(r"/(proc/(self|\d+)|dev)/fd/\d+$", backend.path)
    return [
        m
        for m in fitting
        if temporary.fullmatch(m.path) or (descriptor and m.path.startswith("/memfd:"))
    ]


def _visible(path: str, pid: int) -> str:
    """The VMM's path as this process can open it: by the VMM's root and descriptors."""
    descriptor = re.fullmatch(r"/(?:proc/self|dev)/fd/(\d+)", path)
    if descriptor:
        return f"/proc/{pid}/fd/{descriptor[1]}"
    if path.startswith("/proc/"):
        return path
    return (
        f"/proc/{pid}/root/{path.lstrip('/')}"
        if path.startswith("/")
        else f"/proc/{pid}/cwd/{path}"
    )


def _region(backend: Backend, pid: int, mapping: procfs.Mapping) -> Region | str:
    """The region of a mapping, with a descriptor of its own; or a sentence on why not."""
    what = f"Guest RAM '{backend.id}' in {mapping.path or 'anonymous memory'}"
    if not (mapping.shared and mapping.writable):
        return f"{what} is mapped private or read-only by QEMU: {backend.mend}."
    memfd = mapping.path.startswith("/memfd:")
    kind = procfs.file_system(pid, mapping.file) or ("tmpfs" if memfd else "nothing mounted")
    if kind not in ("tmpfs", "hugetlbfs", "devtmpfs"):
        return (
            f"{what} is on {kind}, where missing pages cannot be waited for: put it on tmpfs or "
            f"hugetlbfs, such as mem-path=/dev/shm/{backend.id}."
        )
    try:
        fd = procfs.open_file(pid, mapping.file)
    except OSError as error:
        return (
            f"{what} could not be opened for writing ({error.strerror or error}): run postcopyd as "
            f"root, and see that QEMU keeps the file open."
        )
    page_size = os.fstatvfs(fd).f_bsize
    size = -(-backend.size // page_size) * page_size
    problem = None
    if page_size not in PAGE_SIZES:
        problem = f"{what} has pages of {page_size} bytes: use pages of 4 KiB or 2 MiB."
    elif mapping.length != size:
        problem = f"{what} is mapped for {mapping.length} bytes, not {size}: {backend.mend}."
    elif os.fstat(fd).st_size < mapping.offset + size:
        problem = f"{what} is longer than its file: do not shrink the file of a running guest."
    if problem is not None:
        os.close(fd)
        return problem
    return Region(
        name=backend.id,
        pages=size // page_size,
        page_size=page_size,
        address=mapping.start,
        fd=fd,
        offset=mapping.offset,
    )


def _host_addresses(text: str) -> dict[str, int]:
    """Addresses in QEMU by block name, from `x-query-ramblock` (the column HVA came with 8.0)."""
    lines = text.splitlines()
    if not lines or "HVA" not in lines[0]:
        return {}
    columns = 7 if lines[0].split()[-1] == "RO" else 6  # after the name; a page size is two words
    rows = (line.rsplit(None, columns) for line in lines[1:])
    addresses = {}
    for row in rows:
        if len(row) == columns + 1 and _ADDRESS.fullmatch(row[6]):
            addresses[row[0].strip()] = int(row[6], 16)
    return addresses
