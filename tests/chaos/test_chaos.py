# SPDX-License-Identifier: Apache-2.0
"""A short run of chaos.py, and its parts held to what they promise."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path

import chaos
import evidence as e
import msgpack
import pytest
import schedule as s
import trio
from guests import qemu as q
from lab import free_port
from needs import missing
from proxy import Proxy

from postcopyd import protocol as p


@pytest.mark.long
def test_a_guest_survives_a_short_run(tmp_path: Path) -> None:
    """A minute of everything; the guest is whole, in one place, and moves on."""
    if os.geteuid() != 0:
        missing("root, whom daemons that adopt a QEMU need")
    try:
        q.boot(tmp_path)
    except q.MissingPartError as error:
        missing(f"a guest in QEMU: {error}")
    words = ["--seed", "1", "--seconds", "60", "--memory", "128", "--bandwidth", "48M"]
    path = os.environ | {"PYTHONPATH": str(Path(chaos.__file__).parent.parent)}
    command = [sys.executable, chaos.__file__, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=path)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-12000:]}"


# --- the schedule --------------------------------------------------------------------------------


def test_a_seed_is_a_schedule() -> None:
    """The same seed breaks the same, another seed something else."""
    first, same, other = (list(islice(s.schedule(seed), 300)) for seed in (1, 1, 2))
    assert first == same
    assert first != other


@pytest.mark.parametrize("seed", range(5))
def test_faults_are_spread(seed: int) -> None:
    """Within 300 faults every phase meets every kind that can be met there, and every victim."""
    faults = list(islice(s.schedule(seed), 300))
    for phase in s.PHASES:
        kinds = {fault.kind for fault in faults if fault.phase == phase}
        assert kinds == set(s.possible(phase))
    for kind, (victims, ranges) in s.KINDS.items():
        of_kind = [fault for fault in faults if fault.kind == kind]
        assert {fault.victim for fault in of_kind} == set(victims)
        for fault in of_kind:
            assert any(a <= fault.seconds <= b for a, b in ranges or ((0, 0),))
    assert all(fault.moment in s.MOMENTS[fault.phase][0] for fault in faults)


def test_a_schedule_can_be_narrowed() -> None:
    """Only what is asked for; and what can never come is refused, not waited for."""
    faults = list(islice(s.schedule(1, (s.GRANTED, s.IDLE), ("cut", "kill")), 50))
    assert {(fault.phase, fault.kind) for fault in faults} == {
        (s.GRANTED, "cut"), (s.GRANTED, "kill"), (s.IDLE, "kill"),
    }  # fmt: skip
    never = (((), ("cut",)), ((s.IDLE,), ("cut",)), (("nowhere",), ("cut",)),
             ((s.GRANTED, s.IDLE), ("cancel",)))  # fmt: skip
    for phases, kinds in never:
        with pytest.raises(ValueError, match="no fault"):
            next(s.schedule(1, phases, kinds))


def test_every_mode_is_used() -> None:
    """Hybrid most of the time, and precopies both ways."""
    some = list(islice(s.moves(1), 200))
    assert some == list(islice(s.moves(1), 200)) != list(islice(s.moves(2), 200))
    modes = [move.mode for move in some]
    assert modes.count("hybrid") > modes.count("postcopy") > modes.count("precopy") > 0
    assert {move.share for move in some if move.mode == "precopy"} == {1.0, 0.5}


# --- what a run is judged by ---------------------------------------------------------------------


def test_a_guest_that_runs_twice_is_seen() -> None:
    """Whatever the order in which two monitors are heard."""
    runs = e.Runs()
    runs.resumed("one", 1.0)
    runs.resumed("two", 5.0)
    assert runs.twice() == "one ran until inf, and two from 5.000000 on"
    runs.stopped("one", 4.0)
    assert runs.twice() == ""
    runs.stopped("two", 9.0)
    runs.resumed("one", 8.0)
    assert runs.twice() == "two ran until 9.000000, and one from 8.000000 on"


def test_the_longest_stop() -> None:
    runs = e.Runs()
    for begin, end, qemu in ((1.0, 4.0, "one"), (4.5, 6.0, "two"), (8.0, 9.0, "two")):
        runs.resumed(qemu, begin)
        runs.stopped(qemu, end)
    assert runs.nowhere == 2.0
    runs.resumed("three", 12.0)
    assert runs.nowhere == 3.0


def test_a_guest_that_is_heard_again_is_seen() -> None:
    assert e.returned(["a", "a", "b", "b", "c"]) == ""
    assert e.returned(["a", "b", "b", "a"]) == "a"


def test_where_the_guest_is() -> None:
    """An end is what both sides say; one side's word is not enough."""
    drained = {"role": "source", "phase": "drained", "migration": "m"}
    arrived = drained | {"role": "destination"}
    assert e.where(drained, arrived) == "destination"
    assert e.where(drained, arrived | {"phase": "paused"}) == ""
    assert e.where(drained, arrived | {"migration": "another"}) == ""
    assert e.where(drained, {}) == e.where({}, arrived) == ""
    assert e.where(drained | {"phase": "failed"}, arrived | {"phase": "failed"}) == "source"
    # The source of this one was the destination of the last; its migration never began.
    assert e.where(arrived, drained) == "source"
    assert e.where(drained | {"phase": "handover"}, arrived | {"phase": "failed"}) == ""


