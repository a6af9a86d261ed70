# SPDX-License-Identifier: Apache-2.0
"""Whether this host has room for a guest's memory, said before the handover and not by an OOM kill.

A VMM at its memory limit is killed; a page that arrives does not wait (the kernel's memory
controller documentation, "memory.max"). So this checks every limit that a page could meet: each
memory cgroup above the VMM (and above this daemon, which is charged for pages that come before the
guest does), the size of the tmpfs, huge pages, MemAvailable. The caller says what other arrivals
have been promised. Reads only; the answer is true for the moment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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


def problems(
    pids: Sequence[int], regions: Sequence[Region], reserved: int = 0, host: Host | None = None
) -> list[str]:
    """A sentence for each limit that the pages still to come would exceed; none when all fit.

    `pids`: the VMM, and other processes that may be charged for its pages. `reserved`: bytes that
    other arrivals on this host have been promised and do not have yet. What a region's file has
    allocated already is not needed again (it is punched first).
    """
    host = host or Host()
    small = sum(_missing(region) for region in regions if region.page_size == SMALL_PAGE)
    found = []
    if small:
        limits = [*_of_each(pids, partial(cgroup_limits, host=host)), memory_limit(host)]
        need = small + small // OVERHEAD + reserved
        found += [_sentence(limit, need) for limit in limits if limit.room < need]
    for files in _by_file_system(regions):
        need = sum(_missing(region) for region in files) + reserved
        limit = tmpfs_limit(files[0])
        if limit is not None and limit.room < need:
            found.append(_sentence(limit, need))
    sizes = {region.page_size for region in regions} - {SMALL_PAGE}
    for size in sorted(sizes):
        huge = [region for region in regions if region.page_size == size]
        limits = _of_each(pids, partial(hugetlb_limits, page_size=size, host=host))
        # A mapping made without MAP_NORESERVE holds a reservation for all that it lacks.
        need = sum(_missing(region) for region in huge)
        if all(procfs.reserves_huge_pages(pids[0], region.address) for region in huge):
            limits = [limit for limit in limits if limit.what.startswith("cgroup")]
        found += [_sentence(limit, need) for limit in limits if limit.room < need]
    return found


def _of_each(pids: Sequence[int], limits: Callable[[int], Iterator[Limit]]) -> list[Limit]:
    """The limits of several processes, each limit once."""
    return list({limit.what: limit for pid in pids for limit in limits(pid)}.values())


def needed(regions: Sequence[Region]) -> int:
    """Bytes that will be allocated for these regions, which one arrival reserves against others."""
    return sum(_missing(region) for region in regions)


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
    if region.fd is None:
        return region.size
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
