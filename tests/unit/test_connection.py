# SPDX-License-Identifier: Apache-2.0
"""Connections between two daemons: greeting, keepalives, ends, and what a bad peer sends."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
import trio.testing

from postcopyd import protocol as p
from postcopyd.cli import certs
from postcopyd.errors import PostcopydError
from postcopyd.handover import Destination, Machine, Source
from postcopyd.net import connection
from postcopyd.net.channel import Channel, ConnectionLost, PeerError
from postcopyd.net.codec import Codec, pack
from postcopyd.net.connection import receive_object
from postcopyd.net.tls import Tls
from postcopyd.protocol import LocalProtocolError, RemoteProtocolError
from postcopyd.records.store import Store
from postcopyd.sessions.shared import Shared
from postcopyd.tasks.nursery import open_nursery

OFFER = p.Offer("m1", "web1", "qemu", [p.RegionOffer("ram", 512, 4096)], {}, 2, 1)


def pair(source: Source, destination: Destination) -> tuple[Channel, Channel]:
    """Both ends of a control connection, in memory."""
    left, right = trio.testing.memory_stream_pair()
    return Channel(left, Machine(source), "there"), Channel(right, Machine(destination), "here")


def alone(state: Source | Destination) -> tuple[Channel, Any]:
    """One end, and the bare stream of the other."""
    left, right = trio.testing.memory_stream_pair()
    return Channel(left, Machine(state), "there"), right


async def all_of(stream: Any) -> list[Any]:
    """What has been sent to a bare stream until it ended."""
    codec, found = Codec(), []
    async for data in stream:
        codec.feed(bytes(data))
        found.extend(codec.objects())
    return found


# --- greeting and messages -----------------------------------------------------------------------


async def test_both_sides_greet() -> None:
    """Each side learns the other's version, software and host."""
    source, destination = pair(Source.GREETING, Destination.GREETING)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.greet)
        hello = await destination.greet()
    assert (hello.version, hello.host) == (p.VERSION, socket.gethostname())
    assert hello.software.startswith("postcopyd ")
    assert (source.machine.state, destination.machine.state) == (
        Source.OFFERING,
        Destination.WAITING,
    )


@pytest.mark.parametrize(("version", "says"), [(2, "newer"), (0, "older")])
async def test_other_version_is_refused(version: int, says: str) -> None:
    """A peer of another version ends the greeting with a sentence that says which is newer."""
    channel, peer = alone(Source.GREETING)
    await peer.send_all(pack(p.Hello(version, [], "postcopyd x", "host2")))
    with pytest.raises(PostcopydError, match=f"host2.*{says}") as caught:
        await channel.greet()
    assert caught.value.name == "VersionMismatch"


async def test_peer_that_does_not_greet_is_refused() -> None:
    """A first message that is no greeting is the peer's error."""
    channel, peer = alone(Source.GREETING)
    await peer.send_all(pack(p.Ready(bytes(32))))
    with pytest.raises(RemoteProtocolError, match="received 'Ready'"):
        await channel.greet()


async def test_messages_come_in_order_in_any_pieces() -> None:
    """Messages that arrive in one piece, or byte by byte, are received one by one."""
    channel, peer = alone(Destination.GREETING)
    stream = pack(p.Hello(1)) + pack(OFFER)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _() -> None:
            for byte in stream:
                await peer.send_all(bytes([byte]))

        assert await channel.receive() == p.Hello(1)
        assert await channel.expect(p.Offer) == OFFER


async def test_message_out_of_turn_is_not_sent() -> None:
    """What the state does not allow never reaches the peer."""
    channel, peer = alone(Source.SAVED)
    with pytest.raises(LocalProtocolError):
        await channel.send(p.Grant(1))
    await channel.aclose()
    assert await all_of(peer) == []


async def test_message_out_of_turn_is_refused() -> None:
    """What the peer must not say now is its error, and changes no state."""
    channel, peer = alone(Source.SAVED)
    await peer.send_all(pack(p.Ran()))
    with pytest.raises(RemoteProtocolError):
        await channel.receive()
    assert channel.machine.state is Source.SAVED


