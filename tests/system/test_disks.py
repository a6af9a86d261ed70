# SPDX-License-Identifier: Apache-2.0
"""Disks of real QEMUs: what is found of them, what two hosts must have alike, what must not change
while a guest is on its way."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from disk_images import MIB, qcow2, raw
from pair import Pair, open_pair, status_until
from qemu_lab import PAIRS, Lab, Machine, inspected

from postcopyd import protocol as p
from postcopyd.sessions import alike
from postcopyd.vmm import Shape

UNLOCKED = "file.locking=off"


def drive(path: Path | str, name: str = "vd0", form: str = "raw") -> list[str]:
    options = f"if=none,id=drive-{name},format={form},file={path},{UNLOCKED}"
    return ["-drive", options, "-device", f"virtio-blk-pci,drive=drive-{name},id={name}"]


def blockdev(path: Path | str, name: str = "vd0", *, bare: bool = False) -> list[str]:
    node = f"driver=file,filename={path},node-name=file0,locking=off,auto-read-only=on"
    top = "file0" if bare else "disk0"
    nodes = [] if bare else ["-blockdev", "driver=raw,file=file0,node-name=disk0"]
    return ["-blockdev", node, *nodes, "-device", f"virtio-blk-pci,drive={top},id={name}"]


def offer(shape: Shape, *, unsafe: bool = False) -> p.Offer:
    disks = alike.offered(shape.disks)
    regions = [p.RegionOffer(r.name, r.pages, r.page_size) for r in shape.regions]
    facts = {key: p.fact(value) for key, value in shape.facts.items()}
    return p.Offer("m", "web1", "qemu", regions, facts, 1, 1, disks=disks, unsafe=unsafe)


async def problems(lab: Lab, here: list[str], there: list[str], pair: tuple[int, int]) -> list[str]:
    """Whatever `check` would say of these two."""
    a = await lab.drive(lab.start(pair[0], *here))
    b = await lab.drive(lab.start(pair[1], *there, "-incoming", "defer"))
    async with inspected(a, "source") as ours, inspected(b, "destination") as theirs:
        found = alike.differences(theirs, "qemu", offer(ours))
        return [*ours.problems, *theirs.problems, *found]


def same_raw(at: Path) -> tuple[list[str], list[str]]:
    image = raw(at / "disk")
    return drive(image), drive(image)


def same_chain(at: Path) -> tuple[list[str], list[str]]:
    raw(at / "base")
    image = qcow2(at / "top", "base")
    return drive(image, form="qcow2"), drive(image, form="qcow2")


def said_in_other_words(at: Path) -> tuple[list[str], list[str]]:
    """-drive and -blockdev, with a format above and without, through a link."""
    image = raw(at / "disk")
    (at / "link").symlink_to(image)
    return drive(image), blockdev(at / "link", bare=True)


def throttled(at: Path) -> tuple[list[str], list[str]]:
    image = raw(at / "disk")
    group = ["-object", "throttle-group,id=tg0,x-iops-total=100"]
    filtered = ["-drive", f"if=none,id=d,driver=throttle,throttle-group=tg0,file.driver=raw,"
                f"file.file.driver=file,file.file.filename={image},file.file.locking=off",
                "-device", "virtio-blk-pci,drive=d,id=vd0"]  # fmt: skip
    return group + filtered, drive(image)


def empty_drive(at: Path) -> tuple[list[str], list[str]]:
    cd = ["-drive", "if=none,id=cd0,media=cdrom", "-device", "ide-cd,drive=cd0,id=cd0"]
    return cd, cd


def copies_of_an_image(at: Path) -> tuple[list[str], list[str]]:
    one, two = raw(at / "one", b"CD001"), raw(at / "two", b"CD001")
    return cdrom(one), cdrom(two)


def cdrom(image: Path) -> list[str]:
    medium = f"if=none,id=cd0,media=cdrom,format=raw,file={image},readonly=on,{UNLOCKED}"
    return ["-drive", medium, "-device", "ide-cd,drive=cd0,id=cd0"]


def flash(at: Path) -> tuple[list[str], list[str]]:
    """Variables of the firmware: QEMU writes them to the file of its own host."""
    one, two = raw(at / "one", b"a", 65536), raw(at / "two", b"b", 65536)
    return (*(["-drive", f"if=pflash,unit=0,format=raw,file={f},{UNLOCKED}"] for f in (one, two)),)


def a_server(at: Path) -> tuple[list[str], list[str]]:
    null = ["-blockdev", "driver=null-co,size=1048576,node-name=n", "-device",
            "virtio-blk-pci,drive=n,id=vd0"]  # fmt: skip
    return null, null


FIT: list[Callable[[Path], tuple[list[str], list[str]]]] = [
    same_raw, same_chain, said_in_other_words, throttled, empty_drive, copies_of_an_image, flash,
    a_server,
]  # fmt: skip


@pytest.mark.parametrize(("source", "destination"), PAIRS)
@pytest.mark.parametrize("case", FIT)
async def test_disks_that_fit(
    lab: Lab, tmp_path: Path, case: Callable[[Path], Any], source: int, destination: int
) -> None:
    """What both QEMUs have is the same to the guest, and is not refused."""
    assert await problems(lab, *case(tmp_path), (source, destination)) == []


def temporary(at: Path) -> tuple[list[str], list[str]]:
    """as with -snapshot"""
    image = raw(at / "disk")
    return ["-snapshot", *drive(image)], drive(image)


def two_files(at: Path) -> tuple[list[str], list[str]]:
    """another file here"""
    return drive(raw(at / "one")), drive(raw(at / "two"))


def two_sizes(at: Path) -> tuple[list[str], list[str]]:
    """2097152 bytes here, raw of 1048576 bytes at the source"""
    return drive(raw(at / "one")), drive(raw(at / "two", size=2 * MIB))


def a_snapshot_more(at: Path) -> tuple[list[str], list[str]]:
    """qcow2 of 1048576 bytes over raw of 1048576 bytes at the source"""
    image = raw(at / "disk")
    return drive(qcow2(at / "top", "disk"), form="qcow2"), drive(image)


def another_base(at: Path) -> tuple[list[str], list[str]]:
    """another file here"""
    raw(at / "one", b"a"), raw(at / "two", b"b")
    return (*(drive(qcow2(at / f"top-{n}", n), form="qcow2") for n in ("one", "two")),)


def another_medium(at: Path) -> tuple[list[str], list[str]]:
    """disk cd0 is another file here"""
    return cdrom(raw(at / "one", b"a")), cdrom(raw(at / "two", b"b"))


def an_ejected_medium(at: Path) -> tuple[list[str], list[str]]:
    """disk cd0 differs: raw of 1048576 bytes, read-only here, empty at the source"""
    return empty_drive(at)[0], cdrom(raw(at / "one"))


UNFIT: list[Callable[[Path], tuple[list[str], list[str]]]] = [
    temporary, two_files, two_sizes, a_snapshot_more, another_base, another_medium,
    an_ejected_medium,
]  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
async def test_disks_that_do_not_fit(
    lab: Lab, tmp_path: Path, case: Callable[[Path], Any], qemu: int
) -> None:
    """What would lose or change what the guest has on its disks is refused in words."""
    assert case.__doc__
    found = await problems(lab, *case(tmp_path), (qemu, qemu))
    assert any(case.__doc__ in problem for problem in found), found


async def test_an_image_that_was_replaced_is_refused(lab: Lab, tmp_path: Path, qemu: int) -> None:
    """A path that leads to another file than the one that QEMU has open."""
    image = raw(tmp_path / "disk")
    driver = await lab.drive(lab.start(qemu, *drive(image)))
    image.rename(tmp_path / "old")
    raw(image)
    async with inspected(driver, "source") as shape:
        (problem,) = shape.problems
        assert "another file open than the one that has this name now" in problem
    image.unlink()
    async with inspected(driver, "source") as shape:
        (problem,) = shape.problems
        assert "another file open" in problem


async def test_a_file_given_as_a_descriptor_is_known(lab: Lab, tmp_path: Path, qemu: int) -> None:
    """As libvirt gives files that QEMU may not open by itself."""
    image = raw(tmp_path / "disk")
    given = ["-add-fd", "fd=8,set=7", "-add-fd", "fd=9,set=7", *drive("/dev/fdset/7")]
    opened = f"exec 8<{image} 9<>{image}"
    a = await lab.drive(lab.start(qemu, *drive(image)))
    b = await lab.drive(lab.start(qemu, *given, "-incoming", "defer", within=opened))
    async with inspected(a, "source") as ours, inspected(b, "destination") as theirs:
        assert (ours.problems, theirs.problems) == ((), ())
        assert alike.differences(theirs, "qemu", offer(ours)) == []


async def test_a_qemu_in_a_root_of_its_own_has_its_own_files(
    lab: Lab, tmp_path: Path, qemu: int
) -> None:
    """A path, and a link in it, are meant as QEMU sees them: it may live in a container."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        raw(folder / "disk", folder.name.encode())
        (folder / "link").symlink_to(outside / "disk")
    mount = f"mount --bind {inside} {outside}"
    private = f'exec unshare -m sh -c \'{mount}; exec "$@"\' sh "$@"'
    machine = lab.start(qemu, *drive(outside / "link"), within=private)
    driver = await lab.drive(machine)
    async with inspected(driver, "source") as shape:
        assert shape.problems == ()
        (disk,) = shape.disks
        kernel = next(iter(disk.files[0].ids.values()))
        assert kernel.split()[-1] == str((inside / "disk").stat().st_ino)


