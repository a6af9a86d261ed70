# SPDX-License-Identifier: Apache-2.0
"""What the driver sends against what QEMU's own `migrate` sends of the same stopped guest: the same
sections with the same bodies, and the same memory beside guest RAM."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from qemu_lab import MIB, QEMUS, Lab, Machine, mapped
from qemus import module_folder

from postcopyd.vmm.qemu import savevm
from postcopyd.vmm.qemu.driver import QemuVmm

COMMAND, SWITCHOVER_START = 8, 11
SMALL = f"memory-backend-ram,id=ram0,size={128 * MIB}"
GUEST_RAM = {"ram0", "pc.ram", "microvm.ram"}
DEVICES = (
    "VGA", "virtio-gpu-pci", "virtio-net-pci,netdev=n0", "e1000e,netdev=n1", "rtl8139,netdev=n2",
    "virtio-blk-pci,drive=d0", "virtio-scsi-pci,id=scsi0", "scsi-hd,bus=scsi0.0,drive=d1",
    "ide-hd,drive=d2,bus=ide.0", "ide-cd,bus=ide.1", "lsi53c895a", "megasas",
    "virtio-serial-pci,id=vs",
    "virtserialport,bus=vs.0,chardev=c0", "virtio-balloon-pci", "virtio-rng-pci",
    "virtio-keyboard-pci", "virtio-tablet-pci", "qemu-xhci", "usb-tablet", "usb-kbd",
    "usb-storage,drive=d3", "intel-hda", "hda-duplex,audiodev=a0", "AC97,audiodev=a0", "i6300esb",
    "pvpanic", "vmgenid", "vmcoreinfo", "sdhci-pci", "isa-serial,chardev=c1", "edu",
    "pcie-root-port,id=rp0,slot=1", "virtio-iommu-pci", "pci-bridge,chassis_nr=9,id=br0",
    "isa-debug-exit",
)  # fmt: skip


def many() -> list[str]:
    options = ["-smp", "2", "-audiodev", "none,id=a0"]
    for n in range(4):
        options += ["-drive", f"if=none,id=d{n},driver=null-co,size=1M,read-zeroes=on"]
    for n in range(3):
        options += ["-netdev", f"user,id=n{n}"]
    for n in range(2):
        options += ["-chardev", f"null,id=c{n}"]
    return options + [word for device in DEVICES for word in ("-device", device)]


@dataclass
class Stream:
    """An incoming stream of QEMU, taken apart."""

    machine: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    """Of RAM blocks."""
    memory: dict[tuple[str, int], bytes] = field(default_factory=dict)
    """Pages that are not zeros, by block and offset."""
    sections: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, instance and version, in order, without that of RAM."""
    bodies: dict[tuple[str, int, int], bytes] = field(default_factory=dict)

    @property
    def run_state(self) -> bytes:
        return self.bodies["globalstate", 0, 1]


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        assert self.at + size <= len(self.data)
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> int:
        (number,) = struct.unpack(">" + kind, self.take(struct.calcsize(kind)))
        return int(number)

    def name(self) -> str:
        return self.take(self.number("B")).decode()


def parsed(data: bytes) -> Stream:
    found, reader = Stream(), Reader(data)
    assert reader.take(8) == savevm.BEGIN
    assert reader.number("B") == savevm.CONFIGURATION
    found.machine = reader.take(reader.number("I")).decode()
    ram = -1
    block = ""  # which a record may leave out
    while (kind := reader.number("B")) != savevm.EOF:
        if kind == COMMAND:  # 10.0 says that it switches over, for which nothing waits
            assert reader.number("H") == SWITCHOVER_START
            assert reader.number("H") == 0
            continue
        section = reader.number("I")
        if kind in (savevm.SECTION_START, savevm.FULL):
            key = reader.name(), reader.number("I"), reader.number("I")
            if kind == savevm.SECTION_START and key[0] == "ram":
                assert key == ("ram", 0, 4)
                ram = section
            elif kind == savevm.FULL:
                found.sections.append(key)
                found.bodies[key] = body(reader, section)
                continue
        if section == ram:
            block = pages(reader, found, block)
        assert reader.take(5) == footer(section)  # others that iterate are empty here
    assert reader.number("B") == savevm.DESCRIPTION
    reader.take(reader.number("I"))
    assert reader.at == len(data)
    return found


def footer(section: int) -> bytes:
    return struct.pack(">BI", savevm.FOOTER, section)


