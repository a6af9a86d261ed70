# SPDX-License-Identifier: Apache-2.0
"""What a host takes on at a time, and what becomes of those who have to wait for it."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from session_faults import (
    Clock,
    cancel,
    cut,
    destination_dies,
    kill_both,
    kill_destination,
    kill_source,
    silence,
    source_dies,
    stop_destination,
    stop_source,
    world,
)
from session_world import LONG_S, SILENCE_S, Fault, World

from postcopyd import protocol as p
from postcopyd.config.options import ServeOptions
from postcopyd.errors import PostcopydError
from postcopyd.handover import Machine, Source
from postcopyd.model import MigrateRequest
from postcopyd.net.channel import Channel, PeerError
from postcopyd.net.connection import dial
from postcopyd.net.peers import DOOR, Peers, Visitor
from postcopyd.records.store import Store
from postcopyd.sessions.limits import Arrivals, Limits, Uplink, shares
from postcopyd.sessions.shared import Shared
from postcopyd.sessions.vm import Vm
from postcopyd.source.engine import SourceEngine
from postcopyd.source.session import SourceSession
from postcopyd.vmm import Region

RAM = 32 * 4096  # of the guest of a session_world


# --- the rules -----------------------------------------------------------------------------------


async def test_first_come_first_served() -> None:
    """A small guest does not pass a large one; who gives up while it waits holds up nobody."""
    arrivals = Arrivals(most=3, memory=10)
    for who, size in (("a", 6), ("b", 5), ("c", 1), ("d", 9), ("e", 1), ("f", 1)):
        arrivals.join(who, size)
    assert [arrivals.ahead(who) for who in "abcdef"] == [None, 0, 1, 2, 3, 4]
    changed = arrivals.changed
    arrivals.leave("a")
    assert changed.is_set()
    assert [arrivals.ahead(who) for who in "bcdef"] == [None, None, 0, 1, 2]
    arrivals.leave("d")
    assert [arrivals.ahead(who) for who in "ef"] == [None, 0]  # three are here
    arrivals.take("g", 100)  # goes on here, and waits for nothing
    arrivals.leave("b")
    arrivals.leave("c")
    assert arrivals.ahead("f") == 0
    arrivals.leave("g")
    assert arrivals.ahead("f") is None


@given(
    st.integers(1, 3) | st.none(),
    st.integers(5, 9) | st.none(),
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 20)), max_size=20),
)
async def test_nobody_waits_for_nothing(
    most: int | None, memory: int | None, steps: list[tuple[int, int]]
) -> None:
    """Whoever comes and goes, limits hold, and as long as some leave everybody is let in."""
    arrivals, present = Arrivals(most, memory), dict[int, int]()
    for who, (size, leaver) in enumerate(steps):
        arrivals.join(who, size)
        present[who] = size
        if leaver in present:
            arrivals.leave(leaver)
            del present[leaver]
        here = [present[one] for one in present if arrivals.ahead(one) is None]
        assert most is None or len(here) <= most
        assert memory is None or sum(here) <= memory
    for _ in range(len(present)):
        first = next(one for one in present if arrivals.ahead(one) is None)
        arrivals.leave(first)
        del present[first]


@given(st.integers(1, 10**12), st.lists(st.integers(0, 10**12), min_size=1, max_size=9))
def test_shares(total: int, limits: list[int]) -> None:
    """All of it is given away, equally, save what limits keep some from using; and never 0, which
    would be no limit."""
    parts = shares(total, limits)
    assert all(
        part >= 1 and (not limit or part <= limit)
        for part, limit in zip(parts, limits, strict=True)
    )
    assert sum(parts) <= max(total, len(parts))
    free = [part for part, limit in zip(parts, limits, strict=True) if part != limit]
    assert max(free, default=1) - min(free, default=1) <= 1
    assert all(part <= max(free, default=part) for part in parts)
    if free and total >= len(parts):
        assert sum(parts) == total


def test_shares_follow_who_begins_and_ends() -> None:
    """Each who sends is told its new rate, and without a limit of the host nobody is."""
    uplink, told = Uplink(100), dict[str, int]()

    def begin(who: str, limit: int = 0) -> int:
        return uplink.join(who, limit, lambda rate: told.update({who: rate}))

    assert begin("a") == 100
    assert (begin("b", 10), told) == (10, {"a": 90})
    assert (begin("c"), told) == (45, {"a": 45, "b": 10})
    assert begin("c") == 45  # a second pass is no second migration
    uplink.leave("a")
    uplink.leave("a")
    assert told == {"a": 45, "b": 10, "c": 90}
    assert Uplink().join("a", 7, told.clear) == 7


@pytest.mark.parametrize(
    ("asked", "most", "rate"), [(None, 0, 0), (5, 0, 5), (None, 3, 3), (5, 3, 3), (2, 3, 2)]
)
async def test_bandwidth_of_one_migration(
    asked: int | None, most: int, rate: int, tmp_path: Path
) -> None:
    """The configured one is what a migration has that asks for none, and the most otherwise."""
    shared = Shared(store := Store(tmp_path), bandwidth=most)
    request = MigrateRequest("h", bandwidth=asked)
    session = SourceSession(Vm("web1", store, None), request, shared, "m")
    engine: Any = SimpleNamespace(limit=None)
    assert session.migration.bandwidth == session.migration.rate(engine) == rate


# --- an engine at work ---------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [False, True], ids=["push", "pass"])
async def test_rate_of_a_push_that_is_under_way(passes: bool) -> None:
    """One that would take an hour is done in a moment once it may."""
    memory, pages = os.memfd_create("guest"), 1024
    os.pwrite(memory, os.urandom(4096) * pages, 0)
    mine, theirs = socket.socketpair()
    theirs.setblocking(False)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    engine = SourceEngine([Region("ram0", pages, 4096, 0, memory, 0)], os.getpid())
    try:
        engine.connect(mine.detach(), urgent=False)
        await engine.scan()
        (engine.copy if passes else engine.push)(1024)
        moved = 0
        with trio.fail_after(60):
            while moved < 64 << 10:  # the first run goes at once, and is to be paid for
                moved += len(await stream.receive_some(1 << 20))
            engine.limit(1 << 40)
            while moved < pages * 4096:
                moved += len(await stream.receive_some(1 << 20))
            engine.limit(0)
            await engine.watch(lambda: engine.stats.pushing == 0)
    finally:
        await engine.aclose()
        await stream.aclose()
        os.close(memory)


def noted(call: Any, rates: list[int]) -> Any:
    def noting(engine: SourceEngine, rate: int) -> None:
        rates.append(rate)
        call(engine, rate)

    return noting


async def test_push_shares_the_host(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration has its share from its first page to its last, and gives it back."""
    rates: list[int] = []
    for name in ("copy", "push", "limit"):
        monkeypatch.setattr(SourceEngine, name, noted(getattr(SourceEngine, name), rates))
    uplink = Uplink(1 << 30)

    def another_begins(made: World, point: str) -> None:
        uplink.join("another", 0, lambda rate: None)

    async with world(tmp_path, {"<- passed": another_begins}) as made:
        made.source.daemon.shared.limits.uplink = uplink
        await made.migrate(mode="hybrid", precopy_passes=2)
        await made.check()
        made.check_over()
    assert rates[:2] == [1 << 30, 1 << 29]  # the first pass; then told
    assert set(rates[2:]) == {1 << 29}
    assert uplink._sending.keys() == {"another"}


