# SPDX-License-Identifier: Apache-2.0
"""Domains of libvirt that nobody has prepared, moved by `migrate` and nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import newest
import pytest
import trio
from guests import qemu as q
from libvirt_hosts import VM, LibvirtPair, Version, libvirt_pair
from needs import libvirt, missing
from pair import MIB, status_until, until

from postcopyd.errors import PostcopydError
from postcopyd.host import procfs

pytestmark = pytest.mark.long


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Version:
    libvirt()
    return Version(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def the_newest(tmp_path_factory: pytest.TempPathFactory) -> Version:
    layers = newest.with_package(tmp_path_factory.mktemp("newest"))
    return Version(tmp_path_factory.mktemp("cache"), layers)


@pytest.fixture(params=["installed", pytest.param("the_newest", marks=pytest.mark.libvirt)])
def version(request: pytest.FixtureRequest) -> Version:
    if os.geteuid() != 0:
        missing("root")
    made: Version = request.getfixturevalue(request.param)
    return made


@pytest.fixture
async def pair(
    folder: Path, boot: tuple[Path, Path], version: Version
) -> AsyncIterator[LibvirtPair]:
    async with libvirt_pair(folder, boot, version) as made:
        yield made


NEWEST_TOO = pytest.mark.parametrize("version", ["installed", "the_newest"], indirect=True)


async def gone(pair: LibvirtPair) -> None:
    """The other host has nothing of the domain, and nothing of ours."""
    await until(lambda: not pair.there.domstate, "the domain to be gone there")
    assert pair.there.leftovers() == []
    assert pair.there.qemu == 0
    await until(lambda: not pair.there.keepers(), "no keeper")


@NEWEST_TOO
async def test_there_and_back(pair: LibvirtPair) -> None:
    """libvirt is right on both sides after each move: a persistent domain is persistent where it
    runs, and unknown where it has been."""
    for mode in ("postcopy", "hybrid", "postcopy", "hybrid"):
        shown = (await pair.here.call("List", domains=True))["vms"]
        assert [one["vm"] for one in shown] == [VM]
        checked = await pair.here.call("Check", name=VM, to=pair.there.address)
        assert checked["problems"] == []
        await pair.move(mode=mode)
        assert pair.here.domstate == "running"
        assert "Persistent:     yes" in pair.here.virsh("dominfo", VM)
        assert "postcopyd" not in pair.here.virsh("dumpxml", VM)
        await gone(pair)
        for word, state in (("suspend", "paused"), ("resume", "running")):
            pair.here.virsh(word, VM)
            assert pair.here.domstate == state


@pytest.mark.libvirt
async def test_a_paused_transient_domain(pair: LibvirtPair) -> None:
    """It stays paused, and transient."""
    pair.here.virsh("undefine", VM)
    pair.here.virsh("suspend", VM)
    result = await pair.here.migrate(VM, pair.there, mode="postcopy")
    assert result["event"] == "completed", result
    pair.moves += 1
    assert pair.here.domstate == "paused"
    assert "Persistent:     no" in pair.here.virsh("dominfo", VM)
    await gone(pair)
    await pair.guest.follow(pair.here)
    pair.here.virsh("resume", VM)
    await pair.check()


NUMA = """
  <cpu><numa>
    <cell id='0' cpus='0' memory='128' unit='MiB'/><cell id='1' cpus='1' memory='128' unit='MiB'/>
  </numa></cpu>"""


@pytest.mark.libvirt
async def test_equal_numa_nodes(folder: Path, boot: tuple[Path, Path], version: Version) -> None:
    """Parts of one size: each is taken for what it is."""
    async with libvirt_pair(folder, boot, version, more=NUMA) as pair:
        for mode in ("postcopy", "hybrid"):
            await pair.move(mode=mode)
        await gone(pair)


@pytest.mark.libvirt
async def test_asked_as_with_virsh(pair: LibvirtPair) -> None:
    """What is persistent where, and the XML that the domain has there."""
    pair.here.virsh("undefine", VM)
    await pair.move(mode="postcopy", persistent=True)
    await gone(pair)
    assert "Persistent:     yes" in pair.here.virsh("dominfo", VM)
    pair.here.virsh("autostart", VM)
    await pair.move(mode="postcopy", persistent=True)
    assert "Autostart:      enable" in pair.here.virsh("dominfo", VM)
    assert pair.there.domstate == "shut off"
    assert "Autostart:      disable" in pair.there.virsh("dominfo", VM)
    pair.there.virsh("undefine", VM)
    await pair.move(mode="postcopy", undefineSource=True)
    await gone(pair)
    assert "Persistent:     no" in pair.here.virsh("dominfo", VM)


@pytest.mark.libvirt
async def test_changed_xml(pair: LibvirtPair, folder: Path) -> None:
    """The file of the disk has another name there; another machine is refused by libvirt."""
    xml = pair.here.virsh("dumpxml", "--migratable", VM)
    other = xml.replace(">2</vcpu>", ">1</vcpu>")
    assert other != xml
    result = await pair.here.migrate(VM, pair.there, mode="postcopy", xml=other)
    assert "Target domain vCPU max 1 does not match source 2" in result["error"], result
    await stayed(pair, result)
    await gone(pair)
    (folder / "renamed").symlink_to("disk")
    changed = xml.replace(f"{folder}/disk", f"{folder}/renamed")
    await pair.move(mode="postcopy", xml=changed)
    for what in ([], ["--inactive"]):
        assert f"{folder}/renamed" in pair.here.virsh("dumpxml", *what, VM)
    await gone(pair)


async def test_what_check_finds(pair: LibvirtPair, folder: Path) -> None:
    """What stands in the way at the other host, by its libvirt and by its files."""

    async def problems(**options: Any) -> str:
        checked = await pair.here.call("Check", name=VM, to=pair.there.address, **options)
        return "; ".join(checked["problems"])

    attached = await pair.here.call("Attach", name=VM, driver="libvirt")
    assert attached["found"]["ram"][0]["bytes"] == 256 * MIB
    assert [one["vm"] for one in (await pair.here.call("List"))["vms"]] == [VM]
    disk = str(folder / "disk")
    (folder / "other").write_bytes(bytes(16 * MIB))
    pair.there.run("mount", "--bind", str(folder / "other"), disk)
    assert "is another file here" in await problems()
    assert await problems(unsafe=True) == ""
    pair.there.run("umount", disk)
    assert await problems() == ""
    xml = folder / "other.xml"
    uuid = pair.here.virsh("domuuid", VM)
    there = pair.here.virsh("dumpxml", "--inactive", VM).replace(uuid, uuid[::-1])
    xml.write_text(there)
    assert "defined" in (said := pair.there.virsh("define", str(xml))), said
    assert "another domain with that name" in await problems()
    xml.write_text(there.replace(uuid[::-1], uuid).replace(f"<name>{VM}<", "<name>web2<"))
    pair.there.virsh("undefine", VM)
    pair.there.virsh("define", str(xml))
    assert "another domain with that UUID" in await problems()
    pair.there.virsh("undefine", "web2")
    assert await problems() == ""


async def begun(pair: LibvirtPair, mode: str, phase: str, bandwidth: int = 4 * MIB) -> str:
    """A migration that has come to a phase, and takes long there."""
    started = await pair.here.call(
        "Migrate", name=VM, to=pair.there.address, mode=mode, bandwidth=bandwidth
    )
    await status_until(pair.here, VM, lambda status: status["phase"] == phase, 60)
    return str(started["migration"])


async def left(pair: LibvirtPair) -> None:
    """The domain was ended at the host that the guest has left, and its memory is kept there."""
    await until(lambda: not pair.here.domstate and not pair.here.qemu, "the domain to end", 60)
    nothing_to_run(pair)


def nothing_to_run(pair: LibvirtPair) -> None:
    assert len(pair.here.keepers()) == 1
    for words in (["resume", VM], ["start", VM], ["managedsave", VM], ["save", VM, "/run/saved"]):
        assert "failed to get domain" in (said := pair.here.virsh(*words)), said
    assert VM not in pair.here.virsh("list", "--all")
    assert pair.here.qemu == 0


async def arrived(pair: LibvirtPair) -> None:
    """All of the guest is at the other host, and nothing of it where it was."""
    await status_until(pair.here, VM, lambda status: status["phase"] == "drained", 240)
    pair.moves += 1
    await pair.guest.follow(pair.here)
    await pair.check()
    assert "Persistent:     yes" in pair.here.virsh("dominfo", VM)
    await gone(pair)


async def test_nobody_runs_or_saves_what_has_left(pair: LibvirtPair) -> None:
    """While the memory follows there is nothing that libvirt's users could run a second time, or
    save: also with the daemon killed, and with libvirt's daemon started anew."""
    await begun(pair, "postcopy", "postcopy")
    await left(pair)
    await trio.to_thread.run_sync(pair.here.end, signal.SIGKILL)
    nothing_to_run(pair)
    pair.here.kill_libvirt()
    pair.here.start_libvirt()
    await pair.here.has_libvirt()
    nothing_to_run(pair)
    await pair.here.start()
    await arrived(pair)