async def test_expect_refuses_another_message() -> None:
    """A message that is allowed but not the one that is due is refused by name."""
    channel, peer = alone(Source.ASKED)
    await peer.send_all(pack(p.Checked([])))
    with pytest.raises(RemoteProtocolError, match="there sent Checked where Ready was due"):
        await channel.expect(p.Ready)


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", b"\xc1", b"\x16\x03\x01\x02\x00", b"\xdd\xff\xff\xff\xff"],
)
async def test_garbage_is_refused(garbage: bytes) -> None:
    """Bytes of another protocol end the connection in one error."""
    channel, peer = alone(Destination.GREETING)
    await peer.send_all(garbage)
    with pytest.raises(RemoteProtocolError):
        await channel.greet()


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nServer: nginx", "an HTTP server is there"),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", "an SSH server is there"),
        (b"\x15\x03\x01\x00\x02\x02\x16", "another program, with TLS, is there"),
        (b"220 mail.example ESMTP\r\n", "it says '220 mail.example ESMTP'"),
    ],
)
@pytest.mark.parametrize("secure", [False, True])
async def test_another_program_is_there(
    said: bytes, what: str, secure: bool, tmp_path: Path
) -> None:
    """Whoever dials a port where something else answers is told what, and which port to say."""
    if secure and said[0] == 0x15:
        return  # a postcopyd ends TLS so as well

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(said)
            with suppress(trio.BrokenResourceError):
                while await stream.receive_some():
                    pass

    tls = None
    if secure:
        certs.make(tmp_path / "tls", ["127.0.0.1"], None)
        tls = Tls.load(tmp_path / "tls")
    shared = Shared(Store(tmp_path / "state"), tls=tls)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            partial(trio.serve_tcp, answer, 0, host="127.0.0.1", handler_nursery=nursery)
        )
        to = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        with pytest.raises(RemoteProtocolError, match="not postcopyd: give the port") as caught:
            async with await connection.dial_control(
                to, Machine(Source.GREETING), shared
            ) as channel:
                await channel.greet()
        nursery.cancel_scope.cancel()
    assert what in str(caught.value)
    assert to in str(caught.value)
    assert caught.value.name == "PeerUnreachable"


async def test_greeting_oneself() -> None:
    """A daemon that has dialled itself, by whatever address, says so on both sides."""
    left, right = trio.testing.memory_stream_pair()
    ours = Channel(left, Machine(Source.GREETING), "postcopyd at there", instance="a")
    theirs = Channel(right, Machine(Destination.GREETING), "192.0.2.1", instance="a")

    async def greets(channel: Channel) -> None:
        with pytest.raises(PostcopydError, match="is this daemon itself: name the host"):
            await channel.greet()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(greets, ours)
        nursery.start_soon(greets, theirs)
    left, right = trio.testing.memory_stream_pair()
    ours = Channel(left, Machine(Source.GREETING), "there", instance="a")
    old = Channel(right, Machine(Destination.GREETING), "there")  # of before it was said
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.greet)
        nursery.start_soon(old.greet)


async def test_many_senders_do_not_mix_their_bytes() -> None:
    """Several tasks may send; each message arrives whole."""
    left, right = trio.testing.lockstep_stream_pair()
    channel = Channel(left, Machine(Source.SAVING), "there")
    pieces = [bytes([n]) * 3000 for n in range(20)]
    found: list[Any] = []
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _() -> None:
            found.extend(await all_of(right))

        async with trio.open_nursery() as senders:
            for piece in pieces:
                senders.start_soon(channel.send, p.Device(piece))
        await channel.aclose()
    assert sorted(obj["data"] for obj in found) == pieces


# --- errors and ends -----------------------------------------------------------------------------


async def test_error_of_the_peer_arrives_by_name() -> None:
    """What one side tells is raised at the other, with its name and sentence."""
    source, destination = pair(Source.ASKED, Destination.OFFERED)
    await destination.tell_error(PostcopydError("no room for web1", "NoRoom"))
    with pytest.raises(PeerError, match="there said: no room for web1") as caught:
        await source.receive()
    assert caught.value.name == "NoRoom"
    assert source.machine.state is Source.ROLLED_BACK
    assert destination.machine.state is Destination.CALLED_OFF


