# SPDX-License-Identifier: Apache-2.0
"""What tests of the process driver share: a driver that is closed, and device state in memory."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio

from postcopyd.vmm.process.driver import ProcessVmm
from postcopyd.vmm.process.exchange import Limits

QUICK = Limits(
    hello=0.5, answer=0.5, called_off=0.2, save=0.5, load=0.5, quit=0.5, state_bytes=1 << 20
)


async def save_all(vmm: ProcessVmm) -> bytes:
    pieces: list[bytes] = []
    stops: list[float] = []

    async def send(piece: bytes) -> None:
        assert stops, "device state before the stop"
        pieces.append(piece)

    await vmm.save(send, lambda: stops.append(trio.current_time()))
    assert len(stops) == 1
    return b"".join(pieces)


async def pieces_of(state: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for at in range(0, len(state), size):
        yield state[at : at + size]


@contextlib.asynccontextmanager
async def driver(socket_path: object, limits: Limits | None = None) -> AsyncIterator[ProcessVmm]:
    vmm = await ProcessVmm.connect("web1", str(socket_path), limits)
    try:
        yield vmm
    finally:
        await vmm.aclose()
