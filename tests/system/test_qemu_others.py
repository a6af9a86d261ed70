# SPDX-License-Identifier: Apache-2.0
"""Others have a hand on the same QEMU: a person, libvirt, a backup. What they do is never undone
and never made wrong by what the driver does meanwhile."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from qemu_lab import MIB, RAM, Lab, Machine, inspected, settings, since_the_stop
from test_qemu_driver import Tape, adopt

from postcopyd.vmm import VmmError
from postcopyd.vmm.qemu.driver import QemuVmm
from postcopyd.vmm.qemu.qmp import QmpRefused
from postcopyd.vmm.qemu.settings import MOVED

SLOW = 1 << 20  # bytes a second, of a save that shall not end by itself


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    return path


def fill(machine: Machine) -> None:
    """Guest RAM that no save can leave out unseen."""
    with machine.ram.open("r+b") as file:
        file.seek(RAM // 2)
        file.write(b"\x5a\xa5\x5a\x01" * (16 * MIB // 4))


async def begin_save(machine: Machine, to: Path, speed: int) -> None:
    await machine.ask("migrate-set-parameters", **{"max-bandwidth": speed})
    await machine.ask("migrate", uri=f"exec:cat>{to}")


async def save_ended(machine: Machine) -> str:
    while True:
        status = (await machine.ask("query-migrate")).get("status", "none")
        if status in ("completed", "failed", "cancelled"):
            return str(status)
        await trio.sleep(0.02)


def holds_ram(saved: Path) -> bool:
    """Whether the guest's memory is in what was saved."""
    return saved.read_bytes().count(b"\x5a\xa5\x5a\x01" * 1024) >= 16 * MIB // 4096 - 1


async def restarted(lab: Lab, driver: QemuVmm, machine: Machine) -> QemuVmm:
    """The daemon was killed and started again; the record says that the guest ran."""
    await driver.aclose()
    lab.drivers.remove(driver)
    again = await lab.drive(machine)
    again.before = "running"
    return again


@pytest.mark.parametrize("daemon", ["lives", "again"])
@pytest.mark.parametrize("did", ["looked", "prepared", "held still"])
async def test_a_guest_that_somebody_else_has_moved_is_not_run(
    lab: Lab, qemu: int, tmp_path: Path, did: str, daemon: str
) -> None:
    """It may run at a third host: neither rollback nor a daemon that is started again runs it."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    async with inspected(driver, "source"):
        pass
    if did == "prepared":
        await driver.prepare()
    if did == "held still":
        async with driver.still():
            pass
    await begin_save(machine, tmp_path / "elsewhere", 1 << 40)
    assert await save_ended(machine) == "completed"
    if daemon == "again":
        driver = await restarted(lab, driver, machine)
    for _ in range(2):
        assert "somebody else has moved or saved it" in await driver.rollback()
        assert await machine.state() == "postmigrate"
    for step in (driver.prepare, lambda: driver.save(Tape().send, lambda: None)):
        with pytest.raises(VmmError, match="may run elsewhere"):
            await step()
    assert await machine.state() == "postmigrate"


@pytest.mark.parametrize("daemon", ["lives", "again"])
async def test_a_pause_of_somebody_else_stays(lab: Lab, qemu: int, daemon: str) -> None:
    """Who pauses the guest between our looks finds it paused afterwards."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    async with inspected(driver, "source"):
        pass
    await driver.prepare()
    await machine.ask("stop")
    if daemon == "again":
        driver = await restarted(lab, driver, machine)
    assert "by somebody else's QMP `stop`" in await driver.rollback()
    assert await machine.state() == "paused"


async def test_a_guest_that_somebody_else_runs_is_left_running(lab: Lab, qemu: int) -> None:
    machine = lab.start(qemu, "-S")
    driver = await lab.drive(machine)
    await driver.prepare()
    await machine.ask("cont")
    assert "somebody else has run it" in await driver.rollback()
    assert await machine.state() == "running"


@pytest.mark.parametrize(
    ("sleep", "state", "wakes"),
    [(0, "shutdown", "system_reset"), (1, "suspended", "system_wakeup")],
    ids=["off", "S3"],
)
async def test_a_guest_that_sleeps_or_was_shut_down_is_left_so(
    lab: Lab, qemu: int, sleep: int, state: str, wakes: str
) -> None:
    """The words say what wakes it, by QMP; nothing is sent to it."""
    machine = lab.start(qemu, "-no-shutdown")
    driver = await lab.drive(machine)
    await driver.prepare()
    with trio.fail_after(20):
        while await machine.state() == "running":
            # What a guest writes to PM1a_CNT in the end, once the firmware has put that there.
            line = f"o /h 0x604 {1 << 13 | sleep << 10:#x}"
            await machine.ask("human-monitor-command", **{"command-line": line})
            await trio.sleep(0.05)
    assert await machine.state() == state
    if state == "suspended" and driver._qmp.version >= (9, 0):
        assert await driver.rollback() == ""  # it is moved as it is: test_qemu_states.py
        assert await machine.state() == state
        return
    assert wakes in await driver.rollback()
    for step in (driver.prepare, lambda: driver.save(Tape().send, lambda: None)):
        with pytest.raises(VmmError, match=wakes):
            await step()
    async with inspected(driver, "source") as shape:
        assert any(wakes in problem for problem in shape.problems), shape.problems
    assert await machine.state() == state
    await machine.ask(wakes)
    if wakes == "system_wakeup":
        with trio.fail_after(5):
            while await machine.state() != "running":
                await trio.sleep(0.02)


