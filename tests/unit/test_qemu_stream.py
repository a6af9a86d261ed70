# SPDX-License-Identifier: Apache-2.0
"""Who feeds a QEMU that loads: the last byte is held back until all others were taken, where
something is to be done then, and that is seen when it happens."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import pytest
import trio

from postcopyd.vmm.qemu import stream


@pytest.mark.parametrize("pieces", [[b"x" * 300_000], [b"x" * 300_000, b"y"], [b"z"], []])
async def test_the_last_byte_waits_until_all_others_were_taken(pieces: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    everything, taken = b"".join(pieces), bytearray()
    at_the_first: list[int] = []
    at_the_last: list[int] = []

    async def receive() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def begun() -> None:
        at_the_first.append(len(taken))

    async def before_the_last() -> None:
        at_the_last.append(len(taken))

    async def qemu() -> None:
        data = b"-"
        while data:
            await trio.lowlevel.wait_readable(theirs)
            data = theirs.recv(32 << 10)  # and noted with nobody in between
            taken.extend(data)

    with trio.fail_after(30), theirs, trio.socket.from_stdlib_socket(ours) as mine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qemu)
            await stream.feed(mine, receive(), begun, lambda: True, before_the_last)
    assert bytes(taken) == everything
    assert at_the_last == [max(len(everything) - 1, 0)]
    assert at_the_first == [len(pieces[0]) - 1 for _ in pieces[:1]]


async def test_a_qemu_that_has_ended_takes_the_rest() -> None:
    """It goes on then: what has become of that QEMU is said by others."""
    ours, theirs = socket.socketpair()
    called: list[str] = []

    async def receive() -> AsyncIterator[bytes]:
        yield b"x" * 50_000

    async def qemu() -> None:
        await trio.lowlevel.wait_readable(theirs)
        theirs.close()

    async def begun() -> None:
        called.append("begun")

    async def before_the_last() -> None:
        called.append("the last")

    with trio.fail_after(30), trio.socket.from_stdlib_socket(ours) as mine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qemu)
            await stream.feed(mine, receive(), begun, lambda: True, before_the_last)
    assert called == ["begun", "the last"]


async def test_nothing_is_held_back_for_nothing() -> None:
    """A QEMU that waits for a page takes the rest later, and the guest stands still meanwhile."""
    ours, theirs = socket.socketpair()

    async def receive() -> AsyncIterator[bytes]:
        yield b"x"
        yield b"y" * 50_000

    async def begun() -> None:
        pass

    async def before_the_last() -> None:
        raise AssertionError

    with trio.fail_after(30), theirs, trio.socket.from_stdlib_socket(ours) as mine:
        await stream.feed(mine, receive(), begun, lambda: False, before_the_last)
        taken = b""
        while data := theirs.recv(1 << 20):
            taken += data
    assert taken == b"x" + b"y" * 50_000
