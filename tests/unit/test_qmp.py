# SPDX-License-Identifier: Apache-2.0
"""The QMP client against a monitor made of a script: each test's server says what it is told to."""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from postcopyd.vmm.qemu import qmp as qmp_module
from postcopyd.vmm.qemu.qmp import (
    Qmp,
    QmpBusy,
    QmpClosed,
    QmpProtocolError,
    QmpRefused,
    QmpUnreachable,
)

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}}, "capabilities": []}}
Script = Callable[["Monitor"], Awaitable[None]]


class Monitor:
    """The server's side of one connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.buffer = b""

    async def say(self, *messages: Any) -> None:
        await self.stream.send_all(b"".join(json.dumps(m).encode() + b"\r\n" for m in messages))

    async def hear(self) -> dict[str, Any]:
        while b"\n" not in self.buffer:
            data = await self.stream.receive_some()
            if not data:
                raise EOFError
            self.buffer += bytes(data)
        line, _, self.buffer = self.buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    async def welcome(self) -> None:
        await self.say(GREETING)
        await self.say({"return": {}, "id": (await self.hear())["id"]})


@asynccontextmanager
async def monitor(path: Path, script: Script) -> AsyncIterator[str]:
    """A listening monitor that runs the script with the first client."""
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(str(path))
    listener.listen(1)

    async def serve() -> None:
        connection, _ = await listener.accept()
        async with trio.SocketStream(connection) as stream:
            await script(Monitor(stream))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        with listener, trio.fail_after(10):
            yield str(path)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def client(path: str) -> AsyncIterator[Qmp]:
    qmp = Qmp(path)
    try:
        await qmp.open()
        yield qmp
    finally:
        qmp.close()


async def test_a_command_returns_and_the_version_is_known(tmp_path: Path) -> None:
    """A reply goes to the command with its number, whatever comes before it."""

    async def script(server: Monitor) -> None:
        await server.welcome()
        message = await server.hear()
        assert message["execute"] == "query-status"
        assert message["arguments"] == {"deep": 1}
        await server.say(
            {"event": "STOP"},
            {"return": "not yours", "id": 999},
            {"return": 7, "id": message["id"]},
        )
        await trio.sleep_forever()

    async with monitor(tmp_path / "m", script) as path, client(path) as qmp:
        assert qmp.version == (10, 0, 2)
        assert await qmp.execute("query-status", {"deep": 1}) == 7


async def test_replies_in_another_order_find_their_callers(tmp_path: Path) -> None:
    """Two tasks may ask at once; one of them reads the socket for both."""

    async def script(server: Monitor) -> None:
        await server.welcome()
        both = [await server.hear(), await server.hear()]
        for message in reversed(both):
            await server.say({"return": message["execute"], "id": message["id"]})
        await trio.sleep_forever()

    answers = {}
    async with monitor(tmp_path / "m", script) as path, client(path) as qmp:

        async def ask(name: str) -> None:
            answers[name] = await qmp.execute(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "one")
            nursery.start_soon(ask, "two")
    assert answers == {"one": "one", "two": "two"}


async def test_a_cancelled_command_does_not_disturb_the_next(tmp_path: Path) -> None:
    """The reply to a command that nobody waits for any more is dropped."""

    async def script(server: Monitor) -> None:
        await server.welcome()
        first = await server.hear()
        second = await server.hear()
        await server.say({"return": "late", "id": first["id"]}, {"return": 2, "id": second["id"]})
        await trio.sleep_forever()

    async with monitor(tmp_path / "m", script) as path, client(path) as qmp:
        with trio.move_on_after(0.05):
            await qmp.execute("slow")
        assert await qmp.execute("quick") == 2


async def test_events_of_the_kinds_asked_for_in_their_order(tmp_path: Path) -> None:
    """A subscriber gets its events, also those that came with somebody else's reply, and when they
    were by QEMU's clock."""
    stamp = {"seconds": 7, "microseconds": 8}

    async def script(server: Monitor) -> None:
        await server.welcome()
        message = await server.hear()
        await server.say({"event": "STOP"}, {"event": "NOISE"}, {"return": {}, "id": message["id"]})
        await server.say({"event": "RESUME", "timestamp": stamp})
        await trio.sleep_forever()

    async with monitor(tmp_path / "m", script) as path, client(path) as qmp:
        with qmp.events("STOP", "RESUME") as events:
            await qmp.execute("stop")
            assert (await events.next())["event"] == "STOP"
            assert await events.next() == {"event": "RESUME", "data": {}, "timestamp": stamp}
            assert events.take() is None


