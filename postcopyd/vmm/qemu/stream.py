# SPDX-License-Identifier: Apache-2.0
"""QEMU's device state stream: a socket pair between QEMU and this process, and its pumps.

Knows how to lend QEMU one end and to move bytes to and from the other. Knows neither what the bytes
mean nor when the stream is good; the driver learns that from events.
"""

from __future__ import annotations

import fcntl
import socket
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import trio

from postcopyd.vmm.qemu.qmp import Qmp

STREAM = "postcopyd"  # the name under which QEMU gets its end
URI = f"fd:{STREAM}"
CHUNK = 256 << 10
# Holds the device state of most guests, so that QEMU need not wait while its guest is stopped: with
# the kernel's 208 KiB the save took 2.9 ms and not 1-1.5.
BUFFER = 4 << 20
LOOK_S = 0.001  # between two looks whether QEMU has taken the rest of what it was sent
SPIN_S = 0.003  # so long it looks without a pause first, as the guest stands still meanwhile
SIOCOUTQ = 0x5411  # unix(7)
SO_SNDBUFFORCE = 32  # socket(7); beyond net.core.wmem_max, for CAP_NET_ADMIN


def _widen(end: socket.socket) -> None:
    try:
        end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER)
    except PermissionError:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)


@asynccontextmanager
async def opened(qmp: Qmp) -> AsyncIterator[trio.socket.SocketType]:
    """Lends one end of a socket pair to QEMU, as URI. Yields the other, and closes it at the end.

    That makes QEMU fail a migration that it still writes, or a load that it still reads.
    """
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        _widen(end)
    with trio.socket.from_stdlib_socket(ours) as mine:
        with theirs:
            await qmp.execute("getfd", {"fdname": STREAM}, fd=theirs.fileno())
        yield mine


async def feed(
    ours: trio.socket.SocketType,
    receive: AsyncIterable[bytes],
    begun: Callable[[], Awaitable[None]],
    holds: Callable[[], bool],
    before_the_last: Callable[[], Awaitable[None]],
) -> None:
    """Writes to QEMU until `receive` ends, then ends the stream.

    `begun` is awaited once QEMU has taken the first piece, and before it gets the next. If `holds`
    says so then, the last byte is held back until QEMU has taken all others and `before_the_last`
    has returned. A QEMU that stops reading says why by an event or by its own end; here the rest is
    dropped.
    """
    held, broken, first = b"", False, True
    async for piece in receive:
        data = held + piece
        broken = broken or not await _send(ours, data[:-1])
        held = data[-1:]
        if first and not broken:
            await _taken(ours)
            await begun()
        first = False
    if broken:
        return
    if holds():
        await _all_read(ours)
        await before_the_last()
    if await _send(ours, held):
        with suppress(OSError):
            ours.shutdown(socket.SHUT_WR)


async def _send(ours: trio.socket.SocketType, data: bytes) -> bool:
    """Returns whether QEMU still has its end open."""
    view = memoryview(data)
    try:
        while view:
            view = view[await ours.send(view) :]
    except OSError:
        return False
    return True


async def _all_read(ours: trio.socket.SocketType) -> None:
    """Returns when QEMU has taken what it was sent. With the smallest buffer, the kernel calls a
    socket writable once almost nothing is left in it. For that rest a timer would be too slow at
    first: the loop's have whole milliseconds, for which the guest would stand still. But QEMU may
    also wait for a page before it takes the rest."""
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    if _unread(ours):
        await trio.lowlevel.wait_writable(ours)
    await _taken(ours)


async def _taken(ours: trio.socket.SocketType) -> None:
    spinning = time.monotonic() + SPIN_S
    while _unread(ours):
        if time.monotonic() < spinning:
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep(LOOK_S)


def _unread(ours: trio.socket.SocketType) -> int:
    """Bytes that QEMU has not taken. A QEMU that has ended takes none."""
    left = bytearray(4)
    fcntl.ioctl(ours.fileno(), SIOCOUTQ, left)
    return int.from_bytes(left, "little")
