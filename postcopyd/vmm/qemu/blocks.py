# SPDX-License-Identifier: Apache-2.0
"""QEMU's RAM blocks: all memory that a guest of it has, by name, and where each is.

Guest RAM is some of them. The others are small (firmware, option ROMs, ACPI tables, the memory of a
display) and cross with the device state (savevm.py). Only asks.

From 8.0 on QEMU tells the address of each block. An older one tells where it has mapped which
block for the guest, and the address of what the guest has at a place: so blocks that the guest
has not mapped have no address here.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from postcopyd.host import procfs
from postcopyd.vmm.qemu.answers import Text
from postcopyd.vmm.qemu.qmp import Qmp, QmpRefused

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{1,16}")
_MAPPED = re.compile(
    r" +(?P<at>[0-9a-f]{16})-[0-9a-f]{16} \(prio -?\d+, (?:nv-)?(?:ram|rom|romd|ramd)\): "
    r"(?P<name>.+?)(?: @(?P<offset>[0-9a-f]{16}))?(?: KVM)?"
)
_HOST = re.compile(r"Host virtual address for \S+ \((?P<name>.+)\) is (?P<address>0x[0-9a-f]+)")


DEVICE_STATE = "device state (one version of postcopyd on both hosts has it alike)"
"""The fact by which an older version, which has another way, is refused."""

PAGE = 4096
PIECE_PAGES = 64
SPARSE = 1 << 20
"""Of a larger block of QEMU's own only what QEMU has ever touched is read: the memory of a display
is 16 MiB of next to nothing."""


@dataclass(frozen=True)
class Block:
    """One of them; sizes in bytes."""

    name: str
    used: int
    total: int
    address: int | None  # in QEMU's address space; None: it could not be learned


async def blocks(qmp: Qmp) -> list[Block]:
    """All that have a name: others are not in use."""
    found = table((await qmp.ask(Text, "x-query-ramblock")).human_readable_text)
    if found and all(block.address is None for block in found):
        addresses = await _mapped(qmp)
        found = [
            Block(block.name, block.used, block.total, _only(block.name, found, addresses))
            for block in found
        ]
    return found


def table(text: str) -> list[Block]:
    """The rows of `x-query-ramblock`. The column HVA came with 8.0, RO with 8.1."""
    head, *lines = text.splitlines() or [""]
    titles = head.partition("PSize")[2].split()
    found = []
    for line in lines:
        name, *row = line.rsplit(None, len(titles) + 2) or [""]
        values = dict(zip(titles, row[2:], strict=False))  # a page size is two words
        used, total, address = (values.get(title, "") for title in ("Used", "Total", "HVA"))
        if _ADDRESS.fullmatch(used) and _ADDRESS.fullmatch(total) and len(row) == len(titles) + 2:
            at = int(address, 16) if _ADDRESS.fullmatch(address) else None
            found.append(Block(name.strip(), int(used, 16), int(total, 16), at))
    return found


def _only(name: str, found: list[Block], addresses: dict[str, int]) -> int | None:
    """The address of what the guest has mapped under this name, which lacks the path of its device.
    None also where another block may be meant."""
    short = name.rpartition("/")[2] if not name.startswith("/") else name
    alike = [block for block in found if block.name == short or block.name.endswith("/" + short)]
    return addresses.get(name, addresses.get(short)) if len(alike) == 1 else None


async def _mapped(qmp: Qmp) -> dict[str, int]:
    """Memory by its name, to the address of its first byte in QEMU."""
    try:
        views = await _human(qmp, "info mtree -f")
    except QmpRefused:
        return {}
    places: dict[str, list[tuple[int, int]]] = {}  # the firmware's is in two, and leaves one
    seen: dict[str, int] = {}
    ours = False
    for line in views.splitlines():
        if line.startswith("FlatView"):
            ours = False
        elif line.startswith(' AS "memory"'):
            ours = True
        elif ours and (row := _MAPPED.fullmatch(line)) is not None:
            place = (int(row["at"], 16), int(row["offset"] or "0", 16))
            places.setdefault(row["name"], []).append(place)
    for name, found in places.items():
        for at, offset in found:
            said = _HOST.search(await _human(qmp, f"gpa2hva {at:#x}"))
            if said is not None and said["name"] == name:
                seen[name] = int(said["address"], 16) - offset
                break  # otherwise other memory is there now
    return seen


async def _human(qmp: Qmp, line: str) -> str:
    return await qmp.ask(str, "human-monitor-command", {"command-line": line})


def facts(present: list[Block], guest_ram: set[str]) -> dict[str, str]:
    """What both hosts must have alike of the small blocks. Those that QEMU makes of files for the
    guest's firmware (ACPI tables and the like) may differ in size: QEMU takes the guest's."""
    small = (block for block in present if block.name not in guest_ram)
    return {DEVICE_STATE: "saved by xen-save-devices-state"} | {
        f"memory '{block.name}'": f"{block.used} bytes"
        for block in small
        if not block.name.startswith("/rom@")
    }


def unknown(present: list[Block], guest_ram: set[str]) -> list[str]:
    """A sentence for each block that would stay behind, as its address is not known. ROMs may: each
    QEMU makes them of its own files."""
    return [
        f"QEMU does not say where it has the memory '{block.name}', which would stay behind: one "
        f"before 8.0 tells only of what the guest has mapped, and not which of two it is. Migrate "
        f"when the guest has booted, or take the device that has it from the guest."
        for block in present
        if block.address is None and block.name not in guest_ram
        if not block.name.startswith("/rom@") and not block.name.endswith(".rom")
    ]


def sparse(pid: int, present: list[Block]) -> set[str]:
    """Names of the large blocks whose pages the kernel's page map shows, all of them: private
    memory. Shared memory may have a page that was swapped out and is not there. Raises OSError."""
    own = [m for m in procfs.mappings(pid) if m.file == (0, 0) and not m.shared]
    return {
        block.name
        for block in present
        if block.address is not None and block.used > SPARSE
        if any(m.start <= block.address and block.address + block.used <= m.end for m in own)
    }


def zeros(small: list[Block], sparse: set[str]) -> list[tuple[str, int]]:
    """The blocks of which `pieces` leaves out zeros, and how many pages each has."""
    return [(block.name, _count(block)) for block in small if block.name in sparse]


Piece = tuple[str, int, bytes]
"""What is in one block: its name, the offset, whole pages."""


def pieces(pid: int, small: list[Block], sparse: set[str]) -> Iterator[Piece]:
    """What is in these blocks. Of sparse ones only what was ever touched: all else has zeros.
    Raises OSError."""
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for block in small:
            if block.address is None:
                continue
            whole = [(0, _count(block))]
            for first, count in _touched(pagemap, block) if block.name in sparse else whole:
                for at in range(first, first + count, PIECE_PAGES):
                    size = min(PIECE_PAGES, first + count - at) * PAGE
                    data = os.pread(memory, size, block.address + at * PAGE)
                    if len(data) < size:
                        raise OSError(errno.EFAULT, f"{block.name} is not all there")
                    yield block.name, at * PAGE, data
    finally:
        os.close(memory)
        os.close(pagemap)


def pages(found: Iterable[Piece]) -> Iterator[Piece]:
    """The same page by page; one of zeros is empty."""
    for name, offset, data in found:
        for at in range(0, len(data), PAGE):
            page = data[at : at + PAGE]
            yield name, offset + at, b"" if page == _ZEROS else page


def changed(before: list[Piece], now: list[Piece]) -> Iterator[Piece]:
    """The pages, as `pages` has them, by which `now` differs from `before`. What only one of them
    tells of has zeros in the other."""
    if [(name, offset, len(data)) for name, offset, data in before] == [
        (name, offset, len(data)) for name, offset, data in now
    ]:
        differ = [i for i, piece in enumerate(now) if piece[2] != before[i][2]]
        before, now = [before[i] for i in differ], [now[i] for i in differ]
    known = {(name, offset): page for name, offset, page in pages(before)}
    for name, offset, page in pages(now):
        if known.pop((name, offset), b"") != page:
            yield name, offset, page
    yield from ((name, offset, b"") for (name, offset), page in known.items() if page)


_ZEROS = bytes(PAGE)


def _count(block: Block) -> int:
    return -(-block.used // PAGE)


def _touched(pagemap: int, block: Block) -> Iterator[tuple[int, int]]:
    """Runs of pages that are there, swapped ones too: the first, and how many."""
    size = _count(block) * ENTRY
    assert block.address is not None
    entries = os.pread(pagemap, size, block.address // PAGE * ENTRY)
    if len(entries) < size:  # or what is not told of would be taken for zeros
        raise OSError(errno.EFAULT, f"{block.name} is not all in the page map")
    for run in _THERE.finditer(entries[ENTRY - 1 :: ENTRY]):
        yield run.start(), run.end() - run.start()


ENTRY = 8  # bytes for a page in /proc/PID/pagemap: bit 63 is set of one in memory, 62 in swap
_THERE = re.compile(rb"[\x40-\xff]+")  # of their last bytes
