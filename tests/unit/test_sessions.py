# SPDX-License-Identifier: Apache-2.0
"""Whether a guest can be lost: every fault at every step of a migration, with both sessions real.

The daemons, sessions, engines, records and sockets are the real ones; the VMMs and the network
between the hosts are made (session_world.py), and break where a test wants it. What must hold
whatever happens is `World.check`; a test says only what it expects beyond that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from fake_vmm import FakeVmm
from session_world import Fault, Instead, World, refusing, world

from postcopyd import daemon
from postcopyd import protocol as p
from postcopyd.vmm import Declined, VmmError

POINTS = [
    "source.inspect",
    "-> hello",
    "<- hello",
    "-> offer",
    "destination.inspect",
    "destination.record arriving",
    "destination.adopt",
    "<- ready",
    "<- serving",
    "source.prepare",
    "source.record intent",
    "-> handover",
    "destination.record loading",
    "source.save",
    "source.save stopped",
    "destination.load",
    "-> device",
    "-> device#2",
    "source.save sent",
    "-> deviceEnd",
    "destination.load done",
    "<- loaded",
    "source.record granted",
    "-> grant",
    "destination.record owned",
    "destination.run",
    "destination.run done",
    "<- ran",
    "<- progress",
    "destination.release",
    "destination.record held",
    "<- drained",
    "source.record granted#2",
    "-> acknowledged",
    "source.finish",
    "source.aclose",
    "source.record granted#3",
]
"""Everything that a migration passes, in the order of a clean one."""

MESSAGES = [point for point in POINTS if point[:2] in ("->", "<-")]
RECORDS = [point for point in POINTS if " record " in point]
CALLS = [point for point in POINTS if point not in (*MESSAGES, *RECORDS)]
GRANT = POINTS.index("source.record granted")
BEFORE, AFTER = POINTS[:GRANT], POINTS[GRANT + 1 :]


Clock = trio.testing.MockClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes when nothing moves; engines have threads, so not at once."""
    monkeypatch.setattr(daemon, "DRIVERS", {"process": FakeVmm})
    return Clock(autojump_threshold=0.01)


async def migrated(
    folder: Path, faults: dict[str, Fault], state: Any = "running", **request: Any
) -> World:
    async with world(folder, faults, state) as made:
        await made.migrate(**request)
        for point in faults:
            assert made.went[point], f"{point} was not reached"
        await made.check()
    return made


# --- what goes wrong, anywhere -------------------------------------------------------------------


def cut(world: World, point: str) -> None:
    world.cut(p.CONTROL, p.DATA)


def cut_data(world: World, point: str) -> None:
    world.cut(p.DATA)


def cut_control(world: World, point: str) -> None:
    world.cut(p.CONTROL)


def silence(world: World, point: str) -> None:
    world.silent = True


def cancel(world: World, point: str) -> None:
    world.cancel()


def stop_source(world: World, point: str) -> None:
    world.source.stop()


def stop_destination(world: World, point: str) -> None:
    world.destination.stop()


def source_dies(world: World, point: str) -> None:
    world.source.vmm.die()


def destination_dies(world: World, point: str) -> None:
    world.destination.vmm.die()


ANYWHERE = [
    cut, cut_data, cut_control, silence, stop_source, stop_destination, source_dies,
    destination_dies,
]  # fmt: skip


