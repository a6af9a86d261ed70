# SPDX-License-Identifier: Apache-2.0
"""What is made of QEMU's saved device state, and of its table of RAM blocks: by bytes and text
alone. That QEMU loads it is for the system tests."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator

import pytest

from postcopyd.host import procfs
from postcopyd.vmm import VmmError
from postcopyd.vmm.qemu import blocks, ram, savevm
from postcopyd.vmm.qemu.blocks import Block

STATE = savevm.GLOBALSTATE + struct.pack(">I", 8) + b"running\0".ljust(32, b"\0") + b"!"
SAVED = savevm.BEGIN + b"\x04\0\0\0\x01" + STATE + b"\x7e\0\0\0\x01\0"


def whole(saved: bytes = SAVED) -> bytes:
    page = b"p" * savevm.PAGE
    pages = [("bios", 0x1000, page), ("bios", 0x2000, b"")]
    sizes = [("ram0", 1 << 33), ("bios", 0x3000)]
    opening = savevm.opening("pc-q35-7.2", sizes, [("bios", 3)])
    return opening + b"".join(savevm.memory(pages)) + savevm.devices(saved)


def test_stream() -> None:
    """Byte by byte, as QEMU's migration/savevm.c and migration/ram.c read it."""
    ram = "40000000"
    assert whole() == b"".join(
        [
            savevm.BEGIN,
            bytes.fromhex("07 0000000a") + b"pc-q35-7.2",
            bytes.fromhex(f"01 {ram} 03") + b"ram" + bytes.fromhex("00000000 00000004"),
            bytes.fromhex("0000000200003004"),
            b"\x04ram0" + bytes.fromhex("0000000200000000"),
            b"\x04bios" + bytes.fromhex("0000000000003000"),
            bytes.fromhex(f"0000000000000010 7e {ram}"),
            bytes.fromhex(f"02 {ram}"),
            bytes.fromhex("0000000000000002") + b"\x04bios\0",
            bytes.fromhex("0000000000001022 00 0000000000002022 00"),
            bytes.fromhex(f"0000000000000010 7e {ram}"),
            bytes.fromhex(f"03 {ram}"),
            bytes.fromhex("0000000000001008") + b"\x04bios" + b"p" * 4096,
            bytes.fromhex("0000000000002002") + b"\x04bios\0",
            bytes.fromhex(f"0000000000000010 7e {ram}"),
            SAVED[8:],
            bytes.fromhex("06 00000000"),
        ]
    )


@pytest.mark.parametrize(
    "saved",
    [
        b"",
        savevm.BEGIN,
        SAVED[:-1],
        SAVED[1:],
        b"QEVM\0\0\0\x02" + SAVED[8:],
        b"\0" * 4096,
    ],
    ids=["nothing", "its beginning", "no end", "no beginning", "another version", "zeros"],
)
def test_what_is_no_device_state(saved: bytes) -> None:
    """As a QEMU that its guest has taken over may leave it, or one that was cut off."""
    with pytest.raises(VmmError):
        whole(saved)


@pytest.mark.parametrize(
    "block", [("x" * 256, 4096), ("\u00e9" * 128, 4096), ("a", 1 << 63), ("a", (1 << 64) - 1)]
)
def test_blocks_that_cannot_be(block: tuple[str, int]) -> None:
    with pytest.raises(VmmError, match="RAM"):
        savevm.opening("pc", [("ram0", 1 << 30), block], [])


def test_a_name_is_counted_in_bytes() -> None:
    made = savevm.opening("pc", [("\u00e9" * 127, 4096)], [])
    assert b"\xfe" + "\u00e9".encode() * 127 + (4096).to_bytes(8, "big") in made


@pytest.mark.parametrize(
    "run_state", ["paused", "prelaunch", "guest-panicked", "io-error", "watchdog", "suspended"]
)
def test_run_state(run_state: str) -> None:
    """Nothing else changes, as what follows says whether the guest slept."""
    made = savevm.with_run_state(SAVED, run_state)
    at = SAVED.index(b"running") - 4
    name = run_state.encode()
    assert made[:at] == SAVED[:at]
    assert made[at : at + 36] == struct.pack(">I", len(name) + 1) + name.ljust(32, b"\0")
    assert made[at + 36 :] == SAVED[at + 36 :]


@pytest.mark.parametrize(
    "saved",
    [
        b"",
        SAVED.replace(b"globalstate", b"globalstatf"),
        SAVED.replace(STATE, STATE + STATE),
        SAVED.replace(b"running", b"paused\0"),
        SAVED.replace(struct.pack(">I", 8) + b"running", struct.pack(">I", 9) + b"running"),
        SAVED.replace(savevm.GLOBALSTATE, savevm.GLOBALSTATE[:-1] + b"\x02"),
        SAVED[: SAVED.index(b"running") + 3],
        SAVED[: SAVED.index(b"running")],
    ],
    ids=["nothing", "none", "two", "paused", "length", "another version", "cut", "cut before it"],
)
def test_run_state_that_is_not_known(saved: bytes) -> None:
    with pytest.raises(VmmError, match="a way that is not known"):
        savevm.with_run_state(saved, "paused")


V7 = """\
              Block Name    PSize              Offset               Used              Total
                    ram0    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000
    0000:00:02.0/vga.vram    4 KiB  0x0000000008000000 0x0000000001000000 0x0000000001000000
    /rom@etc/acpi/tables    4 KiB  0x0000000009000000 0x0000000000020000 0x0000000000200000
"""
V8 = """\
  Block Name    PSize              Offset               Used              Total                HVA
  huge    2 MiB  0x0000000000000000 0x0000000008000000 0x0000000008000000 0x00007f48dbe00000
  /objects/b 1    4 KiB  0x0000000008000000 0x0000000001000000 0x0000000001000000 0x00007f48dbc00000
"""
V10 = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
             microvm.ram    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000 0x00007f48dbe00000  rw
                            4 KiB  0x0000000008000000 0x0000000001000000 0x0000000001000000 0x00007f48dae00000  rw
                 4 KiB    4 KiB  0x0000000008000000 0x0000000001000000 0x0000000001000000 0x00007f48d9e00000  rw
                 pc.bios    4 KiB  0x0000000008000000 0x0000000000020000 0x0000000000020000 0x00007f4931c00000  ro

