# SPDX-License-Identifier: Apache-2.0
"""Whether this host has room for a guest's memory, said before the handover and not by an OOM kill.

A VMM at its memory limit is killed; a page that arrives does not wait (the kernel's memory
controller documentation, "memory.max"). So this checks every limit that a page could meet: each
memory cgroup above the VMM (and above this daemon, which is charged for pages that come before the
guest does), the size of the tmpfs, huge pages, MemAvailable. The caller says which other arrivals
have been promised their memory. Reads only; the answer is true for the moment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from postcopyd.errors import SHORTAGES
from postcopyd.host import procfs
from postcopyd.vmm import Region

SMALL_PAGE = 4096

# One byte for so many, besides the pages: page tables (1/512), the page cache's tree, our bitmaps.
OVERHEAD = 256

# No limit: cgroup v2 has the word "max" for that, v1 the largest multiple of the page size.
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Host:
    """Where the kernel's files are; tests have their own."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")


@dataclass(frozen=True)
class Limit:
    """One limit and what is left below it, in bytes; `mend` is what to do about it."""

    what: str
    room: int
    mend: str
    pool: bool = False  # of huge pages, and no group's


@dataclass(frozen=True)
class Arrival:
    """A guest that is to come: its VMM here (0: it is not made yet), its RAM, and the process that
    holds pages until the guest is there, if pages come before it."""

    pid: int
    regions: Sequence[Region]
    stager: int | None = None

    def of_size(self, size: int) -> list[Region]:
        return [region for region in self.regions if region.page_size == size]

    @property
    def aside(self) -> int:
        """Bytes of private huge pages, which wait in small ones until the guest is there."""
        if self.stager is None:
            return 0
        return sum(r.size for r in self.regions if r.fd is None and r.page_size != SMALL_PAGE)


Maps = list[tuple[int, int, dict[str, list[str]]]]
"""Of each mapping of a process: start, end, and the words of its fields."""


def maps(arrival: Arrival, host: Host | None = None) -> Maps:
    """Those of its VMM, where something has to be known of them. The kernel looks at every page for
    this, tens of milliseconds for a GiB: run it in a thread."""
    if all(r.fd is not None and r.page_size == SMALL_PAGE for r in arrival.regions):
        return []
    found = []
    file = (host or Host()).proc / str(arrival.pid) / "smaps"
    for words, fields in procfs.smaps_entries(_lines(file)):
        start, end = words[0].split("-")
        found.append((int(start, 16), int(end, 16), fields))
    return found


def problems(
    arrival: Arrival, seen: Maps, others: Sequence[Arrival] = (), host: Host | None = None
) -> list[str]:
    """A sentence for each limit that the pages still to come would exceed; none when all fit.

    `seen` is what `maps` returned. `others` have been promised what they lack still. What a VMM's
    RAM has allocated already is not needed again, as it is emptied first.
    """
    host = host or Host()
    promised = [(other, _lacks(other.of_size(SMALL_PAGE), []) + other.aside) for other in others]
    found = []
    for limit, own in _small(arrival, seen, host):
        need = own + sum(size for other, size in promised if _meets(other, limit, host))
        if limit.room < need:
            found.append(_sentence(limit, need))
    every = [region for each in (arrival, *others) for region in each.regions]
    for files in _by_file_system(arrival.regions):
        device = os.fstat(files[0].fd or 0).st_dev
        of_files = tmpfs_limit(files[0])
        need = sum(
            _missing(region)
            for region in every
            if region.fd is not None and os.fstat(region.fd).st_dev == device
        )
        if of_files is not None and of_files.room < need:
            found.append(_sentence(of_files, need))
    sizes = {region.page_size for region in arrival.regions} - {SMALL_PAGE}
    for size in sorted(sizes):
        huge = arrival.of_size(size)
        # A mapping made without MAP_NORESERVE holds a reservation for all that it lacks.
        unreserved = [region for region in huge if not _reserved(region, seen)]
        for limit in hugetlb_limits(arrival.pid, size, host):
            need = _lacks(unreserved if limit.pool else huge, seen)
            if limit.room < need:
                found.append(_sentence(limit, need))
    return found


