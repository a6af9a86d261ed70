# SPDX-License-Identifier: Apache-2.0
"""What is known of the files behind disks: this process stands for a QEMU that has them open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from postcopyd.host import procfs
from postcopyd.vmm import Disk, DiskFile
from postcopyd.vmm.qemu.disk_files import LOCAL_BLOCK, File, _device_ids, to_be_opened
from postcopyd.vmm.qemu.disk_files import seen as seen_in
from postcopyd.vmm.qemu.disks import (
    _Backend,
    _Described,
    _device,
    _Edge,
    _Graph,
    _GraphNode,
    _Image,
    _Node,
    _Nodes,
)
from postcopyd.vmm.qemu.qmp import QmpProtocolError


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def seen(name: str | Path, *, driver: str = "file", writable: bool = True) -> DiskFile:
    files, problems = looked_at(name, driver=driver, writable=writable)
    assert problems == []
    return files["vd0"][0]


def looked_at(name: str | Path, *, driver: str = "file", writable: bool = True) -> Any:
    return seen_in(os.getpid(), [File("vd0", driver, str(name), writable)], {})


def test_a_file_is_known_by_what_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through links, by a relative path, by a descriptor: device and inode of this kernel."""
    image = tmp_path / "disk"
    (tmp_path / "link").symlink_to(image)
    monkeypatch.chdir(tmp_path)
    with opened(image) as fd:
        whole = seen(image)
        status = image.stat()
        kernel = f"kernel {procfs.boot_id()}"
        assert whole.ids == {kernel: f"file {status.st_dev} {status.st_ino}"}
        for name in ("disk", "./link", tmp_path / "link", f"/proc/self/fd/{fd}", f"/dev/fd/{fd}"):
            assert seen(name).ids == whole.ids


def test_what_nobody_writes_to_is_known_by_its_content(tmp_path: Path) -> None:
    """Copies on two hosts are the same; a byte in a sample makes another."""
    ids = []
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).write_bytes(content * 100_000)
        with opened(tmp_path / name, os.O_RDONLY):
            ids.append(seen(tmp_path / name, writable=False).ids["content"])
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("kind", "shared", "family"),
    [
        ("ext4", False, None), ("xfs", False, None), ("tmpfs", False, None), (None, False, None),
        ("overlay", False, None), ("fuse.sshfs", False, None),
        ("nfs", True, "NFS"), ("nfs4", True, "NFS"), ("ceph", True, "CephFS"),
        ("gfs2", True, "GFS2"), ("ocfs2", True, "OCFS2"), ("cifs", True, None),
        ("fuse.glusterfs", True, "GlusterFS"),
    ],
)  # fmt: skip
def test_file_systems_that_other_hosts_have_too(
    kind: str | None, shared: bool, family: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Their inode numbers are compared where they are the same on every host."""
    monkeypatch.setattr(procfs, "file_system", lambda pid, file: kind)
    image = tmp_path / "disk"
    with opened(image):
        found = seen(image)
        assert found.shared is shared
        inodes = {key: value for key, value in found.ids.items() if key.startswith("inode")}
        assert inodes == ({f"inode of {family}": str(image.stat().st_ino)} if family else {})


def test_what_is_not_open_by_its_name_is_refused(tmp_path: Path) -> None:
    """Replaced, moved away, deleted: the other host would open something else, or nothing."""
    image = tmp_path / "disk"
    with opened(image):
        image.rename(tmp_path / "moved")
        assert "has another file open" in looked_at(image)[1][0]
        image.write_bytes(b"another")
        assert "has another file open" in looked_at(image)[1][0]
    with opened(image):
        image.unlink()
        assert "in a temporary file" in looked_at(image)[1][0]


def test_links_that_go_in_circles_are_an_answer(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "cannot be looked at (Too many levels" in looked_at(tmp_path / "a")[1][0]


@pytest.mark.parametrize(
    ("driver", "shared"), [("nbd", True), ("rbd", True), ("null-co", True), ("nvme", False)]
)
def test_what_is_no_file_is_a_server_or_of_this_host(driver: str, shared: bool) -> None:
    assert seen("x", driver=driver) == DiskFile("x", driver, shared, True, {})


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"wwid": "eui.1"}, {"wwid of the device": "eui.1"}),
        ({"device/wwid": "naa.1 "}, {"device/wwid of the device": "naa.1"}),
        ({"dm/uuid": "LVM-x", "wwid": "y"}, {"dm/uuid of the device": "LVM-x"}),
        ({"dm/uuid": "", "serial": "s"}, {"serial of the device": "s"}),
        ({}, {}),
    ],
)
def test_devices_by_their_own_names(
    files: dict[str, str], ids: dict[str, str], tmp_path: Path
) -> None:
    """What sysfs has of a block device; a partition is one of a device."""
    whole, part = tmp_path / "sda", tmp_path / "sda/sda2"
    part.mkdir(parents=True)
    (part / "partition").write_text("2\n")
    for name, text in files.items():
        (whole / name).parent.mkdir(exist_ok=True)
        (whole / name).write_text(text + "\n")
    assert _device_ids(whole) == ids
    assert _device_ids(part) == {key: f"{value} part 2" for key, value in ids.items()}


LEAF = _Node("file", "/d", 197120)


def node(driver: str, size: int, **below: _Node) -> _Node:
    return _Node(driver, "/d", size, tuple(sorted(below.items())))


@pytest.mark.parametrize(
    ("top", "chain", "leaves"),
    [
        (LEAF, "raw of 197120 bytes", "w"),
        (node("raw", 9, file=LEAF), "raw of 9 bytes", "w"),
        (node("throttle", 9, file=node("raw", 9, file=LEAF)), "raw of 9 bytes", "w"),
        (
            node("qcow2", 9, file=LEAF, backing=node("raw", 8, file=LEAF)),
            "qcow2 of 9 bytes over raw of 8 bytes", "rw",
        ),
        (
            node("luks", 9, file=node("qcow2", 10, file=LEAF)),
            "luks of 9 bytes in qcow2 of 10 bytes", "w",
        ),
        (node("vvfat", 9, file=node("qcow", 9, file=LEAF)), "vvfat of 9 bytes in qcow of 9 bytes",
         "w"),
    ],
)  # fmt: skip
def test_chains_in_words(top: _Node, chain: str, leaves: str) -> None:
    """Formats and sizes of what the guest sees, whatever files there are below."""
    assert top.chain == chain
    assert "".join("w" if writable else "r" for _, writable in top.leaves(True)) == leaves
    assert not any(writable for _, writable in top.leaves(False))


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ({"device": "v", "qdev": "/machine/peripheral/vd0/virtio-backend"}, "vd0"),
        ({"device": "", "qdev": "sd0"}, "sd0"),
        ({"device": "v", "qdev": "/machine/peripheral-anon/device[1]/virtio-backend"},
         "peripheral-anon/device[1]"),
        ({"device": "ide0-hd0", "qdev": "/machine/unattached/device[16]"}, "ide0-hd0"),
        ({"device": "", "qdev": "/machine/system.flash0"}, "/machine/system.flash0"),
        ({"device": "v"}, "v"),
    ],
)  # fmt: skip
def test_disks_by_the_names_of_their_devices(backend: dict[str, str], name: str) -> None:
    """Not by those of QEMU's nodes, nor by numbers that differ between its versions."""
    assert _device(_Backend(**backend)) == name


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("/d", "/d"),
        ("file:/d", "/d"),
        ('json:{"driver": "file", "filename": "/d"}', "/d"),
        ('json:{"driver": "null-co"}', 'json:{"driver": "null-co"}'),
        ("json:[]", "json:[]"),
        ("json:{", "json:{"),
    ],
)
def test_names_of_files(file: str, name: str) -> None:
    assert _Described("n", "file", file, _Image(9)).file_name == name


