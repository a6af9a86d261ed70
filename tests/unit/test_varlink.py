# SPDX-License-Identifier: Apache-2.0
"""The Varlink server and the blocking client."""

from __future__ import annotations

import _thread
import array
import contextlib
import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postcopyd.varlink import client as varlink_client
from postcopyd.varlink import server
from postcopyd.varlink.idl import parse_interface

TEST_INTERFACE = """
# For tests.
interface org.example.test
type Pair (first: int, second: ?string)
method Echo(text: string) -> (text: string)
method Wait() -> ()
method Break(how: (bug, network, nan)) -> ()
method Give(index: int) -> (kind: string)
method Follow(count: ?int) -> (at: int)
method Later() -> ()
"""


class Bench:
    """A server of the test interface, and what its handlers have seen."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.wires: list[Wire] = []
        self.waiting = trio.Event()
        self.release = trio.Event()
        self.done = trio.Event()
        self.left = trio.Event()
        names = {"Echo": self._echo, "Wait": self._wait, "Break": self._break}
        names |= {"Give": self._give, "Follow": self._follow}
        self.service = server.Service(
            [parse_interface(TEST_INTERFACE)],
            {f"org.example.test.{name}": handler for name, handler in names.items()},
            product="test",
            version="1",
            streaming=["org.example.test.Follow"],
            with_fds=["org.example.test.Give"],
        )

    async def _echo(self, call: server.Call) -> Mapping[str, Any]:
        return {"text": call.parameters["text"]}

    async def _wait(self, call: server.Call) -> None:
        self.waiting.set()
        await self.release.wait()
        self.done.set()

    async def _break(self, call: server.Call) -> Mapping[str, Any]:
        if call.parameters["how"] == "network":
            raise trio.BrokenResourceError("of the handler's own")
        if call.parameters["how"] == "nan":
            return {"value": float("nan")}
        raise KeyError("a bug")

    async def _give(self, call: server.Call) -> Mapping[str, Any]:
        if len(call.fds) <= call.parameters["index"]:
            raise server.VarlinkError(
                "org.varlink.service.InvalidParameter", {"parameter": "index"}
            )
        mode = os.fstat(call.fds[call.parameters["index"]]).st_mode
        return {"kind": "fifo" if stat.S_ISFIFO(mode) else "other"}

    async def _follow(self, call: server.Call) -> Mapping[str, Any] | None:
        try:
            for at in range(call.parameters.get("count", 1)):
                await call.send({"at": at})
            if "count" in call.parameters:
                return {"at": call.parameters["count"]}
            self.waiting.set()
            await trio.sleep_forever()
        finally:
            self.left.set()

    async def connect(self) -> Wire:
        wire = Wire(await trio.open_unix_socket(self.path))
        self.wires.append(wire)
        return wire


class Wire:
    """A client that says exactly what a test wants said."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.buffer = b""

    async def send(self, *messages: Any) -> None:
        data = b"".join(json.dumps(message).encode() + b"\0" for message in messages)
        await self.stream.send_all(data)

    async def reply(self) -> Any:
        """The next reply, or None at the end of the stream."""
        while b"\0" not in self.buffer:
            with trio.fail_after(5):
                data = await self.stream.receive_some()
            if not data:
                assert not self.buffer
                return None
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    async def ask(self, method: str, **parameters: Any) -> Any:
        await self.send({"method": method, "parameters": parameters})
        return await self.reply()


