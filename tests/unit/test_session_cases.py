# SPDX-License-Identifier: Apache-2.0
"""Migrations of which more is known beforehand than that no guest is lost (test_sessions.py)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trio
from session_faults import (
    Clock,
    cancel,
    cut,
    cut_control,
    destination_says_error,
    made_clock,
    migrated,
    no_room,
    refusing,
    silence,
    source_says_error,
    stop_destination,
    stop_source,
    world,
)
from session_world import Fault, Instead, World

from postcopyd import protocol as p
from postcopyd.connection import Channel, PeerError, dial
from postcopyd.control import MigrateRequest
from postcopyd.daemon import Daemon
from postcopyd.dest.engine import DestinationEngine
from postcopyd.errors import PostcopydError
from postcopyd.handover import Destination, Machine, Source
from postcopyd.settings import Settings
from postcopyd.store import Store
from postcopyd.vmm import Declined, Role, VmmError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return made_clock(monkeypatch)


# --- the destination has the guest ---------------------------------------------------------------


@pytest.mark.parametrize("fault", [source_says_error, cut, silence, stop_source])
async def test_running_guest_outlives_its_source(
    fault: Fault, tmp_path: Path, clock: Clock
) -> None:
    """A guest that runs here and lacks pages is never ended for what its source says or does."""
    made = await migrated(tmp_path, {"<- ran": fault, "<- progress": cut}, reached=False)
    assert made.destination.vmm.state == "running"
    assert (made.source.phase, made.destination.phase) == ("paused", "paused")
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


async def test_keep_source(tmp_path: Path, clock: Clock) -> None:
    """With --keep-source the VMM at the source stays, stopped."""
    made = await migrated(tmp_path, {}, keep_source=True)
    assert made.source.vmm.state == "kept"
    assert made.source.vm.driver is not None


async def test_counts_differ(tmp_path: Path, clock: Clock) -> None:
    """A source that counts other pages than the destination keeps its copy."""

    def fewer(made: World, point: str) -> Instead:
        return Instead(p.Drained(31, 0, 31, 0, 0, 0, 0, 0.0, p.Faults()))

    made = await migrated(tmp_path, {"<- drained": fewer})
    assert made.source.vmm.state == "stopped"
    assert "counts 31 pages" in made.source.vm.status["message"]


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
    assert "could not run web1" in made.source.vm.status["message"]


async def test_declined_and_not_ended(tmp_path: Path, clock: Clock) -> None:
    """A VMM that neither runs the guest nor ends keeps it: the source is not told that it may."""
    made = await migrated(
        tmp_path,
        {
            "destination.run": refusing(Declined("its disk is locked")),
            "destination.end": refusing(VmmError("it does not end")),
        },
    )
    assert made.source.vmm.state == "stopped"
    assert (made.source.phase, made.destination.phase) == ("paused", "paused")


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
        while not made.hosts[sees].session._engine.stats.failure:
            await trio.sleep(0.001)

    made = await migrated(tmp_path, {"destination.load done": cut_until_seen})
    assert made.source.vmm.state == "running"
    assert (made.source.phase, made.destination.phase) == ("failed", "failed")


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


async def test_no_data_connections(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that never makes its data connections is refused, and the VMM here waits again."""
    async with world(tmp_path, {}) as made:
        stream = await dial("127.0.0.1", made.destination.port, p.CONTROL)
        regions = [p.RegionOffer("ram0", 24, 4096), p.RegionOffer("ram1", 8, 4096)]
        offer = p.Offer("m1", "web1", "process", regions, {"version": "1"}, 1, 1)
        async with Channel(stream, Machine(Source.GREETING), "there") as channel, channel.alive():
            await channel.greet()
            await channel.send(offer)
            await channel.expect(p.Ready)
            began = trio.current_time()
            with pytest.raises(PeerError, match="made no data connections within 30 s"):
                await channel.receive()
            assert trio.current_time() - began == pytest.approx(30, abs=1)
        await made.destination.vm.free.wait()
        await made.check()
        assert made.destination.phase == "failed"


async def test_paused_guest_is_no_destination(tmp_path: Path, clock: Clock) -> None:
    """A VMM with a guest that waits here takes no other offer, and goes on waiting."""
    async with world(tmp_path, {"-> grant": cut}) as made:
        await made.migrate()
        assert made.destination.phase == "paused"
        before = dict(made.destination.vm.status)
        stream = await dial("127.0.0.1", made.destination.port, p.CONTROL)
        region = p.RegionOffer("ram0", 24, 4096)
        async with Channel(stream, Machine(Source.GREETING), "there") as channel:
            await channel.greet()
            await channel.send(p.Offer("m2", "web1", "process", [region], {}, 1, 9))
            with pytest.raises(PeerError, match="not at its end"):
                await channel.receive()
        assert made.destination.vm.status == before
        await made.check()


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
    assert "not now" in made.source.vm.status["message"]


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


# --- checking beforehand -------------------------------------------------------------------------


async def test_check_touches_nothing(tmp_path: Path, clock: Clock) -> None:
    """A check asks both VMMs and changes neither, nor a record or a status."""
    async with world(tmp_path, {}) as made:
        made.destination.vmm.problems = ("it has no shared memory",)
        before = [dict(host.vm.status) for host in made.hosts.values()]
        async with made.network() as port:
            problems = await made.source.daemon.check("web1", f"127.0.0.1:{port}")
        assert problems == ["it has no shared memory"]
        assert [host.vm.status for host in made.hosts.values()] == before
        assert (made.source.vmm.state, made.destination.vmm.state) == ("running", "incoming")


# --- what is on disk ------------------------------------------------------------------------------


async def test_records_at_every_instant(tmp_path: Path, clock: Clock) -> None:
    """A daemon that is killed at whatever step finds records of which one at most has the guest."""
    taken: dict[str, Path] = {}

    def photograph(made: World, point: str) -> None:
        taken[point] = tmp_path / "taken" / str(len(taken))
        for role in made.hosts:
            shutil.copytree(tmp_path / role, taken[point] / role)

    points = await points_of_a_clean_run(tmp_path / "first")
    await migrated(tmp_path, dict.fromkeys(points, photograph))
    gave_away = set()
    for point, folder in taken.items():
        here = Store(folder / "source").load()["web1"]
        there = Store(folder / "destination").load()["web1"]
        if here["ownership"] == "granted":
            gave_away.add(point)
        runs_there = there["epoch"] == 1 and there["ownership"] in ("owned", "held")
        assert not runs_there or point in gave_away
        async with trio.open_nursery() as nursery:
            daemon = Daemon(Settings(Store(folder / "source")), nursery)
            await daemon.restore()
            if here["ownership"] == "granted":
                with pytest.raises(PostcopydError):
                    await daemon.migrate("web1", MigrateRequest("127.0.0.1:1"))
            phase = daemon.status("web1")["phase"]
            nursery.cancel_scope.cancel()
        drained = here["status"]["phase"] == "drained"
        asks = here["ownership"] in ("intent", "granted") and not drained
        assert phase == ("drained" if drained else "paused" if asks else "idle")
    assert points[points.index("-> grant") :] == [p for p in points if p in gave_away]


async def points_of_a_clean_run(folder: Path) -> list[str]:
    return list((await migrated(folder, {})).went)
