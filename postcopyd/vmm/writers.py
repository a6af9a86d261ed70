# SPDX-License-Identifier: Apache-2.0
"""What writes to a VMM's guest RAM without the page tables showing it: by its open descriptors.

Tracking of written pages (userfaultfd write-protect) sees what goes through the VMM's page tables:
vCPUs, the VMM's threads, system calls, vhost-net. Direct I/O pins pages, and they count as written
when the request starts; what lands after they were armed again is not seen. Devices that keep guest
RAM pinned are never seen at all. /proc says of both what is so at this moment, whatever the
VMM's own words for it are. Only reads.
"""

from __future__ import annotations

import os
import re
import stat

from postcopyd.host import procfs

# File systems that may read into the reader's own pages without O_DIRECT too.
DIRECT_FILE_SYSTEMS = re.compile(r"fuse(blk|\..*)?|virtiofs|9p|cifs|smb3")

# Devices that write to memory registered with them: VFIO and IOMMUFD, also under QEMU's nvme://;
# vhost's SCSI target and vDPA; RDMA; NVMe passed through by io_uring.
PINNING = re.compile(
    r"/dev/(vfio/|iommu$|vhost-scsi|vhost-vdpa|infiniband/|ng\d)|anon_inode:\[vfio"
)

IO_URING = "anon_inode:[io_uring]"
LOOKS = 5  # the kernel leaves its part out while the ring is in use


def look(pid: int) -> tuple[list[str], list[str]]:
    """What a process reads by direct I/O, and what it has open that keeps its memory pinned.

    By the paths that it sees itself. Who may not be looked at may do anything.
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
    """A ring that will not say counts as one that has some."""
    for _ in range(LOOKS):
        if (buffers := re.search(r"^UserBufs:\s*(\d+)", _info(pid, fd), re.MULTILINE)) is not None:
            return int(buffers[1]) > 0
    return True


def _info(pid: int, fd: int) -> str:
    """What the kernel says of a descriptor; nothing when it was closed meanwhile."""
    try:
        with open(f"/proc/{pid}/fdinfo/{fd}", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def direct_sentence(names: list[str]) -> str | None:
    """`Shape.direct_io` for these."""
    if not names:
        return None
    return f"Reads of {', '.join(names)} by direct I/O land in guest RAM unseen."


def unseen_sentence(names: list[str]) -> str | None:
    """`Shape.untracked` for these."""
    if not names:
        return None
    return f"Something that no page table shows writes to guest RAM: {', '.join(names)}."
