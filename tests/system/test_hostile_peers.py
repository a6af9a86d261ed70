# SPDX-License-Identifier: Apache-2.0
"""Peers and clients that break the rules, in every state: they harm nobody but themselves.

Three ways to be one: in the middle of two daemons (`Middle`), as a source by hand (`Peer`), as a
destination by hand (`false_destination`). Each test ends with the daemons as they were: as many
descriptors and engine threads, no more memory (the fixture `pair`), no traceback in their logs
(`Pair.end`), and where a migration went on beside, its guest whole.
"""

from __future__ import annotations

import json
import random
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgpack
import pytest
import trio
from msgspec import structs
from pair import (
    HELLO,
    KIND,
    LARGE,
    MIB,
    SMALL,
    Host,
    Pair,
    ProcessGuest,
    again,
    completed,
    connected,
    ended,
    filled,
    status_until,
    until,
    verified,
    worked,
)
from test_cut_connections import in_one_place
from test_hybrid import tracked
from test_hybrid_process import copied, unoccupied

from postcopyd import protocol as p
from postcopyd.errors import PostcopydError
from postcopyd.net.channel import ConnectionLost
from postcopyd.net.codec import Codec, pack, parse_message
from postcopyd.net.connection import receive_object

M = TypeVar("M", bound=p.Message)
CORPUS = Path(__file__).parents[1] / "fuzz/corpus"
CHUNK = 65536

# --- what a daemon has


def descriptors(host: Host) -> int:
    assert host.process is not None
    return len(list(Path(f"/proc/{host.process.pid}/fd").iterdir()))


def engine_threads(host: Host) -> int:
    assert host.process is not None
    names = Path(f"/proc/{host.process.pid}/task").glob("*/comm")
    return sum(name.read_text().startswith("pc-") for name in names)