@contextlib.asynccontextmanager
async def serving(path: Path, **options: Any) -> AsyncIterator[Bench]:
    bench = Bench(str(path / "varlink"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(bench.path)
    listener.listen(64)
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda **kw: server.serve(listener, bench.service, **options, **kw))
        try:
            yield bench
        finally:
            nursery.cancel_scope.cancel()
            for wire in bench.wires:
                wire.stream.socket.close()
            os.unlink(bench.path)


def error(name: str, **parameters: str) -> dict[str, Any]:
    found: dict[str, Any] = {"error": f"org.varlink.service.{name}"}
    return {**found, "parameters": parameters} if parameters else found


# The server.


@pytest.mark.trio
async def test_it_describes_itself(tmp_path: Path) -> None:
    """GetInfo and GetInterfaceDescription tell what is there, the definition as it was written."""
    async with serving(tmp_path) as bench:
        wire = await bench.connect()
        info = await wire.ask("org.varlink.service.GetInfo")
        names = ["org.example.test", "org.varlink.service"]
        expected = {"vendor": "test", "product": "test", "version": "1", "url": ""}
        assert info == {"parameters": {**expected, "interfaces": names}}
        for name in names:
            reply = await wire.ask("org.varlink.service.GetInterfaceDescription", interface=name)
            assert parse_interface(reply["parameters"]["description"]).name == name


@pytest.mark.trio
@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"method": "Echo"}, error("InterfaceNotFound", interface="")),
        ({"method": "org.none.Echo"}, error("InterfaceNotFound", interface="org.none")),
        (
            {"method": "org.example.test.None"},
            error("MethodNotFound", method="org.example.test.None"),
        ),
        (
            {"method": "org.example.test.Later"},
            error("MethodNotImplemented", method="org.example.test.Later"),
        ),
        (
            {"method": "org.example.test.Wait", "upgrade": True},
            error("MethodNotImplemented", method="org.example.test.Wait"),
        ),
        ({"method": "org.example.test.Follow"}, error("ExpectedMore")),
        ({"method": "org.example.test.Echo"}, error("InvalidParameter", parameter="text")),
        (
            {"method": "org.example.test.Echo", "parameters": []},
            error("InvalidParameter", parameter="parameters"),
        ),
        (
            {"method": "org.example.test.Echo", "parameters": {"text": 1}},
            error("InvalidParameter", parameter="text"),
        ),
        (
            {"method": "org.example.test.Echo", "parameters": {"text": "a", "\ud800": 1}},
            error("InvalidParameter", parameter="\ud800"),
        ),
        (
            {
                "method": "org.varlink.service.GetInterfaceDescription",
                "parameters": {"interface": "x.y"},
            },
            error("InterfaceNotFound", interface="x.y"),
        ),
    ],
)
async def test_errors_of_the_specification(tmp_path: Path, message: Any, expected: Any) -> None:
    """A call that cannot be met gets the error that the specification names, and the next goes."""
    async with serving(tmp_path) as bench:
        wire = await bench.connect()
        await wire.send(message)
        assert await wire.reply() == expected
        echo = await wire.ask("org.example.test.Echo", text="still here")
        assert echo == {"parameters": {"text": "still here"}}


ECHO = '{"method":"org.example.test.Echo","parameters":{"text":"a"}'


@pytest.mark.trio
@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"nonsense\0",
        b"[]\0",
        b"{}\0",
        b'{"method":1}\0',
        b"\xff\xfe{\0",
        ECHO.encode() + b',"more":1}\0',
        ECHO.encode() + b',"more":true,"oneway":true}\0',
        ECHO.encode() + b',"unknown":true}\0',
        b'{"method":"org.example.test.Echo","parameters":{"text":NaN}}\0',
        b'{"method":"org.example.test.Echo","parameters":{"text":1e999}}\0',
        b"[" * 100_000 + b"\0",
        b"1" * 5000 + b"\0",
        b" " * (server.MAX_MESSAGE + 1),
        b" " * server.MAX_MESSAGE + b"{\0",
    ],
    ids=lambda data: repr(data[:40]),
)
async def test_malformed_messages_end_the_connection(tmp_path: Path, data: bytes) -> None:
    """What has no defined reply is logged and ends that connection, and no other."""
    async with serving(tmp_path) as bench:
        other, wire = await bench.connect(), await bench.connect()
        with structlog.testing.capture_logs() as logs:
            await wire.stream.send_all(data)
            with contextlib.suppress(trio.BrokenResourceError):
                assert await wire.reply() is None
        broke = [entry for entry in logs if entry["event"] == "Varlink client broke the protocol"]
        assert [entry["pid"] for entry in broke] == [os.getpid()]
        assert "parameters" in await other.ask("org.example.test.Echo", text="a")


@pytest.mark.trio
async def test_the_largest_message_goes(tmp_path: Path) -> None:
    """A message of exactly the limit is answered, vendor extensions in it are ignored."""
    async with serving(tmp_path) as bench:
        wire = await bench.connect()
        message = (ECHO + ',"org.example":{"a":1}}').encode()
        data = message + b" " * (server.MAX_MESSAGE - len(message)) + b"\0"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.stream.send_all, data)
            assert await wire.reply() == {"parameters": {"text": "a"}}