# --- VMs and peers -------------------------------------------------------------------------------


async def test_vms(tmp_path: Path, clock: Clock) -> None:
    """A VM too many is refused with a sentence; one that is known may come back."""
    async with world(tmp_path, {}) as made:
        host = made.destination.daemon
        host.shared.limits.max_vms = 1
        with pytest.raises(PostcopydError, match=r"attaching web2: .* max-vms .* is 1") as refused:
            await host.attach("web2", "process", made.destination.vmm.socket)
        assert refused.value.name == "Refused"
        assert [*host.vms] == ["web1"]
        await host.detach("web1")
        await host.attach("web1", "process", made.destination.vmm.socket)


# --- peers ---------------------------------------------------------------------------------------


async def test_peers(tmp_path: Path, clock: Clock) -> None:
    """A guest that finds all places taken stays where it is, its operator is told, and it goes once
    there is one."""
    async with world(tmp_path, {}) as made:
        peers = made.destination.daemon.shared.limits.peers
        peers.most = 0
        await made.migrate()
        assert made.source.phase == "failed"
        assert "max-peers" in made.source.vm.status.message
        peers.most = 1  # its data connections need none
        await made.migrate()
        assert made.source.phase == "drained"
    options = ServeOptions(max_peers=3, max_vms=4)
    assert (Limits(options).peers.most, Limits(options).max_vms) == (3, 4)


