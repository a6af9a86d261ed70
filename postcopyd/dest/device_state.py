# SPDX-License-Identifier: Apache-2.0
"""Device state between the control connection, from which it comes, and the VMM, which loads it.

A VMM that loads may wait for a page of guest RAM, which the source sends only once it has given all
of the device state. So who receives never waits for who loads: what the VMM does not take yet is
kept, up to a limit that tells of a VMM which takes nothing.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import suppress
from types import TracebackType

import trio

from postcopyd.errors import PostcopydError

MOST_WAITING = 1 << 30
"""Bytes that wait. A QEMU has some hundred KiB of device state, and with memory of graphics cards
some hundred MiB."""


class DeviceState:
    """`put` by one task within `with`, whose end is the end of the state; iterated by another."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._in, self._out = trio.open_memory_channel[bytes](math.inf)
        self._waiting = 0

    def put(self, data: bytes) -> None:
        """Raises PostcopydError for what is too much. A load that has failed says so itself."""
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