@pytest.mark.trio
async def test_pipelined_calls_are_answered_in_order(tmp_path: Path) -> None:
    """Calls sent at once are answered one by one, those with oneway not at all, then the end."""
    async with serving(tmp_path) as bench:
        wire = await bench.connect()
        method = "org.example.test.Echo"
        calls = [{"method": method, "parameters": {"text": str(n)}} for n in range(200)]
        calls[50]["oneway"] = calls[51]["oneway"] = True
        calls[51]["method"] = "org.none.Nothing"
        await wire.send(*calls)
        await wire.stream.send_eof()
        texts = [(await wire.reply())["parameters"]["text"] for _ in range(198)]
        assert texts == [str(n) for n in range(200) if n not in (50, 51)]
        assert await wire.reply() is None


@pytest.mark.trio
async def test_a_message_may_come_byte_by_byte(tmp_path: Path) -> None:
    """A message in pieces is put together while others are served."""
    async with serving(tmp_path) as bench:
        slow, quick = await bench.connect(), await bench.connect()
        for byte in (ECHO + "}").encode():
            await slow.stream.send_all(bytes([byte]))
            assert "parameters" in await quick.ask("org.example.test.Echo", text="b")
        await slow.stream.send_all(b"\0")
        assert await slow.reply() == {"parameters": {"text": "a"}}


@pytest.mark.trio
async def test_a_stream_of_replies_ends_with_one_that_does_not_continue(tmp_path: Path) -> None:
    """All but the last reply to a call with more say that others follow; the next call waits."""
    async with serving(tmp_path) as bench:
        wire = await bench.connect()
        method = "org.example.test.Follow"
        await wire.send({"method": method, "more": True, "parameters": {"count": 2}})
        await wire.send({"method": "org.example.test.Echo", "parameters": {"text": "next"}})
        replies = [await wire.reply() for _ in range(4)]
        assert [reply.get("continues") for reply in replies] == [True, True, None, None]
        assert [reply["parameters"].get("at") for reply in replies] == [0, 1, 2, None]


@pytest.mark.trio
async def test_more_on_a_plain_method_gives_one_reply(tmp_path: Path) -> None:
    """A method that does not stream answers once, whatever the client would take."""
    async with serving(tmp_path) as bench:
        wire = await bench.connect()
        await wire.stream.send_all((ECHO + ',"more":true}').encode() + b"\0")
        assert await wire.reply() == {"parameters": {"text": "a"}}


@pytest.mark.trio
async def test_a_stream_ends_with_its_client(tmp_path: Path) -> None:
    """A streaming method is cancelled when its client goes, even if it has nothing to send."""
    async with serving(tmp_path) as bench:
        wire = await bench.connect()
        await wire.send({"method": "org.example.test.Follow", "more": True})
        with trio.fail_after(5):
            await bench.waiting.wait()
            await wire.stream.aclose()
            await bench.left.wait()