@pytest.mark.libvirt
@pytest.mark.parametrize("when_ms", [0, 300, 800, 1600])
async def test_the_daemon_is_killed_while_it_ends_the_domain(
    pair: LibvirtPair, when_ms: int
) -> None:
    """Whatever it had done by then, the guest gets all of its memory, and nothing stays."""
    await begun(pair, "postcopy", "postcopy")
    await trio.sleep(when_ms / 1e3)
    await trio.to_thread.run_sync(pair.here.end, signal.SIGKILL)
    await pair.here.start()
    await arrived(pair)


@pytest.mark.libvirt
async def test_libvirt_hangs_where_the_guest_leaves(pair: LibvirtPair) -> None:
    """The memory follows all the same, and the domain is ended when libvirt goes on."""
    migration = await begun(pair, "hybrid", "precopy", 16 * MIB)
    await status_until(pair.here, VM, lambda status: status["phase"] == "postcopy", 120)
    pair.here.hang_libvirt()
    await trio.sleep(2)
    status = await pair.here.status(VM)
    assert status["phase"] in ("postcopy", "drained"), status
    pair.here.hang_libvirt(signal.SIGCONT)
    result = await pair.here.result(VM, migration)
    assert result["event"] == "completed", result
    await arrived(pair)


@pytest.mark.libvirt
@pytest.mark.parametrize("stopped", [False, True], ids=["hangs", "killed"])
async def test_a_libvirt_that_does_not_answer_is_not_waited_for(
    pair: LibvirtPair, stopped: bool
) -> None:
    """Nor by what asks of VMs that are attached, nor by the next list, nor by a daemon's start."""

    async def seconds(what: Any) -> float:
        began = trio.current_time()
        await what
        return trio.current_time() - began

    await pair.here.call("Attach", name=VM, driver="libvirt")
    (pair.here.kill_libvirt if stopped else pair.here.hang_libvirt)()
    first = await seconds(pair.here.call("List", domains=True))
    assert first < (3 if stopped else 8)
    assert await seconds(pair.here.call("List", domains=True)) < 2
    assert await seconds(pair.here.status(VM)) < 1
    await trio.to_thread.run_sync(pair.here.end, signal.SIGKILL)
    assert await seconds(pair.here.start()) < 5
    assert await seconds(pair.here.status(VM)) < 1
    if stopped:
        pair.here.start_libvirt()
    else:
        pair.here.hang_libvirt(signal.SIGCONT)
    await pair.here.has_libvirt()
    await pair.move(mode="postcopy")


