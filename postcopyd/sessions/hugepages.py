# SPDX-License-Identifier: Apache-2.0
"""Gives a guest that has arrived, or was not moved, its transparent huge pages back.

Pages arrive one by one and are placed one by one, and where writes are tracked the kernel splits
the huge page of each page that is written. So a guest whose RAM was in huge pages runs on small
ones afterwards, and slower, until khugepaged comes, after minutes or never. `give_back` asks the
kernel for huge pages at once, by process_madvise(MADV_COLLAPSE) on the VMM's mappings.

Each arrival has one such task, in the daemon's nursery, and each departure that was tracked and has
failed. It starts when the session has given back its claim: after drained, or after the rollback.
It owns what it opens, and nothing waits for it. It steps aside as soon as anybody claims the VM,
ends when the VM is detached, given away or gone, and is cancelled when the daemon stops. Each time
it first finishes the huge page in work, about a millisecond (before the first one it finishes
reading smaps, where the kernel looks at each page: tens of ms for each GiB). It may stop half-way:
the guest sees the same bytes throughout. A failure is a line in the log.

A VMM that has a guest never waits for a guest again (docs/VMM-PROTOCOL.md), so no session empties
these mappings while a huge page is made of one.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import trio

from postcopyd._native import lib
from postcopyd.host import procfs
from postcopyd.sessions.vm import Vm
from postcopyd.tasks import threads
from postcopyd.vmm import Region, Vmm

SMALL_PAGE = 4096
HUGE_PAGE = 2 << 20
PAGES = HUGE_PAGE // SMALL_PAGE

TURN_S = 0.01
"""How long huge pages are made in one go; after that nothing is done for at least as long."""
BUSY_ROUNDS = 3
"""How often a range is tried whose pages are in use (EAGAIN, EBUSY), which passes in moments."""
BUSY_S = 0.1

REGISTERED = frozenset({"um", "uw", "ui"})
"""VmFlags of a mapping that a userfaultfd watches (Documentation/filesystems/proc.rst): its holes
are pages that are missing, or were lost and must never read as zeros."""

# /proc/PID/pagemap, Documentation/admin-guide/mm/pagemap.rst. The zero page is present, but no
# process has it exclusively: it counts as a hole.
PRESENT_AND_OWN = 1 << 63 | 1 << 56

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")

log = structlog.get_logger()


@dataclass(frozen=True)
class Ram:
    """Guest RAM in small pages, as mapped in the VMM: (address, bytes) of each region."""

    pid: int
    regions: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, pid: int, regions: Iterable[Region]) -> Ram:
        small = (region for region in regions if region.page_size == SMALL_PAGE)
        return cls(pid, tuple((region.address, region.size) for region in small))


@dataclass(frozen=True)
class Area:
    """Part of one mapping that may be in huge pages."""

    mapping: tuple[int, int]  # addresses
    start: int  # address of its first huge page
    end: int
    offset: int | None  # of `start` in the file, bytes; None: anonymous memory


async def give_back(vm: Vm, ram: Ram) -> None:
    """Makes huge pages of the RAM of a guest that is here, until one of the ends that the head of
    this file names. Never raises."""
    driver = vm.driver
    try:
        while driver is not None and vm.driver is driver and vm.ownership != "granted":
            if vm.claimed_by is None and await _attempt(vm, driver, ram):
                return
            await vm.free.wait()
    except OSError as error:
        log.info("no huge pages given back", vm=vm.name, error=str(error))
    except Exception:  # a bug here must not end a migration
        log.exception("bug in giving huge pages back", vm=vm.name)


async def _attempt(vm: Vm, driver: Vmm, ram: Ram) -> bool:
    """Whether the work is done. If not, somebody wants the VM. The next attempt starts anew, as
    what is huge already costs next to nothing."""
    areas = await trio.to_thread.run_sync(find, ram, limiter=threads.HUGE_PAGES)
    if not areas:
        log.debug("no huge pages wanted", vm=vm.name)
        return True
    with Work(ram.pid, areas) as work:
        pause: float | None = 0.0
        while pause is not None:
            await trio.sleep(pause)
            if vm.claimed_by is not None or vm.driver is not driver:
                return False
            pause = await trio.to_thread.run_sync(work.turn, limiter=threads.HUGE_PAGES)
        work.say(vm.name)
    return True


class Work:
    """Huge pages to be made in one VMM, and what became of them. Raises OSError if the VMM has
    ended.

    Owns a pidfd, the VMM's page map and descriptors of its RAM files; used by one thread at a time.
    """

    def __init__(self, pid: int, areas: Sequence[Area]) -> None:
        self._todo: Iterator[tuple[Area, int]] = (
            (area, at) for area in areas for at in range(area.start, area.end, HUGE_PAGE)
        )
        self._busy: list[tuple[Area, int]] = []
        self._rounds = BUSY_ROUNDS
        self._holes = most_holes()
        self._made = self._left = self._errno = 0
        with ExitStack() as opened:
            self._pidfd = os.pidfd_open(pid)
            opened.callback(os.close, self._pidfd)
            self._files: dict[Area, int] = {}
            for area in areas:
                name = "pagemap"
                if area.offset is not None:
                    # Opened, as SEEK_DATA moves the offset: a duplicate shares it with the VMM.
                    name = f"map_files/{area.mapping[0]:x}-{area.mapping[1]:x}"
                fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
                self._files[area] = fd
                opened.callback(os.close, fd)
            self._opened = opened.pop_all()

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *exc: object) -> None:
        self._opened.close()

    def turn(self) -> float | None:
        """Makes huge pages for TURN_S. Returns the seconds until the next turn; None: done."""
        began = time.monotonic()
        for area, address in self._todo:
            result = self._make(area, address)
            if result in (-errno.EAGAIN, -errno.EBUSY):
                self._busy.append((area, address))
            elif result < 0:
                self._left, self._errno = self._left + 1, -result
                # EINVAL concerns this range: it is a hole by now, or pinned. The next ranges would
                # meet any other error too, and for each ENOMEM the host compacts memory in vain.
                if result != -errno.EINVAL:
                    return None
            if (worked := time.monotonic() - began) > TURN_S:
                return worked
        self._rounds -= 1
        if self._busy and self._rounds:
            self._todo, self._busy = iter(self._busy), []
            return BUSY_S
        return None

    def _make(self, area: Area, address: int) -> int:
        """Makes one huge page, unless it has too many holes. Returns 0 or -errno."""
        if area.offset is None:
            data = anonymous_data(self._files[area], address)
        else:
            data = file_data(self._files[area], area.offset + address - area.start)
        if data < PAGES - self._holes:
            return 0
        result: int = lib.pc_collapse(self._pidfd, address, HUGE_PAGE)
        self._made += result == 0
        return result

    def say(self, vm: str) -> None:
        """Logs how many were made, how many could not be made, and why the last one could not."""
        more: dict[str, Any] = {}
        if left := self._left + len(self._busy):
            more = {"left": left, "error": os.strerror(self._errno or errno.EBUSY)}
        log.info("huge pages given back", vm=vm, pages=self._made, **more)


def find(ram: Ram) -> list[Area]:
    """The parts of guest RAM that the kernel would put into huge pages by itself, given time.

    Only once nothing is registered with a userfaultfd any more. MADV_COLLAPSE also works where huge
    pages are turned off, so this must ask whether they are wanted. Raises OSError.
    """
    if not ram.regions:
        return []
    with open(f"/proc/{ram.pid}/smaps", encoding="utf-8", errors="surrogateescape") as smaps:
        return list(eligible(smaps, ram))


def eligible(smaps: Iterable[str], ram: Ram, settings: Path = SETTINGS) -> Iterator[Area]:
    """`find` on the lines of /proc/PID/smaps."""
    for header, fields in procfs.smaps_entries(smaps):
        start, end = (int(address, 16) for address in header[0].split("-"))
        parts = [_whole(max(start, at), min(end, at + size)) for at, size in ram.regions]
        parts = [(first, last) for first, last in parts if first < last]
        flags = frozenset(fields.get("VmFlags", ()))
        if not parts or fields.get("THPeligible") != ["1"] or flags & REGISTERED or "ht" in flags:
            continue
        major, minor = (int(number, 16) for number in header[3].split(":"))
        file = (os.makedev(major, minor), int(header[4]))
        offset = None if file == (0, 0) else int(header[2], 16)
        if offset is not None and (start - offset) % HUGE_PAGE:
            continue
        # THPeligible counts huge pages of any size. The settings below say whether 2 MiB is one of
        # them; for a tmpfs only its mount option counts.
        if offset is None:
            wanted = _wanted("enabled", settings, "hg" in flags)
        elif procfs.file_system(ram.pid, file) is None:  # a memfd, or shared anonymous memory
            wanted = _wanted("shmem_enabled", settings, "hg" in flags)
        else:
            wanted = True
        for first, last in parts if wanted else ():
            at = None if offset is None else offset + first - start
            yield Area((start, end), first, last, at)


def _whole(start: int, end: int) -> tuple[int, int]:
    """The start of the first whole huge page and the end of the last; start >= end: none."""
    return -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE


def _wanted(name: str, settings: Path, advised: bool) -> bool:
    """Whether huge pages of 2 MiB are wanted in memory that has no mount option.

    Linux 6.8 and later have a setting for each size, which may be to inherit the general one.
    """
    word = chosen(settings / "hugepages-2048kB" / name) or "inherit"
    if word == "inherit":
        word = chosen(settings / name)
    return word in ("always", "within_size", "force") or (word in ("madvise", "advise") and advised)


def chosen(path: Path) -> str:
    """The word in brackets, as in "always [madvise] never"; empty if there is no such file."""
    try:
        return path.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def most_holes(settings: Path = SETTINGS) -> int:
    """How many small pages of a huge page may be holes, which take memory once it is made.

    MADV_COLLAPSE would make a huge page around a single small one, and so a sparse guest would grow
    to its full size. It must stay sparse: if at least half of each range is data, guest RAM takes
    at most twice what the guest has, and never more than all of it, for which there was room before
    it came. To forbid all holes would be too strict: pages of zeros are holes here (they never
    travel), and a busy guest has some everywhere. An operator's lower limit for khugepaged counts.
    """
    try:
        allowed = int((settings / "khugepaged/max_ptes_none").read_text())
    except (OSError, ValueError):
        allowed = PAGES
    return min(allowed, PAGES // 2)


def file_data(fd: int, start: int) -> int:
    """How many small pages are no holes in HUGE_PAGE bytes of a file. Raises OSError."""
    data, at, end = 0, start, start + HUGE_PAGE
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # which means: only a hole from here on
                raise
            break
        if at < end:
            hole = min(os.lseek(fd, at, os.SEEK_HOLE), end)
            data, at = data + hole - at, hole
    return data // SMALL_PAGE


def anonymous_data(pagemap: int, address: int) -> int:
    """How many small pages in the range of a huge page are anonymous memory of the process's own.
    Raises OSError."""
    entries = memoryview(os.pread(pagemap, PAGES * 8, address // SMALL_PAGE * 8)).cast("Q")
    return sum(entry & PRESENT_AND_OWN == PRESENT_AND_OWN for entry in entries)