@pytest.mark.trio
async def test_calls_behind_a_stream_are_bounded(tmp_path: Path) -> None:
    """A client that heaps up calls behind a stream that does not end is disconnected."""
    async with serving(tmp_path) as bench:
        wire = await bench.connect()
        await wire.send({"method": "org.example.test.Follow", "more": True})
        with trio.fail_after(5):
            await bench.waiting.wait()
            call = (ECHO + "}").encode() + b"\0"
            with pytest.raises(trio.BrokenResourceError):
                await wire.stream.send_all(call * (4 * server.MAX_MESSAGE // len(call)))
            await bench.left.wait()


@pytest.mark.trio
async def test_other_calls_outlive_their_client(tmp_path: Path) -> None:
    """What a call has begun is not called off because the client has gone."""
    async with serving(tmp_path) as bench:
        wire = await bench.connect()
        await wire.send({"method": "org.example.test.Wait"})
        with trio.fail_after(5):
            await bench.waiting.wait()
            await wire.stream.aclose()
            bench.release.set()
            await bench.done.wait()


@pytest.mark.trio
@pytest.mark.parametrize("how", ["bug", "network", "nan"])
async def test_a_failing_handler_is_answered(tmp_path: Path, how: str) -> None:
    """A fault of the service's own becomes an error reply and a log entry; the next call goes."""
    async with serving(tmp_path) as bench:
        wire = await bench.connect()
        with structlog.testing.capture_logs() as logs:
            reply = await wire.ask("org.example.test.Break", how=how)
        assert reply["error"] == "org.example.test.Internal"
        assert "bug in a Varlink method" in [entry["event"] for entry in logs]
        assert "parameters" in await wire.ask("org.example.test.Echo", text="a")


@pytest.mark.trio
async def test_connections_are_bounded(tmp_path: Path) -> None:
    """One client too many is disconnected at once, and there is room again when another goes."""
    async with serving(tmp_path, max_connections=2) as bench:
        first, second = await bench.connect(), await bench.connect()
        for wire in (first, second):
            assert "parameters" in await wire.ask("org.example.test.Echo", text="a")
        third = await bench.connect()
        assert await third.reply() is None
        await first.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        fourth = await bench.connect()
        assert "parameters" in await fourth.ask("org.example.test.Echo", text="a")


@pytest.mark.trio
@pytest.mark.parametrize("idle", ["says nothing", "says half", "does not read"])
async def test_idle_clients_keep_nobody_out(
    tmp_path: Path, idle: str, autojump_clock: trio.testing.MockClock
) -> None:
    """Where there are too many, one that keeps the server waiting has to go, the longest first; one
    that waits for the server stays, and its call is done."""
    async with serving(tmp_path, max_connections=3) as bench, trio.open_nursery() as nursery:
        busy, follows = await bench.connect(), await bench.connect()
        await busy.send({"method": "org.example.test.Wait"})
        await follows.send({"method": "org.example.test.Follow", "more": True})
        assert (await follows.reply())["continues"]
        forgotten = await bench.connect()
        if idle == "says half":
            await forgotten.stream.send_all(b'{"method": "org')
        if idle == "does not read":
            nursery.start_soon(ask_on_and_on, forgotten)
        await trio.sleep(2 * server.IDLE_SECONDS)
        for _ in range(2):
            new = await bench.connect()
            assert "parameters" in await new.ask("org.example.test.Echo", text="a")
            await trio.sleep(2 * server.IDLE_SECONDS)
        if idle != "does not read":
            assert await forgotten.reply() is None
        bench.release.set()
        assert await busy.reply() == {}
        assert not bench.left.is_set()


async def ask_on_and_on(wire: Wire) -> None:
    """Without ever reading."""
    with contextlib.suppress(trio.BrokenResourceError):
        while True:
            await wire.send(
                {"method": "org.example.test.Echo", "parameters": {"text": "x" * 500_000}}
            )


# Who may use it.


@pytest.mark.parametrize(
    ("uid", "groups", "mode", "may"),
    [
        (0, {0}, 0o000, True),
        (os.geteuid(), {9}, 0o000, True),
        (4711, {4711, 815}, 0o660, True),
        (4711, {4711}, 0o660, False),
        (4711, {4711, 815}, 0o640, False),
        (4711, {4711}, 0o666, True),
    ],
)
def test_who_may_use_the_socket(
    monkeypatch: pytest.MonkeyPatch, uid: int, groups: set[int], mode: int, may: bool
) -> None:
    """Root, the daemon's user, and whom the socket's mode and group let in."""

    class Entry:
        st_mode, st_gid = stat.S_IFSOCK | mode, 815

    monkeypatch.setattr(os, "stat", lambda _: Entry)
    peer = server.Peer(pid=1, uid=uid, gid=min(groups), groups=frozenset(groups))
    assert peer.may_use("/the/socket") is may


@pytest.mark.trio
async def test_others_are_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may not use the socket is told so, logged and disconnected."""
    monkeypatch.setattr(server.Peer, "may_use", lambda self, path: False)
    async with serving(tmp_path) as bench:
        with structlog.testing.capture_logs() as logs:
            wire = await bench.connect()
            assert await wire.reply() == error("PermissionDenied")
            assert await wire.reply() is None
        assert (logs[0]["event"], logs[0]["pid"]) == ("Varlink client denied", os.getpid())


@pytest.mark.trio
async def test_a_client_that_cannot_be_served_ends_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong with one is logged, and the next one is served."""
    async with serving(tmp_path) as bench:
        with monkeypatch.context() as patched, structlog.testing.capture_logs() as logs:
            patched.setattr(server.Peer, "of", lambda sock: 1 / 0)
            wire = await bench.connect()
            assert await wire.reply() is None
        assert [entry["event"] for entry in logs] == ["bug in serving a Varlink client"]
        other = await bench.connect()
        assert "parameters" in await other.ask("org.example.test.Echo", text="a")


@pytest.mark.trio
async def test_the_kernel_says_who_the_peer_is(tmp_path: Path) -> None:
    """Every call is logged with the process and user that made it."""
    async with serving(tmp_path) as bench:
        wire = await bench.connect()
        with structlog.testing.capture_logs() as logs:
            await wire.ask("org.example.test.Echo", text="a")
        entry = next(entry for entry in logs if entry["event"] == "Varlink call")
        assert (entry["pid"], entry["uid"]) == (os.getpid(), os.geteuid())


# File descriptors.


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def send_with_fds(wire: Wire, data: bytes, count: int) -> None:
    reading, writing = os.pipe()
    try:
        fds = array.array("i", [reading] * count)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
        await wire.stream.socket.sendmsg([data], ancillary)
    finally:
        os.close(reading)
        os.close(writing)


def give(index: int) -> bytes:
    call = {"method": "org.example.test.Give", "parameters": {"index": index}}
    return json.dumps(call).encode() + b"\0"


@pytest.mark.trio
async def test_file_descriptors_reach_a_method_that_takes_them(tmp_path: Path) -> None:
    """A method that takes file descriptors gets them, and those it does not keep are closed."""
    async with serving(tmp_path) as bench:
        wire = await bench.connect()
        await wire.ask("org.example.test.Echo", text="a")
        before = open_fds()
        await send_with_fds(wire, give(1), 2)
        assert await wire.reply() == {"parameters": {"kind": "fifo"}}
        await send_with_fds(wire, give(2), 2)
        assert await wire.reply() == error("InvalidParameter", parameter="index")
        assert open_fds() == before


@pytest.mark.trio
async def test_other_file_descriptors_are_closed(tmp_path: Path) -> None:
    """A method that takes none is answered, and what came with the call is closed already."""
    async with serving(tmp_path) as bench:
        wire = await bench.connect()
        await wire.ask("org.example.test.Echo", text="a")
        before = open_fds()
        follow = b'{"method":"org.example.test.Follow","more":true}\0'
        await send_with_fds(wire, follow, server.MAX_FDS)
        assert await wire.reply() == {"parameters": {"at": 0}, "continues": True}
        assert open_fds() == before


@pytest.mark.trio
async def test_a_service_without_such_methods_takes_no_file_descriptors(tmp_path: Path) -> None:
    """Where no method takes file descriptors the kernel drops them, and the call is answered."""
    async with serving(tmp_path) as bench:
        bench.service.with_fds = frozenset()
        wire = await bench.connect()
        await wire.ask("org.example.test.Echo", text="a")
        before = open_fds()
        await send_with_fds(wire, (ECHO + "}").encode() + b"\0", 3)
        assert await wire.reply() == {"parameters": {"text": "a"}}
        assert open_fds() == before


@pytest.mark.trio
@pytest.mark.parametrize(("ahead", "count"), [(0, server.MAX_FDS + 1), (5, 1)])
async def test_misplaced_file_descriptors_end_the_connection(
    tmp_path: Path, ahead: int, count: int
) -> None:
    """File descriptors beyond the limit or amid a message are closed with the connection."""
    async with serving(tmp_path) as bench:
        wire = await bench.connect()
        await wire.ask("org.example.test.Echo", text="a")
        before = open_fds()
        if ahead:
            await wire.stream.send_all(give(0)[:ahead])
            await trio.testing.wait_all_tasks_blocked()
        await send_with_fds(wire, give(0)[ahead:], count)
        with contextlib.suppress(trio.BrokenResourceError):
            assert await wire.reply() is None
        await trio.testing.wait_all_tasks_blocked()
        # Nor is the server's end of the connection open any more.
        assert open_fds() == before - 1


# Anything at all.

PIECES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"\0", b"{", b'"', b'{"method":"org.varlink.service.GetInfo"}\0']),
    st.dictionaries(
        st.sampled_from(["method", "parameters", "more", "oneway", "upgrade", "org.x", "x"]),
        st.one_of(
            st.none(),
            st.booleans(),
            st.floats(),
            st.integers(),
            st.text(max_size=5),
            st.sampled_from([f"org.example.test.{m}" for m in ("Echo", "Give", "Break")]),
            st.dictionaries(st.sampled_from(["text", "index", "how"]), st.integers(), max_size=2),
        ),
    ).map(lambda message: json.dumps(message).encode() + b"\0"),
)


