# SPDX-License-Identifier: Apache-2.0
"""The files behind disks: the way from a name that QEMU has for one to the file that QEMU has open,
and the facts about it that another host can compare.

Asks QEMU nothing, only reads. Files are those that QEMU has open, found by their path as QEMU sees
it: the path may lead to another file by now.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import trio

from postcopyd.host import procfs
from postcopyd.tasks import threads
from postcopyd.vmm import Disk, DiskFile, VmmError

# File systems that other hosts mount too, as libvirt knows them (virFileIsSharedFS), by the name
# that the kernel has for them. The value names the family if a file has the same inode number on
# every host; it is empty for SMB and others, which make up inode numbers of their own.
SHARED_FILE_SYSTEMS = {
    "nfs": "NFS", "nfs4": "NFS", "ceph": "CephFS", "gfs2": "GFS2", "ocfs2": "OCFS2",
    "lustre": "Lustre", "fuse.glusterfs": "GlusterFS",
    "gpfs": "", "cifs": "", "smb3": "", "smbfs": "", "afs": "", "acfs": "", "beegfs": "",
    "fuse.quobyte": "", "fuse.ceph": "", "fuse.ceph-fuse": "", "pvfs2": "", "vxfs": "",
}  # fmt: skip

# Block drivers that open a path of this host.
OF_A_PATH = {"file", "host_device", "host_cdrom"}
# All other drivers reach servers, as other hosts can too, or make their content; but not these.
OF_THIS_HOST = {"nvme", "nvme-io_uring", "vvfat"}
# Kinds of block devices that are made of this host's memory or files.
LOCAL_BLOCK = re.compile(r"(loop|ram|zram|pmem|brd)\d")

SAMPLES, SAMPLE_BYTES = 16, 4096
MAX_LINKS = 40  # as in the kernel

DELETED = " (deleted)"  # what /proc appends to the path of a file without a name


@dataclass(frozen=True)
class File:
    """A file of a disk, by the block driver and the name that QEMU has for it."""

    disk: str
    driver: str
    name: str
    writable: bool


async def look_at(
    pid: int, leaves: Sequence[File], fdsets: dict[str, int]
) -> tuple[dict[str, list[DiskFile]], list[str]]:
    """The files of each disk, and why others cannot be known; `fdsets` are numbers in QEMU."""
    see = partial(seen, pid, leaves, fdsets)
    return await trio.to_thread.run_sync(see, abandon_on_cancel=True, limiter=threads.STORAGE)


async def as_named(disks: Sequence[Disk], pid: int) -> list[Disk]:
    """The disks of a QEMU that was started with those of another host, and cannot be asked yet:
    the files that it has open by these names. Raises VmmError, OSError."""

    def look() -> list[Disk]:
        opened = _Opened(pid, {})
        return [
            replace(one, files=tuple(_again(opened, one.name, f) for f in one.files))
            for one in disks
        ]

    return await trio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=threads.STORAGE)


async def to_be_opened(disks: Sequence[Disk]) -> tuple[list[Disk], list[str]]:
    """The disks of a QEMU that is not there yet, of this host's files by these names, and why some
    could not be opened: sentences. A file that only QEMU's user may see counts as the same."""

    def look() -> tuple[list[Disk], list[str]]:
        problems = []
        with _OnThisHost() as opened:

            def found(disk: str, there: DiskFile) -> DiskFile:
                try:
                    return _again(opened, disk, there)
                except PermissionError:
                    return there
                except OSError as error:
                    problems.append(
                        f"Disk '{disk}' is in {there.path}, which cannot be opened here "
                        f"({error.strerror}): put it on storage that both hosts share."
                    )
                    return there

            files = [tuple(found(one.name, file) for file in one.files) for one in disks]
        return [replace(one, files=f) for one, f in zip(disks, files, strict=True)], problems

    return await trio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=threads.STORAGE)


def _again(opened: _Opened, disk: str, there: DiskFile) -> DiskFile:
    if not there.path.startswith("/"):
        return there
    found = _file(opened, File(disk, "file", there.path, there.writable))
    if isinstance(found, str):
        raise VmmError(found)
    return found


def seen(
    pid: int, leaves: Sequence[File], fdsets: dict[str, int]
) -> tuple[dict[str, list[DiskFile]], list[str]]:
    """The files of each disk, and why others cannot be known. May take a while."""
    files: dict[str, list[DiskFile]] = {}
    problems = []
    opened = _Opened(pid, fdsets)
    for leaf in leaves:
        try:
            found = _file(opened, leaf)
        except OSError as error:
            found = (
                f"The file {leaf.name} of disk '{leaf.disk}' cannot be looked at "
                f"({error.strerror}): see that its storage answers, and run postcopyd as root."
            )
        if isinstance(found, str):
            problems.append(found)
        else:
            files.setdefault(leaf.disk, []).append(found)
    return files, problems


