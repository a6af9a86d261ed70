# SPDX-License-Identifier: Apache-2.0
"""Migrations of which more is known beforehand than that no guest is lost (test_sessions.py)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgpack
import pytest
import trio
from fake_vmm import FakeDriver
from msgspec import to_builtins
from needs import missing
from session_faults import (
    Clock,
    cancel,
    cut,
    cut_control,
    cut_data,
    destination_says_error,
    goes_down,
    kill_both,
    kill_destination,
    kill_source,
    migrated,
    no_room,
    refusing,
    silence,
    source_ends,
    source_says_error,
    stop_destination,
    world,
)
from session_world import Fault, Instead, World

from postcopyd import protocol as p
from postcopyd.dest import migration as arriving
from postcopyd.dest.engine import DestinationEngine
from postcopyd.errors import PostcopydError
from postcopyd.handover import Destination, Machine, Source
from postcopyd.model import MigrateRequest
from postcopyd.net.channel import Channel, ConnectionLost, PeerError
from postcopyd.net.codec import pack
from postcopyd.net.connection import dial, receive_object
from postcopyd.sessions.hooks import HOOK_S
from postcopyd.sessions.vm import ENDING_S
from postcopyd.source.retry import PATIENCE_S
from postcopyd.vmm import Declined, Role, State, VmmError

# --- the destination has the guest ---------------------------------------------------------------


@pytest.mark.parametrize("fault", [source_says_error, cut, silence, source_ends])
async def test_running_guest_outlives_its_source(
    fault: Fault, tmp_path: Path, clock: Clock
) -> None:
    """A guest that runs here and lacks pages is never ended for what its source says or does."""
    async with world(tmp_path, {"<- ran": fault, "<- progress": source_ends}) as made:
        async with made.migrating():
            await made.paused_there()
            await trio.sleep(1000)
        assert made.destination.vmm.state == "running"
        assert made.destination.phase == "paused"
        assert made.destination.session.machine.state is Destination.RUNNING_LOST


@pytest.mark.parametrize("fault", [cut_control, stop_destination, source_says_error])
async def test_complete_while_the_connection_is_lost(
    fault: Fault, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest whose last page came in the moment of the loss is drained here, not paused."""
    wait = DestinationEngine.wait

    async def wait_for_both(engine: DestinationEngine) -> None:
        while not engine.complete:
            await wait(engine)
        fault(made, "")
        await trio.sleep_forever()

    monkeypatch.setattr(DestinationEngine, "wait", wait_for_both)
    async with world(tmp_path, {}) as made:
        await made.migrate()
        await made.check()
    assert made.destination.phase == "drained"
    assert made.destination.recorded() == "held"
    assert made.source.vmm.state == "stopped" or made.source.phase == "drained"


async def test_release_fails_after_drained(tmp_path: Path, clock: Clock) -> None:
    """A VMM that keeps its userfaultfd, when nothing is registered any more, is drained."""
    made = await migrated(tmp_path, {"destination.release": refusing(VmmError("no"))})
    assert (made.source.phase, made.destination.phase) == ("drained", "drained")
    assert made.source.vmm.state == "ended"


async def test_paused_guest_is_not_run(tmp_path: Path, clock: Clock) -> None:
    """A guest that was paused is moved whole and not run, not even for a moment."""
    made = await migrated(tmp_path, {}, "paused")
    assert "destination.run" not in made.went
    assert made.destination.vmm.state == "loaded"
    assert made.destination.phase == "drained"


async def test_paused_guest_is_not_run_after_a_restart(tmp_path: Path, clock: Clock) -> None:
    """Nor is it by the next daemon, where this one dies between its two records of the guest that
    is its own: that it may run, and that it does what it did."""
    made = await migrated(tmp_path, {"destination.record owned#2": kill_destination}, "paused")
    assert "destination.run" not in made.went
    assert made.destination.vmm.state == "loaded"
    assert made.destination.phase == "drained"


async def test_keep_source(tmp_path: Path, clock: Clock) -> None:
    """With --keep-source the VMM at the source stays, stopped."""
    made = await migrated(tmp_path, {}, keep_source=True)
    assert made.source.vmm.state == "kept"
    assert made.source.vm.driver is not None