@asynccontextmanager
async def strangers(port: int) -> AsyncIterator[None]:
    """Within, connections that say nothing come as fast as they are taken."""

    async def one() -> None:
        while True:
            with suppress(OSError):
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    with suppress(trio.BrokenResourceError):
                        await stream.receive_some(1)
            await trio.sleep(0.5)

    async with trio.open_nursery() as nursery:
        for _ in range(2 * DOOR):
            nursery.start_soon(one)
        yield
        nursery.cancel_scope.cancel()


async def test_strangers_keep_no_guest_waiting(tmp_path: Path, clock: Clock) -> None:
    """Whoever holds all places at the door, and peers who hold all others: a guest that waits for
    its pages goes on, and strangers alone keep no new one out."""

    def all_are_taken(made: World, point: str) -> None:
        peers.most = 0

    async with world(tmp_path, {"<- ran": all_are_taken, "<- progress": cut}) as made:
        peers = made.destination.daemon.shared.limits.peers
        async with strangers(made.destination.port):
            while len(peers) < DOOR:
                await trio.sleep(0.1)
            async with made.migrating():
                with trio.fail_after(LONG_S):
                    while made.source.phase not in ("drained", "failed"):
                        await trio.sleep(1)
        await made.settled()
        await made.check()
        made.check_over()
        assert made.source.phase == "drained"
        assert made.result["recoveries"] == 1


def at_the_door(*addresses: str) -> Callable[[ExitStack, Peers], list[Visitor]]:
    return lambda stack, peers: [stack.enter_context(peers.visit(one)) for one in addresses]


def gone(visitors: list[Visitor]) -> list[int]:
    return [at for at, one in enumerate(visitors) if one.scope.cancel_called]


async def test_who_has_to_go() -> None:
    """At a full door it is the first of the address that has most; who was let in before goes last,
    and a host has one address, however many IPv6 gives it."""
    peers = Peers(8)
    with peers.visit("192.0.2.1") as one:
        one.let_in()
    with ExitStack() as stack:
        first = at_the_door("192.0.2.1", "198.51.100.1")(stack, peers)
        crowd = at_the_door(*[f"2001:db8::{n:x}" for n in range(DOOR)])(stack, peers)
        assert gone(first) == [] and gone(crowd) == [0, 1]
        others = at_the_door("192.0.2.1", "203.0.113.1")(stack, peers)
        assert gone(first + others) == [] and gone(crowd) == [0, 1, 2, 3]
        assert len(peers) == DOOR
        with pytest.raises(PostcopydError, match="others connected at the same time"):
            crowd[0].let_in()
        first[0].let_in()
    assert len(peers) == 0
    with ExitStack() as stack:  # each from elsewhere
        far = [f"10.0.{n}.1" for n in range(DOOR - 1)]
        first = at_the_door("192.0.2.1", *far)(stack, peers)
        at_the_door(*[f"10.1.{n}.1" for n in range(DOOR)])(stack, peers)
        assert gone(first) == [*range(1, DOOR)]  # and not the one that is known


async def test_places() -> None:
    """There are so many for who was let in; one aside is nobody's; one that must is let in."""
    peers = Peers(1)
    with ExitStack() as stack:
        one, two, three, four = at_the_door(*["192.0.2.1"] * 4)(stack, peers)
        one.let_in()
        with pytest.raises(PostcopydError, match="no more at a time"):
            two.let_in()
        three.let_in(always=True)
        with peers.aside(), peers.aside():
            two.let_in()
        with pytest.raises(PostcopydError, match="no more at a time"):
            four.let_in()
        assert len(peers) == 4
    assert len(peers) == 0