def _small(arrival: Arrival, seen: Maps, host: Host) -> Iterator[tuple[Limit, int]]:
    """The limits that pages of 4 KiB meet, each with what it has to have room for. The stager is
    charged for all pages, also for those that the VMM's RAM has been emptied of."""
    small, aside = arrival.of_size(SMALL_PAGE), arrival.aside
    lacks, whole = _lacks(small, seen), sum(region.size for region in small)
    of_vmm = {limit.what: limit for limit in cgroup_limits(arrival.pid, host)}
    of_stager: dict[str, Limit] = {}
    if arrival.stager is not None:
        of_stager = {limit.what: limit for limit in cgroup_limits(arrival.stager, host)}
    if not small and not aside:
        return
    for what, limit in (of_vmm | of_stager).items():
        need = lacks if what in of_vmm else whole
        need += aside if what in of_stager else 0
        yield limit, need + need // OVERHEAD
    yield memory_limit(host), lacks + aside + (lacks + aside) // OVERHEAD


def _meets(other: Arrival, limit: Limit, host: Host) -> bool:
    """Whether what comes to another VMM counts for this limit on small pages."""
    if limit.what == memory_limit(host).what:
        return True
    pids = [other.pid] if other.stager is None else [other.pid, other.stager]
    return any(one.what == limit.what for pid in pids for one in cgroup_limits(pid, host))


def _lacks(regions: Sequence[Region], seen: Maps) -> int:
    """Bytes that will be allocated for these regions, of one page size."""
    private = [region for region in regions if region.fd is None]
    files = sum(_missing(region) for region in regions if region.fd is not None)
    had = 0
    for start, end, fields in seen:
        ours = sum(max(0, min(end, r.address + r.size) - max(start, r.address)) for r in private)
        if ours:
            there = sum(int(fields.get(key, ["0"])[0]) << 10 for key in ("Rss", "Private_Hugetlb"))
            # Of memory beside it in one mapping, all may be there.
            had += max(0, there - (end - start - ours))
    return files + max(0, sum(region.size for region in private) - had)


def _reserved(region: Region, seen: Maps) -> bool:
    """Whether its mapping reserved its huge pages when it was made (no "nr" flag)."""
    return any(
        start <= region.address < end and "nr" not in fields.get("VmFlags", ["nr"])
        for start, end, fields in seen
    )


def cgroup_limits(pid: int, host: Host) -> Iterator[Limit]:
    """The memory limits (cgroup v2 and v1) of each group from the process's own to the root."""
    for group, name in _groups(pid, "memory", host):
        limit, usage, stat_key = _UNIFIED if (group / "memory.current").exists() else _LEGACY
        maximum = min((_number(group / file) for file in limit), default=UNLIMITED)
        if maximum >= UNLIMITED:
            continue
        # The kernel drops clean page cache when it needs room; tmpfs pages are not in this count.
        cache = _field(group / "memory.stat", stat_key)
        room = max(0, maximum - _number(group / usage) + cache)
        yield Limit(f"memory cgroup {name}", room, f"raise its {limit[0]}")


_UNIFIED = (("memory.max", "memory.high"), "memory.current", "inactive_file")
_LEGACY = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def hugetlb_limits(pid: int, page_size: int, host: Host) -> Iterator[Limit]:
    """Free huge pages of one size that nobody reserved, and the cgroup v2 limits on them."""
    pool = host.sys / "kernel/mm/hugepages" / f"hugepages-{page_size >> 10}kB"
    free = _number(pool / "free_hugepages") - _number(pool / "resv_hugepages")
    more = _number(pool / "nr_overcommit_hugepages") - _number(pool / "surplus_hugepages")
    yield Limit(
        f"pool of {page_size >> 20} MiB pages",
        max(0, free + max(0, more)) * page_size,
        "raise vm.nr_hugepages",
        pool=True,
    )
    file = f"hugetlb.{page_size >> 20}MB"
    for group, name in _groups(pid, "hugetlb", host):
        maximum = _number(group / f"{file}.max")
        if (group / f"{file}.current").exists() and maximum < UNLIMITED:
            room = max(0, maximum - _number(group / f"{file}.current"))
            yield Limit(
                f"cgroup {name}, {page_size >> 20} MiB pages,", room, f"raise its {file}.max"
            )