"""  # noqa: E501
MIB = 1 << 20
TABLES = {
    "7.2": (
        V7,
        [
            Block("ram0", 128 * MIB, 128 * MIB, None),
            Block("0000:00:02.0/vga.vram", 16 * MIB, 16 * MIB, None),
            Block("/rom@etc/acpi/tables", 128 << 10, 2 * MIB, None),
        ],
    ),
    "8.0": (
        V8,
        [
            Block("huge", 128 * MIB, 128 * MIB, 0x7F48DBE00000),
            Block("/objects/b 1", 16 * MIB, 16 * MIB, 0x7F48DBC00000),
        ],
    ),
    "10.0": (
        V10,
        [
            Block("microvm.ram", 128 * MIB, 128 * MIB, 0x7F48DBE00000),
            Block("4 KiB", 16 * MIB, 16 * MIB, 0x7F48D9E00000),
            Block("pc.bios", 128 << 10, 128 << 10, 0x7F4931C00000),
        ],
    ),
    "nothing": ("", []),
    "no table": ("Block Name\n", []),
    "no numbers": (V7.replace("0x0000000008000000", "a lot"), []),
    "another form": ("Name Size Where\nram0 4 0x0\n", []),
}


@pytest.mark.parametrize("case", TABLES)
def test_table(case: str) -> None:
    """Names may have spaces, and those that are not in use have none."""
    text, expected = TABLES[case]
    found = blocks.table(text)
    if case == "no numbers":
        assert "ram0" not in [block.name for block in found]
    else:
        assert found == expected


LARGE = 4 << 20


@pytest.fixture
def two_blocks() -> Iterator[tuple[Block, Block]]:
    """Large ones of this process, private and shared, with something on the third page."""
    made = []
    for name, flags in (("own", mmap.MAP_PRIVATE), ("shared", mmap.MAP_SHARED)):
        memory = mmap.mmap(-1, LARGE, flags | mmap.MAP_ANONYMOUS)
        memory[2 * 4096] = 1
        made.append((name, memory))
    at = [ctypes.addressof(ctypes.c_char.from_buffer(memory)) for _, memory in made]
    yield (Block("own", LARGE, LARGE, at[0]), Block("shared", LARGE, LARGE, at[1]))
    made.clear()  # until here they are mapped


def test_pages_of_large_blocks(two_blocks: tuple[Block, Block]) -> None:
    """Only for private memory the page map is taken to tell what is there."""
    sparse = blocks.sparse(os.getpid(), list(two_blocks))
    assert sparse == {"own"}
    found = list(blocks.pages(blocks.pieces(os.getpid(), list(two_blocks), sparse)))
    own = {offset: page for name, offset, page in found if name == "own"}
    shared = {offset: page for name, offset, page in found if name == "shared"}
    assert own[2 * 4096] == shared[2 * 4096] == b"\1" + bytes(4095)
    assert len(own) < LARGE // 4096 == len(shared)
    # Where one is not told of, the destination may have another.
    assert blocks.zeros(list(two_blocks), sparse) == [("own", LARGE // 4096)]


def test_page_map_that_ends_early() -> None:
    """What it does not tell of is not taken for zeros."""
    block = Block("far", LARGE, LARGE, (1 << 47) - (2 << 12))
    with pytest.raises(OSError, match="not all in the page map"):
        list(blocks.pieces(os.getpid(), [block], {"far"}))


def test_what_has_changed() -> None:
    """By what was sent before and what is sent then the other side has what is there now: also of
    pages that are told of in one of them only, as QEMU has touched them since, or dropped them."""
    a, b, zeros = b"a" * 4096, b"b" * 4096, bytes(4096)
    before = [("bios", 0, a + b + zeros), ("vga", 0, a + b), ("vga", 16 << 12, a)]
    for now, expected in [
        (before, []),
        ([("bios", 0, a + a + zeros), *before[1:]], [("bios", 4096, a)]),
        ([("bios", 0, zeros + b + zeros), *before[1:]], [("bios", 0, b"")]),
        (before[:2], [("vga", 16 << 12, b"")]),
        ([before[0], ("vga", 4096, b + a + zeros), before[2]], [("vga", 8192, a), ("vga", 0, b"")]),
        ([before[0]], [("vga", 0, b""), ("vga", 4096, b""), ("vga", 16 << 12, b"")]),
    ]:
        assert list(blocks.changed(before, now)) == expected


def test_private_mapping_of_a_file_with_large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is none of hugetlbfs: the guest's memory is mixed with the file's."""
    mapping = procfs.Mapping(1 << 30, 2 << 30, False, True, 0, (7, 1), "/mnt/ram")
    of_a_server = type("", (), {"f_bsize": 2 << 20})()
    monkeypatch.setattr(procfs, "file_system", lambda pid, file: "nfs4")
    monkeypatch.setattr(os, "statvfs", lambda path: of_a_server)
    block = Block("ram0", 1 << 30, 1 << 30, 1 << 30)
    backend = ram.Backend("ram0", "memory-backend-file", 1 << 30, False, block)
    said = ram._region(backend, os.getpid(), [mapping])
    assert isinstance(said, str)
    assert "private mapping of a file" in said