async def test_long_error_is_told_all_the_same() -> None:
    """A sentence beyond the limit is cut and not refused by the peer."""
    source, destination = pair(Source.ASKED, Destination.OFFERED)
    await destination.tell_error(ValueError("x" * 100_000))
    with pytest.raises(PeerError) as caught:
        await source.receive()
    assert caught.value.name == "InternalError"


@pytest.mark.parametrize("state", [Source.GRANTED, Source.RAN, Source.DRAINED])
async def test_no_error_is_told_after_the_grant(state: Source) -> None:
    """After the grant an error stays here: the destination must not take it for a recall."""
    channel, peer = alone(state)
    await channel.tell_error(PostcopydError("disk full"))
    await channel.aclose()
    assert await all_of(peer) == []
    assert channel.machine.state is state


async def test_error_to_a_peer_that_is_gone() -> None:
    """Telling an error never raises, even when nobody is there to hear it."""
    channel, peer = alone(Source.ASKED)
    await peer.aclose()
    await channel.tell_error(PostcopydError("disk full"))


async def test_error_to_a_peer_that_does_not_read(autojump_clock: trio.testing.MockClock) -> None:
    """Telling an error takes a second at most, also while everything is being cancelled."""
    left, _right = trio.testing.lockstep_stream_pair()
    channel = Channel(left, Machine(Source.ASKED), "there")
    with trio.CancelScope() as scope:
        scope.cancel()
        await channel.tell_error(PostcopydError("disk full"))
    assert trio.current_time() <= 1.0


async def test_end_of_stream_is_a_loss() -> None:
    """The end of a connection is never success, in the middle of a message or between two."""
    for rest in (b"", pack(OFFER)[:20]):
        channel, peer = alone(Destination.WAITING)
        await peer.send_all(rest)
        await peer.send_eof()
        with pytest.raises(ConnectionLost, match="there closed the connection"):
            await channel.receive()
        assert channel.machine.state is Destination.WAITING


async def test_sending_to_nobody_is_a_loss() -> None:
    """Sending on a broken or closed connection raises ConnectionLost."""
    channel, peer = alone(Source.OFFERING)
    await peer.aclose()
    with pytest.raises(ConnectionLost, match="sending to there"):
        await channel.send(OFFER)
    channel, _peer = alone(Source.OFFERING)
    await channel.aclose()
    with pytest.raises(ConnectionLost):
        await channel.send(OFFER)
    with pytest.raises(ConnectionLost):
        await channel.receive()


# --- keepalives ----------------------------------------------------------------------------------


async def test_silent_peer_is_dead_after_its_time(autojump_clock: trio.testing.MockClock) -> None:
    """A peer that says nothing for DEAD_S is lost then, not before and not much later."""
    channel, _peer = alone(Source.SAVED)
    with pytest.raises(ConnectionLost, match="has said nothing for 10 s"):
        await channel.receive()
    assert p.DEAD_S <= trio.current_time() < p.DEAD_S + 0.1


async def test_two_idle_sides_stay_connected(autojump_clock: trio.testing.MockClock) -> None:
    """Keepalives hold a connection on which nothing is said for an hour."""
    source, destination = pair(Source.SAVED, Destination.LOADING)
    async with source.alive(), destination.alive(), trio.open_nursery() as nursery:
        nursery.start_soon(destination.receive)
        with trio.move_on_after(3600) as hour:
            await source.receive()
        assert hour.cancelled_caught
        await destination.send(p.Loaded())
        assert await source.receive() == p.Loaded()
        nursery.cancel_scope.cancel()