@pytest.mark.parametrize("daemon", ["lives", "again"])
async def test_a_save_of_somebody_else_is_refused_and_left_alone(
    lab: Lab, qemu: int, tmp_path: Path, daemon: str
) -> None:
    """A backup that goes on keeps the guest from being moved, and ends as if nobody had tried."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    async with inspected(driver, "source"):
        pass
    await driver.prepare()
    fill(machine)
    before = await settings(machine)
    await begin_save(machine, tmp_path / "backup", SLOW)
    for step in (driver.prepare, lambda: driver.save(Tape().send, lambda: None)):
        with pytest.raises(VmmError, match="somebody else is moving or saving it"):
            await step()
    with pytest.raises(VmmError, match="somebody else is moving or saving it"):
        async with driver.still():
            pytest.fail("held still")
    if daemon == "again":
        driver = await restarted(lab, driver, machine)
    with trio.fail_after(10):
        assert "somebody else is moving or saving it" in await driver.rollback()
    await trio.sleep(2.5)  # longer than our own would have been waited for
    assert (await machine.ask("query-migrate"))["status"] == "active"
    await machine.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
    with trio.fail_after(30):
        assert await save_ended(machine) == "completed"
    assert holds_ram(tmp_path / "backup")
    assert (await settings(machine))[0] == before[0]


async def test_nobody_can_save_a_guest_that_we_hold(lab: Lab, qemu: int, tmp_path: Path) -> None:
    """While it is held still, and after its state was saved, a save by somebody else fails at once,
    in words that name us; afterwards it is whole."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    fill(machine)
    file = tmp_path / "save"
    async with driver.still():
        await begin_save(machine, file, 1 << 40)
        assert await save_ended(machine) == "failed"
        assert "postcopyd" in (await machine.ask("query-migrate"))["error-desc"]
    assert await machine.state() == "running"
    await driver.prepare()
    tape = Tape()
    await driver.save(tape.send, tape.stopped)
    assert driver.before == "running"
    await begin_save(machine, file, 1 << 40)
    assert await save_ended(machine) == "failed"
    assert await driver.rollback() == ""
    assert await machine.state() == "running"
    await begin_save(machine, file, 1 << 40)
    with trio.fail_after(30):
        assert await save_ended(machine) == "completed"
    assert holds_ram(file)


@pytest.mark.parametrize("stopped", [False, True])
async def test_a_daemon_that_died_in_a_save_leaves_no_save_without_ram(
    lab: Lab, qemu: int, tmp_path: Path, stopped: bool
) -> None:
    """Until a daemon has cleared up a save by somebody else is whole, while the guest runs, and
    fails, while it is held."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    fill(machine)
    await driver.prepare()

    since = since_the_stop()

    async def hang(data: bytes) -> None:
        if stopped == since(data):
            await driver.aclose()
            raise BrokenPipeError

    with pytest.raises(BaseException):  # noqa: B017, PT011 (of a daemon that is no more)
        await driver.save(hang, lambda: None)
    lab.drivers.remove(driver)
    assert await machine.state() == ("paused" if stopped else "running")
    file = tmp_path / "save"
    await begin_save(machine, file, 1 << 40)
    with trio.fail_after(30):
        assert await save_ended(machine) == ("failed" if stopped else "completed")
    assert stopped or holds_ram(file)
    again = await lab.drive(machine)
    again.before = "running"
    if stopped:
        assert await again.rollback() == ""
        assert await machine.state() == "running"
    else:
        assert "somebody else has moved or saved it" in await again.rollback()
        assert await machine.state() == "postmigrate"


@pytest.mark.parametrize("daemon", ["lives", "again"])
async def test_a_guest_that_left_and_is_run_again(lab: Lab, qemu: int, daemon: str) -> None:
    """Its QEMU was kept. Others may save it once somebody has run it, not before."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    await driver.prepare()
    with trio.fail_after(20):
        await driver.save(Tape().send, lambda: None)
        await driver.finish(keep=True)
    if daemon == "again":
        await driver.aclose()
        await machine.ask("cont")
        driver = await lab.drive(machine)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.gone)
        if daemon == "lives":
            await trio.sleep(0.1)
            assert (await settings(machine))[2] == MOVED
            await machine.ask("cont")
        with trio.fail_after(10):
            while (await settings(machine))[2]:
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    assert await machine.state() == "running"