def test_only_kinds_of_block_devices_that_are_local_are_told_by_name() -> None:
    local = [name for name in ("loop0", "zram1", "sda", "nvme0n1", "dm-3", "rbd0", "drbd1", "ram0")
             if LOCAL_BLOCK.match(name)]  # fmt: skip
    assert local == ["loop0", "zram1", "ram0"]


def nodes(*edges: tuple[int, int]) -> _Nodes:
    numbers = range(60)
    return _Nodes(
        _Graph(
            [_GraphNode(n, "block-driver", f"n{n}") for n in numbers],
            [_Edge(parent, child, "file") for parent, child in edges],
        ),
        [_Described(f"n{n}", "raw", f"/{n}", _Image(9)) for n in numbers],
    )


@pytest.mark.parametrize(
    "edges",
    [
        [(0, 0)],
        [(0, 1), (1, 0)],
        [(n, n + 1) for n in range(59) for _ in range(2)],  # 2^59 ways down
    ],
)
def test_nodes_that_never_end_are_no_answer(edges: list[tuple[int, int]]) -> None:
    """A QEMU whose guest has taken it over may say that a disk is below itself."""
    with pytest.raises(QmpProtocolError, match="never end"):
        nodes(*edges).tree("n0")


def test_nodes_hang_together_as_qemu_says() -> None:
    tree = nodes((0, 1), (1, 2), (77, 2), (2, 99)).tree("n0")
    assert tree is not None
    assert tree.chain == "raw of 9 bytes in raw of 9 bytes"
    assert [leaf.name for leaf, _ in tree.leaves(True)] == ["/2"]
    assert nodes().tree("gone") is None


async def test_files_that_nobody_has_opened_yet(tmp_path: Path) -> None:
    """They are those that a QEMU would find which is started later; one that is not there is
    named."""
    image = tmp_path / "disk"
    with opened(image):
        found = seen(image)
        server = DiskFile("nbd://x", "nbd", True, True, {})
        there = (replace(found, ids={}, where="nfs"), server)
        disks, problems = await to_be_opened([Disk("vd0", "raw", there)])
        assert (disks, problems) == ([Disk("vd0", "raw", (found, server))], [])
        disks, _ = await to_be_opened([Disk("vd0", "raw", (replace(found, writable=False),))])
        assert disks[0].files[0].ids == found.ids  # a peer has named it, so it is not read
    image.unlink()
    disks, problems = await to_be_opened([Disk("vd0", "raw", (found,))])
    assert disks[0].files == (found,)
    assert "both hosts share" in problems[0]
    assert str(image) in problems[0]