def test_what_is_under_way() -> None:
    """The phase of a fault is read from both records, and from what is broken already."""

    def phase(here: str, there: str, **more: bool) -> str:
        source, destination = (e.Side("up", *side.split()) for side in (here, there))
        migrating, disturbed = more.get("migrating", True), more.get("disturbed", False)
        copying = more.get("copying", False)
        return e.phase(source, destination, migrating, disturbed, copying)

    assert phase("held idle", "held idle", migrating=False) == s.IDLE
    assert phase("held idle", "held drained") == s.PREPARE
    assert phase("held idle", "arriving idle") == s.ADOPTION
    assert phase("held idle", "arriving idle", copying=True) == s.PRECOPY
    assert phase("intent idle", "arriving idle") == s.HANDOVER
    assert phase("granted handover", "loading handover") == s.GRANTED
    assert phase("granted handover", "owned handover") == s.POSTCOPY
    assert phase("granted postcopy", "owned postcopy", disturbed=True) == s.RECOVERY
    assert phase("granted paused", "owned postcopy") == s.RECOVERY
    assert phase("granted postcopy", "held drained") == s.DRAINED


# --- the proxy -----------------------------------------------------------------------------------

HELLO = msgpack.packb(p.CONTROL) + msgpack.packb({"type": "hello"})
URGENT = msgpack.packb(p.DATA) + msgpack.packb({"migration": "m", "token": b"t", "urgent": True})