JOBS = {
    "mirror": ("drive-mirror", {"sync": "full"}),
    "backup": ("drive-backup", {"sync": "full"}),
    "stream": ("block-stream", {}),
    "commit": ("block-commit", {}),
}


@pytest.mark.parametrize("kind", JOBS)
async def test_jobs_are_refused_by_name(lab: Lab, tmp_path: Path, qemu: int, kind: str) -> None:
    """A copy, backup or merge of a disk that goes on would be left behind, lost or broken."""
    size = 16 * MIB  # some is done at once, whatever the speed
    raw(tmp_path / "base", size=size)
    machine = lab.start(qemu, *drive(qcow2(tmp_path / "top", "base", size), form="qcow2"))
    driver = await lab.drive(machine)
    outline = await driver.outline()
    command, more = JOBS[kind]
    with open(tmp_path / "base", "r+b") as file:
        file.write(os.urandom(size))  # something to do
    if kind in ("mirror", "backup"):
        more = {**more, "target": str(tmp_path / "copy")}
    arguments = {"device": "drive-vd0", "job-id": "busy", "speed": 65536, **more}
    await machine.ask(command, **arguments)
    async with inspected(driver, "source") as shape:
        assert any(f"job 'busy' ({kind}, " in problem for problem in shape.problems)
    assert await driver.outline() != outline
    await machine.ask("block-job-cancel", device="busy", force=True)
    with trio.fail_after(10):
        while await machine.ask("query-jobs"):
            await trio.sleep(0.01)
    async with inspected(driver, "source") as shape:
        assert shape.problems == ()