async def burnt_down(pair: LibvirtPair) -> None:
    """The host that the guest has gone to."""
    there = pair.there.qemu
    await trio.to_thread.run_sync(pair.there.end, signal.SIGKILL)
    pair.there.kill_libvirt()
    os.kill(there, signal.SIGKILL)
    await status_until(pair.here, VM, lambda status: status["phase"] == "paused", 60)


BACKINGS = {
    "private": "",
    "memfd": "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
    # Whose files QEMU empties when it is told to end.
    "file": "<memoryBacking><source type='file'/><access mode='shared'/><discard/></memoryBacking>",
}


@pytest.mark.libvirt
@pytest.mark.parametrize("restarted", [False, True], ids=["", "restarted"])
@pytest.mark.parametrize("backing", BACKINGS)
async def test_taken_back(
    folder: Path, boot: tuple[Path, Path], version: Version, backing: str, restarted: bool
) -> None:
    """After its new host has burnt down: the domain is made anew, defined as it was, and runs with
    the memory that it had when it stopped here."""
    work = q.Workload(disk_rate=0)
    more = BACKINGS[backing]
    async with libvirt_pair(folder, boot, version, more=more, workload=work) as pair:
        await begun(pair, "postcopy", "postcopy")
        await left(pair)
        await burnt_down(pair)
        if restarted:
            await trio.to_thread.run_sync(pair.here.end, signal.SIGKILL)
            await pair.here.start()
        await pair.here.call("Resolve", name=VM, decision="take_back")
        assert pair.here.domstate == "running"
        assert "Persistent:     yes" in pair.here.virsh("dominfo", VM)
        assert pair.here.keepers() == []
        assert pair.here.leftovers() == []
        await pair.guest.follow(pair.here)
        await pair.check()
        pair.there.start_libvirt()
        await pair.there.has_libvirt()
        await pair.there.start()
        await pair.there.call("Resolve", name=VM, decision="kill")
        await pair.there.call("Detach", name=VM)
        await pair.move(mode="hybrid")


