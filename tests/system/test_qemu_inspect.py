# SPDX-License-Identifier: Apache-2.0
"""What the QEMU driver finds in real QEMUs: RAM, facts, and what cannot be migrated."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from needs import missing
from qemu_lab import FILE, MACHINE, MIB, PAIRS, QEMUS, RAM, Lab, inspected, mapped, settings

from postcopyd import protocol as p
from postcopyd.sessions import alike
from postcopyd.vmm import Shape, VmmError, writers
from postcopyd.vmm.qemu.driver import QemuVmm
from postcopyd.vmm.qemu.qmp import Qmp, QmpBusy, QmpUnreachable


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


def offer(shape: Shape) -> p.Offer:
    regions = [p.RegionOffer(r.name, r.pages, r.page_size) for r in shape.regions]
    return p.Offer(
        "m", "web1", "qemu", regions, shape.facts, 1, 1,
        disks=alike.offered(shape.disks), unsafe=True, places=shape.places,
    )  # fmt: skip


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


CONTROLLERS = (
    "qemu-xhci",
    "virtio-scsi-pci",
    "virtio-serial-pci",
    "intel-hda",
    "ich9-ahci,id=ahci",
)
SEATS = {
    "tab": "usb-tablet",
    "mouse": "usb-mouse",
    "one": "scsi-hd,drive=d1",
    "two": "scsi-hd,drive=d2",
    "port": "virtserialport",
    "port2": "virtserialport,chardev=c1",
    "sound": "hda-output,audiodev=none",
    "voice": "hda-micro,audiodev=none",
    "isa": "isa-serial,chardev=c2",
    "isa2": "isa-serial,chardev=c3",
    "cpu": "qemu64-x86_64-cpu,socket-id=0,die-id=0,core-id=1,thread-id=0",
}
"""Devices whose place QEMU gives, but the CPU's."""


def seated(order: list[str], said: dict[str, str]) -> list[str]:
    """A command line that has them in such an order, at such places where one is said."""
    drives = [f"if=none,id=d{n},driver=null-co,read-zeroes=on" for n in (1, 2)]
    options = ["-smp", "1,maxcpus=4", "-audiodev", "none,id=none"]
    options += [word for one in drives for word in ("-drive", one)]
    options += [word for n in (1, 2, 3) for word in ("-chardev", f"null,id=c{n}")]
    devices = [*CONTROLLERS, "usb-kbd", *(f"{SEATS[i]},id={i},{said.get(i, '')}" for i in order)]
    return options + [word for one in devices for word in ("-device", one.rstrip(","))]


@pytest.mark.parametrize(("source", "destination"), PAIRS)
async def test_places_that_qemu_gives_are_compared(lab: Lab, source: int, destination: int) -> None:
    """Devices that came in another order sit elsewhere, as one does that was plugged in again: the
    state of none would be loaded. Started as the sentence says they fit."""
    order = [*SEATS]
    a = await lab.drive(lab.start(source, *seated(order, {})))
    b = await lab.drive(lab.start(destination, *seated(order[::-1], {}), "-incoming", "defer"))
    async with inspected(a, "source") as ours, inspected(b, "destination") as theirs:
        places, found = ours.places, alike.differences(theirs, "qemu", offer(ours))
    assert {key.removeprefix("device ") for key in places} == {*SEATS, "USB without a name"}
    port = "device tab is at port=3 here, at port=2 at the source; start the destination with port="
    assert sum(port in problem for problem in found) == 1
    moved = {problem.split()[1] for problem in found if " is at " in problem}
    assert moved == {*SEATS} - {"cpu"}
    said = {key.removeprefix("device "): place for key, place in places.items()}
    c = await lab.drive(lab.start(destination, *seated(order[::-1], said), "-incoming", "defer"))
    async with inspected(c, "destination") as theirs:
        assert theirs.places == places
        assert alike.differences(theirs, "qemu", offer(ours)) == []


