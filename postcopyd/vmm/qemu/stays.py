# SPDX-License-Identifier: Apache-2.0
"""What stays behind when a guest of QEMU is moved, though the guest goes on without it.

QEMU's own migration leaves the same behind, unless it was told of it (capability dirty-bitmaps,
`client_migrate_info`). Only asks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from msgspec import Struct

from postcopyd.vmm.qemu.qmp import Qmp, QmpRefused


class _Bitmap(Struct):
    name: str = ""  # one without a name is a job's
    persistent: bool = False


class _Node(Struct, rename="kebab"):
    """One of query-named-block-nodes."""

    node_name: str
    dirty_bitmaps: list[_Bitmap] = []


class _Spice(Struct):
    """query-spice."""

    channels: list[Any] = []


async def sentences(qmp: Qmp) -> AsyncIterator[str]:
    """What it is, and what to do about it."""
    for node in await qmp.ask(list[_Node], "query-named-block-nodes", {"flat": True}):
        for bitmap in node.dirty_bitmaps:
            if bitmap.name and not bitmap.persistent:
                yield (
                    f"The dirty bitmap '{bitmap.name}' of block node '{node.node_name}' is in no "
                    f"image (persistent=off) and stays behind: the next incremental backup that "
                    f"would use it has to be a full one."
                )
    try:
        spice = await qmp.ask(_Spice, "query-spice")
    except QmpRefused:  # this QEMU has none
        return
    if spice.channels:
        yield (
            "A client of SPICE is connected, and is not told where the guest goes: connect it anew "
            "at the destination."
        )