async def test_clean(tmp_path: Path, clock: Clock) -> None:
    """Without a fault the migration passes all points of the table, and ends drained."""
    made = await migrated(tmp_path, {})
    assert set(made.went) == set(POINTS)
    assert (made.source.phase, made.destination.phase) == ("drained", "drained")
    assert made.destination.vmm.received == [b"registers", b"and devices"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("fault", ANYWHERE, ids=lambda fault: fault.__name__)
async def test_anything_breaks_anywhere(fault: Fault, point: str, tmp_path: Path, clock: Clock) -> None:
    """Whatever breaks between or under the daemons, at whatever step, no guest is lost."""
    made = await migrated(tmp_path, {point: fault})
    assert not made.stuck
    if fault not in (source_dies, destination_dies) and point in BEFORE:
        assert made.source.vmm.state == "running" or made.source.phase == "drained"


@pytest.mark.parametrize("point", BEFORE)
async def test_cancel_before_the_grant(point: str, tmp_path: Path, clock: Clock) -> None:
    """A cancel before the grant is obeyed: the guest runs here, and the other host is as it was."""
    made = await migrated(tmp_path, {point: cancel})
    assert made.source.vm.status["result"]["event"] == "cancelled"
    assert made.source.vmm.state == "running"
    assert made.destination.phase in ("idle", "failed")


@pytest.mark.parametrize("point", AFTER)
async def test_cancel_after_the_grant(point: str, tmp_path: Path, clock: Clock) -> None:
    """A cancel after the grant is refused and changes nothing."""
    made = await migrated(tmp_path, {point: cancel})
    assert made.refused == ["AfterGrant"]
    assert (made.source.phase, made.destination.phase) == ("drained", "drained")


@pytest.mark.parametrize("point", POINTS)
async def test_paused_guest(point: str, tmp_path: Path, clock: Clock) -> None:
    """A guest that was paused stays so on either host, whatever breaks."""
    made = await migrated(tmp_path, {point: cut}, "paused")
    assert made.guest.runs == set()
    assert not made.guest.ran_there


# --- messages ------------------------------------------------------------------------------------


def error(world: World, point: str) -> Instead:
    return Instead(p.Error("Broken", "it broke"))


def wrong(world: World, point: str) -> Instead:
    """A message that is never due there."""
    return Instead(p.Checked([]) if point.startswith("<-") else p.Offer(
        "m", "web1", "process", [p.RegionOffer("ram0", 1, 4096)], {}, 1, 1
    ))  # fmt: skip


def torn(world: World, point: str) -> Instead:
    return Instead(bytes=9, then_cut=True)


def last(world: World, point: str) -> Instead:
    return Instead(then_cut=True)


def twice_granted(world: World, point: str) -> Instead:
    return Instead(p.Grant(99))


@pytest.mark.parametrize("point", MESSAGES)
@pytest.mark.parametrize(
    "fault", [error, wrong, torn, last, twice_granted], ids=lambda fault: fault.__name__
)
async def test_another_message(fault: Fault, point: str, tmp_path: Path, clock: Clock) -> None:
    """Whatever arrives instead of a message, and then nothing, no guest is lost."""
    made = await migrated(tmp_path, {point: fault})
    assert not made.stuck


# --- drivers -------------------------------------------------------------------------------------


def hanging(then: Fault) -> Fault:
    """A call that would not end by itself, until something else happens."""

    async def hang(world: World, point: str) -> None:
        world.later(partial(then, world, point))
        await trio.sleep_forever()

    return hang


def stop_here(world: World, point: str) -> None:
    world.hosts[point.split(".", maxsplit=1)[0]].stop()


@pytest.mark.parametrize("point", CALLS)
@pytest.mark.parametrize(
    "error",
    [VmmError("the VMM refused"), Declined("its disk is locked"), RuntimeError("a bug")],
    ids=lambda error: type(error).__name__,
)
async def test_driver_raises(error: Exception, point: str, tmp_path: Path, clock: Clock) -> None:
    """A driver that fails, also by a bug of its own, at whatever step, loses no guest."""
    if isinstance(error, Declined) and point == "destination.run done":
        pytest.skip("a driver that declines after the guest ran breaks its word")
    made = await migrated(tmp_path, {point: refusing(error)})
    assert not made.stuck


STAYS = {"destination.run", "destination.run done"}
"""Calls that nobody but the daemon's end takes back: what they have done is not known."""


@pytest.mark.parametrize("point", CALLS)
@pytest.mark.parametrize("then", [cancel, cut, silence, stop_here, error], ids=lambda then: then.__name__)
async def test_driver_hangs(
    then: Callable[[World, str], Any], point: str, tmp_path: Path, clock: Clock
) -> None:
    """A driver that hangs is left by a cancel, by the network's end, and by the daemon's."""
    await migrated(tmp_path, {point: hanging(then)})
