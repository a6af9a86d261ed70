# SPDX-License-Identifier: Apache-2.0
"""Checks what a VMM says of its guest RAM against what the kernel says of it.

It owns the parsing of region lines and the checks; it must not talk to the VMM. Where the two
differ guest memory goes wrong silently, so a mistake of a VMM's author has to be found here.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import stat

from postcopyd.host import procfs
from postcopyd.vmm import Region, VmmProtocolError
from postcopyd.vmm.process.lines import attributes, number

MAX_REGIONS = 256
PAGE_SIZES = (4096, 2 << 20)
F_GET_SEALS = 1034  # linux/fcntl.h; Python names it from 3.13 on
SMALL = 4096
# An entry of /proc/PID/pagemap is 8 bytes; bit 63: present, bit 62: swapped.
PAGEMAP_CHUNK = 1 << 20
OCCUPIED = int.from_bytes(b"\0\0\0\0\0\0\0\xc0" * (PAGEMAP_CHUNK // 8), "little")

NAME = re.compile(r"[A-Za-z0-9._:/-]{1,64}")


def parse(lines: list[str]) -> list[dict[str, str]]:
    """The attributes of each region line. Raises `VmmProtocolError`."""
    if not 1 <= len(lines) <= MAX_REGIONS:
        raise VmmProtocolError(f"it has {len(lines)} regions where 1 to {MAX_REGIONS} belong")
    parsed = []
    for line in lines:
        values = attributes(line)
        if not line.startswith("region ") or values.get("backing") not in ("file", "anonymous"):
            raise VmmProtocolError(f"its line {line[:80]!r} is not a region with a backing=")
        parsed.append(values)
    return parsed


def regions(parsed: list[dict[str, str]], fds: list[int]) -> tuple[Region, ...]:
    """The regions; `fds` are those of file regions, in order. Raises `VmmProtocolError`."""
    unused = iter(fds)
    found = tuple(
        _region(values, next(unused) if values["backing"] == "file" else None) for values in parsed
    )
    if len({region.name for region in found}) < len(found):
        raise VmmProtocolError("two of its regions have the same name")
    in_order = sorted(found, key=lambda region: region.address)
    for below, above in itertools.pairwise(in_order):
        if below.address + below.size > above.address:
            raise VmmProtocolError(f"its regions {below.name} and {above.name} overlap")
    return found


def _region(values: dict[str, str], fd: int | None) -> Region:
    name, page = values.get("name", ""), number(values, "page")
    address, size, offset = (number(values, key) for key in ("address", "size", "offset"))
    if not NAME.fullmatch(name):
        raise VmmProtocolError(f"name={name[:80]} cannot be the name of a region")
    if page not in PAGE_SIZES or not size or (address | size | offset) % page:
        raise VmmProtocolError(f"its region {name} is not whole pages of 4096 or 2097152 bytes")
    if fd is None and offset:
        raise VmmProtocolError(f"its region {name} is anonymous and has an offset")
    if fd is not None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size < offset + size:
            raise VmmProtocolError(f"the file of its region {name} is too short or not a file")
    return Region(name, size // page, page, address, fd, offset)


def problems(pid: int, guest_ram: tuple[Region, ...]) -> list[str]:
    """Why guest RAM that is mapped like this cannot be migrated: sentences, each with its mend.

    Reads the mappings of every process: call it in a thread.
    """
    try:
        mapped = list(procfs.mappings(pid))
    except PermissionError:
        return [
            f"this daemon may not look into process {pid}: run it as root, with CAP_SYS_PTRACE, "
            "or as the VMM's user"
        ]
    except (FileNotFoundError, ProcessLookupError):
        return [f"process {pid} has ended: start the VMM again"]
    found = []
    for region in guest_ram:
        if (why := _mismatch(region, mapped)) is not None:
            found.append(
                f"region {region.name} {why}: the VMM must describe its guest RAM as it is mapped"
            )
        if region.fd is not None and (why := _unfit(region.fd, region.page_size)) is not None:
            found.append(f"the file of region {region.name} {why}")
    files = [procfs.file_id(region.fd) for region in guest_ram if region.fd is not None]
    found += [
        f"process {other} ({command}) maps guest RAM too and would read zeros from missing pages: "
        "stop it, or take its device (vhost-user, virtiofs) from the guest"
        for other, command in procfs.other_mappers(files, {pid, os.getpid()})
    ]
    return found


def exposed(pid: int, guest_ram: tuple[Region, ...]) -> list[str]:
    """Why the kernel may put zeros where pages of this guest RAM are missing
    (`kernel.fills_holes`): sentences. Anonymous memory is safe on every kernel. Use a thread."""
    return [
        f"the file of region {region.name} may be put in huge pages, and this host's kernel then "
        "puts zeros where pages have not arrived: have the VMM call MADV_NOHUGEPAGE for it while "
        "it waits, or remount its tmpfs with huge=never (a memfd: set "
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled to never)"
        for region in guest_ram
        if region.fd is not None
        and region.page_size == SMALL
        and procfs.may_become_huge(pid, region.address, region.address + region.size)
    ]


def _mismatch(region: Region, mapped: list[procfs.Mapping]) -> str | None:
    status = os.fstat(region.fd) if region.fd is not None else None
    at = region.address
    for one in mapped:
        if one.end <= at or one.start >= region.address + region.size:
            continue
        if one.start > at:
            break
        if not one.writable:
            return f"is not writable at {at:#x}"
        if status is None:
            if one.shared or one.file != (0, 0):
                return f"is not anonymous memory at {at:#x}"
        elif (
            not one.shared
            or one.file != (status.st_dev, status.st_ino)
            or one.offset + at - one.start != region.offset + at - region.address
        ):
            return f"is not a shared mapping of its file at its offset at {at:#x}"
        at = one.end
    return None if at >= region.address + region.size else f"has nothing mapped at {at:#x}"


def _unfit(fd: int, page_size: int) -> str | None:
    try:
        # Only files of tmpfs and hugetlbfs, memfds among them, have seals; only these can be
        # registered with userfaultfd.
        fcntl.fcntl(fd, F_GET_SEALS)
    except OSError:
        return "is on neither tmpfs nor hugetlbfs: put it there (/dev/shm), or use a memfd"
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        return "came read-only: the VMM must send a descriptor open for reading and writing"
    block = os.fstatvfs(fd).f_bsize
    if block != page_size:
        return f"has pages of {block} bytes, not {page_size}: the VMM must say the page size it has"
    return None


def is_empty(pid: int, region: Region) -> bool:
    """Whether all pages of the region are missing. May take long: call it in a thread.

    Huge pages are believed to be missing: nothing outside the VMM can tell.
    """
    if region.page_size != SMALL:
        return True
    if region.fd is None:
        return _is_empty_anonymous(pid, region)
    try:
        return os.lseek(region.fd, region.offset, os.SEEK_DATA) >= region.offset + region.size
    except OSError as error:
        if error.errno == errno.ENXIO:
            return True
        raise


def _is_empty_anonymous(pid: int, region: Region) -> bool:
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        at, left = region.address // SMALL * 8, region.pages * 8
        while left:
            entries = os.pread(file.fileno(), min(left, PAGEMAP_CHUNK), at)
            if not entries or int.from_bytes(entries, "little") & OCCUPIED:
                return False
            at += len(entries)
            left -= len(entries)
    return True
