# SPDX-License-Identifier: Apache-2.0
"""Connections between the daemons that break, at any byte: the guest is in one place only."""

from __future__ import annotations

import itertools
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import msgpack
import pytest
import trio
from pair import (
    LARGE,
    MIB,
    Host,
    Pair,
    ProcessGuest,
    again,
    connected,
    filled,
    state,
    status_until,
    verified,
    worked,
)

from postcopyd import protocol as p


class Wire:
    """A way to a daemon that can be cut: passes on what the source sends, and keeps a record of it.

    `limit` has for a kind of connection (control, urgent, push) how many bytes of it pass; then
    all connections are cut, once. `spoil` may change bytes before they are passed on.
    """

    def __init__(self, to: Host, nursery: trio.Nursery) -> None:
        self.to = to
        self.limit: dict[str, int] = {}
        self.spoil: Callable[[str, bytes], bytes] = lambda _, data: data
        self.sent = {kind: bytearray() for kind in ("control", "urgent", "push")}
        self.address = ""
        self._nursery = nursery
        self._streams: list[trio.SocketStream] = []

    async def open(self) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.address = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        self._nursery.start_soon(trio.serve_listeners, self._serve, listeners)

    async def _serve(self, source: trio.SocketStream) -> None:
        destination = await connected(self.to)
        self._streams += [source, destination]
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with source, destination, trio.open_nursery() as nursery:
                nursery.start_soon(self._pass_on, destination, source, "")
                first = await source.receive_some(16)
                kind = "control"
                if p.DATA.encode().startswith(first[1:]) or p.DATA.encode() in first:
                    kind = "push" if self.sent["urgent"] else "urgent"
                await self._send(destination, first, kind)
                await self._pass_on(source, destination, kind)
                nursery.cancel_scope.cancel()

    async def _pass_on(self, a: trio.SocketStream, b: trio.SocketStream, kind: str) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await a.receive_some(65536):
                await self._send(b, bytes(data), kind)
        await trio.aclose_forcefully(b)

    async def _send(self, to: trio.SocketStream, data: bytes, kind: str) -> None:
        if not kind:
            await to.send_all(data)
            return
        left = self.limit.get(kind, 1 << 60) - len(self.sent[kind])
        self.sent[kind] += data[:left]
        await to.send_all(self.spoil(kind, data[:left]))
        if len(data) >= left:
            self.cut()

    def cut(self) -> None:
        """All connections that there are now."""
        self.limit = {}
        for stream in self._streams:
            # The end comes after what was sent, as when a daemon dies.
            with suppress(OSError, trio.ClosedResourceError, trio.BrokenResourceError):
                stream.socket.shutdown(socket.SHUT_RDWR)
        self._streams.clear()


@asynccontextmanager
async def wire(to: Host) -> AsyncIterator[Wire]:
    async with trio.open_nursery() as nursery:
        made = Wire(to, nursery)
        await made.open()
        yield made
        nursery.cancel_scope.cancel()


async def in_one_place(pair: Pair, name: str, here: ProcessGuest, there: ProcessGuest) -> str:
    """Both sides have come to rest and agree about who has the guest; says where it is."""
    a, b = pair
    source = await status_until(a, name, lambda status: status["phase"] in ("failed", "drained"))
    if source["phase"] == "drained":
        await status_until(b, name, lambda status: status["phase"] == "drained")
        await worked(there, 100)
        await verified(there)
        return "destination"
    await worked(here, 100)
    await verified(here)
    await status_until(b, name, lambda status: status["phase"] in ("failed", "idle"))
    assert await state(there) in ("incoming", "ended")
    return "source"


async def test_cut_at_any_moment(pair: Pair) -> None:
    """Wherever in its control connection a migration is cut, the guest is in one place only."""
    a, b = pair
    numbers = itertools.count()

    async def move(limit: int | None) -> tuple[str, bytes]:
        """Again, if the host was so busy that a keepalive came between, which moves the place."""
        where, stream = "", b"keepalive"
        while b"keepalive" in stream:
            where, stream = await moved(limit)
        return where, stream

    async def moved(limit: int | None) -> tuple[str, bytes]:
        name, here, there = await pair.place(name=f"cut{next(numbers):03}")
        async with wire(b) as one:
            one.limit = {} if limit is None else {"control": limit}
            started = await a.call("Migrate", name=name, to=one.address)
            await a.result(name, started["migration"])
            where = await in_one_place(pair, name, here, there)
        here.kill()
        there.kill()
        return where, bytes(one.sent["control"])

    where, stream = await move(None)
    assert where == "destination"
    unpacker = msgpack.Unpacker()
    unpacker.feed(stream)
    ends = [unpacker.tell() for _ in unpacker]  # of the kind, and of each message
    kinds = [found.decode() for found in re.findall(rb"\xa4type[\xa0-\xbf]([a-zA-Z]+)", stream)]
    assert kinds[:4] == ["hello", "offer", "handover", "device"] and kinds[-1] == "acknowledged"
    after = dict(zip(kinds, ends[1:], strict=True))
    before_grant = [end + near for end in ends if end < after["grant"] for near in (-1, 0)]
    for limit in before_grant:
        where, _ = await move(limit)
        # Who has recorded the grant and could not send it asks, and has it declined.
        assert where == "source"
    assert (await move(after["grant"] - 1))[0] == "source"
    assert (await move(after["grant"]))[0] == "destination"


@pytest.mark.parametrize("kind", ["urgent", "push"])
async def test_data_connection_is_cut(pair: Pair, kind: str) -> None:
    """A data connection that breaks pauses the migration until there are new ones."""
    name, here, there = await pair.place(*LARGE)
    a, b = pair
    await filled(here)
    async with wire(b) as one:
        one.limit = {kind: 300_000}
        started = await a.call("Migrate", name=name, to=one.address, bandwidth=16 * MIB)
        result = await a.result(name, started["migration"])
        assert result["event"] == "completed"
        assert result["recoveries"] == 1
        assert await in_one_place(pair, name, here, there) == "destination"


async def test_data_connections_are_cut_early(pair: Pair) -> None:
    """Cut while they are set up, data connections leave the guest at the source."""
    a, b = pair
    for kind, at in (("urgent", 1), ("push", 1), ("push", 150)):
        name, here, there = await pair.place()
        async with wire(b) as one:
            one.limit = {kind: at}
            started = await a.call("Migrate", name=name, to=one.address)
            result = await a.result(name, started["migration"])
            assert result["event"] == "failed"
            assert await in_one_place(pair, name, here, there) == "source"
        await again(pair, name, there)


async def test_garbage_for_pages(pair: Pair) -> None:
    """A frame that no source sends stops the migration, and nothing of it reaches the guest."""
    name, here, _ = await pair.place(*LARGE)
    a, b = pair
    await filled(here)
    async with wire(b) as one:

        def spoil(kind: str, data: bytes) -> bytes:
            return bytes(len(data)) if kind == "push" and len(one.sent["push"]) > 300_000 else data

        one.spoil = spoil
        started = await a.call("Migrate", name=name, to=one.address, bandwidth=4 * MIB)
        result = await a.result(name, started["migration"])
        assert result["event"] == "paused"
        log = b.log.read_text()
        assert "page frame" in log or "what is not" in log, log[-2000:]
        assert await state(here) == "paused"
