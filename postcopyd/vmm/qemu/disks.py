# SPDX-License-Identifier: Apache-2.0
"""The disks of a QEMU guest: what the guest sees, which files are behind it, what forbids a move.

Owns the questions to QEMU about its block layer, the way from a name there to an open file, and the
facts about that file that another host can compare. Whether the other host has the same file is for
`alike.py` to judge. Only asks and reads, but for `take`.

A disk is known by its device in the guest, and by its chain of formats and sizes. Names of block
nodes differ between two QEMUs. Files are those that QEMU has open, found by their path as QEMU sees
it: the path may lead to another file by now.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Self

import trio
from msgspec import Meta, Struct

from postcopyd.host import procfs
from postcopyd.tasks import threads
from postcopyd.vmm import Disk, DiskFile
from postcopyd.vmm.qemu.answers import Property
from postcopyd.vmm.qemu.qmp import Qmp, QmpProtocolError, QmpRefused

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
# Nodes that pass on what is below them unchanged.
FILTERS = {"throttle", "copy-on-read", "preallocate", "compress"}
# Kinds of block devices that are made of this host's memory or files.
LOCAL_BLOCK = re.compile(r"(loop|ram|zram|pmem|brd)\d")

SAMPLES, SAMPLE_BYTES = 16, 4096
EXPORT = "postcopyd-takes-it-back"
MAX_LINKS = 40  # as in the kernel
MAX_DEPTH = 250  # of a backing chain; QEMU itself allows fewer

# A job in one of these states has ended.
OVER = {"concluded", "null"}


DELETED = " (deleted)"  # what /proc appends to the path of a file without a name


MAX_NODES = 1000
"""Nodes of one disk; a node that is reached twice counts twice."""

Driver = Annotated[str, Meta(max_length=64, pattern=r"\A[A-Za-z0-9_.-]+\Z")]


class _Image(Struct, rename="kebab"):
    virtual_size: int
    filename: str = ""
    backing_image: _Image | None = None


class _Inserted(Struct, rename="kebab"):
    node_name: str
    ro: bool
    image: _Image


class _Backend(Struct):
    """One of query-block."""

    device: str
    qdev: str = ""
    removable: bool = False
    inserted: _Inserted | None = None


class _Described(Struct, rename="kebab"):
    """One of query-named-block-nodes."""

    node_name: str
    drv: Driver
    file: str
    image: _Image

    @property
    def file_name(self) -> str:
        """The plain name: QEMU uses JSON for what a plain name cannot say."""
        name = self.file
        if name.startswith("json:"):
            with suppress(ValueError, RecursionError):
                options = json.loads(name.removeprefix("json:"))
                name = str(options.get("filename", name)) if isinstance(options, dict) else name
        return name.removeprefix("file:")


class _GraphNode(Struct):
    id: int
    type: str
    name: str


class _Edge(Struct):
    parent: int
    child: int
    name: str
    perm: list[str] = []


class _Graph(Struct):
    """x-debug-query-block-graph."""

    nodes: list[_GraphNode]
    edges: list[_Edge]


class _Job(Struct):
    """One of query-jobs."""

    id: str
    type: str
    status: str


class _Fd(Struct):
    fd: int


class _FdSet(Struct, rename="kebab"):
    """One of query-fdsets."""

    fdset_id: int
    fds: list[_Fd]


@dataclass(frozen=True)
class _Node:
    """One node of QEMU's block graph, with the nodes below it."""

    driver: str
    name: str  # of the file, as QEMU has it
    size: int
    below: tuple[tuple[str, _Node], ...] = ()

    @property
    def chain(self) -> str:
        """Formats and sizes from here down; equal for equal content, however it was opened."""
        if self.driver in FILTERS and len(self.below) == 1:
            return self.below[0][1].chain
        text = f"{self.driver if self.below else 'raw'} of {self.size} bytes"
        for edge, node in self.below:
            if edge == "backing":
                text += f" over {node.chain}"
            elif node.below:
                text += f" in {node.chain}"
        return text

    def leaves(self, writable: bool) -> Iterator[tuple[_Node, bool]]:
        """The nodes at the bottom, each with whether the guest's writes go there."""
        if not self.below or self.driver in OF_THIS_HOST:
            yield self, writable
            return
        for edge, node in self.below:
            yield from node.leaves(writable and edge != "backing")