# --- arrivals that wait --------------------------------------------------------------------------


@asynccontextmanager
async def full(folder: Path, **request: Any) -> AsyncIterator[tuple[World, Arrivals]]:
    """A migration to a host where another guest arrives already, as far as it goes."""
    async with world(folder, {}) as made:
        limits = made.destination.daemon.shared.limits
        limits.arrivals = Arrivals(most=1, memory=RAM)
        limits.arrivals.take("another", 1)
        async with made.migrating(**request):
            with trio.fail_after(10):
                while "waits for its turn" not in made.source.vm.status.message:
                    await trio.sleep(0.1)
            yield made, limits.arrivals


@pytest.mark.parametrize("mode", ["postcopy", "hybrid"])
async def test_waits_and_goes_on(mode: str, tmp_path: Path, clock: Clock) -> None:
    """An arrival too many waits for as long as it takes, with nothing held for it here; its source
    says so, runs its guest, and goes on by itself."""
    async with full(tmp_path, mode=mode) as (made, arrivals):
        daemon, there = made.destination.daemon, made.destination.vmm
        assert "web1 runs on here and waits for its turn at" in made.source.vm.status.message
        assert made.source.vm.status.message.endswith(": it is next")
        assert "waits for its turn to come here" in made.destination.vm.status.message
        arrivals.join("a third", RAM)
        await trio.sleep(20 * p.DEAD_S)
        assert (made.source.phase, made.source.vmm.state) == ("idle", "running")
        assert daemon.shared.arriving == {}
        assert made.destination.recorded() == "held"
        assert not there.registered()
        daemon.shared.limits.peers.most = 1
        with daemon.shared.limits.peers.visit("192.0.2.1") as other:
            other.let_in()  # nobody is kept out
        daemon.shared.limits.peers.most = 256
        arrivals.leave("another")
        await made.settled()
        await made.check()
        made.check_over()
        assert made.source.phase == "drained"
        assert arrivals.ahead("a third") is None


async def test_place_in_the_queue(tmp_path: Path, clock: Clock) -> None:
    """The source is told whenever its place has changed."""
    async with world(tmp_path, {}) as made:
        limits = made.destination.daemon.shared.limits
        arrivals = limits.arrivals = Arrivals(most=1)
        for who in "abc":
            arrivals.join(who, 1)
        async with made.migrating():
            for who, says in zip(
                "abc", ("2 others before it", "1 other before", "it is next"), strict=True
            ):
                with trio.fail_after(10):
                    while says not in made.source.vm.status.message:
                        await trio.sleep(0.1)
                assert says in made.destination.vm.status.message
                arrivals.leave(who)
            await made.settled()
        assert made.source.phase == "drained"
        assert made.went["<- queued"] == 3


@pytest.mark.parametrize(
    "fault",
    [cancel, cut, silence, stop_source, kill_source, stop_destination, kill_destination, kill_both],
    ids=lambda fault: fault.__name__,
)
async def test_ends_while_it_waits(fault: Fault, tmp_path: Path, clock: Clock) -> None:
    """Whoever goes while an arrival waits: the guest runs on where it was, the next is let in, and
    it can be moved later."""
    async with full(tmp_path) as (made, arrivals):
        arrivals.join("a third", 1)
        fault(made, "")
        await made.settled()
        await made.check()
        assert made.source.vmm.state == "running"
        assert made.destination.vmm.state == "incoming"
        assert made.went["destination.adopt"] == 0
        if fault is cancel:
            assert made.refused == []
            assert made.result["event"] == "cancelled"
        assert arrivals.ahead("a third") == 0
        arrivals.leave("another")
        assert arrivals.ahead("a third") is None
        arrivals.leave("a third")
        await trio.sleep(SILENCE_S)
        await made.source.daemon.migrate("web1", MigrateRequest(made.to, mode="postcopy"))
        await made.settled()
        await made.check()
        made.check_over()
        assert made.source.phase == "drained"