async def unplug(machine: Machine, at: Path) -> None:
    await machine.ask("device_del", id="net1")
    await unplugged(machine, "net1")


async def plug(machine: Machine, at: Path) -> None:
    await machine.ask("device_add", driver="virtio-net-pci", id="net2", bus="rp2")


async def snapshot(machine: Machine, at: Path) -> None:
    await machine.ask(
        "blockdev-snapshot-sync",
        **{"device": "drive-vd0", "snapshot-file": str(at / "overlay"), "format": "qcow2"},
    )


async def eject(machine: Machine, at: Path) -> None:
    await machine.ask("eject", id="cd0", force=True)


async def other_medium(machine: Machine, at: Path) -> None:
    await machine.ask(
        "blockdev-change-medium",
        **{"id": "cd0", "filename": str(raw(at / "other", b"x")), "format": "raw"},
    )


async def medium_of_the_same_name(machine: Machine, at: Path) -> None:
    """Put in by nodes that have the names of those before. The machine stands meanwhile: its
    firmware resets the drive as it looks for something to boot, and that closes the tray."""
    await machine.ask("stop")
    await machine.ask("blockdev-open-tray", id="cd1", force=True)
    await machine.ask("blockdev-remove-medium", id="cd1")
    await machine.ask("blockdev-del", **{"node-name": "medium"})
    await machine.ask("blockdev-add", **medium(raw(at / "other", b"x")))
    await machine.ask("blockdev-insert-medium", **{"id": "cd1", "node-name": "medium"})
    await machine.ask("blockdev-close-tray", id="cd1")
    await machine.ask("cont")


async def resize(machine: Machine, at: Path) -> None:
    await machine.ask("block_resize", device="drive-vd0", size=2 * MIB)


async def mirror(machine: Machine, at: Path) -> None:
    await machine.ask(
        "drive-mirror", device="drive-vd0", target=str(at / "copy"), sync="full", speed=1
    )


CHANGES = {
    unplug: "device net1 is gone",
    plug: "device net2 is new",
    snapshot: "is qcow2 of 1048576 bytes over raw of 1048576 bytes",
    eject: "disk cd0 was raw of 1048576 bytes, read-only",
    other_medium: "disk cd0 was raw of 1048576 bytes, read-only",
    medium_of_the_same_name: "disk cd1 was raw of 1048576 bytes, read-only",
    resize: "disk vd0 was raw of 1048576 bytes, /",
    mirror: "QEMU runs the job",
}


async def unplugged(machine: Machine, name: str) -> None:
    """There is no guest to let go of a device: a reset takes its place."""
    await machine.ask("system_reset")
    with trio.fail_after(20):
        while name in {e["name"] for e in await machine.ask("qom-list", path=PLUGGED)}:
            await trio.sleep(0.01)


PLUGGED = "/machine/peripheral"


def medium(path: Path) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(path), "node-name": "file1", "locking": "off"}
    return {"driver": "raw", "node-name": "medium", "read-only": True, "file": file}