async def test_keepalives_come_only_when_nothing_else_does(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """One each KEEPALIVE_S of silence; none beside messages that are sent more often."""
    channel, peer = alone(Source.SAVING)
    async with channel.alive():
        await trio.sleep(5.5 * p.KEEPALIVE_S)
        for _ in range(20):
            await channel.send(p.Device(b"x"))
            await trio.sleep(p.KEEPALIVE_S / 2)
    await channel.aclose()
    kinds = [obj["type"] for obj in await all_of(peer)]
    assert kinds == ["keepalive"] * 5 + ["device"] * 20


async def test_keepalives_end_with_their_context(autojump_clock: trio.testing.MockClock) -> None:
    """After `alive` nothing is sent any more, and an error in it comes out as it is."""
    channel, peer = alone(Source.SAVED)
    with pytest.raises(ConnectionLost, match="broken"):
        async with channel.alive():
            raise ConnectionLost("broken")
    await trio.sleep(60)
    await channel.aclose()
    assert await all_of(peer) == []


async def test_keepalive_to_a_dead_peer_is_no_error_of_its_own(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """When the peer goes, whoever receives says so; the keepalive just ends."""
    channel, peer = alone(Source.SAVED)
    async with channel.alive():
        await peer.aclose()
        await trio.sleep(5)
        with pytest.raises(ConnectionLost):
            await channel.receive()


# --- data connections ----------------------------------------------------------------------------


@asynccontextmanager
async def sockets() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    a, b = trio.socket.socketpair()
    async with trio.SocketStream(a) as left, trio.SocketStream(b) as right:
        yield left, right


async def test_receive_object_takes_not_a_byte_more() -> None:
    """What follows a data connection's first object stays in the socket for the engine."""
    hello = p.DataHello("m1", bytes(range(32)), True)
    frame = p.pack_frame(p.Frame(p.ZERO, 0, 0, 1, 0))
    async with sockets() as (left, right):
        await left.send_all(pack(hello) + frame)
        assert await receive_object(right, p.DataHello) == hello
        fd = connection.detach(right)
        with socket.socket(fileno=fd) as rest:
            assert rest.getblocking()
            assert rest.recv(100) == frame
            rest.sendall(b"back")
        assert await left.receive_some() == b"back"


@pytest.mark.parametrize(
    "bad",
    [b"\xc1", b"\x80", msgpack.packb("x"), msgpack.packb({"migration": "m", "token": b"short"})],
)
async def test_bad_first_object_is_refused(bad: bytes) -> None:
    """A data connection that begins with another object is refused."""
    async with sockets() as (left, right):
        await left.send_all(bad)
        with pytest.raises(RemoteProtocolError):
            await receive_object(right, p.DataHello)


async def test_data_connection_that_ends_while_set_up() -> None:
    """The end of the stream before the first object is a loss."""
    async with sockets() as (left, right):
        await left.send_all(pack(p.DataWelcome("m1"))[:-1])
        await left.send_eof()
        with pytest.raises(ConnectionLost, match="while it was set up"):
            await receive_object(right, p.DataWelcome)


async def test_data_connection_that_says_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """A data connection without its first object is given up after CONNECT_S."""
    async with sockets() as (_left, right):
        with pytest.raises(trio.TooSlowError):
            await receive_object(right, p.DataHello)
    assert trio.current_time() >= connection.CONNECT_S


async def test_first_object_in_pieces() -> None:
    """However it is cut, it is taken whole, with nothing of what follows."""
    hello = p.DataHello("m" * 128, bytes(range(32)), True)
    packed = pack(hello)
    for cut in range(1, len(packed)):
        async with sockets() as (left, right), trio.open_nursery() as nursery:
            await left.send_all(packed[:cut])
            nursery.start_soon(send_later, left, packed[cut:] + b"frame")
            assert await receive_object(right, p.DataHello) == hello
            assert await right.receive_some() == b"frame"


async def send_later(stream: trio.SocketStream, data: bytes) -> None:
    await trio.testing.wait_all_tasks_blocked()
    await stream.send_all(data)


NEVER_ENDS = b"\x81\xa1x\xdc\x02\x00" + (b"\xdc\x02\x00" + b"\x01" * 512) * 511


async def test_a_strangers_first_object_costs_little() -> None:
    """What anybody may send before showing who it is is small, and read a few times only: not byte
    by byte, and not to the end of the largest message."""
    reads = 0

    class Counted:
        def __init__(self, sock: Any) -> None:
            self._sock = sock

        async def recv(self, *args: Any) -> bytes:
            nonlocal reads
            reads += 1
            return bytes(await self._sock.recv(*args))

    async with sockets() as (left, right):
        await left.send_all(NEVER_ENDS[:100_000])
        counted: Any = type("Stream", (), {"socket": Counted(right.socket)})()
        with pytest.raises(RemoteProtocolError, match="more than 1024 bytes"):
            await receive_object(counted, p.DataHello)
    assert reads <= 2


async def test_a_strangers_first_message_is_small() -> None:
    """The same for a control connection; what comes after the greeting may be as large as ever, and
    may come with it."""
    channel, peer = alone(Source.GREETING)
    await peer.send_all(NEVER_ENDS)
    with pytest.raises(RemoteProtocolError, match="more than 20480 bytes"):
        await channel.receive()
    assert channel._codec.beyond <= 2 * p.MAX_FIRST
    channel, peer = alone(Source.GREETING)
    problems = p.Checked(["x" * 4000] * 100)
    await peer.send_all(pack(p.Hello(version=p.VERSION)) + pack(problems))
    assert isinstance(await channel.receive(), p.Hello)
    channel.machine.state = Source.ASKED
    assert await channel.receive() == problems


# --- the first bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [p.CONTROL, p.DATA])
async def test_kind_is_recognized_and_nothing_more_is_taken(kind: str) -> None:
    """A connection that came in says what it is for, and what follows is untouched."""
    async with sockets() as (left, right):
        await left.send_all(msgpack.packb(kind) + b"next")
        assert await connection.accepted_kind(right) == kind
        assert await right.receive_some() == b"next"


@pytest.mark.parametrize(
    "first",
    [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01", b"\x00", b"\xb0postcopyd kontrol", b"\xb1postc"],
)
async def test_wrong_first_bytes_are_refused_at_once(first: bytes) -> None:
    """Another protocol is refused at the first byte that differs, quoting it."""
    async with sockets() as (left, right):
        await left.send_all(first)
        if first.endswith(b"postc"):
            await left.send_eof()
        with trio.fail_after(2), pytest.raises(RemoteProtocolError, match="not postcopyd's"):
            await connection.accepted_kind(right)


async def test_connection_that_says_nothing_is_given_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A connection that came in and is silent holds its place for CONNECT_S only."""
    async with sockets() as (_left, right):
        with pytest.raises(RemoteProtocolError):
            await connection.accepted_kind(right)
    assert trio.current_time() >= connection.CONNECT_S


async def test_dial_says_what_for() -> None:
    """A connection that goes out begins with its kind, and small messages leave at once."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    async with listener, await connection.dial("127.0.0.1", port, p.DATA) as ours:
        assert ours.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        async with await listener.accept() as theirs:
            assert await connection.accepted_kind(theirs) == p.DATA


async def test_dial_to_nobody_says_whom_and_what_to_do() -> None:
    """A refused connection names host and port and asks about the daemon there."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    with pytest.raises(PostcopydError, match=f"127.0.0.1, port {port}: .*refused.*serve") as caught:
        await connection.dial("127.0.0.1", port, p.CONTROL)
    assert caught.value.name == "PeerUnreachable"


async def test_dial_to_what_is_no_name() -> None:
    """A name that DNS cannot have is the operator's mistake and not a bug."""
    with pytest.raises(PostcopydError, match="cannot be the name of a host"):
        await connection.dial("a" * 64 + ".example", 1, p.CONTROL)


# --- nurseries -----------------------------------------------------------------------------------


async def test_nursery_raises_the_first_failure_by_itself() -> None:
    """What fails in a task comes out as that error, and a bug comes before what it caused."""

    async def fail(error: Exception) -> None:
        raise error

    with pytest.raises(ConnectionLost):
        async with open_nursery() as nursery:
            nursery.start_soon(fail, ConnectionLost("x"))
            await trio.sleep_forever()
    with pytest.raises(ZeroDivisionError):
        async with open_nursery() as nursery:
            nursery.start_soon(fail, ConnectionLost("x"))
            nursery.start_soon(fail, ZeroDivisionError())
            await trio.sleep_forever()


async def test_nursery_passes_cancellation_on() -> None:
    """A cancelled nursery is cancelled, not failed; no thread or task is left."""
    threads = threading.active_count()
    with trio.move_on_after(0.01) as scope:
        async with open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
    assert scope.cancelled_caught
    assert threading.active_count() == threads