@pytest.mark.parametrize("fault", [source_dies, destination_dies], ids=lambda f: f.__name__)
async def test_vmm_ends_while_it_waits(fault: Fault, tmp_path: Path, clock: Clock) -> None:
    """A guest that is no more, or whose place is no more, waits for nothing."""
    async with full(tmp_path) as (made, arrivals):
        fault(made, "")
        await made.settled()
        assert "has ended" in made.source.vm.status.message
        assert made.source.phase == made.destination.phase == "failed"
        arrivals.join("a third", 1)
        arrivals.leave("another")
        assert arrivals.ahead("a third") is None


def changed_source(made: World) -> None:
    made.source.vmm.problems = ("it has a new device",)


def changed_destination(made: World) -> None:
    made.destination.vmm.problems = ("it has a new device",)


@pytest.mark.parametrize("change", [changed_source, changed_destination])
async def test_looked_at_again(
    change: Callable[[World], None], tmp_path: Path, clock: Clock
) -> None:
    """What was true before the wait is not taken for true after it."""
    async with full(tmp_path) as (made, arrivals):
        change(made)
        arrivals.leave("another")
        await made.settled()
        await made.check()
        assert "it has a new device" in made.source.vm.status.message
        assert made.source.vmm.state == "running"
        assert made.destination.vmm.state == "incoming"


async def test_too_large(tmp_path: Path, clock: Clock) -> None:
    """A guest that could never come is refused at once, by a check too."""
    async with world(tmp_path, {}) as made:
        arrivals = made.destination.daemon.shared.limits.arrivals = Arrivals(memory=RAM - 1)
        await made.migrate()
        await made.check()
        assert "max-arriving-memory" in made.source.vm.status.message
        async with made.network() as port:
            checked = await made.source.daemon.check("web1", f"127.0.0.1:{port}")
        assert len(checked.problems) == 1
        assert "max-arriving-memory" in checked.problems[0]
        arrivals.join("another", 1)
        assert arrivals.ahead("another") is None


async def test_a_pause_keeps_nobody_out(tmp_path: Path, clock: Clock) -> None:
    """An arrival that is paused gives its place back, and goes on above the limit: its guest waits
    for pages."""
    takes: list[object] = []

    def another_comes(made: World, point: str) -> None:
        arrivals.join("another", 1)
        takes.append(arrivals.ahead("another"))

    async with world(tmp_path, {"<- ran": another_comes, "<- progress": cut}) as made:
        arrivals = made.destination.daemon.shared.limits.arrivals = Arrivals(most=1)
        take = arrivals.take

        def another_was_let_in(who: object, size: int) -> None:
            takes.append(arrivals.ahead("another"))
            take(who, size)

        arrivals.take = another_was_let_in
        await made.migrate()
        await made.check()
        made.check_over()
        # Nobody takes a place again when the last pages came just before the cut.
        assert takes in ([0], [0, None])
        assert arrivals.ahead("another") is None


async def test_source_that_knows_no_queue(tmp_path: Path, clock: Clock) -> None:
    """An older source waits without a word, and is served in its turn."""
    async with world(tmp_path, {}) as made:
        arrivals = made.destination.daemon.shared.limits.arrivals = Arrivals(most=1)
        arrivals.take("another", 1)
        stream = await dial("127.0.0.1", made.destination.port, p.CONTROL)
        regions = [p.RegionOffer("ram0", 24, 4096), p.RegionOffer("ram1", 8, 4096)]
        offer = p.Offer("m1", "web1", "process", regions, {"version": "1"}, 1, 1)
        async with Channel(stream, Machine(Source.GREETING), "there") as channel, channel.alive():
            await channel.send(p.Hello(version=p.VERSION))
            await channel.expect(p.Hello)
            await channel.send(offer)
            with trio.move_on_after(2 * p.DEAD_S) as waits:
                await channel.receive()
            assert waits.cancelled_caught
            with pytest.raises(PeerError, match="web1 is in migration m1 already"):
                await offered_again(made, structs.replace(offer, migration="m2"))
            arrivals.leave("another")
            await channel.expect(p.Ready)
        await made.destination.vm.free.wait()
        await made.check()


async def offered_again(made: World, offer: p.Offer) -> None:
    stream = await dial("127.0.0.1", made.destination.port, p.CONTROL)
    async with Channel(stream, Machine(Source.GREETING), "there") as channel:
        await channel.greet()
        await channel.send(offer)
        await channel.receive()