@dataclass(frozen=True)
class _Leaf:
    disk: str
    node: _Node
    writable: bool


async def look(qmp: Qmp, pid: int) -> tuple[list[Disk], list[str]]:
    """The guest's disks by name, and a sentence for each reason why one cannot be moved along."""
    problems = await _jobs(qmp)
    backends = await qmp.ask(list[_Backend], "query-block")
    nodes = await _Nodes.of(qmp)
    fdsets = await _fdsets(qmp)
    chains: dict[str, str] = {}
    leaves: list[_Leaf] = []
    for backend in backends:
        name, inserted = _device(backend), backend.inserted
        if inserted is None:
            chains[name] = "empty"
        elif (top := nodes.tree(inserted.node_name)) is None:
            problems.append(f"Disk '{name}' changed while it was looked at: try again.")
        else:
            chains[name] = top.chain + (", read-only" if inserted.ro else "")
            # What is in flash memory moves with the guest, and is written to the file there.
            if not await _is_flash(qmp, backend):
                found = top.leaves(not inserted.ro)
                leaves += [_Leaf(name, leaf, writable) for leaf, writable in found]
    see = partial(_look_at, pid, leaves, fdsets)
    files, unfit = await trio.to_thread.run_sync(
        see, abandon_on_cancel=True, limiter=threads.STORAGE
    )
    disks = [Disk(name, chains[name], tuple(files.get(name, ()))) for name in sorted(chains)]
    return disks, problems + unfit