class Echo:
    """A daemon of which only the connections count: it sends back what comes; and its clients."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.ended: list[str] = []
        self.clients: list[trio.SocketStream] = []
        self.proxy: Proxy

    async def serve(self, stream: trio.SocketStream) -> None:
        try:
            async for data in stream:
                await stream.send_all(data)
            self.ended.append("end")
        except trio.BrokenResourceError:
            self.ended.append("reset")

    async def on_message(self, message: str) -> None:
        self.messages.append(message)

    async def dial(self) -> trio.SocketStream:
        self.clients.append(await trio.open_tcp_stream("127.0.0.1", self.proxy.port))
        return self.clients[-1]

    async def connect(self, first: bytes) -> trio.SocketStream:
        """A connection that has been answered."""
        stream = await self.dial()
        await say(stream, first)
        return stream


@asynccontextmanager
async def proxied() -> AsyncIterator[tuple[Proxy, Echo]]:
    echo = Echo()
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, echo.serve, [listener])
        to = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        proxy = echo.proxy = Proxy(free_port(), to, echo.on_message)
        await nursery.start(proxy.run)
        try:
            with trio.fail_after(10):
                yield proxy, echo
        finally:
            for client in echo.clients:
                client.socket.close()
        nursery.cancel_scope.cancel()


async def say(stream: trio.SocketStream, data: bytes) -> None:
    """Returns when it has come back."""
    await stream.send_all(data)
    got = b""
    while len(got) < len(data):
        more = await stream.receive_some()
        assert more
        got += more
    assert got == data


async def test_one_kind_of_connection_is_cut() -> None:
    """The control connection ends on both sides, the other goes on."""
    async with proxied() as (proxy, echo):
        control, urgent = await echo.connect(HELLO), await echo.connect(URGENT)
        assert sorted(link.kind for link in proxy.links) == ["control", "urgent"]
        assert proxy.cut("push") == 0
        assert proxy.cut("control") == 1
        assert await control.receive_some() == b""
        while not echo.ended:
            await trio.sleep(0.001)
        assert echo.ended == ["end"]
        await say(urgent, bytes(1 << 20))


async def test_all_connections_are_reset() -> None:
    async with proxied() as (proxy, echo):
        streams = [await echo.connect(first) for first in (HELLO, URGENT)]
        assert proxy.reset() == 2
        for stream in streams:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        while len(echo.ended) < 2:
            await trio.sleep(0.001)
        assert echo.ended == ["reset", "reset"]
        await echo.connect(HELLO)


async def test_one_direction_is_stalled() -> None:
    """What goes to the daemon arrives, its answers do not; later all comes, and in order."""
    async with proxied() as (proxy, echo):
        stream = await echo.connect(HELLO)
        proxy.stall(0.3, ("source",))
        assert proxy.disturbed
        began = trio.current_time()
        await stream.send_all(msgpack.packb({"type": "offer"}))
        while "offer" not in echo.messages:
            await trio.sleep(0.001)
        with trio.move_on_after(0.1) as waited:
            await stream.receive_some()
        assert waited.cancelled_caught
        await stream.send_eof()
        answer = b"".join([data async for data in stream])
        assert answer == msgpack.packb({"type": "offer"})
        assert trio.current_time() >= began + 0.3
        assert not proxy.disturbed


async def test_new_connections_are_refused() -> None:
    """For a time; those that are there go on, and the port is the same afterwards."""
    async with proxied() as (proxy, echo):
        stream = await echo.connect(HELLO)
        proxy.refuse(0.3)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionRefusedError), socket.socket() as refused:
            refused.connect(("127.0.0.1", proxy.port))
        await say(stream, b"still there")
        with trio.fail_after(5):
            while True:
                try:
                    await echo.connect(HELLO)
                    return
                except OSError:
                    await trio.sleep(0.01)


async def test_messages_are_told_before_they_pass() -> None:
    """In both directions of a control connection, however they are cut into pieces."""
    held = trio.Event()
    told: list[str] = []

    async def hold(message: str) -> None:
        told.append(message)
        if message == "grant":
            await held.wait()

    async with proxied() as (proxy, echo):
        proxy._on_message = hold
        stream = await echo.connect(HELLO)
        grant = msgpack.packb({"type": "grant", "epoch": 1})
        await stream.send_all(grant[:5])
        await stream.send_all(grant[5:])
        while told != ["hello", "hello", "grant"]:
            await trio.sleep(0.001)
        got = b""
        with trio.move_on_after(0.05):  # of the pieces only those that came before its end
            while True:
                got += await stream.receive_some()
        assert len(got) < len(grant)
        held.set()
        while len(got) < len(grant):
            got += await stream.receive_some()
        assert told == ["hello", "hello", "grant", "grant"]


async def test_a_daemon_that_is_down_resets() -> None:
    async with proxied() as (proxy, echo):
        proxy._to = ("127.0.0.1", free_port())
        stream = await echo.dial()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