def body(reader: Reader, section: int) -> bytes:
    """Up to a footer that something follows which can follow one: bodies do not say how long they
    are."""
    at = reader.at
    while True:
        at = reader.data.index(footer(section), at)
        after = reader.data[at + 5 :]
        if after[:2] == bytes([savevm.EOF, savevm.DESCRIPTION]) or (
            after[:1] == bytes([savevm.FULL]) and after[6 : 6 + after[5]].isascii()
        ):
            found = reader.take(at - reader.at)
            reader.take(5)
            return found
        at += 1


def pages(reader: Reader, found: Stream, block: str) -> str:
    """Returns the block that the last of them was of."""
    while True:
        word = reader.number("Q")
        offset, flags = word & ~0xFFF, word & 0xFFF
        if flags & savevm.SIZES:
            left = offset
            while left > 0:
                name = reader.name()
                found.sizes[name] = reader.number("Q")
                left -= found.sizes[name]
            assert left == 0
        elif flags & savevm.END:
            return block
        else:
            assert flags & ~0x20 in (savevm.ZERO, savevm.WHOLE), hex(flags)
            block = block if flags & 0x20 else reader.name()  # CONTINUE
            page = reader.take(1 if flags & savevm.ZERO else 4096)
            if page.strip(b"\0"):
                found.memory[block, offset] = page


async def of_qemu(machine: Machine, folder: Path) -> Stream:
    """By QEMU's own `migrate`, which leaves it in postmigrate."""
    file = folder / "stream"
    await machine.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
    await machine.ask("migrate", uri=f"exec:cat >{file}")
    with trio.fail_after(60):
        while (status := (await machine.ask("query-migrate"))["status"]) != "completed":
            assert status != "failed"
            await trio.sleep(0.02)
    return parsed(file.read_bytes())


async def of_driver(driver: QemuVmm) -> Stream:
    pieces: list[bytes] = []

    async def send(data: bytes) -> None:
        pieces.append(data)

    await driver.prepare()
    with trio.fail_after(30):
        await driver.save(send, lambda: None)
    return parsed(b"".join(pieces))


def small(found: Stream) -> dict[tuple[str, int], bytes]:
    return {key: page for key, page in found.memory.items() if key[0] not in GUEST_RAM}


def different(ours: Stream, theirs: Stream) -> Iterator[str]:
    """Names of sections whose bodies differ, and where."""
    for key in theirs.bodies:
        a, b = ours.bodies.get(key, b""), theirs.bodies[key]
        if a != b:
            first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), -1)
            yield f"{key} {len(a)} {len(b)} at {first}: {a[first:][:16]!r} {b[first:][:16]!r}"


@pytest.mark.parametrize("machine", ["plain", "q35", "pc", "isapc", "microvm"])
async def test_as_qemu_itself_sends(
    lab: Lab, qemu: int, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a paused guest all is alike. Of one that runs, that it ran."""
    monkeypatch.setenv("QEMU_MODULE_DIR", module_folder(QEMUS[qemu][0]))
    clock = ["-rtc", "clock=vm"]  # which stands still with the guest
    if machine == "q35":
        it = lab.start(qemu, *clock, *many(), memory=SMALL)
    elif machine == "plain":
        it = lab.start(qemu, *clock, "-device", "VGA", "-device", "e1000e", memory=None)
    else:
        kind = ["-machine", f"{machine},accel=tcg", "-m", "128"]
        it = lab.start_bare(qemu, *clock, *kind)
    driver = await lab.drive(it)
    await mapped(driver)
    await it.ask("stop")
    ours = await of_driver(driver)
    assert await driver.rollback() == ""
    theirs = await of_qemu(it, lab.folder)
    assert ours.machine == theirs.machine
    assert ours.sizes == theirs.sizes
    assert ours.sections == theirs.sections
    assert list(different(ours, theirs)) == []
    found, expected = small(ours), small(theirs)
    if driver._qmp.version < (8, 0):  # which does not say where it has what firmware alone reads
        for memory in (found, expected):  # and which the firmware has mapped for moments only
            for name, offset in [*memory]:
                if name.startswith("/rom@") or name.endswith(".rom"):
                    del memory[name, offset]
    assert found == expected
    assert not any(name in GUEST_RAM for name, _ in ours.memory)
    if machine == "q35":
        assert len(ours.sections) > 50
        assert "vga.vram" in "".join(ours.sizes)
    await it.ask("cont")
    running = await of_driver(driver)
    assert await driver.rollback() == ""
    assert running.run_state == (await of_qemu(it, lab.folder)).run_state != ours.run_state