@pytest.mark.libvirt
async def test_not_taken_back_without_a_page(
    folder: Path, boot: tuple[Path, Path], version: Version
) -> None:
    """One of a file that cannot be read any more. It would become zeros one day, so no guest runs,
    and all that was kept is still there."""
    more = BACKINGS["file"]
    async with libvirt_pair(folder, boot, version, more=more) as pair:
        await begun(pair, "postcopy", "postcopy")
        await left(pair)
        (kept,) = pair.here.keepers()
        (ram,) = (one for one in procfs.mappings(kept) if one.length == 256 * MIB)
        with open(
            f"/proc/{kept}/map_files/{ram.start:x}-{ram.start + ram.length:x}", "r+b"
        ) as file:
            os.truncate(file.fileno(), ram.length - 4096)  # where the firmware has its tables
        await burnt_down(pair)
        with pytest.raises(PostcopydError, match=r"1 page of the memory .* was not made anew"):
            await pair.here.call("Resolve", name=VM, decision="take_back")
        assert not pair.here.domstate
        assert pair.here.keepers() == [kept]
        assert (await pair.here.status(VM))["phase"] == "paused"


async def test_cancelled(pair: LibvirtPair) -> None:
    """The domain that waits is taken away, and the one that runs goes on, as does the next try."""
    migration = await begun(pair, "hybrid", "precopy")
    assert pair.there.domstate == "paused"
    await pair.here.call("Cancel", name=VM)
    result = await pair.here.result(VM, migration)
    assert result["event"] == "cancelled", result
    assert pair.here.domstate == "running"
    await pair.check()
    await gone(pair)
    await pair.move(mode="postcopy")


async def killed_in_handover(pair: LibvirtPair, kill: Any) -> dict[str, Any]:
    """Migrates, and kills something as soon as the guest is handed over. Returns the result."""
    done: list[dict[str, Any]] = []
    async with trio.open_nursery() as nursery:

        async def migrate() -> None:
            done.append(await pair.here.migrate(VM, pair.there, mode="postcopy"))

        nursery.start_soon(migrate)
        while not done:
            with suppress(PostcopydError):
                if (await pair.there.status(VM))["phase"] == "handover":
                    kill()
                    break
            await trio.sleep(0.002)
    return done[0]


