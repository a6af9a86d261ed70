# SPDX-License-Identifier: Apache-2.0
"""The QEMU driver against real QEMUs: small TCG machines that run their firmware and no more.

Guest RAM is copied by the test where the engine would move it. `POSTCOPYD_QEMU` names the QEMUs
to try, separated by ":"; each is a path, or a path and its first options separated by commas.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from needs import missing

from postcopyd.vmm import Declined, Role, Shape, VmmError, VmmGone, qemu_userfaultfd
from postcopyd.vmm.qemu import QemuVmm
from postcopyd.vmm.qmp import Qmp, QmpBusy, QmpUnreachable

MIB = 1 << 20
RAM = 128 * MIB
MACHINE = "pc-q35-7.2"  # every version tried here knows it


def find_qemus() -> list[list[str]]:
    named = os.environ.get("POSTCOPYD_QEMU", "")
    if named:
        return [entry.split(",") for entry in named.split(os.pathsep)]
    return [["qemu-system-x86_64"]]


QEMUS = find_qemus()
PAIRS = [(a, b) for a in range(len(QEMUS)) for b in range(len(QEMUS))]


class Machine:
    """One QEMU process with two monitors: one for the driver, one for the test to look at it."""

    def __init__(self, folder: Path, qemu: list[str], name: str, options: list[str]) -> None:
        self.socket = str(folder / f"{name}.qmp")
        self.own_socket = str(folder / f"{name}.own")
        self.log = folder / f"{name}.log"
        self.ram = Path(f"/dev/shm/{folder.name}.{name}")
        command = [
            *qemu,
            "-nodefaults",
            "-display",
            "none",
            "-qmp",
            f"unix:{self.socket},server=on,wait=off",
            "-qmp",
            f"unix:{self.own_socket},server=on,wait=off",
            *(option.replace("RAMFILE", str(self.ram)) for option in options),
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.pid = self.process.pid

    async def ask(self, command: str, **arguments: object) -> object:
        qmp = Qmp(self.own_socket)
        try:
            return await qmp.execute(command, arguments)
        finally:
            qmp.close()

    async def state(self) -> str:
        return (await self.ask("query-status"))["status"]  # type: ignore[index]

    async def writes(self, image: Path) -> bool:
        """Whether QEMU can write to its disk: it has to have taken it back for that."""
        with image.open("r+b") as file:
            file.write(bytes(4096))
        line = 'qemu-io disk0 "write -P 90 0 4k"'
        try:
            await self.ask("human-monitor-command", **{"command-line": line})
        except VmmGone:
            return False  # QEMU aborts when the disk is inactive
        return image.read_bytes()[:4096] == bytes([90]) * 4096

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.ram.unlink(missing_ok=True)


FILE = f"memory-backend-file,id=ram0,size={RAM},mem-path=RAMFILE,share=on"


class Lab:
    """Starts QEMUs and drivers, and ends them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: list[Machine] = []
        self.drivers: list[QemuVmm] = []

    def start(self, qemu: int, *options: str, memory: str | None = FILE) -> Machine:
        base = ["-machine", f"{MACHINE},accel=tcg" + (",memory-backend=ram0" if memory else "")]
        base += ["-m", f"{RAM // MIB}"] + (["-object", memory] if memory else [])
        return self.start_bare(qemu, *base, *options)

    def start_bare(self, qemu: int, *options: str) -> Machine:
        name = f"m{len(self.machines)}"
        machine = Machine(self.folder, QEMUS[qemu], name, list(options))
        self.machines.append(machine)
        return machine

    async def drive(self, machine: Machine) -> QemuVmm:
        with trio.fail_after(10):
            while not Path(machine.own_socket).exists():
                assert machine.process.poll() is None, machine.log.read_text()
                await trio.sleep(0.01)
            driver = await QemuVmm.connect("web1", machine.socket)
        self.drivers.append(driver)
        return driver

    async def pair(
        self, source: int, destination: int, *options: str, paused: bool = False
    ) -> tuple[QemuVmm, QemuVmm]:
        return (
            await self.drive(self.start(source, *options, *(["-S"] if paused else []))),
            await self.drive(self.start(destination, *options, "-incoming", "defer")),
        )

    def copy_ram(self, source: int = 0, destination: int = 1) -> None:
        here, there = self.machines[source].ram, self.machines[destination].ram
        with here.open("rb") as read, there.open("r+b") as write:
            shutil.copyfileobj(read, write, MIB)


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    for qemu in QEMUS:
        if shutil.which(qemu[0]) is None:
            missing(qemu[0])
    if os.geteuid() != 0:
        missing("root")
    folder = Path(tempfile.mkdtemp(prefix="pcq"))
    made = Lab(folder)
    try:
        yield made
    finally:
        for driver in made.drivers:
            await driver.aclose()
        for machine in made.machines:
            machine.end()
        shutil.rmtree(folder)


