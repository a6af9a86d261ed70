# SPDX-License-Identifier: Apache-2.0
"""QEMU's device state stream: a socket pair between QEMU and us, and who pumps it.

Knows how to lend QEMU one end and to move bytes to and from the other. Knows nothing of what the
bytes mean, nor when the stream is good; the driver learns that from events.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio

from postcopyd.vmm.qmp import Qmp

STREAM = "postcopyd"  # the name under which QEMU gets its end
CHUNK = 256 << 10
# Holds the device state of most guests, so that QEMU never waits for us while its guest is stopped:
# with the kernel's 208 KiB the save took 2.9 ms and not 1-1.5.
BUFFER = 4 << 20
SO_SNDBUFFORCE = 32  # socket(7); beyond net.core.wmem_max, for CAP_NET_ADMIN


def _widen(end: socket.socket) -> None:
    try:
        end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER)
    except PermissionError:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)


@asynccontextmanager
async def opened(
    qmp: Qmp, command: str, arguments: dict[str, Any]
) -> AsyncIterator[trio.socket.SocketType]:
    """Run a migration command on one end of a socket pair and give the other, closed at the end.

    Closing makes a QEMU that still writes fail its migration, and one that still reads its load.
    """
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        _widen(end)
    with trio.socket.from_stdlib_socket(ours) as mine:
        with theirs:
            await qmp.execute("getfd", {"fdname": STREAM}, fd=theirs.fileno())
        await qmp.execute(command, {"uri": f"fd:{STREAM}"} | arguments)
        yield mine


async def relay(ours: trio.socket.SocketType, send: Callable[[bytes], Awaitable[None]]) -> None:
    """Give to `send` what QEMU writes, until it closes its end."""
    while data := await ours.recv(CHUNK):
        await send(data)


async def feed(ours: trio.socket.SocketType, receive: AsyncIterable[bytes]) -> None:
    """Write to QEMU until `receive` ends, then end the stream.

    A QEMU that stops reading says why by an event or by its own end; here the rest is dropped.
    """
    broken = False
    async for data in receive:
        view = memoryview(data)
        while view and not broken:
            try:
                view = view[await ours.send(view) :]
            except OSError:
                broken = True
    with suppress(OSError):
        ours.shutdown(socket.SHUT_WR)


@asynccontextmanager
async def crew() -> AsyncIterator[trio.Nursery]:
    """A nursery whose only failure is raised as itself, not as a group of one."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        only: BaseException = group
        while isinstance(only, BaseExceptionGroup) and len(only.exceptions) == 1:
            only = only.exceptions[0]
        raise only from only.__cause__
