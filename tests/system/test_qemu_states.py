# SPDX-License-Identifier: Apache-2.0
"""Guests that do not run, in real QEMUs: each arrives as it was, and can be moved again; and what
forbids a move that comes when it has begun."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from qemu_lab import MIB, Lab, Machine, inspected, mapped
from test_qemu_driver import Tape, adopt, disk
from test_qemu_others import begin_save, save_ended

from postcopyd.vmm import VmmError
from postcopyd.vmm.qemu import savevm
from postcopyd.vmm.qemu.driver import QemuVmm


async def save(driver: QemuVmm) -> Tape:
    tape = Tape()
    await driver.prepare()
    with trio.fail_after(20):
        await driver.save(tape.send, tape.stopped)
    return tape


async def arrive(lab: Lab, driver: QemuVmm, tape: Tape, source: int, destination: int) -> None:
    """A guest that is to stay as it is."""
    await adopt(driver)
    lab.copy_ram(source, destination)
    driver.before = "paused"  # as a session does before the end of the device state
    with trio.fail_after(20):
        await driver.load(tape.play())
        await driver.release()


async def human(machine: Machine, line: str) -> None:
    await machine.ask("human-monitor-command", **{"command-line": line})


async def becomes(machine: Machine, state: str) -> None:
    with trio.fail_after(10):
        while await machine.state() != state:
            await trio.sleep(0.02)


# ---- paused, with a disk


def others(folder: Path) -> list[str]:
    """Images that are no disk to write to: a CD, one that nothing uses."""
    for name in ("cd", "spare"):
        (folder / name).write_bytes(bytes(MIB))
    return [
        *("-drive", f"if=none,id=cd0,media=cdrom,format=raw,file={folder}/cd"),
        *("-device", "ide-cd,drive=cd0"),
        *("-blockdev", f"driver=file,node-name=spare,filename={folder}/spare"),
    ]


@pytest.mark.parametrize("writable", [True, False], ids=["disk", "no disk"])
async def test_a_paused_guest_moves_twice_and_after_rollbacks(
    lab: Lab, qemu: int, tmp_path: Path, writable: bool
) -> None:
    """Each QEMU that it was at lives on; at the last it runs, and writes to its disk."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    more = [*others(tmp_path), *(disk(image) if writable else [])]
    first = lab.start(qemu, *more)
    source = await lab.drive(first)
    await trio.sleep(0.2)
    await first.ask("stop")
    for move in range(2):
        for _ in range(2):
            await save(source)
            assert await source.rollback() == ""
            assert await lab.machines[move].state() == "paused"
        tape = await save(source)
        machine = lab.start(qemu, *more, "-incoming", "defer")
        destination = await lab.drive(machine)
        await arrive(lab, destination, tape, move, move + 1)
        await source.finish(keep=True)
        assert await machine.state() == "paused"
        source = destination
    await source.run()
    assert await lab.machines[2].state() == "running"
    assert not writable or await lab.machines[2].writes(image)
    for machine in lab.machines:
        assert machine.process.poll() is None, machine.log.read_text()


@pytest.mark.parametrize("then", ["cont", "migrate", "block_resize", "savevm"])
async def test_a_paused_guest_after_a_rollback(
    lab: Lab, qemu: int, tmp_path: Path, then: str
) -> None:
    """Nobody sees a difference: it runs, is moved by others, and its disk is as it was."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    machine = lab.start(qemu, *disk(image), *others(tmp_path))
    driver = await lab.drive(machine)
    await machine.ask("stop")
    await save(driver)
    assert await driver.rollback() == ""
    if then == "migrate":
        await begin_save(machine, tmp_path / "elsewhere", 1 << 40)
        with trio.fail_after(30):
            assert await save_ended(machine) == "completed"
    elif then == "block_resize":
        await machine.ask("block_resize", device="disk0", size=2 * MIB)
        assert image.stat().st_size == 2 * MIB
    elif then == "savevm":
        await human(machine, "savevm one")  # which these images cannot have
    await machine.ask("cont")
    assert await machine.state() == "running"
    assert await machine.writes(image), machine.log.read_text()


# ---- what comes too late for `check`

PORT = [
    *("-device", "pcie-root-port,id=rp0,slot=1", "-drive", "if=none,id=late,driver=null-co"),
    *("-object", "memory-backend-ram,id=late,size=1M,share=on"),
]


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
@pytest.mark.parametrize("when", ["prepared", "begun"])
async def test_a_device_that_cannot_be_moved_is_plugged(
    lab: Lab, qemu: int, when: str, paused: bool
) -> None:
    """QEMU itself would end in the save. It is not begun, and the guest goes on."""
    machine = lab.start(qemu, *PORT)
    driver = await lab.drive(machine)
    if paused:
        await machine.ask("stop")

    kind, name, options = "nvme", "nvme", {"drive": "late", "serial": "1"}
    why = f"cannot be moved any more.*{kind}"
    if driver._qmp.version >= (11, 0):  # which migrates that
        kind, name, options = "ivshmem", "ivshmem-plain", {"memdev": "late"}
        why = "got more memory" if when == "prepared" else f"cannot be moved any more.*{kind}"

    async def plug() -> None:
        await machine.ask("device_add", driver=name, id="n0", bus="rp0", **options)

    async def send(data: bytes) -> None:
        if when == "begun" and data.startswith(savevm.BEGIN):
            await plug()

    await driver.prepare()
    if when == "prepared":
        await plug()
    with trio.fail_after(10), pytest.raises(VmmError, match=why):
        await driver.save(send, lambda: None)
    assert await driver.rollback() == ""
    assert await machine.state() == ("paused" if paused else "running")
    async with inspected(driver, "source") as shape:
        assert [kind in problem for problem in shape.problems] == [True]


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
async def test_a_migration_by_somebody_else_begins_meanwhile(
    lab: Lab, qemu: int, tmp_path: Path, paused: bool
) -> None:
    """Between our look and our stop: ours fails, theirs has it all, and nobody runs the guest."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    if paused:
        await machine.ask("stop")
    file = tmp_path / "elsewhere"

    async def send(data: bytes) -> None:
        if data.startswith(savevm.BEGIN):
            await begin_save(machine, file, 1 << 20)

    await driver.prepare()
    with trio.fail_after(10), pytest.raises(VmmError, match="Somebody else began to move or save"):
        await driver.save(send, lambda: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.rollback)
        await trio.sleep(0.1)
        await machine.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
    with trio.fail_after(30):
        assert await save_ended(machine) == "completed"
    assert await machine.state() == "postmigrate"