async def test_somebody_who_runs_it_after_its_save_is_seen(lab: Lab, qemu: int) -> None:
    """Before it is granted, and without a question to QEMU."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.gone)  # as a daemon does: it reads the monitor
        await driver.prepare()
        await driver.save(Tape().send, lambda: None)
        driver.check_saved()
        await machine.ask("cont")
        with trio.fail_after(5), pytest.raises(VmmError, match="resumed by someone else"):
            while True:
                driver.check_saved()
                await trio.sleep(0.01)
        assert await driver.rollback() == ""
        assert await machine.state() == "running"
        driver.check_saved()
        nursery.cancel_scope.cancel()


# ---- the destination


async def test_a_save_at_the_destination_is_whole(lab: Lab, qemu: int, tmp_path: Path) -> None:
    """Between the load and the release of a guest whose memory still follows, a save by somebody
    else has all of its memory; before the guest runs none can begin."""
    a, b = await lab.pair(qemu, qemu)
    here, there = lab.machines
    fill(here)
    tape = Tape()
    await a.prepare()
    await adopt(b)
    await a.save(tape.send, tape.stopped)
    lab.copy_ram()
    await b.load(tape.play())
    assert not (await settings(there))[0]["x-ignore-shared"]
    file = tmp_path / "save"
    await begin_save(there, file, 1 << 40)
    assert await save_ended(there) == "failed"
    await b.run()
    await begin_save(there, file, 1 << 40)
    with trio.fail_after(30):
        assert await save_ended(there) == "completed"
    assert holds_ram(file)
    await b.release()


async def test_a_save_in_the_middle_of_the_load_fails(lab: Lab, qemu: int, tmp_path: Path) -> None:
    """As long as the memory would be left out QEMU itself refuses."""
    a, b = await lab.pair(qemu, qemu)
    there = lab.machines[1]
    tape = Tape()
    await a.prepare()
    await adopt(b)
    await a.save(tape.send, tape.stopped)
    lab.copy_ram()

    async def slow() -> AsyncIterator[bytes]:
        whole = b"".join(tape.pieces)
        for at in range(0, len(whole), 64 << 10):
            yield whole[at : at + (64 << 10)]
            with pytest.raises(QmpRefused):
                await begin_save(there, tmp_path / "save", 1 << 40)

    with trio.fail_after(20):
        await b.load(slow())
    await b.run()
    assert await there.state() == "running"


# ---- disks of a guest that does not run


def empty_qcow2(size: int) -> bytes:
    """Header, refcount table, its one block, first level table: 64 KiB each."""
    cluster = 1 << 16
    header = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, 16, size, 0, 1, 3 * cluster, cluster, 1, 0, 0
    )
    parts = [header, struct.pack(">Q", 2 * cluster), struct.pack(">4H", 1, 1, 1, 1), b""]
    return b"".join(part.ljust(cluster, b"\0") for part in parts)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
async def test_a_paused_guest_is_moved_on_before_it_ran(
    lab: Lab, qemu: int, tmp_path: Path, form: str
) -> None:
    """Three hosts, one after the other; QEMU 7.2 aborts when it gives away a disk that it has not
    taken. At the last it runs, and writes to its disk."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB) if form == "raw" else empty_qcow2(MIB))
    drive = [
        "-drive", f"if=none,id=disk0,format={form},file={image}",
        "-device", "virtio-blk-pci,drive=disk0,id=vd0",
    ]  # fmt: skip
    machines: list[Machine] = [lab.start(qemu, *drive)]
    drivers: list[Any] = [await lab.drive(machines[0])]
    await machines[0].ask("stop")
    for move in range(2):
        machines.append(lab.start(qemu, *drive, "-incoming", "defer"))
        drivers.append(await lab.drive(machines[-1]))
        a, b = drivers[-2:]
        tape = Tape()
        await a.prepare()
        await adopt(b)
        with trio.fail_after(20):
            await a.save(tape.send, tape.stopped)
        lab.copy_ram(move, move + 1)
        b.before = "paused"  # as a session does before the end of the device state
        with trio.fail_after(20):
            await b.load(tape.play())
            await b.release()
        await a.end()
        assert machines[move].process.wait(5) == 0, machines[move].log.read_text()
        assert await machines[-1].state() in ("paused", "prelaunch")
    await machines[-1].ask("cont")
    assert await machines[-1].state() == "running"
    if form == "raw":
        assert await machines[-1].writes(image), machines[-1].log.read_text()
