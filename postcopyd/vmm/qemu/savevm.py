# SPDX-License-Identifier: Apache-2.0
"""The device state of a guest: from what QEMU saves to what a waiting QEMU loads.

`xen-save-devices-state` (every build has it, and nothing of Xen is needed) saves the state of all
devices, and no RAM. It is a migration stream without its beginning: QEMU's migration/savevm.c has
the sections, migration/ram.c those of RAM. `stream` makes a whole one of it, by which the memory of
small RAM blocks crosses, and none of guest RAM: a block that is named without pages is left as it
is. QEMU itself compares names and sizes of all blocks with its own when it loads that.

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
EOF, SECTION_START, SECTION_END, FULL, DESCRIPTION, CONFIGURATION = 0, 1, 3, 4, 6, 7
FOOTER = 0x7E
# What a record of RAM is, in its lowest bits; CONTINUE: of the same block as the record before.
ZERO, SIZES, WHOLE, END, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
RAM_VERSION = 4
RAM = 1 << 30  # the section's number: no other section's, and not 0, which those have before theirs

#: Section globalstate: its name, instance and version; then the length of a run state's name, and
#: the name. What follows of the section says, since 9.0, whether the guest slept (S3).
GLOBALSTATE = b"\x0bglobalstate" + struct.pack(">II", 0, 1)
RUN_STATE = struct.Struct(">I32s")


def stream(
    machine: str,
    sizes: Iterable[tuple[str, int]],
    pages: Iterable[tuple[str, int, bytes | int]],
    saved: bytes,
) -> Iterator[bytes]:
    """The rest of the stream, after `BEGIN`: `sizes` of all blocks by name, in bytes; `pages` of
    some, each with its offset, or how many pages of zeros begin there. Raises VmmError for what is
    no device state."""
    if not saved.startswith(BEGIN) or not saved.endswith(bytes([EOF])):
        raise VmmError("QEMU has saved something else than the state of its devices")
    kind = machine.encode()
    yield struct.pack(">BI", CONFIGURATION, len(kind)) + kind
    blocks = list(sizes)
    total = sum(size for _, size in blocks)
    if total >= 1 << 63:
        raise VmmError(f"QEMU has {total} bytes of RAM, it says")
    yield b"".join(
        [
            struct.pack(">BI", SECTION_START, RAM) + _counted("ram"),
            struct.pack(">II", 0, RAM_VERSION),
            struct.pack(">Q", total | SIZES),
            *(_counted(name) + struct.pack(">Q", size) for name, size in blocks),
            struct.pack(">Q", END),
            struct.pack(">BI", FOOTER, RAM),
            struct.pack(">BI", SECTION_END, RAM),
        ]
    )
    for name, offset, page in pages:
        if isinstance(page, bytes):
            yield struct.pack(">Q", offset | WHOLE) + _counted(name) + page
        else:
            yield struct.pack(">Q", offset | ZERO) + _counted(name) + b"\0"
            yield _zeros(offset + PAGE, page - 1)
    yield struct.pack(">Q", END) + struct.pack(">BI", FOOTER, RAM)
    yield saved[len(BEGIN) :]
    yield struct.pack(">BI", DESCRIPTION, 0)


def _zeros(offset: int, count: int) -> bytes:
    """Records of so many pages. A display has thousands, and the guest stands still meanwhile."""
    words = array("Q", range(offset | ZERO | CONTINUE, offset + count * PAGE, PAGE))
    if sys.byteorder == "little":
        words.byteswap()
    raw, records = words.tobytes(), bytearray(count * 9)
    for byte in range(8):
        records[byte::9] = raw[byte::8]
    return bytes(records)


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
