# SPDX-License-Identifier: Apache-2.0
"""What people decide about a migration that cannot go on, and how one ends that goes wrong in its
own last steps: nobody is told of what was not done, nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_vmm
import pytest
import trio
from fake_vmm import FakeDriver
from session_faults import (
    Clock,
    cut,
    full,
    goes_down,
    migrated,
    refusing,
    source_ends,
    world,
)
from session_world import Instead, World
from test_sessions import RECOVERY

from postcopyd import protocol as p
from postcopyd.dest import device_state
from postcopyd.dest.session import DestinationSession
from postcopyd.errors import PostcopydError
from postcopyd.source import recovery
from postcopyd.source.decision import TAKE_BACK_S
from postcopyd.source.figures import Figures
from postcopyd.source.migration import Migration
from postcopyd.source.rollback import Rollback
from postcopyd.source.session import SourceSession
from postcopyd.vmm import Declined, Role, Shape, VmmError


def deciding(choice: Any, said: list[str]) -> Callable[[World, str], Instead]:
    """A person decides at the source when the point is reached; what comes of it goes to `said`."""

    async def decide(made: World) -> None:
        try:
            await made.source.daemon.resolve("web1", choice)
        except PostcopydError as error:
            said.append(str(error))
        else:
            said.append("done")

    def begin(made: World, point: str) -> Instead:
        made._nursery.start_soon(decide, made)
        return Instead()

    return begin


# --- taking back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [point for point in RECOVERY if "#" in point or "have" in point])
async def test_no_take_back_from_who_answers(point: str, tmp_path: Path, clock: Clock) -> None:
    """Wherever a recovery is when a person calls the destination dead: it answers, so it has the
    guest, and goes on with it."""
    said: list[str] = []
    faults = {"<- progress": cut, point: deciding("take_back", said)}
    async with world(tmp_path, faults) as made:
        await made.migrate()
        await made.check()
        made.check_over()
    assert made.guest.broken == []
    assert made.source.phase == "drained"
    assert len(said) == 1
    assert said[0] != "done"


async def test_take_back_waits_for_a_word(tmp_path: Path, clock: Clock) -> None:
    """A destination that is only started again, or away for seconds, is not dead: a person who
    says so is told of it, and the migration goes on."""
    async with world(tmp_path, {"<- progress": goes_down}) as made, made.migrating():
        await made.paused_there()
        async with trio.open_nursery() as nursery:
            said: list[str] = []
            made._nursery = nursery
            deciding("take_back", said)(made, "")
            await trio.sleep(TAKE_BACK_S - 2)
            assert said == []
            made.down = False
            await made.settled()
        assert "not known to be dead" in said[0]
        await made.check()
        made.check_over()
        assert made.source.phase == "drained"


async def test_take_back_from_one_that_is_lost(tmp_path: Path, clock: Clock) -> None:
    """A destination that says itself that the guest is gone is taken back from at once."""
    async with world(tmp_path, {"<- progress": goes_down}) as made, made.migrating():
        await made.paused_there()
        made.guest.given_up = True
        await made.destination.daemon.resolve("web1", "kill")
        made.down = False
        await trio.sleep(20)
        began = trio.current_time()
        await made.source.daemon.resolve("web1", "take_back")
        assert trio.current_time() - began < TAKE_BACK_S / 2
        assert made.source.vmm.state == "running"
        assert made.source.recorded() == "held"


async def test_no_take_back_from_who_goes_on_without(tmp_path: Path, clock: Clock) -> None:
    """A guest whose missing pages a person gave up runs at the destination: that needs nothing of
    its source any more, and is not dead."""
    async with world(tmp_path, {"<- progress": goes_down}) as made, made.migrating():
        await made.paused_there()
        await made.destination.daemon.resolve("web1", "poison")
        made.down = False
        await trio.sleep(20)
        assert "needs the memory of web1 no more" in made.source.vm.status.message
        with pytest.raises(PostcopydError, match="not known to be dead"):
            await made.source.daemon.resolve("web1", "take_back")
        assert (made.source.vmm.state, made.source.recorded()) == ("stopped", "granted")
        assert made.guest.broken == []


async def test_taken_back_guest_never_runs_there(tmp_path: Path, clock: Clock) -> None:
    """A destination that has the grant and has not run, and comes back after its guest was taken
    back, waits: nobody tells it to run."""
    faults = {
        "destination.record owned": full,
        "destination.end": refusing(VmmError("does not quit")),
        "<- hello#2": goes_down,
    }
    async with world(tmp_path, faults) as made, made.migrating():
        await made.paused_there()
        made.guest.given_up = True
        await made.source.daemon.resolve("web1", "take_back")
        assert made.source.vmm.state == "running"
        made.destination.store.full = made.down = False
        await trio.sleep(1000)
        assert made.destination.vmm.state != "running"
        assert made.guest.broken == []


async def test_take_back_is_on_record_or_not_done(tmp_path: Path, clock: Clock) -> None:
    """A disk that is full keeps the guest from being run here, as a daemon that is started again
    would think it away; who asks is told, and may say it again."""
    async with world(tmp_path, {"<- progress": goes_down}) as made, made.migrating():
        await made.paused_there()
        made.destination.vmm.die()
        made.guest.given_up = made.source.store.full = True
        with pytest.raises(PostcopydError, match="No space left"):
            await made.source.daemon.resolve("web1", "take_back")
        assert (made.source.vmm.state, made.source.phase) == ("stopped", "paused")
        made.source.store.full = False
        await made.source.daemon.resolve("web1", "take_back")
        assert (made.source.vmm.state, made.source.recorded()) == ("running", "held")
        assert made.source.vm.epoch == 2


# --- what a person is told -----------------------------------------------------------------------


async def test_rollback_that_fails_is_no_success(tmp_path: Path, clock: Clock) -> None:
    """Who takes back a guest that its VMM does not run again is told so."""
    faults = {"<- progress": goes_down, "source.rollback": refusing(VmmError("its disk is locked"))}
    async with world(tmp_path, faults) as made, made.migrating():
        await made.paused_there()
        made.destination.vmm.die()
        made.guest.given_up = True
        with pytest.raises(PostcopydError, match="its disk is locked"):
            await made.source.daemon.resolve("web1", "take_back")


async def test_kill_that_fails_is_no_success(tmp_path: Path, clock: Clock) -> None:
    """A VMM that does not end is told of; the migration is as it was, and goes on later."""
    faults = {"<- progress": goes_down, "source.end": refusing(VmmError("may not be killed"))}
    async with world(tmp_path, faults) as made, made.migrating():
        await made.paused_there()
        with pytest.raises(
            PostcopydError, match=r"may not be killed.*the migration of web1 is as it was"
        ):
            await made.source.daemon.resolve("web1", "kill")
        assert made.source.phase == "paused"
        made.down = False
        await made.settled()
        await made.check()
        made.check_over()
        assert made.source.phase == "drained"


@pytest.mark.parametrize("role", ["source", "destination"])
async def test_kill_is_on_record_or_said_again(role: Role, tmp_path: Path, clock: Clock) -> None:
    """A VMM that was ended, with that not on record, is told of and decided about again."""
    async with world(tmp_path, {"<- progress": goes_down}) as made, made.migrating():
        await made.paused_there()
        host, made.guest.given_up = made.hosts[role], True
        host.store.full = True
        with pytest.raises(PostcopydError, match="not on record"):
            await host.daemon.resolve("web1", "kill")
        assert (host.vmm.state, host.phase) == ("ended", "paused")
        host.store.full = False
        await host.daemon.resolve("web1", "kill")
        assert (host.phase, host.recorded()) == ("failed", "declined")


async def test_kill_when_it_answers_again(tmp_path: Path, clock: Clock) -> None:
    """A copy is not ended that the destination has just come back for."""
    said: list[str] = []
    faults = {"<- progress": cut, "<- ready#2": deciding("kill", said)}
    async with world(tmp_path, faults) as made:
        await made.migrate()
        await made.check()
        made.check_over()
    assert "not known to be dead" in said[0]
    assert made.source.phase == "drained"


# --- poison --------------------------------------------------------------------------------------


async def test_no_poison_without_a_record(tmp_path: Path, clock: Clock) -> None:
    """No vCPU runs before it is on record that this host owns the guest, not by a person's word
    either: a daemon that is started would end it."""
    faults = {
        "destination.record owned": full,
        "destination.end": refusing(VmmError("does not quit")),
        "<- hello#2": source_ends,
    }
    async with world(tmp_path, faults) as made, made.migrating():
        await made.paused_there()
        there = made.destination
        assert there.recorded() == "loading"
        with pytest.raises(PostcopydError, match="No space left"):
            await there.daemon.resolve("web1", "poison")
        assert (there.vmm.state, there.recorded(), there.phase) == ("loaded", "loading", "paused")
        assert there.session.memory.engine.stats.lost_pages == 0
        there.store.full = False
        await there.daemon.resolve("web1", "poison")
        assert (there.vmm.state, there.recorded()) == ("running", "owned")
        there.kill()
        await trio.sleep(30)
        assert (there.vmm.state, there.recorded()) == ("running", "owned")
        assert made.guest.broken == []


# --- cancelling ----------------------------------------------------------------------------------


async def test_check_is_cancelled(tmp_path: Path, clock: Clock) -> None:
    """A check that is cancelled ends, and says so."""

    async def hang(made: World, point: str) -> None:
        await trio.sleep_forever()

    async with world(tmp_path, {"destination.inspect": hang}) as made:
        made._armed = True
        async with made.network() as port, trio.open_nursery() as nursery:

            async def cancel() -> None:
                await trio.sleep(2)
                await made.source.daemon.cancel("web1")

            nursery.start_soon(cancel)
            with trio.fail_after(5), pytest.raises(PostcopydError, match="was cancelled"):
                await made.source.daemon.check("web1", f"127.0.0.1:{port}")
        assert made.source.vm.claimed_by is None


async def test_cancel_of_what_has_failed(tmp_path: Path, clock: Clock) -> None:
    """A migration that is being rolled back is not cancelled any more, and nobody is told so."""
    refused: list[str] = []

    def cancel(made: World, point: str) -> None:
        made.cancel()
        refused.extend(made.refused)

    faults = {"source.prepare": refusing(VmmError("no")), "source.rollback": cancel}
    async with world(tmp_path, faults) as made:
        await made.migrate()
    assert refused == ["NotMigrating"]
    assert made.result["event"] == "failed"


# --- bugs in the last steps ----------------------------------------------------------------------


async def result(made: World) -> dict[str, Any]:
    """What who waits for the migration is told, in time."""
    with trio.fail_after(60):
        while made.source.vm.status.result is None or made.source.vm.claimed_by is not None:
            await trio.sleep(1)
    found: dict[str, Any] = made.result
    return found


async def test_vmm_without_regions(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VMM with no memory that could be moved is refused, with the reason, and answered for; who
    attaches it is told at once."""
    why = "its RAM is private: start it with share=on"

    async def inspect(driver: FakeDriver, role: Role) -> Shape:
        return Shape("running", driver.pid, (), {}, (why,))

    monkeypatch.setattr(FakeDriver, "inspect", inspect)
    async with world(tmp_path, {}) as made:
        assert why in made.source.vm.status.message
        async with made.migrating():
            told = await result(made)
    assert told["event"] == "failed"
    assert why in told["error"]
    assert not [entry for entry in made.logs if "bug" in str(entry["event"])]