def memory(host: Host) -> int:
    """Bytes that the daemon holds."""
    assert host.process is not None
    status = Path(f"/proc/{host.process.pid}/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) << 10


@pytest.fixture
def pair(daemons: Pair) -> Iterator[Pair]:
    deadline = time.monotonic() + 10
    for host in daemons:  # it answers before it has all that it keeps
        while "event=serving" not in host.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    before = [(descriptors(host), memory(host)) for host in daemons]
    yield daemons
    daemons.end_guests()
    for host, (fds, had) in zip(daemons, before, strict=True):
        deadline = time.monotonic() + 10
        while (descriptors(host) > fds or engine_threads(host)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert host.process is not None and host.process.poll() is None
        assert descriptors(host) <= fds
        assert engine_threads(host) == 0
        assert memory(host) < had + 64 * MIB


@asynccontextmanager
async def beside(pair: Pair, seconds: float = 2) -> AsyncIterator[None]:
    """A migration that goes on meanwhile, arrives, and never had to be continued."""
    name, _, there = await pair.place("--memory", "16M", "--rate", "4000")
    a, b = pair
    rate = int(16 * MIB / seconds)
    started = await a.call("Migrate", name=name, to=b.address, bandwidth=rate)
    await status_until(b, name, lambda status: status["phase"] == "postcopy")
    yield
    completed(await a.result(name, started["migration"]))
    await verified(there)


async def logged(host: Host, word: str, since: int) -> None:
    """The daemon says so in its log, behind its first `since` characters."""
    await until(lambda: re.search(word, host.log.read_text()[since:]), f"{word} in the log", 15)


# --- bad peers


class Closed(Exception):
    """The daemon has closed where something was due."""


class Peer:
    """One end of a control connection, by hand."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._codec = Codec()
        self._heard: list[p.Message] = []

    async def say(self, *messages: p.Message | bytes) -> None:
        for message in messages:
            await self.stream.send_all(message if isinstance(message, bytes) else pack(message))

    async def hear(self, kind: type[M]) -> M:
        """The next message but keepalives, which is of this kind."""
        with trio.fail_after(15):
            while True:
                while self._heard:
                    message = self._heard.pop(0)
                    if not isinstance(message, p.Keepalive):
                        assert isinstance(message, kind), message
                        return message
                data = await self.stream.receive_some(CHUNK)
                if not data:
                    raise Closed(f"closed where {kind.__name__} was due")
                self._codec.feed(bytes(data))
                self._heard += [parse_message(obj) for obj in self._codec.objects()]

    async def until_error(self) -> p.Error:
        while True:
            message = await self.hear(p.Message)
            if isinstance(message, p.Error):
                return message

    async def closed(self) -> None:
        """The other end closes, whatever it says before."""
        with trio.fail_after(15), suppress(trio.BrokenResourceError):
            while await self.stream.receive_some(CHUNK):
                pass


@asynccontextmanager
async def source_of(host: Host) -> AsyncIterator[Peer]:
    """A source by hand, greeted by the daemon."""
    async with await connected(host) as stream:
        peer = Peer(stream)
        await peer.say(KIND[p.CONTROL], HELLO)
        await peer.hear(p.Hello)
        yield peer


@asynccontextmanager
async def listening(serve: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[str]:
    """Somebody at an address, which this gives."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


class FalseDestination:
    """Has everything handed over to it by hand, up to the grant, each time that it is asked.

    `control` is the newest control connection, `data` the data connections, urgent ones first,
    read only with `reads`. It says what it likes in `before` the handover and `after` the grant.
    """

    def __init__(self) -> None:
        self.asked: p.Offer | p.Resume | None = None
        self.control: Peer
        self.data: list[trio.SocketStream] = []
        self.reads = False
        self.before: Callable[[Peer], Awaitable[None]] | None = None
        self.after: Callable[[Peer], Awaitable[None]] = self._nothing

    async def _nothing(self, _: Peer) -> None:
        await trio.sleep_forever()

    async def serve(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, AssertionError):
            first = await stream.receive_some(len(KIND[p.DATA]))
            if first == KIND[p.DATA]:
                hello: p.DataHello = await receive_object(stream, p.DataHello)
                await stream.send_all(pack(p.DataWelcome(hello.migration)))
                self.data.insert(0 if hello.urgent else len(self.data), stream)
                while self.reads and await stream.receive_some(MIB):
                    pass
                await trio.sleep_forever()
            while first != KIND[p.CONTROL]:
                first += await stream.receive_some(1)
            await self._control(Peer(stream))

    async def _control(self, peer: Peer) -> None:
        self.control = peer
        await peer.say(HELLO)
        await peer.hear(p.Hello)
        asked = await peer.hear(p.Message)
        assert isinstance(asked, p.Offer | p.Resume)
        self.asked = asked
        if isinstance(asked, p.Offer) and asked.check:
            await peer.say(p.Checked([]))
            return
        self.data.clear()
        await peer.say(p.Ready(bytes(32)))
        while len(self.data) < 3:  # as many as a daemon makes
            await trio.sleep(0.01)
        if isinstance(asked, p.Offer):
            await peer.say(p.Serving())
            if self.before is not None:
                await self.before(peer)
            await peer.hear(p.Handover)
            while not isinstance(await peer.hear(p.Message), p.DeviceEnd):
                pass
            await peer.say(p.Loaded())
            await peer.hear(p.Grant)
        await peer.say(p.Ran())
        await self.after(peer)


async def offer_of(pair: Pair, name: str) -> p.Offer:
    """What the first host offers for this VM."""
    false = FalseDestination()
    async with listening(false.serve) as address:
        await pair.hosts[0].call("Check", name=name, to=address)
    assert isinstance(false.asked, p.Offer)
    return structs.replace(false.asked, check=False, connections=1)


class Middle:
    """Between a source and a destination: passes on, and once does what it likes.

    `message(to, message)` is asked for each control message and gives what is sent to that side in
    its place; `frame(kind, header, payload)` for each frame to the destination of a connection of
    this kind, and `request(header)` for each to the source.
    """

    def __init__(self, to: Host) -> None:
        self.to = to
        self.message: Callable[[str, p.Message], bytes] = lambda _, message: pack(message)
        self.frame: Callable[[str, bytes, bytes], bytes] = lambda _, header, payload: (
            header + payload
        )
        self.request: Callable[[bytes], bytes] = lambda header: header
        self.dialled = 0

    async def serve(self, source: trio.SocketStream) -> None:
        destination = await connected(self.to)
        gone = (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError)
        with suppress(ConnectionLost, *gone):  # either side ends it where it likes
            async with destination, trio.open_nursery() as nursery:
                kind = b""
                while kind not in KIND.values():
                    kind += await source.receive_some(1)
                await destination.send_all(kind)
                if kind == KIND[p.DATA]:
                    hello: p.DataHello = await receive_object(source, p.DataHello)
                    await destination.send_all(pack(hello))
                    welcome = await receive_object(destination, p.DataWelcome)
                    await source.send_all(pack(welcome))
                    kinds = "urgent" if hello.urgent else "push"
                    nursery.start_soon(self._frames, source, destination, kinds)
                    await self._frames(destination, source, "")
                else:
                    self.dialled += 1
                    nursery.start_soon(self._messages, source, destination, "destination")
                    await self._messages(destination, source, "source")
                nursery.cancel_scope.cancel()

    async def _messages(self, a: trio.SocketStream, b: trio.SocketStream, to: str) -> None:
        codec = Codec()
        with suppress(trio.BrokenResourceError):
            while data := await a.receive_some(CHUNK):
                codec.feed(bytes(data))
                for obj in codec.objects():
                    await b.send_all(self.message(to, parse_message(obj)))
        with suppress(trio.BrokenResourceError):
            await b.send_eof()

    async def _frames(self, a: trio.SocketStream, b: trio.SocketStream, kind: str) -> None:
        held = b""
        with suppress(trio.BrokenResourceError):
            while data := await a.receive_some(CHUNK):
                held += data
                out = []
                while len(held) >= p.FRAME_BYTES:
                    header = held[: p.FRAME_BYTES]
                    end = p.FRAME_BYTES + p.unpack_frame(header).payload
                    if len(held) < end:
                        break
                    payload, held = held[p.FRAME_BYTES : end], held[end:]
                    out.append(self.frame(kind, header, payload) if kind else self.request(header))
                await b.send_all(b"".join(out))
        with suppress(trio.BrokenResourceError):
            await b.send_eof()


# --- control connections

NO_MSGPACK = b"\xc1"
OVERSIZED = b"\xdb\xff\xff\xff\xff" + b"x" * 1_100_000
NESTED = b"\x91" * 5000
ROOM = b"\xdc\x02\x00" * 3000
TWICE = b"\x82\xa4type\xa5hello\xa4type\xa5error"
UNKNOWN = pack(p.Error("x", "y")).replace(b"error", b"erxor")
WRONG = {"destination": pack(p.Loaded()), "source": pack(p.Handover())}

REFUSED = "sent what is no|sent a bad|sent a message of more|not possible"

AFTER = [
    ("destination", "hello", NESTED),
    ("destination", "offer", OVERSIZED),
    ("destination", "handover", TWICE),
    ("destination", "device", WRONG["destination"]),
    ("destination", "deviceEnd", NO_MSGPACK),
    ("destination", "grant", WRONG["destination"]),
    ("source", "hello", WRONG["source"]),
    ("source", "ready", UNKNOWN),
    ("source", "serving", ROOM),
    ("source", "loaded", NO_MSGPACK),
    ("source", "ran", OVERSIZED),
    ("source", "progress", WRONG["source"]),
]


async def hurry(host: Host, name: str) -> None:
    """Does not wait until the source asks again by itself, some seconds after a peer's error."""
    while True:
        with suppress(PostcopydError):
            await host.call("Recover", name=name)
        await trio.sleep(0.3)


def tag(message: p.Message) -> str:
    return str(type(message).__struct_config__.tag)


async def test_bad_message_in_each_state(pair: Pair) -> None:
    """What must not come ends the migration with a named error; after the grant, one attempt.

    And a message of which some bytes are others: the guest is in one place, whatever it says.
    """
    a, b = pair
    hosts = {"source": a, "destination": b}
    at_once = trio.CapacityLimiter(2)

    async def attempt(to: str, after: str, bad: bytes, seed: int | None) -> None:
        async with at_once:
            await one_attempt(to, after, bad, seed)

    async def one_attempt(to: str, after: str, bad: bytes, seed: int | None) -> None:
        name, here, there = await pair.place("--memory", "8M", "--rate", "4000")
        middle, draw, done = Middle(b), random.Random(seed), False
        since = len(hosts[to].log.read_text())

        def message(side: str, one: p.Message) -> bytes:
            nonlocal done
            data = pack(one)
            if done or (side, tag(one)) != (to, after):
                return data
            done = True
            if seed is None:
                return data + bad
            spoiled = bytearray(data)  # it may be a good one still, then nothing is to be said
            for _ in range(3):
                spoiled[draw.randrange(len(spoiled))] = draw.randrange(256)
            return bytes(spoiled)

        middle.message = message
        async with listening(middle.serve) as address:
            started = await a.call("Migrate", name=name, to=address, bandwidth=16 * MIB)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hurry, a, name)
                result = await a.result(name, started["migration"])
                where = await in_one_place(pair, name, here, there)
                nursery.cancel_scope.cancel()
        assert done
        if seed is not None:
            return
        granted = after in ("grant", "loaded", "ran", "progress")
        assert where == ("destination" if granted and after != "loaded" else "source"), after
        if where == "source":
            assert result["event"] == "failed"
            assert re.search(REFUSED, result["error"]), result
        else:
            # None, when the last page had come by then.
            assert (result["event"], result["recoveries"] <= 1) == ("completed", True)
        await logged(hosts[to], REFUSED, since)

    async with beside(pair), trio.open_nursery() as nursery:
        for number, case in enumerate(AFTER):
            nursery.start_soon(attempt, *case, None)
            if number % 3 == 1:
                nursery.start_soon(attempt, *case, number)


async def test_any_bytes(pair: Pair) -> None:
    """What the fuzzers have found of interest is said to a daemon that has just been greeted."""
    _, b = pair
    streams = [
        KIND[p.CONTROL] + HELLO + path.read_bytes()[2:]
        for path in sorted((CORPUS / "control").iterdir())
    ]
    streams += [
        KIND[p.DATA] + path.read_bytes()[2:] for path in sorted((CORPUS / "frames").iterdir())
    ]
    async with beside(pair):
        for sends in streams:
            async with await connected(b) as stream:
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(sends)
                    await stream.send_eof()
        assert (await b.call("List"))["vms"]


async def test_destination_that_resets(pair: Pair) -> None:
    """A connection that is gone as soon as it is there is an answer to a person, and no bug."""
    name, _, _ = await pair.place()
    a, _ = pair

    async def reset(stream: trio.SocketStream) -> None:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async with listening(reset) as address:
        for _ in range(20):
            problems = (await a.call("Check", name=name, to=address))["problems"]
            assert len(problems) == 1 and address.rpartition(":")[2] in problems[0]


async def test_bombs(pair: Pair) -> None:
    """Messages that are small on the wire and large in memory, from many at once."""
    _, b = pair
    row = b"\xdc\x02\x00" + b"\x80" * 512
    bomb = KIND[p.CONTROL] + HELLO + b"\xdc\x02\x00" + row * 511
    async with beside(pair), trio.open_nursery() as nursery:

        async def explode() -> None:
            async with await connected(b) as stream:
                peer = Peer(stream)
                with suppress(trio.BrokenResourceError):
                    await peer.say(bomb)
                    await peer.say(row)
                    await peer.closed()

        for _ in range(16):
            nursery.start_soon(explode)


# --- data connections


async def data_connection(host: Host, *hello: p.DataHello | bytes) -> trio.SocketStream:
    stream = await connected(host)
    await stream.send_all(KIND[p.DATA])
    for one in hello:
        await stream.send_all(one if isinstance(one, bytes) else pack(one))
    return stream


async def refused(host: Host, *hello: p.DataHello | bytes) -> None:
    async with await data_connection(host, *hello) as stream:
        with trio.fail_after(15), suppress(trio.BrokenResourceError):
            assert await stream.receive_some(100) == b""


@asynccontextmanager
async def arriving(
    pair: Pair, offer: p.Offer, name: str
) -> AsyncIterator[tuple[Peer, ProcessGuest, list[trio.SocketStream]]]:
    """By hand up to serving: the control connection, the VMM there, the data connections."""
    _, b = pair
    there = await pair.attach(b, name, pair.guest(*SMALL, "--incoming"))
    async with source_of(b) as peer:
        await peer.say(structs.replace(offer, migration=f"hand-{name}", vm=name))
        token = (await peer.hear(p.Ready)).token
        urgent = p.DataHello(f"hand-{name}", token, urgent=True)
        push = structs.replace(urgent, urgent=False)
        await refused(b, structs.replace(urgent, token=bytes(32)))
        await refused(b, structs.replace(urgent, migration="another"))
        data = [await data_connection(b, urgent)]
        await receive_object(data[0], p.DataWelcome)
        await refused(b, urgent)  # replayed
        await refused(b, b"\xc1")
        data.append(await data_connection(b, push))
        await receive_object(data[1], p.DataWelcome)
        for _ in range(4):
            await refused(b, push)
        await peer.hear(p.Serving)
        yield peer, there, data
        for stream in data:
            await stream.aclose()


PAGE = 4096
BAD_FRAMES = {
    "region": p.pack_frame(p.Frame(p.PAGES, 1, 0, 1, PAGE)) + bytes(PAGE),
    "far page": p.pack_frame(p.Frame(p.ZERO, 0, 2**64 - 1, 1, 0)),
    "count that overflows": p.pack_frame(p.Frame(p.ZERO, 0, 2**64 - 2, 3, 0)),
    "short": p.pack_frame(p.Frame(p.PAGES, 0, 0, 2, PAGE)) + bytes(PAGE),
    "role": p.pack_frame(p.Frame(p.REQUEST, 0, 0, 1, 0)),
    "garbage": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
}


async def test_frames_that_do_not_fit(pair: Pair) -> None:
    """Neither wrong data connections nor wrong frames go further than a named error."""
    _, b = pair
    name, _, _ = await pair.place()
    offer = await offer_of(pair, name)
    async with beside(pair):
        for number, frame in enumerate(BAD_FRAMES.values()):
            vm = pair.name()
            async with arriving(pair, offer, vm) as (peer, there, data):
                await peer.say(p.Handover())
                await status_until(b, vm, lambda status: status["phase"] == "handover")
                await data[number % 2].send_all(frame)
                error = await peer.until_error()
                assert error.name == "EngineFailed"
                assert re.search("does not fit the guest|not a frame", error.message), error
            await ended(there)  # it had begun to load
        assert (await b.status(name))["phase"] == "idle"


async def test_pages_again_with_other_content(pair: Pair) -> None:
    """A page that was placed stays as it is, whatever comes for it later."""
    name, here, there = await pair.place(*LARGE)
    a, b = pair
    await filled(here)
    middle, twice = Middle(b), 0

    def frame(kind: str, header: bytes, payload: bytes) -> bytes:
        nonlocal twice
        one = p.unpack_frame(header)
        twice += 2 * one.count
        other = p.pack_frame(p.Frame(p.PAGES, one.region, one.page, one.count, one.count * PAGE))
        zeros = p.pack_frame(p.Frame(p.ZERO, one.region, one.page, one.count, 0))
        return header + payload + other + b"\x5a" * (one.count * PAGE) + zeros

    middle.frame = frame
    async with listening(middle.serve) as address:
        started = await a.call("Migrate", name=name, to=address)
        result = await a.result(name, started["migration"])
        assert result["event"] == "completed"
        assert result["memory"]["duplicatePages"] >= twice - 4096
        await verified(there)


async def test_requests_without_end(pair: Pair) -> None:
    """A destination that asks for one page 100,000 times and takes nothing costs no memory; one
    that does is answered each time."""
    name, here, _ = await pair.place()
    a, _ = pair
    false, had, answered = FalseDestination(), memory(a), trio.Event()
    requests = p.pack_frame(p.Frame(p.REQUEST, 0, 0, 1, 0)) * 100_000

    async def after(peer: Peer) -> None:
        urgent, got, seen = false.data[0], 0, b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(urgent.send_all, requests)
            await trio.sleep(0.5)
            assert memory(a) < had + 32 * MIB
            while p.FRAME_BYTES > len(seen):
                seen += await urgent.receive_some(p.FRAME_BYTES - len(seen))
            each = p.FRAME_BYTES + p.unpack_frame(seen).payload // p.unpack_frame(seen).count
            while got + len(seen) < each * 100_000:
                data = await urgent.receive_some(MIB)
                assert data
                got += len(data)
            assert got + len(seen) == each * 100_000
        answered.set()
        await trio.sleep_forever()

    false.after = after
    async with beside(pair), listening(false.serve) as address:
        await a.call("Migrate", name=name, to=address, bandwidth=MIB)
        with trio.fail_after(30):
            await answered.wait()
        assert memory(a) < had + 32 * MIB
    await taken_back(a, name, here)


async def taken_back(host: Host, name: str, here: ProcessGuest) -> None:
    """The end of a migration to a destination that was none: the guest runs on where it was."""
    await status_until(host, name, lambda status: status["phase"] == "paused")
    await host.call("Resolve", name=name, decision="take_back")
    await worked(here, 100)
    await verified(here)


BAD_REQUESTS = [
    p.pack_frame(p.Frame(p.REQUEST, 7, 0, 1, 0)),
    p.pack_frame(p.Frame(p.REQUEST, 0, 4096, 1, 0)),
    p.pack_frame(p.Frame(p.REQUEST, 0, 0, 2, 0)),
    p.pack_frame(p.Frame(p.REQUEST, 0, 0, 1, 8)) + bytes(8),
    p.pack_frame(p.Frame(p.PAGES, 0, 0, 1, PAGE)) + bytes(PAGE),
    bytes(24),
]
BAD_HAVES: list[p.Message] = [
    p.Have(1, 0, 8, b"\xff"),
    p.Have(0, 2**63 - 1, 8, b"\xff"),
    p.Have(0, 4095, 2, b"\xff"),
    p.Have(0, 0, 9, b"\xff"),
    p.Have(0, 0, 8, b"\xff\xff"),
    p.Drained(4095, 0, 0, 0, 0, 0, 0, 0.0, p.Faults()),
    p.Error("Cancelled", "so it is"),
    p.Declined("too late"),
]


async def test_destination_that_lies(pair: Pair) -> None:
    """Requests, numbers and counts that cannot be pause the migration, which goes on asking."""
    name, here, _ = await pair.place()
    a, _ = pair
    false = FalseDestination()
    lies: list[bytes | p.Message] = [*BAD_REQUESTS, *BAD_HAVES]
    said: list[str] = []

    async def after(peer: Peer) -> None:
        if not lies:
            await trio.sleep_forever()
        lie = lies.pop(0)
        if isinstance(lie, bytes):
            await false.data[0].send_all(lie)
        else:
            await peer.say(lie)
        with suppress(trio.BrokenResourceError):
            while data := await peer.stream.receive_some(CHUNK):
                said.append(repr(bytes(data)))

    false.after = after
    async with beside(pair), listening(false.serve) as address:
        await a.call("Migrate", name=name, to=address, bandwidth=MIB)
        messages = set()
        with trio.fail_after(30):
            while lies:
                status = await a.status(name)
                messages.add(status["message"])
                with suppress(PostcopydError):
                    await a.call("Recover", name=name)  # at once, where it is paused
                await trio.sleep(0.002)
        await status_until(a, name, lambda status: status["phase"] == "postcopy")
        text = " ".join(messages)
        for part in ("not a request", "which this guest has not", "counts 4095 pages", "so it is"):
            assert part in text, (part, messages)
        assert (await trio.to_thread.run_sync(here.report))["state"] == "paused"
    await taken_back(a, name, here)


# --- passes


def zeros(first: int, count: int) -> bytes:
    return p.pack_frame(p.Frame(p.ZERO, 0, first, count, 0))


def pass_of(pages: bytes) -> bytes:
    """A Pass with these bytes for its number."""
    return pack(p.Pass(0)).replace(b"pages\x00", b"pages" + pages)


DATA = p.pack_frame(p.Frame(p.PAGES, 0, 7, 1, PAGE)) + b"\x5a" * PAGE
HANDED = (p.Handover(), p.Device(b"state"))

# What a source does: bytes go to the push connection, messages to the control connection, of a type
# of message one is waited for. And what it is told then.
Step = bytes | p.Message | type[p.Message]
PASSED: tuple[Step, ...] = (zeros(0, 10) + DATA, p.Pass(11), p.Passed)
BAD_PASSES: dict[str, tuple[tuple[Step, ...], str]] = {
    "fewer": ((zeros(0, 10), p.Pass(5)), "sent 10 pages in passes and says 5"),
    "backwards": ((*PASSED, p.Pass(10)), "sent 11 pages in passes and says 10"),
    "not waited": ((p.Pass(2**63 - 1), p.Pass(2**63 - 1)), "'Pass', which is not possible"),
    "hurried": ((p.Pass(1), p.Handover()), "'Handover', which is not possible"),
    "stale early": ((*PASSED, p.Stale(0, 0, 8, b"\xff")), "'Stale', which is not possible"),
    "stale in a pass": ((p.Pass(9), p.Stale(0, 0, 8, b"\xff")), "'Stale', which is not possible"),
    "passed": ((*PASSED, p.Passed()), "'Passed', which is not possible"),
    "serving": ((*PASSED, p.Serving()), "'Serving', which is not possible"),
    "end": ((*PASSED, p.DeviceEnd(0)), "'DeviceEnd', which is not possible"),
    "request": ((p.pack_frame(p.Frame(p.REQUEST, 0, 0, 1, 0)),), "does not fit the guest"),
    "far page": ((zeros(4000, 97),), "does not fit the guest"),
    "far stale": ((*PASSED, *HANDED, p.Stale(0, 4089, 8, b"\xff")), "4089 to 4097 of region 0"),
    "farthest": ((*HANDED, p.Stale(0, 2**63 - 1, 8, b"\xff")), "of region 0"),
    "region": ((*PASSED, *HANDED, p.Stale(1, 0, 8, b"\xff")), "pages 0 to 8 of region 1"),
    "bits": ((*PASSED, *HANDED, p.Stale(0, 0, 9, b"\xff")), "written pages which this guest has n"),
    "pass late": ((*PASSED, *HANDED, p.Pass(11)), "'Pass', which is not possible"),
    "stale late": (
        (*PASSED, *HANDED, p.DeviceEnd(5), p.Stale(0, 0, 8, b"\xff")), "'Stale', which is not poss"
    ),
    "serving late": ((*PASSED, *HANDED, p.DeviceEnd(5), p.Serving()), "'Serving', which is not"),
    # Harm to nobody but its own guest, and what is refused is that guest's state.
    "pages late": (
        (*PASSED, DATA * 99, *HANDED, DATA, p.DeviceEnd(5), DATA + zeros(0, 4096)), "refused to"
    ),
}  # fmt: skip
BAD_NUMBERS = {"negative": b"\xff", "too large": b"\xcf" + b"\xff" * 8, "none": b"\xc0"}


async def test_source_that_passes_wrongly(pair: Pair) -> None:
    """Whatever it does in the states that passes add: a named error; and where the VMM there was
    to load nothing yet, it waits as before, its RAM empty, and takes the next guest."""
    a, b = pair
    name, here, _ = await pair.place()
    offer = structs.replace(await offer_of(pair, name), staged=True)
    waiting: list[tuple[str, ProcessGuest]] = []
    at_once = trio.CapacityLimiter(4)

    async def attempt(what: str, steps: tuple[Step, ...], number: bytes, words: str) -> None:
        vm = pair.name()
        async with at_once, arriving(pair, offer, vm) as (peer, there, data):
            said = b""
            for step in steps:
                if isinstance(step, p.Message):
                    said += pack(step)
                    continue
                await peer.say(said)
                said = b""
                if isinstance(step, bytes):
                    await data[1].send_all(step)
                else:
                    await peer.hear(step)
            await peer.say(said + number)
            error = await peer.until_error()
            assert re.search(words, error.message), (what, error)
            status = await status_until(b, vm, lambda status: status["phase"] == "failed")
            assert re.search(words, status["message"]), (what, status)
            if HANDED[1] in steps:
                await ended(there)
            else:
                await unoccupied(b, vm, there)
                waiting.append((vm, there))

    async with beside(pair), trio.open_nursery() as nursery:
        for what, (steps, words) in BAD_PASSES.items():
            nursery.start_soon(attempt, what, steps, b"", words)
        for what, number in BAD_NUMBERS.items():
            nursery.start_soon(attempt, what, PASSED, pass_of(number), "a bad 'pass' message")
    assert len(waiting) == 14
    vm, there = waiting[0]
    await a.call("Detach", name=name)
    await a.attach(vm, "process", here.path)
    copied(await a.migrate(vm, b, mode="hybrid"))
    await verified(there)


async def test_stale_without_passes(pair: Pair) -> None:
    """Of an offer that was not staged nothing can be stale."""
    name, _, _ = await pair.place()
    offer = await offer_of(pair, name)
    async with arriving(pair, offer, pair.name()) as (peer, there, _):
        await peer.say(p.Handover(), p.Stale(0, 0, 8, b"\xff"))
        error = await peer.until_error()
        assert (error.name, "made no passes" in error.message) == ("ProtocolError", True)
        await ended(there)


async def test_passes_without_end(pair: Pair) -> None:
    """A source that only ever passes holds up nobody else, and when it goes all is as before."""
    a, b = pair
    name, here, _ = await pair.place()
    offer = structs.replace(await offer_of(pair, name), staged=True)
    vm, had = pair.name(), memory(b)
    async with beside(pair):
        async with arriving(pair, offer, vm) as (peer, there, data):
            for number in range(1, 201):
                await data[number % 2].send_all(DATA + zeros(0, 99))
                await peer.say(p.Pass(100 * number))
                await peer.hear(p.Passed)
            assert memory(b) < had + 16 * MIB
            assert (await b.status(vm))["phase"] == "precopy"
        await status_until(b, vm, lambda status: status["phase"] == "failed")
        await unoccupied(b, vm, there)
    await a.call("Detach", name=name)
    await a.attach(vm, "process", here.path)
    copied(await a.migrate(vm, b, mode="hybrid"))
    await verified(there)


# What a destination says: at once while the first pass is on its way, behind it, and once it has
# been given the device state. And how the source names it.
BAD_ANSWERS: dict[str, tuple[str, tuple[p.Message, ...], str]] = {
    "passed": ("at once", (p.Passed(),), "'Passed', which is not possible"),
    "serving": ("at once", (p.Serving(),), "'Serving', which is not possible"),
    "loaded": ("at once", (p.Loaded(),), "'Loaded', which is not possible"),
    "have": ("at once", (p.Have(0, 0, 8, b"\xff"),), "'Have', which is not possible"),
    "error": ("at once", (p.Error("NoRoom", "had enough of it"),), "had enough of it"),
    "twice": ("behind", (p.Passed(), p.Passed()), "'Passed', which is not possible"),
    "no answer": ("behind", (p.Serving(),), "'Serving', which is not possible"),
    "ran": ("behind", (p.Ran(),), "'Ran', which is not possible"),
    "not whole": ("given", (p.Serving(), p.Loaded(), p.Ran()), "sent Serving where Loaded was due"),
    "passed late": ("given", (p.Passed(),), "'Passed', which is not possible"),
}


async def passes_to(pair: Pair, false: FalseDestination, words: str, **options: object) -> None:
    """A hybrid migration to this destination, which fails; the guest runs on, and as before."""
    a, _ = pair
    name, here = pair.name(), pair.guest(*SMALL)
    await pair.attach(a, name, here)
    await worked(here)
    async with listening(false.serve) as address:
        started = await a.call("Migrate", name=name, to=address, mode="hybrid", **options)
        if words == "cancelled":
            await status_until(a, name, lambda status: status["phase"] == "precopy")
            await trio.sleep(2 * p.KEEPALIVE_S)  # nothing else happens
            assert (await a.status(name))["phase"] == "precopy"
            await worked(here, 100)
            await a.call("Cancel", name=name)
        result = await a.result(name, started["migration"])
    assert result["event"] == ("cancelled" if words == "cancelled" else "failed"), result
    assert words in result["error"], (words, result)
    assert (await a.status(name))["phase"] == "failed"
    assert tracked(here.process.pid) == []
    await worked(here, 100)
    await verified(here)


async def test_destination_that_answers_passes_wrongly(pair: Pair) -> None:
    """Named, and the guest unharmed; one that only says that it is there is left by cancelling."""
    at_once = trio.CapacityLimiter(4)

    async def attempt(when: str, says: tuple[p.Message, ...], words: str) -> None:
        false = FalseDestination()
        false.reads = True

        async def before(peer: Peer) -> None:
            if when == "behind":
                await peer.hear(p.Pass)
            elif when == "given":
                while not isinstance(message := await peer.hear(p.Message), p.DeviceEnd):
                    if isinstance(message, p.Pass):
                        await peer.say(p.Passed())
            await peer.say(*says)
            await trio.sleep_forever()

        false.before = before
        async with at_once:
            await passes_to(pair, false, words, **({"bandwidth": MIB} if when == "at once" else {}))

    async def silent(reads: bool) -> None:
        false = FalseDestination()
        false.reads = reads

        async def before(peer: Peer) -> None:
            while True:
                await peer.say(p.Keepalive())
                await trio.sleep(p.KEEPALIVE_S)

        false.before = before
        await passes_to(pair, false, "cancelled")

    async with beside(pair), trio.open_nursery() as nursery:
        for reads in (True, False):
            nursery.start_soon(silent, reads)
        for case in BAD_ANSWERS.values():
            nursery.start_soon(attempt, *case)


# --- who asks again


async def test_resume_by_others(pair: Pair) -> None:
    """Who asks for a migration that is not his gets an error, and nobody is disturbed."""
    name, here, there = await pair.place(*LARGE)
    a, b = pair
    idle = pair.name()
    await pair.attach(b, idle, pair.guest(*SMALL))
    await filled(here)
    started = await a.call("Migrate", name=name, to=b.address, bandwidth=16 * MIB)
    await status_until(b, name, lambda status: status["phase"] == "postcopy")
    true = p.Resume(started["migration"], name, 1)
    wrong = [
        structs.replace(true, epoch=0),
        structs.replace(true, epoch=2**63 - 1),
        structs.replace(true, migration="another"),
        structs.replace(true, vm=idle),
        structs.replace(true, vm="nobody"),
    ]
    for resume in wrong:
        async with source_of(b) as peer:
            await peer.say(resume)
            assert (await peer.until_error()).name in ("NotMigrating", "NoSuchVm")
            await peer.closed()
    assert (await b.status(name))["phase"] == "postcopy"  # nothing of this has taken long
    completed(await a.result(name, started["migration"]))
    await verified(there)
    async with source_of(b) as peer:  # replayed
        await peer.say(true)
        assert (await peer.hear(p.Drained)).confirmed == 16384


async def test_stolen_conversation(pair: Pair) -> None:
    """Who knows a migration's numbers can hold it up; its source gets it back, and all arrives."""
    name, here, there = await pair.place(*LARGE)
    a, b = pair
    await filled(here)
    started = await a.call("Migrate", name=name, to=b.address, bandwidth=24 * MIB)
    await status_until(b, name, lambda status: status["phase"] == "postcopy")
    stolen = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hurry, a, name)
        answer: p.Message = p.Ran()
        while stolen < 3 and not isinstance(answer, p.Drained):
            async with source_of(b) as peer:
                await peer.say(p.Resume(started["migration"], name, 1))
                with suppress(Closed):  # when its source asks at any time in this
                    answer = await peer.hear(p.Message)
                    if isinstance(answer, p.Ready):
                        stolen += 1
                        await peer.closed()
        assert stolen > 0
        result = await a.result(name, started["migration"])
        nursery.cancel_scope.cancel()
    assert (result["event"], result["recoveries"] > 0) == ("completed", True)
    await verified(there)


