# SPDX-License-Identifier: Apache-2.0
"""Finds, by a VMM's open descriptors, what writes to guest RAM without its page tables showing it.

Tracking of written pages (userfaultfd write-protect) sees what goes through the VMM's page tables:
vCPUs, the VMM's threads, system calls, vhost-net. Direct I/O pins pages, and they count as written
when the request starts; data that lands after they were armed again is not seen. Writes of devices
that keep guest RAM pinned are never seen. /proc tells of both as they are at this moment, whatever
the VMM calls them. Only reads.
"""

from __future__ import annotations

import os
import re
import stat

from postcopyd.host import procfs

# File systems that may read into the reader's own pages even without O_DIRECT.
DIRECT_FILE_SYSTEMS = re.compile(r"fuse(blk|\..*)?|virtiofs|9p|cifs|smb3")

# Devices that write to memory registered with them: VFIO and IOMMUFD, also under QEMU's nvme://;
# vhost's SCSI target and vDPA; RDMA; NVMe passed through by io_uring.
PINNING = re.compile(
    r"/dev/(vfio/|iommu$|vhost-scsi|vhost-vdpa|infiniband/|ng\d)|anon_inode:\[vfio"
)

IO_URING = "anon_inode:[io_uring]"
LOOKS = 5  # attempts: the kernel leaves the line out while the ring is in use


def look(pid: int) -> tuple[list[str], list[str]]:
    """What a process reads by direct I/O, and what it has open that keeps its memory pinned.

    Names both by the paths that the process sees. A process that may not be looked at counts as one
    that keeps memory pinned.
    """
    direct, unseen = set(), set()
    try:
        links = procfs.descriptors(pid)
    except OSError as error:
        return [], [f"process {pid}, whose descriptors cannot be seen ({error.strerror})"]
    for fd, link in links.items():
        if _is_direct(pid, fd):
            direct.add(link)
        if PINNING.match(link):
            unseen.add(link)
        elif link == IO_URING and _has_buffers(pid, fd):
            unseen.add("registered buffers of io_uring")
    return sorted(direct), sorted(unseen)


def _is_direct(pid: int, fd: int) -> bool:
    flags = re.search(r"^flags:\s*([0-7]+)", _info(pid, fd), re.MULTILINE)
    if flags is None:
        return False
    if int(flags[1], 8) & os.O_DIRECT:
        return True
    try:
        status = os.stat(f"/proc/{pid}/fd/{fd}")
    except OSError:
        return False  # closed meanwhile
    if not stat.S_ISREG(status.st_mode):
        return False
    kind = procfs.file_system(pid, (status.st_dev, status.st_ino)) or ""
    return DIRECT_FILE_SYSTEMS.fullmatch(kind) is not None


def _has_buffers(pid: int, fd: int) -> bool:
    """Whether a ring has registered buffers. One that does not say counts as one that has."""
    for _ in range(LOOKS):
        if (buffers := re.search(r"^UserBufs:\s*(\d+)", _info(pid, fd), re.MULTILINE)) is not None:
            return int(buffers[1]) > 0
    return True


def _info(pid: int, fd: int) -> str:
    """What the kernel says of a descriptor; empty if it was closed meanwhile."""
    try:
        with open(f"/proc/{pid}/fdinfo/{fd}", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def direct_sentence(names: list[str]) -> str | None:
    """The sentence for `Shape.direct_io`, or None."""
    if not names:
        return None
    return f"Reads of {', '.join(names)} by direct I/O land in guest RAM unseen."


def unseen_sentence(names: list[str]) -> str | None:
    """The sentence for `Shape.untracked`, or None."""
    if not names:
        return None
    return f"Something that no page table shows writes to guest RAM: {', '.join(names)}."