def memory_limit(host: Host) -> Limit:
    """MemAvailable: what the kernel thinks it can give without swapping."""
    room = _field(host.proc / "meminfo", "MemAvailable:") << 10
    return Limit("host", room, "free memory there or choose another destination")


def tmpfs_limit(region: Region) -> Limit | None:
    """What the file system of a region's file can still hold, None when it has no limit."""
    if region.fd is None or region.page_size != SMALL_PAGE:
        return None
    stat = os.fstatvfs(region.fd)
    if stat.f_blocks == 0:
        return None  # size=0, or a memfd
    path = os.readlink(f"/proc/self/fd/{region.fd}")
    return Limit(
        f"tmpfs of {path}", stat.f_bavail * stat.f_frsize, "remount it with a larger size="
    )


def _sentence(limit: Limit, need: int) -> str:
    return (
        f"The guest's memory needs {need / 2**30:.2f} GiB more here and the {limit.what} has "
        f"{limit.room / 2**30:.2f} GiB left: {limit.mend}."
    )


def _missing(region: Region) -> int:
    """Of one in a file."""
    assert region.fd is not None
    return max(0, region.size - os.fstat(region.fd).st_blocks * 512)


def _by_file_system(regions: Sequence[Region]) -> list[list[Region]]:
    grouped: dict[int, list[Region]] = {}
    for region in regions:
        if region.fd is not None:
            grouped.setdefault(os.fstat(region.fd).st_dev, []).append(region)
    return list(grouped.values())


def _groups(pid: int, controller: str, host: Host) -> Iterator[tuple[Path, str]]:
    """The folders (and names) of a process's groups in each hierarchy that counts `controller`."""
    mounts = _mounts(controller, host)
    for line in _lines(host.proc / str(pid) / "cgroup"):
        number, controllers, path = line.split(":", 2)
        unified = number == "0" and not controllers
        if not unified and controller not in controllers.split(","):
            continue
        mount = mounts.get("cgroup2" if unified else "cgroup")
        if mount is None:
            continue
        folder, root = mount
        inside = path.removeprefix(root.rstrip("/")) if path.startswith(root) else "/"
        below = Path(inside).parts[1:]
        for depth in range(len(below), -1, -1):
            group = folder.joinpath(*below[:depth])
            if group.is_dir():
                yield group, "/" + "/".join(below[:depth])


def _mounts(controller: str, host: Host) -> dict[str, tuple[Path, str]]:
    """File system type to mount point and root, of hierarchies that may count `controller`."""
    found: dict[str, tuple[Path, str]] = {}
    for line in _lines(host.proc / "self/mountinfo"):
        mount, _, rest = line.partition(" - ")
        kind, _, options = rest.split(None, 2)
        fields = mount.split()
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            found.setdefault(kind, (Path(fields[4]), fields[3]))
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError as error:
        if error.errno in SHORTAGES:
            raise  # a limit that could not be read may exist all the same
        return []


def _number(path: Path) -> int:
    """The number in a file. "max", and a missing file of a limit, are no limit; all else is 0."""
    text = "\n".join(_lines(path))
    if text.isdigit():
        return min(int(text), UNLIMITED)
    limit = text == "max" or path.name.endswith(("max", "high", "limit_in_bytes"))
    return UNLIMITED if limit else 0


def _field(path: Path, key: str) -> int:
    for line in _lines(path):
        words = line.split()
        if words and words[0] == key:
            return int(words[1])
    return 0