@pytest.fixture(params=range(len(QEMUS)), ids=lambda number: f"qemu{number}")
def qemu(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    return path


def disk(path: Path) -> list[str]:
    drive = f"if=none,id=disk0,format=raw,file={path}"
    return ["-drive", drive, "-device", "virtio-blk-pci,drive=disk0,id=vd0"]


@asynccontextmanager
async def inspected(driver: QemuVmm, role: Role) -> AsyncIterator[Shape]:
    shape = await driver.inspect(role)
    try:
        yield shape
    finally:
        shape.close()


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


async def settings(machine: Machine) -> tuple[dict[str, bool], int]:
    capabilities = await machine.ask("query-migrate-capabilities")
    parameters = await machine.ask("query-migrate-parameters")
    return (
        {c["capability"]: c["state"] for c in capabilities},  # type: ignore[index,union-attr]
        parameters["max-bandwidth"],  # type: ignore[index]
    )


# ---- looking


async def test_inspect_finds_ram_and_asks_nothing_of_the_guest(lab: Lab, qemu: int) -> None:
    """A running guest's RAM is one region, whose descriptor shows what the guest wrote."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    before = await settings(machine)
    shape = await driver.inspect("source")
    assert shape.state == "running"
    assert shape.problems == ()
    assert shape.pid == machine.pid
    (region,) = shape.regions
    assert (region.name, region.size, region.page_size) == ("ram0", RAM, 4096)
    assert region.fd is not None
    line = f"{region.address:x}-{region.address + region.size:x} rw-s"
    assert line in Path(f"/proc/{machine.pid}/maps").read_text()
    assert os.fstat(region.fd).st_ino == machine.ram.stat().st_ino
    shape.close()
    assert await machine.state() == "running"
    assert await settings(machine) == before


@pytest.mark.parametrize(("source", "destination"), PAIRS)
async def test_facts_agree_for_the_same_machine(lab: Lab, source: int, destination: int) -> None:
    """A booted guest and its waiting destination have equal facts, also in different versions."""
    options = ["-smp", "2,maxcpus=4", "-device", "pcie-root-port,id=rp1,slot=1"]
    options += ["-device", "virtio-balloon-pci,bus=rp1", "-device", "isa-debug-exit"]
    a, b = await lab.pair(source, destination, *options)
    async with inspected(a, "source") as ours, inspected(b, "destination") as theirs:
        assert ours.facts == theirs.facts
        assert theirs.state == "incoming"
        assert (ours.problems, theirs.problems) == ((), ())
    assert ours.facts["machine"] == MACHINE
    assert ours.facts["device rp1"] == "pcie-root-port at pcie.0 01.0"


async def test_facts_tell_machines_apart(lab: Lab, qemu: int) -> None:
    """Another CPU, another slot, another size of RAM: each shows in the facts."""
    small = FILE.replace(str(RAM), str(RAM // 2))
    a = await lab.drive(lab.start(qemu, "-device", "virtio-balloon-pci,id=b,addr=5"))
    b = await lab.drive(
        lab.start(
            qemu, "-cpu", "Nehalem", "-m", "64", "-device", "virtio-balloon-pci,id=b,addr=6",
            memory=small,
        )
    )  # fmt: skip
    async with inspected(a, "source") as ours, inspected(b, "source") as theirs:
        different = {key for key in ours.facts if ours.facts[key] != theirs.facts.get(key)}
    assert different == {"CPU", "RAM", "memory layout", "device b"}


SHARED_ANONYMOUS = f"memory-backend-ram,id=ram0,size={RAM},share=on"
REFUSALS = {
    "private": ([], FILE.replace("share=on", "share=off"), "private memory"),
    "no backend": ([], None, "private memory"),
    "nameless": ([], SHARED_ANONYMOUS, "no file that can be opened"),
    "on a disk": ([], FILE.replace("RAMFILE", "DISKFILE"), "put it on tmpfs"),
    "free page reporting": (
        ["-device", "virtio-balloon-pci,id=b,free-page-reporting=on"],
        FILE,
        "free-page-reporting=off",
    ),
    "blocked": (["-drive", "if=none,id=v,file=fat:rw:FOLDER"], FILE, "does not support live"),
    "nvdimm": (
        [
            "-machine", "nvdimm=on", "-m", "128,maxmem=1G,slots=2",
            "-object", "memory-backend-file,id=nv,size=64M,share=on,mem-path=RAMFILE.nv",
            "-device", "nvdimm,id=nv0,memdev=nv",
        ],
        FILE,
        "persists pages unseen",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
async def test_inspect_refuses(lab: Lab, qemu: int, case: str, tmp_path: Path) -> None:
    """What cannot be migrated is said in one sentence that names the mend."""
    options, memory, expected = REFUSALS[case]
    (tmp_path / "fat").mkdir()
    if memory is not None:
        memory = memory.replace("DISKFILE", str(tmp_path / "ram"))
    machine = lab.start(
        qemu, *(o.replace("FOLDER", str(tmp_path / "fat")) for o in options), memory=memory
    )
    try:
        driver = await lab.drive(machine)
        async with inspected(driver, "source") as shape:
            assert shape.problems
            assert all(expected in problem for problem in shape.problems)
            assert all(problem.endswith(".") for problem in shape.problems)
    finally:
        Path(f"{machine.ram}.nv").unlink(missing_ok=True)


async def test_memfd_is_refused_where_qemu_would_send_it(lab: Lab, qemu: int) -> None:
    """memory-backend-memfd can be moved out of QEMU 8.0 and older only."""
    memory = f"memory-backend-memfd,id=ram0,size={RAM},share=on"
    driver = await lab.drive(lab.start(qemu, memory=memory))
    async with inspected(driver, "source") as shape:
        if driver._qmp.version >= (8, 1):
            assert "would be sent by QEMU" in shape.problems[0]
        else:
            assert shape.problems == ()
            assert shape.regions[0].size == RAM


async def test_ram_in_a_folder_and_in_a_descriptor_is_found(lab: Lab, qemu: int) -> None:
    """A mem-path that is a folder, and one that is a descriptor of a memfd, lead to the mapping."""
    folder = await lab.drive(lab.start(qemu, memory=FILE.replace("RAMFILE", "/dev/shm")))
    async with inspected(folder, "source") as shape:
        assert shape.problems == ()
        assert shape.regions[0].size == RAM
    memfd = os.memfd_create("guest", 0)
    os.ftruncate(memfd, RAM)
    try:
        machine = lab.start(qemu, memory=FILE.replace("RAMFILE", f"/proc/{os.getpid()}/fd/{memfd}"))
        driver = await lab.drive(machine)
        async with inspected(driver, "source") as shape:
            assert shape.problems == ()
            assert os.fstat(shape.regions[0].fd).st_ino == os.fstat(memfd).st_ino
    finally:
        os.close(memfd)


async def test_another_process_that_maps_the_ram_is_named(lab: Lab, qemu: int) -> None:
    """A process beside QEMU that maps guest RAM is refused by its pid and command."""
    machine = lab.start(qemu)
    driver = await lab.drive(machine)
    script = (
        "import mmap,sys\n"
        "f=open(sys.argv[1],'r+b'); m=mmap.mmap(f.fileno(),4096)\n"
        "print('mapped',flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(machine.ram)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        assert other.stdout is not None
        await trio.to_thread.run_sync(other.stdout.readline)
        async with inspected(driver, "source") as shape:
            (problem,) = shape.problems
            assert f"Process {other.pid} (" in problem
        other.kill()


async def test_roles_are_not_confused(lab: Lab, qemu: int) -> None:
    """A running guest is no destination, a waiting QEMU no source, one that listens neither."""
    running = await lab.drive(lab.start(qemu))
    waiting = await lab.drive(lab.start(qemu, "-incoming", "defer"))
    listening = await lab.drive(lab.start(qemu, "-incoming", f"unix:{lab.folder}/in"))
    for driver, role, words in (
        (running, "destination", "does not wait for a guest"),
        (waiting, "source", "no guest to give away"),
        (listening, "destination", "told already"),
    ):
        async with inspected(driver, role) as shape:
            assert [words in problem for problem in shape.problems] == [True]


async def test_a_second_client_is_told_within_seconds(lab: Lab, qemu: int) -> None:
    """Each further client of a monitor that is taken learns so, however many there are."""
    machine = lab.start(qemu)
    await lab.drive(machine)
    for _ in range(4):  # the kernel queues some and then refuses: both mean the same
        with trio.fail_after(2), pytest.raises(QmpBusy, match="another client"):
            await Qmp(machine.socket).open(patience=0.3)
    with pytest.raises(QmpUnreachable, match="-qmp"):
        await QemuVmm.connect("web1", str(lab.folder / "nothing"))


# ---- the handover


@pytest.mark.parametrize(("source", "destination"), PAIRS)
async def test_a_guest_moves(lab: Lab, source: int, destination: int, image: Path) -> None:
    """The guest stops once, loads paused although the destination has no -S, and runs there."""
    a, b = await lab.pair(source, destination, *disk(image), "-device", "VGA")
    tape = Tape()
    await a.prepare()
    await adopt(b)
    with trio.fail_after(20):
        await a.save(tape.send, tape.stopped)
    assert len(tape.stops) == 1
    assert sum(map(len, tape.pieces)) < 20 * MIB  # RAM was left out
    assert await lab.machines[0].state() == "postmigrate"
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
            assert len(descriptors) == len(qemu_userfaultfd.numbers(b.pid)) == 3
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
    tape = Tape()
    await a.prepare()
    await adopt(b)
    with trio.fail_after(20):
        await a.save(tape.send, tape.stopped)
    assert len(tape.stops) == 1
    lab.copy_ram()
    with trio.fail_after(20):
        await b.load(tape.play())
    assert await lab.machines[1].state() in ("paused", "prelaunch")
    await a.finish(keep=True)
    assert await lab.machines[0].state() == "postmigrate"


async def test_a_disk_in_use_elsewhere_declines(lab: Lab, qemu: int, image: Path) -> None:
    """`run` raises Declined when a disk is locked, and then the source can run the guest again."""
    a, b = await lab.pair(qemu, qemu, *disk(image))
    tape = Tape()
    await a.prepare()
    await adopt(b)
    await a.save(tape.send, tape.stopped)
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


async def test_bad_device_state_is_a_named_error(lab: Lab, qemu: int) -> None:
    """Device state that is cut short, or is none, makes load fail at once and not hang."""
    a, b = await lab.pair(qemu, qemu)
    tape = Tape()
    await a.prepare()
    await adopt(b)
    await a.save(tape.send, tape.stopped)
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
    tape = Tape()
    if where == "saved":
        await driver.save(tape.send, tape.stopped)
    elif where == "send fails":

        async def fail(data: bytes) -> None:
            raise BrokenPipeError("the peer went away")

        with pytest.raises(BrokenPipeError):
            await driver.save(fail, tape.stopped)
    else:
        with trio.move_on_after(1 if where == "send hangs" else 10) as scope:

            async def hang(data: bytes) -> None:
                await trio.sleep_forever()

            def stopped() -> None:
                if where == "cancelled at the stop":
                    scope.cancel()

            await driver.save(hang, stopped)
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
    assert (await settings(machine))[0]["x-ignore-shared"]
    await saved_up_to(where, driver)
    for _ in range(2):
        with trio.fail_after(10):
            await driver.rollback()
        # A paused guest whose state went out whole (it may fit into the socket's buffer) stays in
        # postmigrate: stopped as before, but QEMU has no way back to the name.
        stopped = {"prelaunch"} if where == "prepared" else {"prelaunch", "postmigrate"}
        assert await machine.state() in (stopped if paused else {"running"})
        if not paused:
            assert await machine.writes(image), machine.log.read_text()
        assert await settings(machine) == before
    if not paused:  # and it can be migrated now
        await driver.prepare()
        with trio.fail_after(10):
            await saved_up_to("saved", driver)
        assert await machine.state() == "postmigrate"


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
    with trio.fail_after(10):
        await again.rollback()
    assert await machine.state() == "running"
    assert await settings(machine) == before


async def test_a_new_daemon_adopts_again_without_the_monitor(lab: Lab, qemu: int) -> None:
    """A QEMU whose main loop is stuck gives its userfaultfds, and its monitor when it goes on."""
    machine = lab.start(qemu, "-incoming", "defer")
    driver = await lab.drive(machine)
    async with inspected(driver, "destination") as shape:
        (first,) = await driver.adopt(shape)
    await driver.aclose()
    lab.drivers.remove(driver)
    machine.process.send_signal(signal.SIGSTOP)
    again = QemuVmm.known("web1", machine.socket, machine.pid)
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
    assert qemu_userfaultfd.numbers(machine.pid) == []


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
        machine.process.kill()

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
        assert len(qemu_userfaultfd.numbers(machine.pid)) == 1
        os.close(descriptors[0])
    shape.close()
    await driver.release()
    await driver.release()
    assert qemu_userfaultfd.numbers(machine.pid) == []
    assert await machine.state() == "inmigrate"
    assert await settings(machine) == before


async def test_adopt_of_an_unprivileged_qemu(lab: Lab, qemu: int) -> None:
    """A QEMU that may not create a userfaultfd is lent the device, and keeps nothing else."""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        missing("vm.unprivileged_userfaultfd=0")
    usage = await trio.run_process([*QEMUS[qemu], "-help"], capture_stdout=True)
    nobody = ["-runas", "nobody"] if b"-runas" in usage.stdout else ["-run-with", "user=nobody"]
    machine = lab.start(qemu, "-incoming", "defer", *nobody, "-sandbox", "on")
    driver = await lab.drive(machine)
    shape = await driver.inspect("destination")
    (descriptor,) = await driver.adopt(shape)
    shape.close()
    assert os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[userfaultfd]"
    os.close(descriptor)
    links = [os.readlink(path) for path in Path(f"/proc/{machine.pid}/fd").iterdir()]
    assert "/dev/userfaultfd" not in links
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


async def test_huge_pages_keep_their_reservation(lab: Lab, qemu: int) -> None:
    """Emptying RAM of huge pages gives none of them away."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    folders = [words[1] for words in mounts if words[2] == "hugetlbfs"]
    if not folders or int((pool / "free_hugepages").read_text()) < RAM >> 21:
        missing("hugetlbfs with 64 free pages of 2 MiB")
    memory = FILE.replace("RAMFILE", folders[0]) + ",prealloc=on"
    driver = await lab.drive(lab.start(qemu, "-incoming", "defer", memory=memory))
    shape = await driver.inspect("destination")
    assert shape.problems == ()
    assert shape.regions[0].page_size == 2 * MIB
    unreserved = unreserved_pages(pool)
    (descriptor,) = await driver.adopt(shape)
    assert os.fstat(shape.regions[0].fd).st_blocks == 0
    assert unreserved_pages(pool) == unreserved
    os.close(descriptor)
    shape.close()
    await driver.release()


def unreserved_pages(pool: Path) -> int:
    return int((pool / "free_hugepages").read_text()) - int((pool / "resv_hugepages").read_text())


async def test_the_socket_of_somebody_else_still_leads_to_qemu(lab: Lab, qemu: int) -> None:
    """When another process made QEMU's listening socket, the pid found is QEMU's all the same."""
    path = str(lab.folder / "given.qmp")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        command = [*QEMUS[qemu], "-nodefaults", "-display", "none", "-S", "-chardev"]
        command += [
            f"socket,id=m,fd={listener.fileno()},server=on,wait=off",
            "-mon",
            "m,mode=control",
        ]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()])
    try:
        driver = await QemuVmm.connect("web1", path)
        assert driver.pid == process.pid
        await driver.aclose()
    finally:
        process.kill()
        process.wait()
