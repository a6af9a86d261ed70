# SPDX-License-Identifier: Apache-2.0
"""The device state of a guest: from what QEMU saves to what a waiting QEMU loads.

`xen-save-devices-state` (every build has it, and nothing of Xen is needed) saves the state of all
devices, and no RAM. It is a migration stream without its beginning: QEMU's migration/savevm.c has
the sections, migration/ram.c those of RAM. A whole one is `opening`, `memory` and `devices`. By it
the memory of small RAM blocks crosses, and none of guest RAM: a block that is named without pages
is left as it is. QEMU itself compares names and sizes of all blocks with its own at the load.

Knows bytes alone. What QEMU writes is the guest's as soon as the guest has taken QEMU over: it is
looked at for two marks, and otherwise passed on as it is.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator

from postcopyd.vmm import VmmError

PAGE = 4096
BEGIN = b"QEVM" + (3).to_bytes(4, "big")
EOF, CONFIGURATION, DESCRIPTION = 0, 7, 6
SECTION_START, SECTION_PART, SECTION_END, FULL = 1, 2, 3, 4
FOOTER = 0x7E
# What a record of RAM is, in its lowest bits; CONTINUE: of the same block as the record before.
ZERO, SIZES, WHOLE, END, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
RAM_VERSION = 4
RAM = 1 << 30  # the section's number: no other section's, and not 0, which those have before theirs

#: Section globalstate: its name, instance and version; then the length of a run state's name, and
#: the name. What follows of the section says, since 9.0, whether the guest slept (S3).
GLOBALSTATE = b"\x0bglobalstate" + struct.pack(">II", 0, 1)
RUN_STATE = struct.Struct(">I32s")


def opening(
    machine: str, sizes: Iterable[tuple[str, int]], zeros: Iterable[tuple[str, int]]
) -> bytes:
    """The beginning, which can be loaded while the guest still runs: `sizes` of all blocks by name,
    in bytes; blocks that are to have zeros where `memory` names no page, and how many pages each
    has. Raises VmmError for sizes and names that QEMU cannot have."""
    kind = machine.encode()
    blocks = list(sizes)
    total = sum(size for _, size in blocks)
    if total >= 1 << 63:
        raise VmmError(f"QEMU has {total} bytes of RAM, it says")
    return b"".join(
        [
            BEGIN,
            struct.pack(">BI", CONFIGURATION, len(kind)) + kind,
            struct.pack(">BI", SECTION_START, RAM) + _counted("ram"),
            struct.pack(">II", 0, RAM_VERSION),
            struct.pack(">Q", total | SIZES),
            *(_counted(name) + struct.pack(">Q", size) for name, size in blocks),
            END_OF_SECTION,
            struct.pack(">BI", SECTION_PART, RAM),
            *(_zeros(name, count) for name, count in zeros),
            END_OF_SECTION,
        ]
    )


END_OF_SECTION = struct.pack(">QBI", END, FOOTER, RAM)


def memory(pages: Iterable[tuple[str, int, bytes]], kind: int = SECTION_END) -> Iterator[bytes]:
    """What follows: `pages` of blocks, each with its offset; an empty one has zeros. Any number of
    SECTION_PART, then one SECTION_END; the last word on a page is right."""
    yield struct.pack(">BI", kind, RAM)
    for name, offset, page in pages:
        if page:
            yield struct.pack(">Q", offset | WHOLE) + _counted(name) + page
        else:
            yield struct.pack(">Q", offset | ZERO) + _counted(name) + b"\0"
    yield END_OF_SECTION


def devices(saved: bytes) -> bytes:
    """The rest, of what QEMU has saved. Raises VmmError for what is no device state."""
    if not saved.startswith(BEGIN) or not saved.endswith(bytes([EOF])):
        raise VmmError("QEMU has saved something else than the state of its devices")
    return saved[len(BEGIN) :] + struct.pack(">BI", DESCRIPTION, 0)


def _zeros(name: str, count: int) -> bytes:
    """Records of all pages of a block, with zeros. A display has thousands."""
    words = array("Q", range(PAGE | ZERO | CONTINUE, count * PAGE, PAGE))
    if sys.byteorder == "little":
        words.byteswap()
    raw, records = words.tobytes(), bytearray(len(words) * 9)
    for byte in range(8):
        records[byte::9] = raw[byte::8]
    return struct.pack(">Q", ZERO) + _counted(name) + b"\0" + records


def with_run_state(saved: bytes, run_state: str) -> bytes:
    """The same with what the guest did before it was stopped: as saved, it always ran. Raises
    VmmError where this QEMU does not say it in the way that is known."""
    at = saved.find(GLOBALSTATE) + len(GLOBALSTATE)
    known = at >= len(GLOBALSTATE) and saved.find(GLOBALSTATE, at) < 0
    known = known and len(saved) >= at + RUN_STATE.size
    length, name = RUN_STATE.unpack_from(saved, at) if known else (0, b"")
    if length != len(b"running\0") or not name.startswith(b"running\0"):
        raise VmmError("QEMU has saved the state of its devices in a way that is not known")
    said = run_state.encode() + b"\0"
    return saved[:at] + RUN_STATE.pack(len(said), said) + saved[at + RUN_STATE.size :]


def _counted(name: str) -> bytes:
    """A name after its length. Raises VmmError for one that QEMU cannot have."""
    said = name.encode()
    if len(said) > 255:
        raise VmmError(f"QEMU has RAM with a name of {len(said)} bytes")
    return bytes([len(said)]) + said