async def test_one_name_for_two_migrations(pair: Pair) -> None:
    """The name of a migration that is arriving already is refused to another."""
    _, b = pair
    first, other = pair.name(), pair.name()
    name, _, _ = await pair.place()
    offer = await offer_of(pair, name)
    await pair.attach(b, other, pair.guest(*SMALL, "--incoming"))
    async with arriving(pair, offer, first) as (peer, there, _):
        async with source_of(b) as second:
            await second.say(structs.replace(offer, migration=f"hand-{first}", vm=other))
            assert f"hand-{first}" in (await second.until_error()).message
        await peer.say(p.Cancel("enough"))
        await peer.closed()
    await status_until(b, first, lambda status: status["phase"] == "failed")
    assert there.process.poll() is None


# --- slow ones and many


async def test_slow_peers(pair: Pair) -> None:
    """Whoever says nothing, or next to nothing, or only that it is there, is let go in time."""
    _, b = pair
    keepalive = pack(p.Keepalive())
    offer = pack(p.Offer("m", "v", "d", [p.RegionOffer("r", 1, 4096)], {}, 1, 1))
    drips: list[tuple[bytes, bytes]] = [
        (b"", KIND[p.CONTROL]),
        (b"", b""),
        (KIND[p.CONTROL], HELLO),
        (KIND[p.CONTROL], keepalive * 100),
        (KIND[p.CONTROL] + HELLO, keepalive * 100),
        (KIND[p.CONTROL] + HELLO, offer),
        (KIND[p.CONTROL] + HELLO + b"\xdb\xff\xff\xff\xff", keepalive * 100),
        (KIND[p.CONTROL] + HELLO, b"\xc6\x00\x00\xff\xff" + bytes(100)),
        (KIND[p.DATA], pack(p.DataHello("m", bytes(32), urgent=True))),
        (KIND[p.DATA], b""),
    ]
    began = trio.current_time()

    async def drip(first: bytes, then: bytes) -> None:
        whole = keepalive if keepalive in then else b""
        async with await connected(b) as stream, trio.open_nursery() as nursery:
            await stream.send_all(first)

            async def send() -> None:
                with suppress(trio.BrokenResourceError):
                    for at in range(len(then)):
                        await trio.sleep(1)
                        await stream.send_all(whole or then[at : at + 1])

            nursery.start_soon(send)
            with suppress(trio.BrokenResourceError):
                while await stream.receive_some(CHUNK):
                    pass
            nursery.cancel_scope.cancel()

    had = descriptors(b)
    with trio.fail_after(16):
        async with trio.open_nursery() as nursery:
            for first, then in drips:
                nursery.start_soon(drip, first, then)
            idle = [await connected(b) for _ in range(300)]
            for number in (0, 1):  # while all of these are there, as far as there is room
                name, _, there = await pair.place()
                if number:
                    await until(lambda: descriptors(b) < had + 100, "idle peers are let go", 14)
                    await again(pair, name, there)
    assert trio.current_time() - began < 16
    for stream in idle:
        await stream.aclose()


