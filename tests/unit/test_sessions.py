# SPDX-License-Identifier: Apache-2.0
"""Whether a guest can be lost: every fault at every step of a migration, with both sessions real.

A fault that comes after the grant is followed by recovery, which meets faults at its own steps.

The daemons, sessions, engines, records and sockets are the real ones; the VMMs and the network
between the hosts are made (session_world.py), and break where a test wants it. What must hold
whatever happens is `World.check`; a test says only what it expects beyond that.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from session_faults import (
    Clock,
    cancel,
    cut,
    cut_data,
    destination_dies,
    destination_says_error,
    error,
    full,
    grant,
    hanging,
    kill_both,
    kill_destination,
    kill_here,
    kill_receiver,
    kill_sender,
    kill_source,
    last,
    migrated,
    no_room,
    refusing,
    silence,
    source_dies,
    source_says_error,
    stop_destination,
    stop_here,
    stop_source,
    torn,
    wrong,
)
from session_world import LONG_S, Fault

from postcopyd.vmm import Declined, VmmError

POINTS = [
    "source.inspect",
    "-> hello",
    "<- hello",
    "-> offer",
    "destination.inspect",
    "destination.record arriving",
    "destination.adopt",
    "destination.adopt done",
    "<- ready",
    "data",
    "data#2",
    "<- serving",
    "source.prepare",
    "source.inspect#2",
    "source.record intent",
    "source.outline",
    "-> handover",
    "destination.outline",
    "destination.record loading",
    "source.save",
    "source.save stopped",
    "destination.load",
    "-> device",
    "-> device#2",
    "source.save sent",
    "-> deviceEnd",
    "source.outline#2",
    "destination.load done",
    "<- loaded",
    "source.record granted",
    "-> grant",
    "destination.record owned",
    "destination.run",
    "destination.run done",
    "<- ran",
    "destination.record owned#2",
    "source.record granted#2",
    "<- progress",
    "destination.unregister",
    "destination.unregister done",
    "destination.release",
    "destination.release done",
    "destination.record held",
    "<- drained",
    "source.record granted#3",
    "-> acknowledged",
    "source.finish",
    "source.finish done",
    "source.aclose",
    "source.record granted#4",
]
"""Everything that a migration passes, in the order of a clean one."""

RECOVERY = [
    "source.record granted#3",
    "destination.record owned#3",
    "-> hello#2",
    "<- hello#2",
    "-> resume",
    "<- ready#2",
    "<- ran#2",
    "destination.record owned#4",
    "data#3",
    "data#4",
    "<- have",
    "<- have#2",
    "<- serving#2",
    "source.record granted#4",
    "<- progress#2",
    "destination.unregister",
    "destination.unregister done",
    "destination.release",
    "destination.release done",
    "destination.record held",
    "<- drained",
    "source.record granted#5",
    "-> acknowledged",
    "source.finish",
    "source.finish done",
    "source.aclose",
    "source.record granted#6",
]
"""Everything that is passed after the connection was lost while pages were missing."""


def messages(points: list[str]) -> list[str]:
    return [point for point in points if point[:2] in ("->", "<-")]


RECORDS = [point for point in POINTS if ".record " in point]
ENGINE = [point for point in POINTS if ".unregister" in point]
CALLS = [
    point
    for point in POINTS
    if point not in (*messages(POINTS), *RECORDS, *ENGINE) and "data" not in point
]
GRANT = POINTS.index("source.record granted")
BEGUN = POINTS.index("source.prepare")
BEFORE, AFTER = POINTS[:GRANT], POINTS[GRANT + 1 :]


# --- anywhere -----------------------------------------------------------------------------------


KILLED = [kill_source, kill_destination, kill_both]
ANYWHERE = [
    cut, cut_data, silence, stop_source, stop_destination, *KILLED, source_dies, destination_dies,
]  # fmt: skip


async def test_clean(tmp_path: Path, clock: Clock) -> None:
    """Without a fault the migration passes all points of the table, and ends drained."""
    made = await migrated(tmp_path, {})
    assert set(made.went) == set(POINTS)
    assert (made.source.phase, made.destination.phase) == ("drained", "drained")
    assert made.destination.vmm.received == [b"registers", b"and devices"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("fault", ANYWHERE, ids=lambda fault: fault.__name__)
async def test_anything_breaks_anywhere(
    fault: Fault, point: str, tmp_path: Path, clock: Clock
) -> None:
    """Whatever breaks between or under the daemons, at whatever step, no guest is lost."""
    sticks = point in AFTER and fault is destination_dies
    patience = 15 if sticks else LONG_S
    made = await migrated(tmp_path, {point: fault}, patience=patience, sticks=sticks)
    if point in BEFORE[:-1] and fault not in (cut_data, source_dies):
        assert made.source.vmm.state == "running" or made.source.phase == "drained"


@pytest.mark.parametrize("point", [*CALLS, *RECORDS])
@pytest.mark.parametrize("fault", [source_says_error, destination_says_error])
async def test_error_is_said_anywhere(
    fault: Fault, point: str, tmp_path: Path, clock: Clock
) -> None:
    """An error that comes at whatever step loses no guest, and never ends a running one."""
    await migrated(tmp_path, {point: fault})


@pytest.mark.parametrize("point", BEFORE)
async def test_cancel_before_the_grant(point: str, tmp_path: Path, clock: Clock) -> None:
    """A cancel before the grant is obeyed: the guest runs here, and the other host is as it was."""
    made = await migrated(tmp_path, {point: cancel})
    assert made.result["event"] == "cancelled"
    assert made.source.vmm.state == "running"
    assert made.destination.phase in ("idle", "failed")


@pytest.mark.parametrize("point", AFTER)
async def test_cancel_after_the_grant(point: str, tmp_path: Path, clock: Clock) -> None:
    """A cancel after the grant is refused and changes nothing."""
    made = await migrated(tmp_path, {point: cancel})
    assert made.refused == ["AfterGrant"]
    assert (made.source.phase, made.destination.phase) == ("drained", "drained")


@pytest.mark.parametrize("point", POINTS[BEGUN:])
async def test_paused_guest(point: str, tmp_path: Path, clock: Clock) -> None:
    """A guest that was paused stays so on either host, wherever its migration ends."""
    made = await migrated(tmp_path, {point: cut}, "paused", reached="run" not in point)
    assert made.guest.runs == set()
    assert not made.guest.ran_there


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", messages(POINTS))
@pytest.mark.parametrize(
    "fault",
    [error, wrong, torn, last, grant, kill_sender, kill_receiver],
    ids=lambda fault: fault.__name__,
)
async def test_another_message(fault: Fault, point: str, tmp_path: Path, clock: Clock) -> None:
    """Whatever arrives instead of a message, and then nothing, no guest is lost."""
    await migrated(tmp_path, {point: fault})


# --- recovery ------------------------------------------------------------------------------------


async def test_recovered(tmp_path: Path, clock: Clock) -> None:
    """A connection that is lost while pages are missing is made again, and nothing else is seen."""
    made = await migrated(tmp_path, {"<- progress": cut})
    assert set(made.went) == {*POINTS, *RECOVERY}
    assert made.result["event"] == "completed"
    assert made.result["recoveries"] == 1


@pytest.mark.parametrize("point", RECOVERY)
@pytest.mark.parametrize("fault", [cut, cut_data, silence, *KILLED], ids=lambda f: f.__name__)
async def test_recovery_breaks_anywhere(
    fault: Fault, point: str, tmp_path: Path, clock: Clock
) -> None:
    """Whatever breaks at whatever step of a recovery, the next attempt brings all of it over."""
    made = await migrated(tmp_path, {"<- progress": cut, point: fault})
    assert made.destination.phase == "drained"


@pytest.mark.parametrize("point", messages(RECOVERY))
@pytest.mark.parametrize(
    "fault",
    [error, wrong, torn, last, grant, kill_sender, kill_receiver],
    ids=lambda fault: fault.__name__,
)
async def test_another_message_in_recovery(
    fault: Fault, point: str, tmp_path: Path, clock: Clock
) -> None:
    """Whatever arrives instead of a message of a recovery, the next attempt goes well."""
    made = await migrated(tmp_path, {"<- progress": cut, point: fault})
    assert made.destination.phase == "drained"


# --- drivers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", CALLS)
@pytest.mark.parametrize(
    "error",
    [VmmError("the VMM refused"), RuntimeError("a bug")],
    ids=lambda error: type(error).__name__,
)
async def test_driver_raises(error: Exception, point: str, tmp_path: Path, clock: Clock) -> None:
    """A driver that fails, also by a bug of its own, at whatever step, loses no guest."""
    made = await migrated(tmp_path, {point: refusing(error)})
    if point in BEFORE and point != "source.inspect":
        assert made.source.vmm.state == "running"


STAYS = {
    "source.inspect",
    "destination.run",
    "destination.run done",
    "source.finish",
    "source.finish done",
    "source.aclose",
}
"""Calls that only the driver itself, and the daemon's end, take back."""