async def test_a_device_that_was_plugged_in_again_has_its_place(lab: Lab, qemu: int) -> None:
    """A tablet that comes again sits at another port, where its state of before does not fit."""
    usb = ["-device", "qemu-xhci,id=usb", "-device", "usb-tablet,id=tab", "-device", "usb-mouse"]
    machine = lab.start(qemu, *usb)
    driver = await lab.drive(machine)
    async with inspected(driver, "source") as was:
        assert was.places["device tab"] == "port=1"
    await machine.ask("device_del", id="tab")
    await machine.ask("device_add", driver="usb-tablet", id="tab", bus="usb.0")
    async with inspected(driver, "source") as now:
        (change,) = alike.changes(was, now)
        assert change == "device tab was at port=1, is at port=3"


SHARED_ANONYMOUS = f"memory-backend-ram,id=ram0,size={RAM},share=on"
REFUSALS = {
    "private": ([], FILE.replace("share=on", "share=off"), "private mapping of a file"),
    "on a disk": ([], FILE.replace("RAMFILE", "DISKFILE"), "put it on tmpfs"),
    "free page reporting": (
        ["-device", "virtio-balloon-pci,id=b,free-page-reporting=on"],
        FILE,
        "free-page-reporting=off",
    ),
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
            assert all(expected in problem for problem in shape.problems), shape.problems
            assert all(problem.endswith(".") for problem in shape.problems)
    finally:
        Path(f"{machine.ram}.nv").unlink(missing_ok=True)


BLOCKED = {
    "nvme": ["-drive", "if=none,id=d0,driver=null-co", "-device", "nvme,drive=d0,serial=1"],
    "usb-mtp": ["-device", "qemu-xhci", "-device", "usb-mtp,rootdir=FOLDER"],
    "ivshmem": [
        "-object", "memory-backend-ram,id=m0,size=1M,share=on", "-device", "ivshmem-plain,memdev=m0"
    ],
    "vvfat": ["-drive", "if=none,id=v,file=fat:rw:FOLDER"],
}  # fmt: skip
"""Devices and disks that QEMU itself does not migrate, and may not live to save."""


@pytest.mark.parametrize("case", BLOCKED)
async def test_what_qemu_does_not_migrate_is_refused(
    lab: Lab, qemu: int, case: str, tmp_path: Path
) -> None:
    """In QEMU's own words, and QEMU lives."""
    machine = lab.start(qemu, *(o.replace("FOLDER", str(tmp_path)) for o in BLOCKED[case]))
    driver = await lab.drive(machine)
    async with inspected(driver, "source") as shape:
        words = [p for p in shape.problems if "says that this guest cannot be migrated" in p]
        since_11 = case == "nvme" and driver._qmp.version >= (11, 0)  # which migrates it
        assert bool(words) != since_11, shape.problems
    await trio.sleep(0.1)
    assert await machine.state() == "running"


KINDS = {
    "plain": (None, False, "pc.ram"),
    "private": (f"memory-backend-ram,id=ram0,size={RAM}", False, "ram0"),
    "shared": (SHARED_ANONYMOUS, True, "ram0"),
    "memfd": (f"memory-backend-memfd,id=ram0,size={RAM},share=on", True, "ram0"),
    "private memfd": (f"memory-backend-memfd,id=ram0,size={RAM},share=off", False, ""),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_ram_of_each_kind_is_found(lab: Lab, qemu: int, kind: str) -> None:
    """By its address in QEMU, and where others can map it, as a file."""
    memory, file, name = KINDS[kind]
    driver = await lab.drive(lab.start(qemu, memory=memory))
    async with inspected(driver, "source") as shape:
        if not name:
            assert "private mapping of a file" in shape.problems[0]
            return
        assert shape.problems == ()
        (region,) = shape.regions
        assert (region.name, region.size, region.page_size) == (name, RAM, 4096)
        assert (region.fd is not None) == file


async def test_ram_in_two_places_of_the_guest_is_found(lab: Lab, qemu: int) -> None:
    """As all that goes beyond 4 GiB is: one region, none of which is there yet."""
    machine = lab.start_bare(qemu, "-machine", "q35,accel=tcg", "-m", "6G", "-S")
    driver = await lab.drive(machine)
    async with inspected(driver, "source") as shape:
        assert shape.problems == ()
        ((name, size, address),) = [(r.name, r.size, r.address) for r in shape.regions]
    assert (name, size) == ("pc.ram", 6 << 30)
    assert f"{address:x}-{address + size:x} rw-p" in Path(f"/proc/{machine.pid}/maps").read_text()


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


DISK = "if=none,id=disk0,format=raw,file={image},file.locking=off"


@pytest.mark.parametrize("how", ["cache=none", "cache=none,aio=native", "cache=directsync", ""])
async def test_disks_with_direct_io_are_named(
    lab: Lab, qemu: int, how: str, tmp_path: Path
) -> None:
    """A disk whose reads go to the guest's own pages is named by its file, one with the host's
    cache is not."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    options = ["-drive", ",".join(filter(None, [DISK.format(image=image), how]))]
    driver = await lab.drive(lab.start(qemu, *options, "-device", "virtio-blk-pci,drive=disk0"))
    async with inspected(driver, "source") as shape:
        assert (shape.problems, shape.untracked) == ((), None)
        if how:
            assert shape.direct_io is not None
            assert str(image) in shape.direct_io
        else:
            assert shape.direct_io is None


async def test_direct_io_below_an_image_is_named(lab: Lab, qemu: int, tmp_path: Path) -> None:
    """What counts is how the file is open, and not what the node above it says."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    nodes = [
        f"driver=file,node-name=file0,filename={image},cache.direct=on",
        "driver=raw,node-name=disk0,file=file0,cache.direct=off",
    ]
    options = [word for node in nodes for word in ("-blockdev", node)]
    driver = await lab.drive(lab.start(qemu, *options, "-device", "virtio-blk-pci,drive=disk0"))
    async with inspected(driver, "source") as shape:
        assert shape.direct_io is not None
        assert str(image) in shape.direct_io


def test_what_a_process_has_pinned_is_named() -> None:
    """Buffers registered with a ring; a ring without any is like any other descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = (ctypes.c_uint8 * 120)()
    ring = libc.syscall(425, 4, parameters)  # io_uring_setup
    if ring < 0:
        missing(f"io_uring: {os.strerror(ctypes.get_errno())}")
    try:
        assert writers.look(os.getpid())[1] == []
        page = mmap.mmap(-1, mmap.PAGESIZE)
        vector = (ctypes.c_size_t * 2)(
            ctypes.addressof(ctypes.c_char.from_buffer(page)), mmap.PAGESIZE
        )
        assert libc.syscall(427, ring, 0, vector, 1) == 0  # io_uring_register, BUFFERS
        assert writers.look(os.getpid())[1] == ["registered buffers of io_uring"]
    finally:
        os.close(ring)


def test_a_process_that_cannot_be_looked_at_may_do_anything() -> None:
    """One that has ended has no descriptors to see: nobody may rely on that."""
    process = subprocess.Popen(["true"])
    process.wait()
    assert writers.look(process.pid)[1] != []


async def test_memory_that_qemu_does_not_tell_of_is_refused(lab: Lab, qemu: int) -> None:
    """It would stay behind, without a word: 7.2 tells of none that the guest has not mapped, and
    does not tell two of one name apart."""
    machine = lab.start(qemu, "-S", "-device", "VGA")
    driver = await lab.drive(machine)
    old = driver._qmp.version < (8, 0)
    async with inspected(driver, "source") as shape:
        assert ["vga.vram" in problem for problem in shape.problems] == [True] * old
    if old:
        with pytest.raises(VmmError, match=r"does not say where it has the memory .*vga\.vram"):
            await driver.prepare()
    await machine.ask("cont")
    await mapped(driver)
    two = await lab.drive(lab.start(qemu, "-device", "VGA", "-device", "secondary-vga"))
    async with inspected(two, "source") as shape:
        assert ["vga.vram" in problem for problem in shape.problems] == [True, True] * old
    async with inspected(two, "destination") as shape:
        assert not any("vga.vram" in problem for problem in shape.problems)


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