async def test_peer_that_talks_without_end(pair: Pair) -> None:
    """Messages as fast as they go, and none of the answers read: others are served meanwhile."""
    _, b = pair
    name, _, _ = await pair.place()
    offer = await offer_of(pair, name)
    # What a reader does not know it ignores.
    keepalives = msgpack.packb({"type": "keepalive", "newer": bytes(4000)}) * 16

    async def talk(first: bytes) -> None:
        async with await connected(b) as stream:
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with suppress(trio.BrokenResourceError):
                await stream.send_all(first)
                while True:
                    await stream.send_all(keepalives)

    waiting = pair.name()
    await pair.attach(b, waiting, pair.guest(*SMALL, "--incoming"))
    offered = pack(structs.replace(offer, migration="talk", vm=waiting))
    async with beside(pair), trio.open_nursery() as nursery:
        for first in (b"", HELLO, HELLO, HELLO + offered):
            nursery.start_soon(talk, KIND[p.CONTROL] + first)
        for _ in range(5):
            with trio.fail_after(5):
                await b.call("List")
            await trio.sleep(0.05)
        # What is cut off before it is read was never an offer.
        await status_until(b, waiting, lambda status: status["migration"] == "talk")
        nursery.cancel_scope.cancel()
    await status_until(b, waiting, lambda status: status["phase"] == "failed")