async def stayed(pair: LibvirtPair, result: dict[str, Any]) -> None:
    """The guest is where it was, and all of it is right."""
    assert result["event"] == "failed", result
    await pair.check()
    assert pair.here.domstate == "running"


@pytest.mark.libvirt
async def test_the_qemu_that_waits_is_killed(pair: LibvirtPair) -> None:
    """Also in the blackout: then the guest runs on where it was, under libvirt."""
    result = await killed_in_handover(pair, lambda: os.kill(pair.there.qemu, signal.SIGKILL))
    await stayed(pair, result)
    await gone(pair)
    migration = await begun(pair, "hybrid", "precopy")
    os.kill(pair.there.qemu, signal.SIGKILL)
    await stayed(pair, await pair.here.result(VM, migration))
    await gone(pair)
    await pair.move(mode="hybrid")


@pytest.mark.libvirt
async def test_libvirt_is_killed_where_the_guest_arrives(pair: LibvirtPair) -> None:
    """Before the grant the guest stays; then libvirt is started again, and has nothing of it."""
    migration = await begun(pair, "hybrid", "precopy")
    pair.there.kill_libvirt()
    await stayed(pair, await pair.here.result(VM, migration))
    pair.there.start_libvirt()
    await gone(pair)
    await pair.move(mode="hybrid")


@pytest.mark.libvirt
async def test_libvirt_hangs_where_the_guest_arrives(pair: LibvirtPair) -> None:
    """It never says that the guest is there: the guest stays, and runs again in seconds."""
    migration = await begun(pair, "hybrid", "precopy", 64 * MIB)
    pair.there.hang_libvirt()
    await stayed(pair, await pair.here.result(VM, migration))
    pair.there.hang_libvirt(signal.SIGCONT)
    await trio.sleep(2)  # 9.0 crashes now and then, when it finds the QEMU gone
    pair.there.start_libvirt()
    await gone(pair)
    await pair.move(mode="hybrid")


@pytest.mark.libvirt
async def test_libvirt_is_restarted_where_the_guest_leaves(pair: LibvirtPair) -> None:
    """At each step: the migration goes on, or the guest stays where it was, under libvirt."""
    migration = await begun(pair, "hybrid", "precopy", 16 * MIB)
    pair.here.kill_libvirt()
    pair.here.start_libvirt()
    result = await pair.here.result(VM, migration)
    if result["event"] == "completed":
        pair.moves += 1
        await pair.guest.follow(pair.here)
    await pair.check()
    assert pair.here.domstate == "running"
    await gone(pair)
    migration = await begun(pair, "postcopy", "postcopy")
    pair.here.kill_libvirt()
    pair.here.start_libvirt()
    result = await pair.here.result(VM, migration)
    assert result["event"] == "completed", result
    pair.moves += 1
    await pair.guest.follow(pair.here)
    await pair.check()
    await gone(pair)


@pytest.mark.libvirt
@pytest.mark.parametrize("side", ["here", "there"])
@pytest.mark.parametrize("phase", ["precopy", "postcopy"])
async def test_a_daemon_is_killed(pair: LibvirtPair, side: str, phase: str) -> None:
    """Before the grant the guest stays, after it the migration goes on by itself."""
    mode = "hybrid" if phase == "precopy" else "postcopy"
    await begun(pair, mode, phase)
    host = getattr(pair, side)
    host.end(signal.SIGKILL)
    await trio.sleep(0.5)
    await host.start()
    over = "failed" if phase == "precopy" else "drained"
    await status_until(pair.here, VM, lambda status: status["phase"] == over, 120)
    if phase == "postcopy":
        pair.moves += 1
        await pair.guest.follow(pair.here)
    await pair.check()
    assert pair.here.domstate == "running"
    assert "Persistent:     yes" in pair.here.virsh("dominfo", VM)
    await gone(pair)
    await pair.move(mode="hybrid")
