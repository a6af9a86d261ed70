# SPDX-License-Identifier: Apache-2.0
"""What is compared of two VMMs: disks and the files behind them, facts, and one VMM over time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from postcopyd import protocol as p
from postcopyd.sessions import alike
from postcopyd.vmm import Disk, DiskFile, Shape

LOCAL = DiskFile("/d", "ext4", False, True, {"kernel A": "file 1 7"})
ELSEWHERE = replace(LOCAL, ids={"kernel B": "file 1 7"})
NFS = DiskFile("/d", "nfs4", True, True, {"kernel A": "file 1 7", "inode of NFS": "7"})
NFS_THERE = replace(NFS, ids={"kernel B": "file 9 7", "inode of NFS": "7"})
SMB = DiskFile("/d", "cifs", True, True, {"kernel A": "file 1 7"})
SMB_THERE = replace(SMB, ids={"kernel B": "file 3 4"})
LUN = DiskFile("/dev/sda", "block device", True, True, {"kernel A": "block 8:0", "wwid": "naa.1"})
LUN_THERE = replace(LUN, ids={"kernel B": "block 8:16", "wwid": "naa.1"})
ISO = DiskFile("/iso", "ext4", False, False, {"kernel A": "file 1 8", "content": "x"})
ISO_THERE = replace(ISO, ids={"kernel B": "file 1 9", "content": "x"})
SERVED = DiskFile("nbd://h/e", "nbd", True, True, {})

PAIRS: dict[str, tuple[DiskFile, DiskFile, str]] = {
    "one machine": (LOCAL, LOCAL, ""),
    "two files of one machine": (LOCAL, replace(LOCAL, ids={"kernel A": "file 1 8"}), "another"),
    "local storage, even with equal numbers": (LOCAL, ELSEWHERE, "local storage"),
    "NFS": (NFS, NFS_THERE, ""),
    "two files of NFS": (NFS, replace(NFS_THERE, ids={"inode of NFS": "8"}), "another file"),
    "NFS mounted twice on one machine": (
        NFS, replace(NFS, ids={"kernel A": "file 2 7", "inode of NFS": "7"}), "",
    ),
    "NFS and what its server has": (NFS, ELSEWHERE, "local storage"),
    "SMB, whose inodes are each host's": (SMB, SMB_THERE, ""),
    "a LUN": (LUN, LUN_THERE, ""),
    "two LUNs of one name": (LUN, replace(LUN_THERE, ids={"wwid": "naa.2"}), "another file"),
    "a device that has no name of its own": (LUN, replace(LUN_THERE, ids={}), ""),
    "a server": (SERVED, SERVED, ""),
    "two copies of what nobody writes to": (ISO, ISO_THERE, ""),
    "another image of the same name and size": (
        ISO, replace(ISO_THERE, ids={"content": "y"}), "another file",
    ),
}  # fmt: skip


def shape(*disks: Disk, **more: Any) -> Shape:
    return Shape("incoming", 1, (), {"CPU": "x"}, (), disks=disks, **more)


def offer(found: Shape, *, unsafe: bool = False) -> p.Offer:
    disks = alike.offered(found.disks)
    return p.Offer("m", "v", "qemu", [], dict(found.facts), 1, 1, disks=disks, unsafe=unsafe)


def disk(*files: DiskFile, chain: str = "raw of 9 bytes") -> Disk:
    return Disk("vd0", chain, files)


@pytest.mark.parametrize("case", PAIRS)
def test_files_are_the_same_or_refused(case: str) -> None:
    """What both hosts know of a file decides, or else what it is on; --unsafe believes a person."""
    here, there, why = PAIRS[case]
    for ours, theirs in ((here, there), (there, here)):
        problems = alike.differences(shape(disk(ours)), "qemu", offer(shape(disk(theirs))))
        assert [why in problem for problem in problems] == ([True] if why else [])
        assert all("disk vd0" in one and "--unsafe" in one for one in problems)
        insisting = offer(shape(disk(theirs)), unsafe=True)
        assert alike.differences(shape(disk(ours)), "qemu", insisting) == []


@pytest.mark.parametrize("unsafe", [False, True])
def test_chains_have_to_be_equal(unsafe: bool) -> None:
    """Another size, format, snapshot or medium, and a disk that only one host has: refused, also
    where a person insists."""
    raw, grown = disk(NFS), disk(NFS, chain="raw of 10 bytes")
    snapshot = disk(NFS, NFS, chain="qcow2 of 9 bytes over raw of 9 bytes")
    for ours, theirs in ((raw, grown), (raw, snapshot), (Disk("vd0", "empty", ()), raw)):
        offered = offer(shape(theirs), unsafe=unsafe)
        (problem,) = alike.differences(shape(ours), "qemu", offered)
        assert problem.startswith(
            f"disk vd0 differs: {ours.chain} here, {theirs.chain} at the source; "
        )
    (problem,) = alike.differences(shape(), "qemu", offer(shape(raw), unsafe=unsafe))
    assert "none here" in problem


def test_a_chain_of_other_files_is_refused() -> None:
    """One more file behind a disk of the same description."""
    (problem,) = alike.differences(shape(disk(NFS, NFS)), "qemu", offer(shape(disk(NFS))))
    assert "2 files here and of 1 at the source" in problem


def test_a_source_that_names_no_disks_is_believed_only_without() -> None:
    """A postcopyd from before disks were compared."""
    old = p.Offer("m", "v", "qemu", [], {"CPU": "x"}, 1, 1)
    (problem,) = alike.differences(shape(disk(NFS)), "qemu", old)
    assert "upgrade it first" in problem
    assert alike.differences(shape(), "qemu", old) == []


def test_places_are_compared_where_both_tell_them() -> None:
    """What only one host names is a fact that differs, or a postcopyd from before."""
    here = shape(places={"device tab": "port=2", "device pen": "port=1"})
    there = structs.replace(offer(here), places={"device tab": "port=1", "device old": "port=2"})
    assert alike.differences(here, "qemu", there) == [
        "device tab is at port=2 here, at port=1 at the source; start the destination with "
        "port=1 for it"
    ]
    assert alike.differences(here, "qemu", offer(here)) == []


def test_what_changes_in_one_vmm_is_named() -> None:
    """Devices gone and new, disks with another chain or file, problems that came."""
    was = shape(disk(LOCAL), Disk("cd0", "empty", ()))
    assert alike.changes(was, was) == []
    now = replace(
        was,
        facts={"CPU": "x", "device net1": "e1000 at pci.0"},
        problems=("QEMU runs a job.",),
        disks=(disk(LOCAL, NFS, chain="qcow2 of 9 bytes over raw of 9 bytes"),),
        direct_io="Reads land unseen.",
        places={"device tab": "port=2", "device new": "port=1"},
    )
    was = replace(was, places={"device tab": "port=1", "device old": "port=2"})
    assert alike.changes(was, now) == [
        "QEMU runs a job.",
        "Reads land unseen.",
        "device net1 is new (e1000 at pci.0)",
        "device tab was at port=1, is at port=2",
        "disk cd0 is gone (empty)",
        "disk vd0 was raw of 9 bytes, /d (ext4), is qcow2 of 9 bytes over raw of 9 bytes, "
        "/d (ext4), /d (nfs4)",
    ]
    assert "device net1 is gone (e1000 at pci.0)" in alike.changes(now, was)