def furnished(at: Path) -> list[str]:
    """A guest with something to change."""
    ports = [f"pcie-root-port,id=rp{i},slot={i},chassis={i}" for i in (1, 2)]
    options = [word for port in ports for word in ("-device", port)]
    options += ["-device", "virtio-net-pci,id=net1,bus=rp1"]
    options += ["-blockdev", json.dumps(medium(raw(at / "medium1")))]
    options += ["-device", "virtio-scsi-pci", "-device", "scsi-cd,drive=medium,id=cd1"]
    return [*options, *drive(raw(at / "disk")), *cdrom(raw(at / "medium"))]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
async def test_changes_show_in_the_outline_and_in_words(
    lab: Lab, tmp_path: Path, qemu: int, change: Any
) -> None:
    """Whatever is plugged in, taken out, or put behind a disk: seen at the stop within a
    millisecond, and named by a second look."""
    machine = lab.start(qemu, *furnished(tmp_path))
    driver = await lab.drive(machine)
    async with inspected(driver, "source") as was:
        assert await driver.outline() == was.outline
        await change(machine, tmp_path)
        assert await driver.outline() != was.outline
        async with inspected(driver, "source") as now:
            assert any(CHANGES[change] in news for news in alike.changes(was, now))
            assert await driver.outline() == now.outline


@pytest.fixture(scope="module")
def hosts() -> Any:
    with open_pair() as made:
        yield made


async def attached(hosts: Pair, *machines: Machine) -> str:
    """The name of a VM that runs at one host and is waited for at the other."""
    vm = hosts.name()
    for host, machine in zip(hosts, machines, strict=True):
        await machine.answers()
        await host.attach(vm, "qemu", machine.socket)
    return vm


@asynccontextmanager
async def before_the_stop(hosts: Pair, vm: str, mode: str) -> AsyncIterator[str]:
    """A migration that waits meanwhile in the last hook before its guest is stopped."""
    a, b = hosts
    go, held = (hosts.folder / f"{vm}.{name}" for name in ("go", "held"))
    hosts.hook(vm, "source", "handover", f"touch {held}; while [ ! -e {go} ]; do sleep 0.05; done")
    try:
        started = await a.call("Migrate", name=vm, to=b.address, mode=mode)
        with trio.fail_after(60):
            while not held.exists():
                await trio.sleep(0.01)
        yield started["migration"]
    finally:
        go.touch()
        hosts.unhook(vm)


@pytest.mark.parametrize("mode", ["postcopy", "hybrid"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
async def test_what_was_compared_is_so_still_before_the_stop(
    lab: Lab, hosts: Pair, tmp_path: Path, change: Any, mode: str
) -> None:
    """A guest that was changed while its migration was prepared is not moved to a VMM that is as it
    was: it runs on, and the sentence names what changed."""
    a, _ = hosts
    options = furnished(tmp_path)
    source, destination = lab.start(0, *options), lab.start(0, *options, "-incoming", "defer")
    vm = await attached(hosts, source, destination)
    async with before_the_stop(hosts, vm, mode) as migration:
        await change(source, tmp_path)
    result = await a.result(vm, migration)
    assert result["event"] == "failed", result
    assert CHANGES[change] in result["error"]
    assert await source.state() == "running"
    assert await destination.state() in ("inmigrate", "paused")


async def test_a_destination_that_was_changed_meanwhile_takes_nothing(
    lab: Lab, hosts: Pair, tmp_path: Path, qemu: int
) -> None:
    """The VMM that waits was compared once, too."""
    a, _ = hosts
    options = furnished(tmp_path)
    source, destination = lab.start(qemu, *options), lab.start(qemu, *options, "-incoming", "defer")
    vm = await attached(hosts, source, destination)
    async with before_the_stop(hosts, vm, "hybrid") as migration:
        await other_medium(destination, tmp_path)
    result = await a.result(vm, migration)
    assert result["event"] == "failed", result
    assert "somebody changed devices or disks of the VMM that waits" in result["error"]
    assert await source.state() == "running"


async def test_check_and_migrate_refuse_local_disks_unless_told(
    lab: Lab, hosts: Pair, tmp_path: Path, qemu: int
) -> None:
    """--unsafe, and only that, has a guest moved to a copy of its disk."""
    a, b = hosts
    one, two = raw(tmp_path / "one"), raw(tmp_path / "two")
    source = lab.start(qemu, *drive(one))
    destination = lab.start(qemu, *drive(two), "-incoming", "defer")
    vm = await attached(hosts, source, destination)
    (problem,) = (await a.call("Check", name=vm, to=b.address))["problems"]
    assert "disk vd0 is another file here" in problem
    assert (await a.call("Check", name=vm, to=b.address, unsafe=True))["problems"] == []
    result = await a.migrate(vm, b)
    assert result["event"] == "failed"
    assert problem in result["error"]
    result = await a.migrate(vm, b, unsafe=True)
    assert result["event"] == "completed", result
    await status_until(b, vm, lambda status: status["phase"] == "drained")
    assert await destination.state() == "running"