async def test_what_qemu_lets_move_goes_along(lab: Lab, qemu: int, tmp_path: Path) -> None:
    """A folder that is not mounted; shared memory that the guest is the master of, with what is in
    it. A bitmap that no image has is named."""
    options = [
        *("-fsdev", f"local,id=f0,path={tmp_path},security_model=none"),
        *("-device", "virtio-9p-pci,fsdev=f0,mount_tag=f0"),
        *("-object", f"memory-backend-file,id=m0,size=1M,share=on,mem-path={tmp_path}/ROLE"),
        *("-device", "ivshmem-plain,memdev=m0,master=on"),
        *("-blockdev", "null-co,node-name=n0,size=1048576"),
    ]
    here, there = (
        lab.start(qemu, *(option.replace("ROLE", role) for option in options), *more)
        for role, more in (("source", []), ("destination", ["-incoming", "defer"]))
    )
    source, destination = await lab.drive(here), await lab.drive(there)
    await here.ask("block-dirty-bitmap-add", node="n0", name="b0")
    await mapped(source)
    async with inspected(source, "source") as shape:
        assert shape.problems == ()
        assert len(shape.stays) == 1
        assert "bitmap 'b0' of block node 'n0'" in shape.stays[0]
    with (tmp_path / "source").open("r+b") as memory:
        memory.write(b"by another guest")
    await arrive(lab, destination, await save(source), 0, 1)
    assert await there.state() == "paused"
    assert (tmp_path / "destination").read_bytes()[:16] == b"by another guest"


# ---- panicked, suspended


async def test_a_panicked_guest_arrives_as_that(lab: Lab, qemu: int) -> None:
    options = ["-device", "pvpanic", "-action", "panic=pause"]
    a, b = await lab.pair(qemu, qemu, *options)
    here, there = lab.machines
    await human(here, "o /b 0x505 1")
    await becomes(here, "guest-panicked")
    async with inspected(a, "source") as shape:
        assert (shape.state, shape.problems) == ("paused", ())
    await save(a)
    assert await a.rollback() == ""
    assert await here.state() == "guest-panicked"
    tape = await save(a)
    await arrive(lab, b, tape, 0, 1)
    assert await there.state() == "guest-panicked"
    await a.finish(keep=True)
    async with inspected(b, "source") as shape:
        assert (shape.state, shape.problems) == ("paused", ())
    await save(b)  # and on
    assert await b.rollback() == ""
    assert await there.state() == "guest-panicked"


async def test_a_guest_that_sleeps_arrives_asleep(lab: Lab, qemu: int) -> None:
    """Since 9.0; an older QEMU would wake it, so that it is refused there in words."""
    a, b = await lab.pair(qemu, qemu)
    here, there = lab.machines
    with trio.fail_after(20):
        while await here.state() == "running":
            # What a guest writes to PM1a_CNT in the end, once the firmware has put that there.
            await human(here, f"o /h 0x604 {1 << 13 | 1 << 10:#x}")
            await trio.sleep(0.05)
    assert await here.state() == "suspended"
    async with inspected(a, "source") as shape:
        if a._qmp.version < (9, 0):
            assert ["system_wakeup" in problem for problem in shape.problems] == [True]
            with pytest.raises(VmmError, match="system_wakeup"):
                await a.prepare()
            assert await here.state() == "suspended"
            return
        assert (shape.state, shape.problems) == ("running", ())
    await save(a)
    assert await a.rollback() == ""
    assert await here.state() == "suspended"
    tape = await save(a)
    await adopt(b)
    lab.copy_ram()
    with trio.fail_after(20):
        await b.load(tape.play())
        await b.run()
        await b.release()
    assert await there.state() == "suspended"
    async with inspected(b, "source") as shape:
        assert (shape.state, shape.problems) == ("running", ())
    await there.ask("system_wakeup")
    await becomes(there, "running")