async def outline(qmp: Qmp) -> str:
    """A digest of the plugged devices, the block graph, and each disk's files and sizes: a node may
    be resized, or made anew with its name. Asks all at once and takes a millisecond, as the guest
    may stand still meanwhile."""
    named, nameless, graph, backends = await qmp.ask_all(
        ("qom-list", {"path": "/machine/peripheral"}, list[Property]),
        ("qom-list", {"path": "/machine/peripheral-anon"}, list[Property]),
        ("x-debug-query-block-graph", None, _Graph),
        ("query-block", None, list[_Backend]),
    )
    names = {node.id: [node.type, node.name] for node in graph.nodes}
    edges = [[names.get(e.parent, []), e.name, names.get(e.child, [])] for e in graph.edges]
    devices = [[entry.name, entry.type] for entry in (*named, *nameless)]
    disks = [[one.qdev or one.device, *_image(one.inserted)] for one in backends]
    parts = [sorted(part) for part in (names.values(), edges, devices, disks)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


async def are_taken(qmp: Qmp) -> bool:
    """Whether QEMU may write to any disk or flash: it has them, and has not given them up."""
    graph = await qmp.ask(_Graph, "x-debug-query-block-graph")
    return any("write" in edge.perm for edge in graph.edges if edge.name == "root")


async def untaken(qmp: Qmp) -> list[str]:
    """Disks that QEMU may not write to, because it gave them up or did not take them. Without an
    image's lock QEMU goes on like that after a load, and says so only in its log."""
    graph, backends = await qmp.ask_all(
        ("x-debug-query-block-graph", None, _Graph), ("query-block", None, list[_Backend])
    )
    names = {node.id: node.name for node in graph.nodes}
    roots = [edge for edge in graph.edges if edge.name == "root"]
    written = {names.get(edge.child) for edge in roots if "write" in edge.perm}
    return [
        _device(one)
        for one in backends
        # A drive with removable media may have a writable one and not use it.
        if one.qdev and not one.removable and one.inserted is not None
        if not one.inserted.ro and one.inserted.node_name not in written
    ]


async def take(qmp: Qmp) -> None:
    """Has QEMU take all images back that it gave up, where the guest stays stopped: otherwise
    `cont` does so. One that is locked elsewhere stays given up."""
    if qmp.version >= (10, 0):
        with suppress(QmpRefused):
            await qmp.execute("blockdev-set-active", {"active": True})
        return
    # An older one aborts when it is told to resize, move or give up what it gave up. For an export
    # it takes an image, and that before it sees that there is no server to export it.
    graph = await qmp.ask(_Graph, "x-debug-query-block-graph")
    nodes = {node.id: node.name for node in graph.nodes if node.type == "block-driver"}
    below = {edge.child for edge in graph.edges if edge.parent in nodes}
    for number in nodes.keys() - below:
        export = {"type": "nbd", "id": EXPORT, "node-name": nodes[number]}
        with suppress(QmpRefused):
            await qmp.execute("block-export-add", export)
            await qmp.execute("block-export-del", {"id": EXPORT, "mode": "hard"})


def _image(inserted: _Inserted | None) -> Iterator[list[str | int]]:
    """Files and sizes of what is in a drive, and of all its backing images."""
    image = inserted.image if inserted is not None else None
    while image is not None:
        yield [image.filename, image.virtual_size]
        image = image.backing_image


class _Nodes:
    """All block nodes by name, and what is below each."""

    def __init__(self, graph: _Graph, described: list[_Described]) -> None:
        self._described = {node.node_name: node for node in described}
        names = {node.id: node.name for node in graph.nodes if node.type == "block-driver"}
        self._below: dict[str, list[tuple[str, str]]] = {}
        for edge in graph.edges:
            parent, child = names.get(edge.parent), names.get(edge.child)
            if parent is not None and child in self._described:
                self._below.setdefault(parent, []).append((edge.name, child))

    @classmethod
    async def of(cls, qmp: Qmp) -> Self:
        """Asks QEMU: only this one answer tells what is below what."""
        graph = await qmp.ask(_Graph, "x-debug-query-block-graph")
        flat = {"flat": True}
        return cls(graph, await qmp.ask(list[_Described], "query-named-block-nodes", flat))

    def tree(self, name: str) -> _Node | None:
        """A node with all that is below it; None if it has gone meanwhile."""
        left = itertools.count(1)

        def tree(name: str, depth: int) -> _Node:
            if depth > MAX_DEPTH or next(left) > MAX_NODES:
                raise QmpProtocolError(f"QEMU says that the nodes of a disk ('{name}') never end.")
            below = sorted(self._below.get(name, ()))
            node = self._described[name]
            return _Node(
                node.drv,
                node.file_name,
                node.image.virtual_size,
                tuple((edge, tree(child, depth + 1)) for edge, child in below),
            )

        return tree(name, 0) if name in self._described else None


async def _jobs(qmp: Qmp) -> list[str]:
    return [
        f"QEMU runs the job '{job.id}' ({job.type}, {job.status}), which would not move with "
        f"the guest: wait for its end, or end it with QMP `job-cancel`."
        for job in await qmp.ask(list[_Job], "query-jobs")
        if job.status not in OVER
    ]


async def _fdsets(qmp: Qmp) -> dict[str, int]:
    """Names of descriptors that QEMU was given, with their numbers in QEMU."""
    return {
        f"/dev/fdset/{entry.fdset_id}": entry.fds[0].fd
        for entry in await qmp.ask(list[_FdSet], "query-fdsets")
        if entry.fds
    }


def _device(backend: _Backend) -> str:
    """The name of the guest's device, the same in all versions of QEMU."""
    path = backend.qdev
    if not path.startswith("/"):
        return path or backend.device
    folder, _, rest = path.removeprefix("/machine/").partition("/")
    if folder == "peripheral":
        return rest.partition("/")[0]
    if folder == "peripheral-anon":
        return f"{folder}/{rest.partition('/')[0]}"
    return backend.device or path


async def _is_flash(qmp: Qmp, backend: _Backend) -> bool:
    if not backend.qdev.startswith("/machine/"):
        return False
    kind = await qmp.ask(str, "qom-get", {"path": backend.qdev, "property": "type"})
    return kind.startswith("cfi.pflash")


def _look_at(
    pid: int, leaves: Sequence[_Leaf], fdsets: dict[str, int]
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
                f"The file {leaf.node.name} of disk '{leaf.disk}' cannot be looked at "
                f"({error.strerror}): see that its storage answers, and run postcopyd as root."
            )
        if isinstance(found, str):
            problems.append(found)
        else:
            files.setdefault(leaf.disk, []).append(found)
    return files, problems


def _file(opened: _Opened, leaf: _Leaf) -> DiskFile | str:
    """What is known of a file of a disk, or why it cannot be moved along. Raises OSError."""
    node, name = leaf.node, leaf.node.name
    if node.driver not in OF_A_PATH:
        return DiskFile(name, node.driver, node.driver not in OF_THIS_HOST, leaf.writable, {})
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
    if not leaf.writable:
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