# --- the control socket


async def test_clients_that_break_the_rules(pair: Pair) -> None:
    """Calls in pieces, without end, too large or meaningless: others are answered meanwhile."""
    a, _ = pair
    good = json.dumps({"method": "org.varlink.service.GetInfo"}).encode() + b"\0"
    bad = [path.read_bytes() + b"\0" for path in sorted((CORPUS / "call").iterdir())]
    bad += [
        b"x" * (2 * MIB),
        b'{"method":"io.postcopyd.List","parameters":' + b'{"a":' * 100_000,
        b"[" * 500_000 + b"\0",
        b'{"method":"io.postcopyd.Status","parameters":{"name":"' + b"n" * 900_000 + b'"}}\0',
        b'{"method":"io.postcopyd.Migrate","parameters":{"name":"a","to":"b","bandwidth":'
        + b"9" * 4000
        + b"}}\0",
        good[:-10],
        b"\0" * 1000,
    ]

    async def client() -> trio.SocketStream:
        return await trio.open_unix_socket(a.control)

    async with beside(pair):
        for sends in bad:
            async with await client() as stream:
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(sends)
                    await stream.send_eof()
                    with trio.fail_after(5):
                        while await stream.receive_some(CHUNK):
                            pass
        async with await client() as stream:
            for at in range(len(good)):
                await stream.send_all(good[at : at + 1])
            assert b"postcopyd" in await stream.receive_some(CHUNK)
        async with await client() as stream:  # calls without end, no answer read
            with suppress(trio.BrokenResourceError), trio.move_on_after(0.5):
                while True:
                    await stream.send_all(good * 1000)
            assert (await a.call("List"))["vms"]
        flood = [await client() for _ in range(200)]
        for stream in flood[::2]:
            with suppress(trio.BrokenResourceError):
                await stream.send_all(good[:20])
        for stream in flood:
            await stream.aclose()
        with suppress(PostcopydError):  # the last of them may not be gone yet
            await a.call("List")
        assert (await a.call("List"))["vms"]