@pytest.mark.parametrize("point", CALLS)
@pytest.mark.parametrize("then", [cancel, cut, silence, stop_here], ids=lambda then: then.__name__)
async def test_driver_hangs(then: Fault, point: str, tmp_path: Path, clock: Clock) -> None:
    """A driver that hangs is left by a cancel, by the network's end, and by the daemon's."""
    faults = {point: hanging(then)}
    sticks = point in STAYS
    await migrated(tmp_path, faults, patience=40 if sticks else LONG_S, sticks=sticks)


# --- the disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", RECORDS)
@pytest.mark.parametrize("fault", [no_room, full], ids=lambda fault: fault.__name__)
async def test_record_is_not_written(
    fault: Fault, point: str, tmp_path: Path, clock: Clock
) -> None:
    """What cannot be recorded is not done; a disk that is full, for good too, loses no guest."""
    made = await migrated(tmp_path, {point: fault})
    if point in POINTS[: POINTS.index("destination.run")]:
        assert made.source.vmm.state == "running"
        assert made.source.phase == made.destination.phase == "failed"
    else:
        assert made.source.phase == made.destination.phase == "drained"


# --- when going back fails too -------------------------------------------------------------------

FIRST = {
    "load refused": {"destination.load": refusing(VmmError("bad device state"))},
    "save refused": {"source.save sent": refusing(VmmError("no more"))},
    "run declined": {"destination.run": refusing(Declined("its disk is locked"))},
    "offer taken back": {"destination.adopt": cancel},
}
RAISES = [refusing(VmmError("no")), refusing(RuntimeError("a bug"))]
SECOND = [
    "source.rollback",
    "source.rollback done",
    "source.record held",
    "destination.record declined",
    "destination.end",
    "destination.end done",
    "destination.release",
    "destination.release done",
    "destination.aclose",
]


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize(
    ("second", "fault"),
    [
        (second, fault)
        for second in SECOND
        for fault in [cut, stop_here, kill_here, *([no_room] if ".record " in second else RAISES)]
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
async def test_going_back_fails_too(
    fault: Fault, second: str, first: str, tmp_path: Path, clock: Clock
) -> None:
    """What fails while a failed migration is undone does not lose the guest either."""
    # A VMM that has refused to run the guest, and that was not recorded: only a person can know.
    unknown = ("destination.end", "destination.end done", "destination.record declined")
    sticks = first == "run declined" and second in unknown
    patience = 15 if sticks else LONG_S
    faults = {**FIRST[first], second: fault}
    await migrated(tmp_path, faults, reached=False, patience=patience, sticks=sticks)