def _file(opened: _Opened, leaf: File) -> DiskFile | str:
    """What is known of a file of a disk, or why it cannot be moved along. Raises OSError."""
    name = leaf.name
    if leaf.driver not in OF_A_PATH:
        return DiskFile(name, leaf.driver, leaf.driver not in OF_THIS_HOST, leaf.writable, {})
    if (number := opened.number(name)) is None:
        return (
            f"Disk '{leaf.disk}' is in {name}, and QEMU has another file open than the one that "
            f"has this name now: put back what was moved, or start QEMU anew."
        )
    status = os.stat(opened.path(number))
    if status.st_nlink == 0 and opened.links.get(number, "").endswith(DELETED):
        return (
            f"Disk '{leaf.disk}' is in a temporary file ({name}), as with -snapshot, which no "
            f"other host can open: what the guest wrote would be lost; write it to the image below "
            f"(HMP `commit`) if it is to stay, and start both QEMUs without it."
        )
    if stat.S_ISREG(status.st_mode):
        kind = procfs.file_system(opened.pid, (status.st_dev, status.st_ino)) or "no file system"
        where, shared = kind, kind in SHARED_FILE_SYSTEMS
        ids = {f"kernel {procfs.boot_id()}": f"file {status.st_dev} {status.st_ino}"}
        if family := SHARED_FILE_SYSTEMS.get(kind):
            ids[f"inode of {family}"] = str(status.st_ino)
    else:
        kind = "block" if stat.S_ISBLK(status.st_mode) else "char"
        number_of = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        device = Path(f"/sys/dev/{kind}/{number_of}")
        where, shared = f"{kind} device", LOCAL_BLOCK.match(device.resolve().name) is None
        ids = {f"kernel {procfs.boot_id()}": f"{kind} {number_of}", **_device_ids(device)}
    if not leaf.writable and opened.readable:
        with suppress(OSError):  # a drive without a medium
            ids["content"] = _sample(opened.path(number))
    return DiskFile(name, where, shared, leaf.writable, ids)


def _device_ids(device: Path) -> dict[str, str]:
    """The name that a device gives itself, the same on every host that has it."""
    part = ""
    if (device / "partition").exists():
        part = f" part {(device / 'partition').read_text().strip()}"
        device = device.resolve().parent
    for key in ("dm/uuid", "wwid", "device/wwid", "serial", "device/serial", "md/uuid"):
        with suppress(OSError):
            if value := (device / key).read_text(errors="replace").strip():
                return {f"{key} of the device": value + part}
    return {}


def _sample(path: str) -> str:
    """A digest of samples of a file that nobody writes to: tells images of equal size apart."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        for part in range(SAMPLES):
            at = size * part // SAMPLES // SAMPLE_BYTES * SAMPLE_BYTES
            digest.update(os.pread(file.fileno(), SAMPLE_BYTES, at))
        digest.update(os.pread(file.fileno(), SAMPLE_BYTES, max(size - SAMPLE_BYTES, 0)))
    return digest.hexdigest()[:32]


class _Opened:
    """The files that a process has open, by the names that the process has for them."""

    readable = True

    def __init__(self, pid: int, fdsets: dict[str, int]) -> None:
        self.pid, self._fdsets = pid, fdsets
        self.links = procfs.descriptors(pid)
        self._numbers: dict[procfs.FileId, int] = {}
        for number in self.links:
            with suppress(OSError):  # closed meanwhile
                self._numbers.setdefault(procfs.file_id(self.path(number)), number)

    def path(self, number: int) -> str:
        return f"/proc/{self.pid}/fd/{number}"

    def number(self, name: str) -> int | None:
        """The descriptor of the file of this name; None if it is not open. Raises OSError."""
        if (given := re.fullmatch(r"/(?:proc/self|dev)/fd/(\d+)", name)) is not None:
            return int(given[1])
        if name in self._fdsets:
            return self._fdsets[name]
        try:
            return self._numbers.get(procfs.file_id(self._inside(name)))
        except FileNotFoundError:
            gone = f"/{os.path.basename(name)}{DELETED}"
            return next((n for n, link in self.links.items() if link.endswith(gone)), None)

    def _inside(self, name: str) -> str:
        """The path as this process can open it: absolute links start at the root of `pid`."""
        root = f"/proc/{self.pid}/root"
        here = root if name.startswith("/") else f"/proc/{self.pid}/cwd"
        left = name.split("/")
        links = 0
        while left:
            path = f"{here}/{left.pop(0)}"
            if not os.path.islink(path):
                here = path
                continue
            if (links := links + 1) > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = os.readlink(path)
            here = root if target.startswith("/") else here
            left = target.split("/") + left
        return here


class _OnThisHost(_Opened):
    """Files that nobody has opened yet, by their names on this host; closed at the end. Not read:
    a peer has named them."""

    readable = False

    def __init__(self) -> None:
        self.pid, self.links = os.getpid(), {}
        self._held: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._held:
            os.close(number)

    def number(self, name: str) -> int:
        self._held.append(os.open(name, os.O_PATH | os.O_CLOEXEC))
        return self._held[-1]
