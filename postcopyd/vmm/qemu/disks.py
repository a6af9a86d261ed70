# SPDX-License-Identifier: Apache-2.0
"""The disks of a QEMU guest: what the guest sees, which files are behind it, what forbids a move.

Owns the questions to QEMU about its block layer; disk_files.py knows the files. Whether the other
host has the same is for `alike.py` to judge. Only asks and reads, but for `take`.

A disk is known by its device in the guest, and by its chain of formats and sizes. Names of block
nodes differ between two QEMUs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Self

from msgspec import Meta, Struct

from postcopyd.vmm import Disk
from postcopyd.vmm.qemu.answers import Property
from postcopyd.vmm.qemu.disk_files import OF_THIS_HOST, File, look_at
from postcopyd.vmm.qemu.qmp import Qmp, QmpProtocolError, QmpRefused

# Nodes that pass on what is below them unchanged.
FILTERS = {"throttle", "copy-on-read", "preallocate", "compress"}
EXPORT = "postcopyd-takes-it-back"
MAX_DEPTH = 250  # of a backing chain; QEMU itself allows fewer

# A job in one of these states has ended.
OVER = {"concluded", "null"}


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


async def look(qmp: Qmp, pid: int) -> tuple[list[Disk], list[str]]:
    """The guest's disks by name, and a sentence for each reason why one cannot be moved along."""
    problems = await _jobs(qmp)
    backends = await qmp.ask(list[_Backend], "query-block")
    nodes = await _Nodes.of(qmp)
    fdsets = await _fdsets(qmp)
    chains: dict[str, str] = {}
    leaves: list[File] = []
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
                leaves += [File(name, leaf.driver, leaf.name, w) for leaf, w in found]
    files, unfit = await look_at(pid, leaves, fdsets)
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
