# SPDX-License-Identifier: Apache-2.0
"""A queue for device state, from the control connection to the VMM that loads it.

A VMM that loads may wait for a page of guest RAM, and the source sends no such page before it has
sent all device state. So the task that receives never waits for the task that loads: what the VMM
has not taken yet is kept. If that exceeds a limit, the VMM takes nothing.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import suppress
from types import TracebackType

import trio

from postcopyd.errors import PostcopydError

MOST_WAITING = 1 << 30
"""Bytes that may wait. A QEMU has some hundred KiB of device state, with the memory of graphics
cards some hundred MiB."""


class DeviceState:
    """One task calls `put` within `with`, whose end is the end of the state; another iterates."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._in, self._out = trio.open_memory_channel[bytes](math.inf)
        self._waiting = 0

    def put(self, data: bytes) -> None:
        """Raises PostcopydError if too much waits. A load that has failed tells of that itself."""
        if self._waiting + len(data) > MOST_WAITING:
            raise PostcopydError(
                f"the VMM of {self._name} here takes no more device state, and "
                f"{MOST_WAITING >> 20} MiB of it wait: see its own log, and start it anew",
                "NoMemory",
            )
        with suppress(trio.BrokenResourceError):
            self._in.send_nowait(data)
            self._waiting += len(data)

    def __enter__(self) -> DeviceState:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._in.close()

    async def taken(self) -> AsyncGenerator[bytes, None]:
        """The pieces in their order, until the end."""
        with self._out:
            async for piece in self._out:
                self._waiting -= len(piece)
                yield piece
