# SPDX-License-Identifier: Apache-2.0
"""Facts that were compared once are true until the guest is granted, on both hosts; or it stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from session_faults import Clock, Fault, migrated, world
from session_world import Instead, World

from postcopyd import protocol as p
from postcopyd.vmm import Disk, DiskFile, Role

DISK = Disk("vd0", "raw of 9 bytes", (DiskFile("/d", "nfs4", True, True, {"inode of NFS": "7"}),))
GROWN = Disk("vd0", "raw of 10 bytes", DISK.files)
MODES = ("postcopy", "hybrid", "precopy")


def plugs(role: Role) -> Fault:
    """Something is plugged in there, as a look in short sees it."""

    def plug(made: World, point: str) -> None:
        made.hosts[role].vmm.plugged += "another"

    return plug


def learns(**news: object) -> Fault:
    """The source's VMM changes."""

    def learn(made: World, point: str) -> None:
        for name, value in news.items():
            setattr(made.source.vmm, name, value)

    return learn


def stayed(made: World, words: str) -> None:
    assert made.source.vmm.state == "running"
    assert "destination.run" not in made.went
    result = made.result
    assert result["event"] == "failed"
    assert words in result["error"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("point", ["source.save", "source.save stopped", "source.save sent"])
async def test_what_is_plugged_while_the_guest_stops(
    point: str, mode: str, tmp_path: Path, clock: Clock
) -> None:
    """The source is looked at once more before the grant, when nothing of it changes any more."""
    made = await migrated(tmp_path, {point: plugs("source")}, mode=mode)
    stayed(made, "somebody changed devices or disks of web1 as it was handed over")


@pytest.mark.parametrize("mode", MODES)
async def test_what_is_plugged_at_the_destination(mode: str, tmp_path: Path, clock: Clock) -> None:
    """The VMM that waits is the one that was compared when it is given the guest."""
    made = await migrated(tmp_path, {"-> handover": plugs("destination")}, mode=mode)
    stayed(made, "changed devices or disks of the VMM that waits for web1")
    assert made.destination.vmm.state == "incoming"


async def test_what_is_plugged_at_the_destination_during_passes(
    tmp_path: Path, clock: Clock
) -> None:
    """That is found before the guest is stopped for nothing."""
    made = await migrated(tmp_path, {"-> pass": plugs("destination")}, mode="hybrid")
    stayed(made, "changed devices or disks of the VMM that waits for web1")
    assert "source.save" not in made.went


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("news", "words"),
    [
        ({"facts": {"version": "2"}}, "version was 1, is 2"),
        ({"disks": (DISK,)}, "disk vd0 is new"),
        ({"problems": ("QEMU runs the job 'x'.",)}, "QEMU runs the job 'x'"),
    ],
)
async def test_what_changes_before_the_stop(
    news: dict[str, object], words: str, mode: str, tmp_path: Path, clock: Clock
) -> None:
    """Whatever was compared is looked at again before the stop, in words: in passes, or after."""
    point = "source.prepare" if mode == "postcopy" else "<- serving"
    made = await migrated(tmp_path, {point: learns(**news)}, mode=mode)
    stayed(made, words)
    assert "source.save" not in made.went


@pytest.mark.parametrize("mode", MODES)
async def test_what_is_plugged_before_the_stop(mode: str, tmp_path: Path, clock: Clock) -> None:
    """What is plugged after the last pass is found before the guest is stopped."""
    news = learns(facts={"version": "1", "device net2": "e1000"}, plugged="net2")
    made = await migrated(tmp_path, {"source.prepare": news}, mode=mode)
    stayed(made, "device net2 is new (e1000)")
    assert "source.save" not in made.went


async def test_what_is_no_part_of_the_guest_may_change(tmp_path: Path, clock: Clock) -> None:
    """An outline may tell of more than a guest sees: then the whole look decides."""
    news = learns(plugged="a node that nothing uses")
    made = await migrated(tmp_path, {"source.prepare": news}, mode="hybrid")
    assert made.destination.phase == "drained"


async def test_disks_are_compared(tmp_path: Path, clock: Clock) -> None:
    """A disk of another size is refused, the same one is not; a check says so too."""
    async with world(tmp_path, {}) as made:
        made.source.vmm.disks, made.destination.vmm.disks = (DISK,), (GROWN,)
        async with made.network() as port:
            checked = await made.source.daemon.check("web1", f"127.0.0.1:{port}")
        (problem,) = checked.problems
        assert "disk vd0 differs: raw of 10 bytes here, raw of 9 bytes at the source" in problem
        await made.migrate()
        stayed(made, problem)
        made.destination.vmm.disks = (DISK,)
        await made.migrate()
        await made.check()
        assert made.destination.phase == "drained"


@pytest.mark.parametrize("unsafe", [False, True])
async def test_a_destination_that_compares_no_disks(
    unsafe: bool, tmp_path: Path, clock: Clock
) -> None:
    """An older daemon would not see that a disk is another one: it gets no guest with disks, unless
    a person says that they are the same."""

    def older(made: World, point: str) -> Instead:
        return Instead(p.Hello(p.VERSION))

    async with world(tmp_path, {"<- hello": older}) as made:
        made.source.vmm.disks = made.destination.vmm.disks = (DISK,)
        await made.migrate(unsafe=unsafe)
        await made.check()
        if unsafe:
            assert made.destination.phase == "drained"
        else:
            stayed(made, "too old to see that the disks of web1 are the same")
