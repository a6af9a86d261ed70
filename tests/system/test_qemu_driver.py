# SPDX-License-Identifier: Apache-2.0
"""The QEMU driver hands over real QEMUs' guests: adopt, save, load, run, and each way back.

Guest RAM is copied by the test where the engine would move it.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
from needs import missing
from qemu_lab import (
    FILE,
    MACHINE,
    MIB,
    PAIRS,
    QEMUS,
    RAM,
    Lab,
    Machine,
    inspected,
    mapped,
    settings,
    since_the_stop,
)

from postcopyd.host import procfs
from postcopyd.native import adoption
from postcopyd.vmm import Declined, VmmError, VmmGone, VmmTimeout
from postcopyd.vmm.qemu import hugepages, userfaultfd
from postcopyd.vmm.qemu import source as qemu_source
from postcopyd.vmm.qemu.driver import QemuVmm
from postcopyd.vmm.qemu.qmp import Qmp

UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    return path


def disk(path: Path) -> list[str]:
    drive = f"if=none,id=disk0,format=raw,file={path}"
    return ["-drive", drive, "-device", "virtio-blk-pci,drive=disk0,id=vd0"]


class Tape:
    """Device state kept in memory: what a session would carry to the other host."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.stops: list[float] = []

    async def send(self, data: bytes) -> None:
        self.pieces.append(data)

    def stopped(self) -> None:
        self.stops.append(time.monotonic())

    async def play(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


async def adopt(driver: QemuVmm) -> None:
    """Adopt without an engine: nothing is registered, so what is missing reads as zeros."""
    shape = await driver.inspect("destination")
    for descriptor in await driver.adopt(shape):
        os.close(descriptor)
    shape.close()


async def saved(source: QemuVmm, destination: QemuVmm) -> Tape:
    """The device state of a guest that was stopped once, for a destination that is adopted."""
    tape = Tape()
    await source.prepare()
    await adopt(destination)
    with trio.fail_after(20):
        await source.save(tape.send, tape.stopped)
    assert len(tape.stops) == 1
    return tape


# ---- the handover


@pytest.mark.parametrize(("source", "destination"), PAIRS)
async def test_a_guest_moves(lab: Lab, source: int, destination: int, image: Path) -> None:
    """The guest stops once, loads paused although the destination has no -S, and runs there."""
    a, b = await lab.pair(source, destination, *disk(image), "-device", "VGA")
    await mapped(a)
    tape = await saved(a, b)
    assert sum(map(len, tape.pieces)) < 20 * MIB  # RAM was left out
    assert await lab.machines[0].state() == "paused"
    lab.copy_ram()
    with trio.fail_after(20):
        await b.load(tape.play())
    assert await lab.machines[1].state() == "paused"
    with trio.fail_after(20):
        await b.run()
    assert await lab.machines[1].state() == "running"
    with trio.fail_after(20):
        await a.finish(keep=False)
        await a.gone()
    assert lab.machines[0].process.wait(1) == 0
    await b.release()
    assert not any((await settings(lab.machines[1]))[0].values())


async def test_several_backends_are_several_regions(lab: Lab, qemu: int) -> None:
    """Two NUMA nodes and a memory module: three regions by name, a userfaultfd each, one guest."""
    parts = ["-machine", f"{MACHINE},accel=tcg", "-m", "64M,slots=2,maxmem=1G", "-smp", "2"]
    for name in ("ram1", "ram0", "extra"):
        size = 64 if name == "extra" else 32
        path = f"mem-path=RAMFILE.{name}"
        parts += ["-object", f"memory-backend-file,id={name},size={size}M,share=on,{path}"]
    parts += ["-numa", "node,cpus=0,memdev=ram0", "-numa", "node,cpus=1,memdev=ram1"]
    parts += ["-device", "pc-dimm,id=dimm0,memdev=extra"]
    machines = [lab.start_bare(qemu, *parts), lab.start_bare(qemu, *parts, "-incoming", "defer")]
    try:
        a, b = [await lab.drive(machine) for machine in machines]
        async with inspected(a, "source") as ours, inspected(b, "destination") as theirs:
            assert (ours.problems, theirs.problems) == ((), ())
            assert ours.facts == theirs.facts
            assert "64" in ours.facts["memory device dimm0"]
            regions = [(region.name, region.size // MIB) for region in theirs.regions]
            assert regions == [("extra", 64), ("ram0", 32), ("ram1", 32)]
            descriptors = await b.adopt(theirs)
            assert len(descriptors) == len(userfaultfd.numbers(b.pid)) == 3
            for descriptor in descriptors:
                os.close(descriptor)
            tape = Tape()
            await a.prepare()
            await a.save(tape.send, tape.stopped)
            assert sum(map(len, tape.pieces)) < MIB
            for here, there in zip(ours.regions, theirs.regions, strict=True):
                assert here.fd is not None
                assert there.fd is not None
                os.pwrite(there.fd, os.pread(here.fd, here.size, here.offset), there.offset)
        await b.load(tape.play())
        await b.run()
        assert await machines[1].state() == "running"
    finally:
        for machine in machines:
            for name in ("ram0", "ram1", "extra"):
                Path(f"{machine.ram}.{name}").unlink(missing_ok=True)


async def test_a_paused_guest_stays_paused(lab: Lab, qemu: int) -> None:
    """A guest that does not run is saved at once and is not running after its load."""
    a, b = await lab.pair(qemu, qemu, paused=True)
    async with inspected(a, "source") as shape:
        assert shape.state == "paused"
    tape = await saved(a, b)
    lab.copy_ram()
    with trio.fail_after(20):
        await b.load(tape.play())
    assert await lab.machines[1].state() in ("paused", "prelaunch")
    await a.finish(keep=True)
    assert await lab.machines[0].state() in ("paused", "prelaunch")
    async with inspected(a, "source") as shape:  # which is not the guest any more
        assert "postcopyd has moved this guest" in shape.problems[0]


async def test_a_disk_in_use_elsewhere_declines(lab: Lab, qemu: int, image: Path) -> None:
    """`run` raises Declined when a disk is locked, and then the source can run the guest again."""
    a, b = await lab.pair(qemu, qemu, *disk(image))
    tape = await saved(a, b)
    lab.copy_ram()
    with trio.fail_after(20):
        await b.load(tape.play())
    # Another QEMU takes the disk: the source's lock went with the end of its migration.
    third = lab.start(qemu, *disk(image))
    await lab.drive(third)
    with trio.fail_after(20), pytest.raises(Declined, match="lock"):
        await b.run()
    assert await lab.machines[1].state() == "paused"
    await b.end()
    third.end()
    with trio.fail_after(20):
        await a.rollback()
    assert await lab.machines[0].state() == "running"


async def test_a_paused_guest_whose_disk_is_in_use_elsewhere(
    lab: Lab, qemu: int, image: Path
) -> None:
    """QEMU before 10 takes the disks of a guest that stays paused as it loads it. Without the lock
    it would go on, and abort when the guest is moved again; later ones take them when it runs."""
    cd = ["-device", "ide-cd,id=cd0"]
    a, b = await lab.pair(qemu, qemu, *disk(image), *cd, paused=True)
    tape = await saved(a, b)
    lab.copy_ram()
    third = lab.start(qemu, *disk(image))
    await lab.drive(third)
    b.before = "paused"
    with trio.fail_after(20):
        if b._qmp.version < (10, 0):
            with pytest.raises(VmmError, match="could not take the disk vd0 of web1"):
                await b.load(tape.play())
        else:
            await b.load(tape.play())
            with pytest.raises(Declined, match="lock"):
                await b.run()
        await b.end()
        third.end()
        await a.rollback()
        await lab.machines[0].ask("cont")
    assert await lab.machines[0].state() == "running"


async def test_bad_device_state_is_a_named_error(lab: Lab, qemu: int) -> None:
    """Device state that is cut short, or is none, makes load fail at once and not hang."""
    a, b = await lab.pair(qemu, qemu)
    tape = await saved(a, b)
    whole = b"".join(tape.pieces)
    tape.pieces = [whole[: len(whole) // 2]]
    with trio.fail_after(5), pytest.raises((VmmError, VmmGone)):
        await b.load(tape.play())
    with trio.fail_after(5):
        await b.end()
    with trio.fail_after(5):
        await a.rollback()
    assert await lab.machines[0].state() == "running"


# ---- the way back


async def saved_up_to(where: str, driver: QemuVmm) -> None:
    """Bring a save to some point and leave it there, as a failure or the loss of the task would."""
    if where == "prepared":
        return
    tape, stopped = Tape(), since_the_stop()
    if where == "saved":
        await driver.save(tape.send, tape.stopped)
    elif where == "send fails":

        async def fail(data: bytes) -> None:
            if stopped(data):
                raise BrokenPipeError("the peer went away")

        with pytest.raises(BrokenPipeError):
            await driver.save(fail, tape.stopped)
    else:
        with trio.move_on_after(1 if where == "send hangs" else 10) as scope:

            async def hang(data: bytes) -> None:
                if stopped(data):
                    await trio.sleep_forever()

            def at_the_stop() -> None:
                if where == "cancelled at the stop":
                    scope.cancel()

            await driver.save(hang, at_the_stop)
        assert scope.cancelled_caught


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
@pytest.mark.parametrize(
    "where", ["prepared", "send hangs", "cancelled at the stop", "send fails", "saved"]
)
async def test_rollback(lab: Lab, qemu: int, where: str, paused: bool, image: Path) -> None:
    """From each point the guest is as it was, QEMU's settings too, and rollback can be repeated."""
    machine = lab.start(qemu, *disk(image), *(["-S"] if paused else []))
    driver = await lab.drive(machine)
    await machine.ask("migrate-set-parameters", **{"max-bandwidth": 12345678})
    before = await settings(machine)
    await driver.prepare()
    assert await settings(machine) == before  # a save by somebody else would be whole
    await saved_up_to(where, driver)
    for _ in range(2):
        with trio.fail_after(10):
            assert await driver.rollback() == ""
        assert await machine.state() == ("prelaunch" if paused else "running")
        if not paused:
            assert await machine.writes(image), machine.log.read_text()
        assert await settings(machine) == before
    await driver.prepare()  # and it can be migrated now
    with trio.fail_after(10):
        await saved_up_to("saved", driver)
    assert await machine.state() == ("prelaunch" if paused else "paused")


@pytest.mark.parametrize("where", ["send hangs", "saved"])
async def test_a_new_daemon_rolls_back(lab: Lab, qemu: int, where: str) -> None:
    """A driver that knows nothing of the one before it runs the guest again and clears up."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    before = await settings(machine)
    await driver.prepare()
    await saved_up_to(where, driver)
    await driver.aclose()
    lab.drivers.remove(driver)
    again = await lab.drive(machine)
    again.before = "running"  # by its record
    with trio.fail_after(10):
        assert await again.rollback() == ""
    assert await machine.state() == "running"
    assert await settings(machine) == before


async def unmarked(lab: Lab, machine: Machine, driver: QemuVmm) -> QemuVmm:
    """Another driver, of a guest that a version without the guard has had."""
    await driver.aclose()
    lab.drivers.remove(driver)
    await machine.ask("migrate-set-parameters", **{"tls-creds": ""})
    again = await lab.drive(machine)
    again.before = "running"
    with trio.fail_after(10):
        await again.mark()
    return again


@pytest.mark.parametrize("where", ["send hangs", "saved", "still"])
async def test_a_guest_stopped_by_a_version_without_the_guard(
    lab: Lab, qemu: int, where: str
) -> None:
    """Its record says that it was stopped for a migration: it runs again, and all is put back."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    before = await settings(machine)
    await driver.prepare()
    if where == "still":
        await machine.ask("stop")
    else:
        await saved_up_to(where, driver)
    again = await unmarked(lab, machine, driver)
    with trio.fail_after(10):
        assert await again.rollback() == ""
    assert await machine.state() == "running"
    assert await settings(machine) == before


async def test_a_guest_that_others_have_moved_gets_no_mark(lab: Lab, qemu: int) -> None:
    """Nor one that runs; whatever a record says."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    again = await unmarked(lab, machine, driver)
    before = await settings(machine)
    await machine.ask("migrate", uri="exec:cat >/dev/null")
    with trio.fail_after(60):
        while await machine.state() != "postmigrate":
            await trio.sleep(0.01)
    again = await unmarked(lab, machine, again)
    assert await settings(machine) == before
    assert "somebody else has moved or saved it" in await again.rollback()
    assert await machine.state() == "postmigrate"


async def test_a_new_daemon_adopts_again_without_the_monitor(lab: Lab, qemu: int) -> None:
    """A QEMU whose main loop is stuck gives its userfaultfds, and its monitor when it goes on."""
    machine = lab.start(qemu, "-incoming", "defer")
    driver = await lab.drive(machine)
    async with inspected(driver, "destination") as shape:
        (first,) = await driver.adopt(shape)
    await driver.aclose()
    lab.drivers.remove(driver)
    machine.process.send_signal(signal.SIGSTOP)
    again = await QemuVmm.known("web1", machine.socket, machine.pid)
    lab.drivers.append(again)
    with trio.fail_after(2):
        (second,) = await again.adopted()
    assert os.stat(first) == os.stat(second)
    os.close(first)
    os.close(second)
    machine.process.send_signal(signal.SIGCONT)
    async with inspected(again, "destination") as shape:
        assert shape.state == "incoming"
    await again.release()
    assert userfaultfd.numbers(machine.pid) == []


async def test_cancelling_at_any_moment_brings_the_guest_back(
    lab: Lab, qemu: int, image: Path
) -> None:
    """A save cancelled after 0 to 10 ms, 40 times in a row: the guest runs and has its disk."""
    machine = lab.start(qemu, *disk(image))
    driver = await lab.drive(machine)
    tape = Tape()
    for attempt in range(40):
        await driver.prepare()
        with trio.move_on_after(attempt * 0.00025):
            await driver.save(tape.send, tape.stopped)
        with trio.fail_after(10):
            await driver.rollback()
        assert await machine.state() == "running", attempt
        assert await machine.writes(image), attempt


# ---- the end of QEMU


async def test_qemu_killed_during_save(lab: Lab, qemu: int) -> None:
    """The death of the source's QEMU while it saves is an error with its name, and no hang."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    await driver.prepare()

    async def send(data: bytes) -> None:
        machine.process.kill()  # before it is stopped

    with trio.fail_after(5), pytest.raises(VmmGone, match="ended"):
        await driver.save(send, lambda: None)
    with trio.fail_after(5):
        await driver.gone()
        await driver.end()
        await driver.finish(keep=True)


async def test_qemu_killed_during_load(lab: Lab, qemu: int) -> None:
    """The death of the destination's QEMU while it loads is an error with its name, and no hang."""
    machine = lab.start(qemu, "-incoming", "defer")
    driver = await lab.drive(machine)
    await adopt(driver)

    async def receive() -> AsyncIterator[bytes]:
        machine.process.kill()
        yield b"\0" * 4096

    with trio.fail_after(5), pytest.raises(VmmGone, match="ended"):
        await driver.load(receive())
    with trio.fail_after(5), pytest.raises(Declined):
        await driver.run()


async def test_a_frozen_qemu_is_ended(lab: Lab, qemu: int) -> None:
    """A QEMU that does not answer is killed; several may wait for its end meanwhile."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    machine.process.send_signal(signal.SIGSTOP)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.gone)
            nursery.start_soon(driver.gone)
            await driver.end()
    assert machine.process.wait(1) == -signal.SIGKILL


# ---- adoption


async def test_adopt_empties_ram_and_gives_descriptors(lab: Lab, qemu: int) -> None:
    """After adopt the RAM file is a hole and QEMU holds what we hold; release takes it back."""
    machine = lab.start(qemu, "-incoming", "defer")
    driver = await lab.drive(machine)
    with machine.ram.open("r+b") as file:
        file.write(b"old" * MIB)
    before = await settings(machine)
    shape = await driver.inspect("destination")
    for _ in range(2):  # a second time starts anew
        descriptors = await driver.adopt(shape)
        assert machine.ram.stat().st_blocks == 0
        assert len(descriptors) == 1
        assert os.readlink(f"/proc/self/fd/{descriptors[0]}") == "anon_inode:[userfaultfd]"
        assert len(userfaultfd.numbers(machine.pid)) == 1
        os.close(descriptors[0])
    shape.close()
    await driver.release()
    await driver.release()
    assert userfaultfd.numbers(machine.pid) == []
    assert await machine.state() == "inmigrate"
    assert await settings(machine) == before


def may_have_huge_pages(machine: Machine) -> bool:
    return procfs.status(machine.pid)["THP_enabled"] == "1"


async def test_no_huge_pages_while_memory_follows(
    lab: Lab, qemu: int, kernel_says: Callable[..., None]
) -> None:
    """On a kernel that makes zeros of missing pages when it makes huge ones QEMU gets none from
    adopt to release, whichever daemon releases it."""
    kernel_says(zeros=1)
    machine = lab.start(qemu, "-incoming", "defer")
    driver = await lab.drive(machine)
    for _ in range(2):
        await adopt(driver)
        assert not may_have_huge_pages(machine)
    await driver.release()
    assert may_have_huge_pages(machine)
    await adopt(driver)
    again = await QemuVmm.known("again", driver.socket, machine.pid)
    await driver.aclose()  # and its daemon is gone
    try:
        assert not may_have_huge_pages(machine)
        await again.release()
        assert may_have_huge_pages(machine)
    finally:
        await again.aclose()


async def test_huge_pages_that_somebody_else_has_forbidden_stay_so(
    lab: Lab, qemu: int, kernel_says: Callable[..., None]
) -> None:
    """What an operator has set for a QEMU is his; and on a kernel that is right nothing is set."""
    machine = lab.start(qemu, "-incoming", "defer")
    driver = await lab.drive(machine)
    kernel_says(zeros=0)
    await adopt(driver)
    assert may_have_huge_pages(machine)
    await driver.release()
    await adoption.prctl(machine.pid, hugepages.PR_SET_THP_DISABLE, 1)
    for zeros in (0, 1):
        kernel_says(zeros=zeros)
        await adopt(driver)
        await driver.release()
        assert not may_have_huge_pages(machine)
    kernel_says(zeros=0)
    again = await QemuVmm.known("again", driver.socket, machine.pid)
    await driver.aclose()
    try:
        await again.release()
        assert not may_have_huge_pages(machine)
    finally:
        await again.aclose()


async def test_adopt_of_an_unprivileged_qemu(lab: Lab, qemu: int) -> None:
    """A QEMU that may not create a userfaultfd is lent the device, and keeps nothing else."""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        missing("vm.unprivileged_userfaultfd=0")
    machine = lab.start(qemu, "-incoming", "defer", *unprivileged(qemu))
    driver = await lab.drive(machine)
    shape = await driver.inspect("destination")
    (descriptor,) = await driver.adopt(shape)
    shape.close()
    assert os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[userfaultfd]"
    os.close(descriptor)
    assert "/dev/userfaultfd" not in links(machine.pid)
    await driver.release()


async def test_adopt_touches_only_a_waiting_qemu(lab: Lab, qemu: int) -> None:
    """The RAM of a guest that runs is never emptied."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    shape = await driver.inspect("source")
    blocks = machine.ram.stat().st_blocks
    with pytest.raises(VmmError, match="was not touched"):
        await driver.adopt(shape)
    shape.close()
    assert machine.ram.stat().st_blocks >= blocks


async def test_huge_pages_keep_their_reservation(lab: Lab, qemu: int, tmp_path: Path) -> None:
    """Emptying RAM of huge pages gives none of them away. They are counted in a file system of its
    own, as other tests use huge pages meanwhile."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    if int((pool / "free_hugepages").read_text()) < RAM >> 21:
        missing("64 free pages of 2 MiB")
    mount = ["mount", "-t", "hugetlbfs", "-o", f"pagesize=2M,size={2 * RAM}"]
    subprocess.run([*mount, "postcopyd-tests", tmp_path], check=True)
    try:
        memory = FILE.replace("RAMFILE", str(tmp_path)) + ",prealloc=on"
        driver = await lab.drive(lab.start(qemu, "-incoming", "defer", memory=memory))
        shape = await driver.inspect("destination")
        assert shape.problems == ()
        assert shape.regions[0].page_size == 2 * MIB
        unreserved = os.statvfs(tmp_path).f_bfree
        assert unreserved == RAM >> 21
        (descriptor,) = await driver.adopt(shape)
        assert os.fstat(shape.regions[0].fd).st_blocks == 0
        assert os.statvfs(tmp_path).f_bfree == unreserved
        os.close(descriptor)
        shape.close()
        await driver.release()
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


# ---- tracking


def unprivileged(qemu: int) -> list[str]:
    """Options for a QEMU as libvirt runs it, which may not make a userfaultfd by itself."""
    usage = subprocess.run([*QEMUS[qemu], "-help"], capture_output=True, check=True).stdout
    user = ["-runas", "nobody"] if b"-runas" in usage else ["-run-with", "user=nobody"]
    return [*user, "-sandbox", "on"]


def links(pid: int | str) -> list[str]:
    return sorted(procfs.descriptors(int(pid)).values())


def flags_of(pid: int, address: int) -> list[str]:
    """The kernel's flags of the mapping at an address; "uw": userfaultfd write-protect."""
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.startswith(f"{address:x}-")
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:#x}")


@pytest.mark.parametrize("user", ["root", "nobody"])
async def test_track_leaves_nothing_in_qemu(lab: Lab, qemu: int, user: str) -> None:
    """A running guest's writes can be tracked twenty times in a row, each time as long as our
    descriptor is open and no longer."""
    if user == "nobody" and Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() != "0\n":
        missing("vm.unprivileged_userfaultfd=0")
    machine = lab.start(qemu, *(unprivileged(qemu) if user == "nobody" else []))
    driver = await lab.drive(machine)
    async with inspected(driver, "source") as shape:
        (region,) = shape.regions
        found = links(machine.pid)
        for _ in range(20):
            uffd = await driver.track()
            assert links(machine.pid) == found
            try:
                # Write-protect in shared memory, Linux 5.19; it also says that nothing was done.
                fcntl.ioctl(uffd, UFFDIO_API, bytearray(struct.pack("QQQ", 0xAA, 1 << 12, 0)))
            except OSError:
                missing("userfaultfd write-protect in shared memory: Linux 5.19")
            what = bytearray(struct.pack("QQQQ", region.address, region.size, 2, 0))
            fcntl.ioctl(uffd, UFFDIO_REGISTER, what)
            assert "uw" in flags_of(machine.pid, region.address)
            os.close(uffd)
            assert "uw" not in flags_of(machine.pid, region.address)
    assert await machine.state() == "running"


@pytest.mark.parametrize("user", ["root", "nobody"])
async def test_track_cancelled_at_any_moment(lab: Lab, qemu: int, user: str) -> None:
    """Cancelled after 0 to 8 ms, neither QEMU nor this process keeps a descriptor of it."""
    machine = lab.start(qemu, *(unprivileged(qemu) if user == "nobody" else []))
    driver = await lab.drive(machine)
    os.close(await driver.track())
    theirs, ours = links(machine.pid), links(os.getpid())
    for attempt in range(80):
        with trio.move_on_after(attempt * 0.0001):
            os.close(await driver.track())
        assert links(machine.pid) == theirs, attempt
        assert links(os.getpid()) == ours, attempt
    assert await machine.state() == "running"


async def test_what_a_killed_daemon_left_is_closed(lab: Lab, qemu: int) -> None:
    """A userfaultfd that was made in QEMU and not closed there goes at the next track or
    rollback."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    for close in (driver.track, driver.rollback):
        ours, _ = await userfaultfd.create(driver._qmp, driver.pid)
        os.close(ours)
        assert len(userfaultfd.numbers(machine.pid)) == 1
        if isinstance(uffd := await close(), int):
            os.close(uffd)
        assert userfaultfd.numbers(machine.pid) == []
    assert await machine.state() == "running"


async def test_a_guest_is_held_still_for_a_moment(lab: Lab, qemu: int) -> None:
    """Stopped inside and running afterwards, also when the body fails; a paused guest is left
    alone."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    own = Qmp(machine.own_socket)
    await own.open()
    try:
        with own.events("STOP", "RESUME") as events:
            for _ in range(2):
                with pytest.raises(ZeroDivisionError):
                    async with driver.still():
                        status = await own.execute("query-status")
                        assert status["status"] == "paused"
                        raise ZeroDivisionError
            assert (await own.execute("query-status"))["running"]
            seen = [event["event"] for event in events.queue]
            assert seen == ["STOP", "RESUME"] * 2
            assert driver.before is None
            await own.execute("stop")
            events.queue.clear()
            async with driver.still():
                assert not (await own.execute("query-status"))["running"]
            assert not (await own.execute("query-status"))["running"]
            assert not events.queue
            await driver.rollback()
            assert not (await own.execute("query-status"))["running"]
    finally:
        own.close()


async def test_still_cancelled_at_any_moment(lab: Lab, qemu: int) -> None:
    """Cancelled on its way in, inside or on its way out, the guest runs and rollback has nothing to
    do."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    for attempt in range(60):
        with trio.move_on_after(attempt * 0.00005):
            async with driver.still():
                await trio.sleep(0.001)
        assert await machine.state() == "running", attempt
    await driver.rollback()
    assert await machine.state() == "running"


async def test_a_daemon_that_died_while_the_guest_was_still(lab: Lab, qemu: int) -> None:
    """The daemon after it runs the guest again, by its record that the guest ran."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    await driver._hold()  # what `still` does, and no more
    await driver.aclose()
    lab.drivers.remove(driver)
    again = await lab.drive(machine)
    again.before = "running"
    with trio.fail_after(10):
        assert await again.rollback() == ""
    assert await machine.state() == "running"
    assert not any((await settings(machine))[0].values())


async def test_a_guest_that_somebody_else_resumes_is_not_still(lab: Lab, qemu: int) -> None:
    """What was done while the guest ran all the same is worth nothing, and still says so."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    for commands in (["cont"], ["cont", "stop"]):
        with pytest.raises(VmmError, match="resumed by someone else"):
            async with driver.still():
                for command in commands:
                    await machine.ask(command)
        assert await machine.state() == "running"


async def test_a_guest_that_cannot_run_again_is_named(
    lab: Lab, qemu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A QEMU that hangs inside, or does not want to go on, is an error that says what to do."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    monkeypatch.setattr(qemu_source, "CONT_SECONDS", 0.2)
    with trio.fail_after(5), pytest.raises(VmmTimeout, match="send QMP `cont`"):
        async with driver.still():
            machine.process.send_signal(signal.SIGSTOP)
            raise ZeroDivisionError
    assert driver.before == "running"
    machine.process.send_signal(signal.SIGCONT)
    await driver.rollback()
    assert await machine.state() == "running"


async def test_still_waits_for_reads_under_way(lab: Lab, qemu: int) -> None:
    """Eight reads that take a fifth of a second each have all ended when the guest is still."""
    slow = "if=none,id=disk0,driver=null-co,size=1M,latency-ns=200000000"
    machine = lab.start(qemu, "-drive", slow, "-device", "virtio-blk-pci,drive=disk0,id=vd0")
    driver = await lab.drive(machine)

    async def reads() -> int:
        (disk,) = await machine.ask("query-blockstats")
        return int(disk["stats"]["rd_operations"])

    before = await reads()
    for _ in range(8):
        line = 'qemu-io disk0 "aio_read 0 4k"'
        await machine.ask("human-monitor-command", **{"command-line": line})
    assert await reads() < before + 8
    async with driver.still():
        assert await reads() >= before + 8
    assert await machine.state() == "running"