async def test_an_error_is_qemus_sentence(tmp_path: Path) -> None:
    """A refusal names the command and gives QEMU's reason."""

    async def script(server: Monitor) -> None:
        await server.welcome()
        message = await server.hear()
        error = {"class": "GenericError", "desc": 'Failed to get "write" lock.'}
        await server.say({"error": error, "id": message["id"]})
        await trio.sleep_forever()

    async with monitor(tmp_path / "m", script) as path, client(path) as qmp:
        with pytest.raises(QmpRefused, match="`cont`") as caught:
            await qmp.execute("cont")
    assert caught.value.reason == 'Failed to get "write" lock'


async def test_a_descriptor_travels_with_its_command(tmp_path: Path) -> None:
    """The monitor gets a duplicate of the descriptor beside the text."""

    async def script(server: Monitor) -> None:
        await server.welcome()
        data, ancillary, _, _ = await server.stream.socket.recvmsg(4096, socket.CMSG_SPACE(4))
        ((_, _, rights),) = ancillary
        (number,) = array.array("i", rights)
        os.write(number, b"hello")
        os.close(number)
        await server.say({"return": {}, "id": json.loads(data)["id"]})
        await trio.sleep_forever()

    read, write = os.pipe()
    try:
        async with monitor(tmp_path / "m", script) as path, client(path) as qmp:
            await qmp.execute("getfd", {"fdname": "x"}, fd=write)
        assert os.read(read, 16) == b"hello"
    finally:
        os.close(read)
        os.close(write)


async def test_a_silent_monitor_is_busy_and_can_be_tried_again(tmp_path: Path) -> None:
    """No greeting within the patience is said so; the same client may try again later."""

    async def silent(server: Monitor) -> None:
        await trio.sleep_forever()

    qmp = Qmp(str(tmp_path / "m"))
    async with monitor(tmp_path / "m", silent):
        with pytest.raises(QmpBusy, match="another client"):
            await qmp.open(patience=0.05)
    (tmp_path / "m").unlink()
    async with monitor(tmp_path / "m", Monitor.welcome):
        await qmp.open()
    qmp.close()


async def test_nobody_listens(tmp_path: Path) -> None:
    """A path without a listener is an error that says how to start QEMU."""
    with pytest.raises(QmpUnreachable, match="-qmp unix:"):
        await Qmp(str(tmp_path / "m")).open()


async def test_the_end_of_the_connection_wakes_everybody(tmp_path: Path) -> None:
    """All who wait learn that QEMU has ended; a later command knows that none of it was sent."""

    async def script(server: Monitor) -> None:
        await server.welcome()
        await server.hear()

    ended = []
    async with monitor(tmp_path / "m", script) as path, client(path) as qmp:

        async def waits(wait: Callable[[], Awaitable[Any]]) -> None:
            with pytest.raises(QmpClosed) as caught:
                await wait()
            ended.append(caught.value.unsent)

        with qmp.events("STOP") as events, qmp.events("RESUME") as others:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(waits, events.next)
                nursery.start_soon(waits, others.next)
                nursery.start_soon(waits, lambda: qmp.execute("cont"))
        assert ended == [False, False, False]
        with pytest.raises(QmpClosed) as caught:
            await qmp.execute("cont")
        assert caught.value.unsent


@pytest.mark.parametrize("junk", [b"\x00\xff\n", b"[1, 2]\n", b"[" * 100_000 + b"\n", b'"x"\n'])
async def test_what_is_not_qmp_is_refused(tmp_path: Path, junk: bytes) -> None:
    """A peer that speaks something else ends the connection with a named error."""

    async def script(server: Monitor) -> None:
        await server.stream.send_all(junk)
        await trio.sleep_forever()

    async with monitor(tmp_path / "m", script) as path:
        with pytest.raises(QmpProtocolError, match="does not speak QMP"):
            await Qmp(path).open()


async def test_an_endless_message_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message over the limit is not collected without end."""
    monkeypatch.setattr(qmp_module, "MAX_MESSAGE_BYTES", 100_000)

    async def script(server: Monitor) -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await server.stream.send_all(b" " * 50_000)

    async with monitor(tmp_path / "m", script) as path:
        qmp = Qmp(path)
        with pytest.raises(QmpProtocolError, match="over 100000 bytes"):
            await qmp.open()