def broken(*args: Any, **kwargs: Any) -> Any:
    raise IndexError("a bug")


async def broken_step(*args: Any, **kwargs: Any) -> Any:
    raise IndexError("a bug")


@pytest.mark.parametrize(
    ("step", "bug"),
    [
        ((Figures, "tell"), broken),
        ((Migration, "result"), broken),
        ((Rollback, "run"), broken_step),
        ((SourceSession, "_end_early"), broken_step),
        ((SourceSession, "_close"), broken_step),
    ],
)
async def test_bug_in_the_end_of_a_session(
    step: tuple[type, str], bug: Any, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source's session whose own last steps fail still answers who waits, and lets the VM go."""
    monkeypatch.setattr(*step, bug)
    with_refusal = {"source.prepare": refusing(VmmError("no"))}
    async with world(tmp_path, with_refusal) as made, made.migrating():
        told = await result(made)
        assert told["event"] == "failed"
        assert made.source.phase == "failed"
        assert made.source.vmm.state == "running"
        session = made.source.session
        monkeypatch.undo()
        await session._close()


async def test_bug_after_the_grant(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the grant such a bug leaves a pause, and never a guest that two may run."""
    monkeypatch.setattr(recovery, "pause", broken)
    async with world(tmp_path, {"<- progress": cut}) as made, made.migrating():
        told = await result(made)
        assert told["event"] == "paused"
        assert made.source.phase == "paused"
        assert made.source.recorded() == "granted"
        assert made.source.vmm.state == "stopped"


async def test_bug_in_the_end_of_an_arrival(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same at the destination."""
    monkeypatch.setattr(DestinationSession, "_called_off", broken_step)
    with_refusal = {"source.prepare": refusing(VmmError("no"))}
    async with world(tmp_path, with_refusal) as made, made.migrating():
        await result(made)
        with trio.fail_after(60):
            await made.destination.vm.free.wait()
        assert made.destination.phase == "failed"
        session = made.destination.session
        session.memory.engine.unregister(called_off=True)
        await session.close()


def test_names_of_silence() -> None:
    """What is taken for silence is what connections really say."""
    from postcopyd.net.channel import ConnectionLost
    from postcopyd.source.decision import GIVEN_UP, SILENT

    assert ConnectionLost.name in SILENT
    assert p.LOST in GIVEN_UP
    assert p.POISONED not in GIVEN_UP | SILENT  # the guest runs


# --- VMMs that do not answer ---------------------------------------------------------------------


async def hang(made: World, point: str) -> None:
    await trio.sleep_forever()


REFUSED = {"source.save sent": refusing(VmmError("no more"))}
HANGS: list[tuple[str, dict[str, Any]]] = [
    ("destination.release", {"source.prepare": refusing(VmmError("no"))}),
    ("destination.discard", {"source.prepare": refusing(VmmError("no"))}),
    ("destination.end", REFUSED),
    ("destination.aclose", REFUSED),
    ("source.rollback", REFUSED),
    ("source.rollback done", REFUSED),
    ("destination.end", {"destination.run": refusing(Declined("its disk is locked"))}),
]


@pytest.mark.parametrize(("point", "faults"), HANGS, ids=lambda value: str(value)[:40])
async def test_stuck_vmm_keeps_no_place(
    point: str, faults: dict[str, Any], tmp_path: Path, clock: Clock
) -> None:
    """A VMM that never answers while a migration is called off holds up neither the host's places
    for arrivals, nor its own VM, nor the end of the daemon."""
    async with world(tmp_path, {**faults, point: hang}) as made:
        arrivals = made.destination.daemon.shared.limits.arrivals
        arrivals._most = 1
        async with made.migrating(mode="hybrid"):
            await trio.sleep(90)
            assert made.went[point]
            role = "source" if point.startswith("source") else "destination"
            assert made.hosts[role].vm.claimed_by is None
            assert made.hosts[role].phase in ("failed", "drained")
            assert not arrivals._here
            with trio.fail_after(60):
                for host in made.hosts.values():
                    host.stop()
                while not all(host.over for host in made.hosts.values()):
                    await trio.sleep(1)
        assert made.guest.broken == []


async def test_arrival_is_ended_when_asked_again(tmp_path: Path, clock: Clock) -> None:
    """A VMM that did not end when its arrival was called off is ended once the source asks, which
    has granted the guest and gets it back so."""
    faults = {"-> grant": cut, "destination.end": refusing(VmmError("it is stuck"))}
    async with world(tmp_path, faults) as made:
        await made.migrate()
        await made.check()
        assert (made.source.vmm.state, made.source.recorded()) == ("running", "held")
        assert (made.destination.vmm.state, made.destination.recorded()) == ("ended", "declined")


async def test_device_state_of_any_size(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VMM that waits for a page while it loads, with more device state behind than the sockets
    and a few pieces hold: the page comes after all of it."""
    monkeypatch.setattr(fake_vmm, "DEVICE_STATE", (bytes(1 << 20),) * 100)

    async def waits_for_a_page(made: World, point: str) -> None:
        while not made.went["-> deviceEnd"]:
            await trio.sleep(0.01)

    made = await migrated(tmp_path, {"destination.load": waits_for_a_page})
    assert made.source.phase == "drained"
    assert sum(map(len, made.destination.vmm.received)) == 100 << 20


async def test_device_state_without_end(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a VMM does not take is kept up to a limit, and then said."""
    monkeypatch.setattr(fake_vmm, "DEVICE_STATE", (bytes(1 << 16),) * 100)
    monkeypatch.setattr(device_state, "MOST_WAITING", 1 << 20)
    made = await migrated(tmp_path, {"destination.load": hang})
    assert made.source.vmm.state == "running"
    assert "takes no more device state" in made.source.vm.status.message