async def test_counts_differ(tmp_path: Path, clock: Clock) -> None:
    """A source that counts other pages than the destination keeps its copy, and asks again."""

    def fewer(made: World, point: str) -> Instead:
        return Instead(p.Drained(31, 0, 31, 0, 0, 0, 0, 0.0, p.Faults()))

    made = await migrated(tmp_path, {"<- drained": fewer})
    assert made.source.phase == made.destination.phase == "drained"
    assert any("counts 31 pages" in str(entry.get("error")) for entry in made.logs)


# --- declined ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [
        {"destination.run": refusing(Declined("its disk is locked. " * 1000))},
        {"destination.run": refusing(Declined("its disk \udcff is locked"))},
        {"destination.record owned": no_room},
    ],
    ids=["long reason", "reason that is no text", "disk full"],
)
async def test_declined(faults: dict[str, Fault], tmp_path: Path, clock: Clock) -> None:
    """A destination that cannot run the guest ends its VMM first; then the source runs it."""
    made = await migrated(tmp_path, faults)
    assert made.source.vmm.state == "running"
    assert made.destination.vmm.state == "ended"
    assert (made.source.recorded(), made.destination.recorded()) == ("held", "declined")
    assert made.source.vm.epoch == 2  # what the destination had was 1, and is over
    assert "could not run web1" in made.source.vm.status.message


async def test_declined_and_not_ended(tmp_path: Path, clock: Clock) -> None:
    """A VMM that neither runs the guest nor ends keeps it: the source is not told that it may, and
    when it asks the guest is run once more."""
    made = await migrated(
        tmp_path,
        {
            "destination.run": refusing(Declined("its disk is locked")),
            "destination.end": refusing(VmmError("it does not end")),
        },
    )
    assert made.destination.vmm.state == "running"
    assert made.source.phase == "drained"


# --- before the grant ----------------------------------------------------------------------------


