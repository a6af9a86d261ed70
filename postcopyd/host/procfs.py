# SPDX-License-Identifier: Apache-2.0
"""What /proc tells about another process: mappings, descriptors, threads, command, file systems.

Reads only, decides nothing. Everything here may be stale when it returns; a process that ends while
it is read counts as having nothing.

psutil cannot be used: it gives neither device nor inode of a mapping.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from postcopyd.errors import SHORTAGES

FileId = tuple[int, int]  # st_dev, st_ino


@dataclass(frozen=True)
class Mapping:
    """One line of /proc/PID/maps."""

    start: int
    end: int
    shared: bool
    writable: bool
    offset: int  # of `start` in the file, bytes
    file: FileId  # (0, 0) for anonymous memory
    path: str

    @property
    def length(self) -> int:
        return self.end - self.start


def mappings(pid: int) -> Iterator[Mapping]:
    """The mappings of a process in order of address. Raises OSError when it may not be read."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            span, permissions, offset, device, inode, *path = line.rstrip("\n").split(None, 5)
            start, end = span.split("-")
            major, minor = device.split(":")
            yield Mapping(
                int(start, 16),
                int(end, 16),
                permissions[3] == "s",
                permissions[1] == "w",
                int(offset, 16),
                (os.makedev(int(major, 16), int(minor, 16)), int(inode)),
                path[0] if path else "",
            )


def file_id(path: str | int) -> FileId:
    """Device and inode of a path (followed) or descriptor. Raises OSError."""
    found = os.stat(path)
    return (found.st_dev, found.st_ino)


def descriptors(pid: int) -> dict[int, str]:
    """Number and link text of each descriptor of a process. Raises OSError if it may not look."""
    links: dict[int, str] = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            links[int(number)] = os.readlink(f"/proc/{pid}/fd/{number}")
        except OSError:
            continue  # closed meanwhile
    return links


def open_mapped(pid: int, mapping: Mapping) -> int:
    """A new open file description (read, write) of a file that a process has mapped.

    By a descriptor of the process, because the path may be deleted or belong to another mount
    namespace; or by the mapping, when it has closed its descriptors, which takes root. Raises
    OSError.
    """
    for number in descriptors(pid):
        path = f"/proc/{pid}/fd/{number}"
        try:
            if file_id(path) != mapping.file:
                continue
        except OSError:
            continue
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return os.open(mapped_path(pid, mapping), os.O_RDWR | os.O_CLOEXEC)


def mapped_path(pid: int, mapping: Mapping) -> str:
    """Of the file that is mapped there, whatever has become of its name. Only root may open it."""
    return f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"


def file_system(pid: int, file: FileId) -> str | None:
    """The type of the file system a file is on ("tmpfs"), as mounted where the process lives.

    None when it is mounted nowhere: a memfd, or shared anonymous memory.
    """
    device = f"{os.major(file[0])}:{os.minor(file[0])}"
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            mount, _, kind = line.partition(" - ")
            if mount.split()[2] == device:
                return kind.split()[0]
    return None


def boot_id() -> str:
    """The identity of this boot of the kernel; processes in its containers have the same."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def command(pid: int) -> str:
    """The short name of a process, or "?"."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"


def arguments(pid: int) -> list[str]:
    """The command line of a process, empty when it has ended."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:-1]
    except OSError:
        return []


def status(pid: int | str) -> dict[str, str]:
    """The fields of /proc/PID/status, empty when it has ended. `pid` may be "PID/task/TID"."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return {}
    return {
        key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())
    }


def started(pid: int) -> int:
    """When a process was started, in clock ticks since boot (field 22 of /proc/PID/stat); 0 when it
    has ended. With the process number it names one process of this boot. Raises OSError when it
    cannot be known: for want of descriptors, say, a guest must not be taken for dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    state, *fields = stat.rpartition(")")[2].split()
    return 0 if state in ("Z", "X") else int(fields[18])


def usage(pid: int) -> tuple[int, float] | None:
    """(page faults without I/O, CPU seconds) of all threads of a process; None when it has ended.

    Fields 10, 14 and 15 of /proc/PID/stat, see proc(5)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="surrogateescape") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[7]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def has_thread(pid: int, number: int) -> bool:
    """Whether a process has a thread with this number, here or in its own PID namespace."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return False
    if str(number) in threads:
        return True
    return any(
        status(f"{pid}/task/{thread}").get("NSpid", "").split()[-1:] == [str(number)]
        for thread in threads
    )


def other_mappers(files: Iterable[FileId], besides: Iterable[int]) -> list[tuple[int, str]]:
    """Processes (pid, command) that map one of the files, without those in `besides`.

    Reads the maps of every process of the host: milliseconds to tenths of a second, so call it in
    a thread. A process whose maps this one may not read counts as having none. Raises OSError when
    it cannot look.
    """
    wanted, skipped = set(files), set(besides)
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in skipped:
            continue
        try:
            if any(mapping.file in wanted for mapping in mappings(int(entry))):
                found.append((int(entry), command(int(entry))))
        except OSError as error:
            if error.errno in SHORTAGES:
                raise
    return sorted(found)


def reserves_huge_pages(pid: int, address: int) -> bool:
    """Whether the mapping at an address reserved its huge pages when it was made (no "nr" flag)."""
    for start, end, fields in smaps(pid):
        if start <= address < end:
            return "nr" not in fields.get("VmFlags", ())
    return False


def may_become_huge(pid: int, start: int, end: int) -> bool:
    """Whether the kernel may make huge pages by itself of memory mapped there. The kernel's own
    answer: it covers settings, mount options, and what the process has asked for."""
    return any(
        first < end and start < last and fields.get("THPeligible") == ["1"]
        for first, last, fields in smaps(pid)
    )


def smaps(pid: int) -> Iterator[tuple[int, int, dict[str, list[str]]]]:
    """Of each mapping of a process: start, end, and the words of each field. For this the kernel
    looks at every page: tens of milliseconds for a GiB. Raises OSError."""
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="surrogateescape") as lines:
        for header, fields in smaps_entries(lines):
            start, end = header[0].split("-")
            yield int(start, 16), int(end, 16), fields


def smaps_entries(lines: Iterable[str]) -> Iterator[tuple[list[str], dict[str, list[str]]]]:
    """Splits the lines of /proc/PID/smaps by mapping: the words of its first line, and the words of
    each field."""
    header: list[str] = []
    fields: dict[str, list[str]] = {}
    for line in lines:
        first, *words = line.split()
        if first.endswith(":"):
            fields[first[:-1]] = words
            continue
        if header:
            yield header, fields
        header, fields = [first, *words], {}
    if header:
        yield header, fields