@pytest.mark.trio
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pieces=st.lists(PIECES, max_size=12))
async def test_whatever_comes_is_answered_or_ends(tmp_path: Path, pieces: list[bytes]) -> None:
    """No input stops the server: replies are well formed, or the connection is closed."""
    async with serving(tmp_path) as bench:
        wire = await bench.connect()
        with contextlib.suppress(trio.BrokenResourceError):
            for piece in pieces:
                await wire.stream.send_all(piece)
            await wire.stream.send_eof()
            while reply := await wire.reply():
                assert set(reply) <= {"parameters", "error"}
        other = await bench.connect()
        assert "parameters" in await other.ask("org.varlink.service.GetInfo")


# The client.


@pytest.mark.trio
async def test_the_client_calls_and_follows(tmp_path: Path) -> None:
    """The blocking client gets replies, streams and errors, and tells when it is disconnected."""
    async with serving(tmp_path) as bench:

        def use() -> None:
            with varlink_client.Client(bench.path) as client:
                long = "ä" * 100_000
                assert client.call("org.example.test.Echo", text=long, no=None) == {"text": long}
                follow = client.stream("org.example.test.Follow", count=3)
                assert [reply["at"] for reply in follow] == [0, 1, 2, 3]
                with pytest.raises(varlink_client.ErrorReply) as caught:
                    client.call("org.example.test.Echo", text=1)
                assert caught.value.parameters == {"parameter": "text"}
                with pytest.raises(varlink_client.ConnectionLost):
                    client.call("x" * (server.MAX_MESSAGE + 1))

        await trio.to_thread.run_sync(use)