@pytest.mark.parametrize("sees", ["source", "destination"])
async def test_pages_cannot_come(
    sees: Role, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data connections that either side knows to be lost before the grant take the guest back."""
    if sees == "source":
        monkeypatch.setattr(DestinationEngine, "check", lambda engine: None)

    async def cut_until_seen(made: World, point: str) -> None:
        made.cut(p.DATA)
        while not made.hosts[sees].engine.stats.failure:
            await trio.sleep(0.001)

    made = await migrated(tmp_path, {"destination.load done": cut_until_seen})
    assert made.source.vmm.state == "running"
    assert (made.source.phase, made.destination.phase) == ("failed", "failed")


def no_answer(made: World, point: str) -> None:
    """The urgent connection is up, and brings nothing of what was asked for."""
    made.destination.engine.stats.unanswered = 1


@pytest.mark.parametrize(
    ("point", "fault"),
    [
        ("destination.load", cut_data),
        ("destination.load", no_answer),
        ("destination.run", cut_data),
        ("destination.run", no_answer),
    ],
)
async def test_vmm_waits_for_a_page(point: str, fault: Fault, tmp_path: Path, clock: Clock) -> None:
    """A VMM that loads or runs its guest waits for a page, which does not come, while the hosts
    hear each other: the guest is not stopped for longer than it takes to see that."""

    async def waits(made: World, point: str) -> None:
        await trio.sleep(1)
        fault(made, point)
        await trio.sleep_forever()

    made = await migrated(tmp_path, {point: waits})
    assert not made.stuck
    where = made.source if point == "destination.load" else made.destination
    assert where.vmm.state == "running"


@pytest.mark.parametrize("fault", [cut, destination_says_error])
async def test_long_hook_hears_the_end(fault: Fault, tmp_path: Path, clock: Clock) -> None:
    """A source that is kept by its VMM before the stop hears at once that it is over."""

    async def hang(made: World, point: str) -> None:
        fault(made, point)
        await trio.sleep_forever()

    made = await migrated(tmp_path, {"source.prepare": hang}, patience=15)
    assert not made.stuck
    assert "source.save" not in made.went


async def test_again_after_a_failure(tmp_path: Path, clock: Clock) -> None:
    """What a migration that failed early leaves behind does not stand in the way of the next."""
    async with world(tmp_path, {"<- serving": cut, "source.prepare": cancel}) as made:
        for phase in ("failed", "failed", "drained"):
            await made.migrate()
            await made.check()
            assert made.destination.phase == phase


@asynccontextmanager
async def invited(made: World) -> AsyncIterator[tuple[Channel, p.Ready]]:
    """A source that has offered its guest, and is to make its data connections."""
    stream = await dial("127.0.0.1", made.destination.port, p.CONTROL)
    regions = [p.RegionOffer("ram0", 24, 4096), p.RegionOffer("ram1", 8, 4096)]
    offer = p.Offer("m1", "web1", "process", regions, {"version": "1"}, 1, 1)
    async with Channel(stream, Machine(Source.GREETING), "there") as channel, channel.alive():
        await channel.greet()
        await channel.send(offer)
        yield channel, await channel.expect(p.Ready)


async def test_no_data_connections(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that never makes its data connections is refused, and the VMM here waits again."""
    async with world(tmp_path, {}) as made:
        async with invited(made) as (channel, _):
            began = trio.current_time()
            with pytest.raises(PeerError, match="made no data connections within 30 s"):
                await channel.receive()
            assert trio.current_time() - began == pytest.approx(30, abs=1)
        await made.destination.vm.free.wait()
        await made.check()
        assert made.destination.phase == "failed"


async def test_a_data_connection_is_lost_before_the_rest_come(tmp_path: Path, clock: Clock) -> None:
    """That is what is told, at once, and not that the others were not made."""
    async with world(tmp_path, {}) as made:
        async with invited(made) as (channel, ready):
            data = await dial("127.0.0.1", made.destination.port, p.DATA)
            await data.send_all(pack(p.DataHello("m1", ready.token, False)))
            await receive_object(data, p.DataWelcome)
            await data.aclose()
            with pytest.raises(PeerError, match="connection was closed by the source"):
                await channel.receive()
        await made.destination.vm.free.wait()
        await made.check()
        assert made.destination.phase == "failed"


@pytest.mark.parametrize("name", ["--help", "../../x", "a/b", "web1\x1b[2J", ".."])
async def test_no_hook_for_what_is_no_name(name: str, tmp_path: Path, clock: Clock) -> None:
    """An offer for a VM that cannot be called so ends before the hooks are run for it."""
    async with world(tmp_path, {}) as made:
        hooks = made.destination.daemon.shared.hooks
        assert hooks is not None
        hooks.mkdir()
        hook = hooks / "tell"
        hook.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/ran\n')
        hook.chmod(0o755)
        offer = p.Offer("m1", "web2", "process", [p.RegionOffer("ram0", 24, 4096)], {}, 1, 1)
        for vm in (name, "web2"):
            stream = await dial("127.0.0.1", made.destination.port, p.CONTROL)
            async with Channel(stream, Machine(Source.OFFERING), "there") as channel:
                await stream.send_all(pack(p.Hello(p.VERSION)))
                raw = to_builtins(offer, builtin_types=(bytes,)) | {"vm": vm}
                await stream.send_all(msgpack.packb(raw))
                channel.machine.state = Source.GREETING
                await channel.expect(p.Hello)
                why = "cannot be the name of a VM" if vm == name else "no VM web2 is attached"
                with pytest.raises(PeerError, match=why):
                    await channel.receive()
        assert (tmp_path / "ran").read_text() == "web2\n"


async def test_paused_guest_is_no_destination(tmp_path: Path, clock: Clock) -> None:
    """A VMM with a guest that waits here takes no other offer, and goes on waiting."""
    async with source_is_gone(tmp_path) as made:
        before = made.destination.vm.status
        stream = await dial("127.0.0.1", made.destination.port, p.CONTROL)
        region = p.RegionOffer("ram0", 24, 4096)
        async with Channel(stream, Machine(Source.GREETING), "there") as channel:
            await channel.greet()
            await channel.send(p.Offer("m2", "web1", "process", [region], {}, 1, 9))
            with pytest.raises(PeerError, match="not at its end"):
                await channel.receive()
        assert made.destination.vm.status == before


# --- recovery ------------------------------------------------------------------------------------


@asynccontextmanager
async def source_is_gone(folder: Path) -> AsyncIterator[World]:
    """A guest that runs at its destination and lacks pages, and nobody who asks."""
    async with world(folder, {"<- progress": source_ends}) as made, made.migrating():
        await made.paused_there()
        yield made


@asynccontextmanager
async def network_is_down(folder: Path) -> AsyncIterator[World]:
    """A guest that runs at its destination and lacks pages, and a source that asks in vain."""
    async with world(folder, {"<- progress": goes_down}) as made, made.migrating():
        await made.paused_there()
        yield made


@asynccontextmanager
async def asking(made: World, migration: str, epoch: int) -> AsyncIterator[Channel]:
    """A source that asks what became of its guest."""
    stream = await dial("127.0.0.1", made.destination.port, p.CONTROL)
    async with Channel(stream, Machine(Source.RAN_LOST), "there") as channel, channel.alive():
        await channel.greet()
        await channel.send(p.Resume(migration, "web1", epoch))
        yield channel


@pytest.mark.parametrize(("migration", "epoch"), [("other", 1), ("", 0), ("", 2)])
async def test_resume_of_another(migration: str, epoch: int, tmp_path: Path, clock: Clock) -> None:
    """Who asks for another migration or another epoch is told so, and the guest waits on."""
    async with source_is_gone(tmp_path) as made:
        waiting, before = made.destination.vm.waiting, made.destination.vm.status
        async with asking(made, migration or before.migration, epoch) as channel:
            with pytest.raises(PeerError, match="knows nothing of this move"):
                await channel.receive()
        assert made.destination.vm.waiting is waiting is not None
        assert made.destination.vm.status == before


async def test_resume_takes_over(tmp_path: Path, clock: Clock) -> None:
    """A source that asks again has lost the connection before, whatever this side thinks of it."""
    async with source_is_gone(tmp_path) as made:
        migration = made.destination.vm.status.migration
        async with asking(made, migration, 1) as first:
            token = (await first.expect(p.Ready)).token
            await first.expect(p.Ran)
            async with asking(made, migration, 1) as second:
                assert (await second.expect(p.Ready)).token != token
                await second.expect(p.Ran)
                with pytest.raises(ConnectionLost):
                    await first.receive()
        await made.paused_there()


@pytest.mark.parametrize("state", ["running", "paused"])
@pytest.mark.parametrize("fault", [cut, kill_source, kill_destination, kill_both])
async def test_declined_later(fault: Fault, state: State, tmp_path: Path, clock: Clock) -> None:
    """A grant that did not arrive is taken back once the destination has said that it has not."""
    made = await migrated(tmp_path, {"-> grant": fault}, state)
    assert made.went["<- declined"]
    assert made.source.vmm.state == state
    assert (made.source.recorded(), made.destination.recorded()) == ("held", "declined")
    assert made.source.vm.epoch == 2


async def test_recover_elsewhere(tmp_path: Path, clock: Clock) -> None:
    """A destination that has another address now is found there, by a source that is told so."""
    async with network_is_down(tmp_path) as made:
        with pytest.raises(PostcopydError, match="its source does that"):
            await made.destination.daemon.recover("web1", None)
        address = f"127.0.0.1:{made.destination.port}"
        await made.source.daemon.recover("web1", address)
        await made.settled()
        await made.check()
        made.check_over()
        assert made.source.phase == "drained"
        assert made.source.vm.status.peer == address
        with pytest.raises(PostcopydError, match="no paused migration"):
            await made.source.daemon.recover("web1", None)


async def test_result_of_a_pause(tmp_path: Path, clock: Clock) -> None:
    """Who waits for the result hears of a pause that is a long one, and of its end; to cancel it
    is refused."""
    async with network_is_down(tmp_path) as made:
        vm = made.source.vm
        while vm.status.phase != "paused":
            await trio.sleep(0.1)
        await trio.sleep(PATIENCE_S - 2)
        assert (vm.status.phase, vm.status.result) == ("paused", None)
        with trio.fail_after(PATIENCE_S):
            while vm.status.result is None:
                await trio.sleep(1)
        assert vm.status.result.event == "paused"
        with pytest.raises(PostcopydError, match="it can only go on there"):
            await made.source.daemon.cancel("web1")
        made.down = False
        await made.settled()
        await made.check()
        made.check_over()
        assert vm.status.result.event == "completed"


# --- a daemon that has just started --------------------------------------------------------------


@pytest.mark.parametrize("late", [1.0, 100.0])
async def test_asked_before_it_has_taken_over(
    late: float, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks a daemon that is about to find its VMMs again waits for that, and is not told to
    start another VMM; nor when the VMM answers late."""
    connect = FakeDriver.connect

    async def connect_late(name: str, socket: str) -> FakeDriver:
        await trio.sleep(late)
        return await connect(name, socket)

    async with world(tmp_path, {}) as made:
        monkeypatch.setattr(FakeDriver, "connect", connect_late)
        first = made.source.life
        made.source.kill()
        while made.source.life is first or not made.source.up:
            await trio.sleep(0.1)
        if late > ENDING_S:
            with pytest.raises(PostcopydError, match="still being taken over"):
                await made.source.daemon.migrate("web1", MigrateRequest("127.0.0.1:1"))
            return
        await made.migrate()
        assert made.source.phase == "drained"


# --- what a person decides ----------------------------------------------------------------------


async def test_nothing_to_decide(tmp_path: Path, clock: Clock) -> None:
    """A migration that goes on, or is over, leaves nothing to decide."""
    async with world(tmp_path, {}) as made:
        for host in made.hosts.values():
            with pytest.raises(PostcopydError, match="has no paused migration here"):
                await host.daemon.resolve("web1", "kill")
        assert (made.source.vmm.state, made.destination.vmm.state) == ("running", "incoming")


async def test_wait(tmp_path: Path, clock: Clock) -> None:
    """To wait changes nothing on either side, and what is for the other side is refused."""
    async with network_is_down(tmp_path) as made:
        before = [host.vm.status for host in made.hosts.values()]
        for host in made.hosts.values():
            await host.daemon.resolve("web1", "wait")
        with pytest.raises(PostcopydError, match="they are not missing here"):
            await made.source.daemon.resolve("web1", "poison")
        with pytest.raises(PostcopydError, match="that is for the host it left"):
            await made.destination.daemon.resolve("web1", "take_back")
        assert [host.vm.status for host in made.hosts.values()] == before
        made.down = False
        await made.settled()
        made.check_over()


async def test_take_back(tmp_path: Path, clock: Clock) -> None:
    """Who says that the destination is certainly dead has the guest here, as it stopped here."""
    async with network_is_down(tmp_path) as made:
        made.destination.vmm.die()
        made.guest.given_up = True
        await made.source.daemon.resolve("web1", "take_back")
        await made.check()
        assert made.source.vmm.state == "running"
        assert (made.source.recorded(), made.source.phase) == ("held", "failed")
        assert made.source.vm.epoch == 2
        assert "taken back by an operator's decision" in made.source.vm.status.message


async def test_kill_the_source(tmp_path: Path, clock: Clock) -> None:
    """Who gives the copy here up ends its VMM; the guest at the destination is not touched."""
    async with network_is_down(tmp_path) as made:
        await made.source.daemon.resolve("web1", "kill")
        assert (made.source.vmm.state, made.source.phase) == ("ended", "failed")
        assert made.source.recorded() == "declined"
        assert made.result["event"] == "paused"  # for all that is known here
        assert (made.destination.vmm.state, made.destination.phase) == ("running", "paused")


async def test_kill_the_destination(tmp_path: Path, clock: Clock) -> None:
    """Who gives the guest here up ends its VMM; the source does not take that for an answer."""
    async with network_is_down(tmp_path) as made:
        made.guest.given_up = True
        await made.destination.daemon.resolve("web1", "kill")
        assert (made.destination.vmm.state, made.destination.phase) == ("ended", "failed")
        made.down = False
        await trio.sleep(20)
        assert (made.source.vmm.state, made.source.phase) == ("stopped", "paused")


async def test_poison(tmp_path: Path, clock: Clock) -> None:
    """Who gives up the missing pages has a guest that goes on, and that nothing moves or ends."""
    async with source_is_gone(tmp_path) as made:
        try:
            await made.destination.daemon.resolve("web1", "poison")
        except PostcopydError as error:
            if "Linux 6.6" in str(error):
                missing("UFFDIO_POISON, of Linux 6.6")
            raise
        assert made.destination.vmm.state == "running"
        assert "without" in made.destination.vm.status.message
        assert made.destination.vmm.registered()  # or the errors would become zeros
        async with asking(made, made.destination.vm.status.migration, 1) as channel:
            with pytest.raises(PeerError, match="were given up"):
                await channel.receive()


# --- hooks ---------------------------------------------------------------------------------------


def hook(folder: Path, role: Role, phase: str) -> None:
    """One that refuses in this phase."""
    path = folder / f"{role}-hooks" / "10-refuse"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\n[ "$3" != {phase} ] || {{ echo not now >&2; exit 1; }}\n')
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("role", "phase"), [("source", "prepare"), ("destination", "prepare"), ("source", "handover")]
)
async def test_veto(role: Role, phase: str, tmp_path: Path, clock: Clock) -> None:
    """A hook's veto is told with its reason, and the guest runs on."""
    hook(tmp_path, role, phase)
    made = await migrated(tmp_path, {})
    assert "source.save" not in made.went
    assert made.source.vmm.state == "running"
    assert "not now" in made.source.vm.status.message


@pytest.mark.parametrize(
    ("role", "phase"),
    [("destination", "running"), ("destination", "drained"), ("source", "drained")],
)
async def test_no_veto_after_the_grant(
    role: Role, phase: str, tmp_path: Path, clock: Clock
) -> None:
    """A hook that fails after the grant changes nothing."""
    hook(tmp_path, role, phase)
    made = await migrated(tmp_path, {})
    assert (made.source.phase, made.destination.phase) == ("drained", "drained")


async def test_a_long_hook_holds_nothing_up(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the hooks take their time that are told that the guest runs here, a connection that is
    lost is seen, the source's first question is answered, and the memory follows. They run once and
    to their end, and those of the next phase after them."""
    ran: list[str] = []

    async def slow(folder: object, vm: str, role: str, phase: str, **about: object) -> None:
        ran.append(phase)
        if phase == "running":
            cut(made, "")
            await trio.sleep(HOOK_S)
            ran.append(f"then it is {made.destination.phase}")

    monkeypatch.setattr(arriving, "run_hooks", slow)
    async with world(tmp_path, {}) as made:
        await made.migrate()
        await made.check()
        made.check_over()
    assert ran == ["running", "then it is drained", "drained"]
    assert made.went["-> resume"] == 1


async def test_a_long_hook_holds_up_no_answer(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grant is lost. While the destination's hooks are told that the arrival has failed, the
    source asks, hears *declined*, and runs its guest again."""
    seen = []

    async def slow(folder: object, vm: str, role: str, phase: str, **about: object) -> None:
        await trio.sleep(HOOK_S)
        seen.append((phase, made.source.vmm.state))

    monkeypatch.setattr(arriving, "run_hooks", slow)
    async with world(tmp_path, {"-> grant": cut}) as made:
        await made.migrate()
        await trio.sleep(HOOK_S)
    assert seen == [("failed", "running")]


# --- checking beforehand -------------------------------------------------------------------------


async def test_check_touches_nothing(tmp_path: Path, clock: Clock) -> None:
    """A check asks both VMMs and changes neither, nor a record or a status."""
    async with world(tmp_path, {}) as made:
        made.destination.vmm.problems = ("it has no shared memory",)
        before = [host.vm.status for host in made.hosts.values()]
        async with made.network() as port:
            said = await made.source.daemon.check("web1", f"127.0.0.1:{port}")
        assert said.problems == ["it has no shared memory"]
        assert [(ram.kind, ram.page_size) for ram in said.found.ram] == [("memfd", 4096)] * 2
        assert [host.vm.status for host in made.hosts.values()] == before
        assert (made.source.vmm.state, made.destination.vmm.state) == ("running", "incoming")