def test_the_client_says_why_nothing_answers(tmp_path: Path) -> None:
    """A missing, dead or impossible address is told apart from a service that answers."""
    dead = str(tmp_path / "dead")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(dead)
    for path, why in ((dead, "refused"), (dead + "x", "No such file"), ("/" * 200, "too long")):
        with pytest.raises(varlink_client.NoAnswer, match=why):
            varlink_client.Client(path)


def test_a_service_that_is_busy_is_waited_for(tmp_path: Path) -> None:
    """A client that finds the queue of others full takes its turn."""
    path = str(tmp_path / "busy")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as others:
        listener.bind(path)
        listener.listen(0)
        others.enter_context(varlink_client.Client(path))
        made: list[varlink_client.Client] = []
        late = threading.Thread(target=lambda: made.append(varlink_client.Client(path)))
        late.start()
        late.join(0.1)
        assert late.is_alive()
        others.enter_context(listener.accept()[0])
        late.join()
        made[0].close()


WAITING = ("45", "7")
"""recvfrom and poll, by their numbers on x86-64."""


def test_an_interrupt_is_not_missed(tmp_path: Path) -> None:
    """Ctrl-C that comes just before the client waits, so that no call is interrupted by it."""
    call = Path(f"/proc/self/task/{os.getpid()}/syscall")
    path, left, heard = str(tmp_path / "silent"), threading.Event(), list[bool]()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def interrupt() -> None:
            with listener.accept()[0] as end:
                end.recv(1000)
                while call.read_text().split()[0] not in WAITING:
                    time.sleep(0.001)
                _thread.interrupt_main()  # noted for Python only: a call that waits goes on
                heard.append(left.wait(10))

        # Who runs the tests in the background has it ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        other = threading.Thread(target=interrupt)
        other.start()
        try:
            with varlink_client.Client(path) as client:
                with pytest.raises(KeyboardInterrupt):
                    client.call("org.example.test.Wait")
                left.set()
        finally:
            signal.signal(signal.SIGINT, before)
        other.join()
    assert heard == [True]
