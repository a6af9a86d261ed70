# SPDX-License-Identifier: Apache-2.0
"""Whether a guest can be lost or show an old page: every fault at every step that passes add to a
migration (test_sessions.py), and the others with a guest that was copied while it ran."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_vmm import FakeVmm
from session_faults import (
    Clock,
    cancel,
    cut,
    cut_data,
    destination_dies,
    destination_says_error,
    error,
    grant,
    hanging,
    kill_both,
    kill_destination,
    kill_receiver,
    kill_sender,
    kill_source,
    last,
    made_clock,
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
    world,
    wrong,
)
from session_world import LONG_S, Fault, Instead, World

from postcopyd import protocol as p
from postcopyd.source import passes
from postcopyd.source.engine import SourceEngine
from postcopyd.vmm import VmmError

PASSES = [
    "source.track",
    "-> pass",
    "<- passed",
    "-> pass#2",
    "<- passed#2",
    "source.prepare",
    "-> handover",
    "source.save stopped",
    "-> stale",
    "-> stale#2",
    "-> deviceEnd",
]
"""What passes add to a migration, in order, among some that are there anyway."""

STILL = ["source.record intent", "source.still", "source.still done", "source.record held"]
"""What direct I/O adds before each pass."""

LATER = [
    "<- loaded",
    "source.record granted",
    "destination.record owned",
    "destination.run",
    "<- ran",
    "<- progress",
    "destination.unregister",
    "<- drained",
]

ANYWHERE = [
    cut, cut_data, silence, stop_source, stop_destination, kill_source, kill_destination, kill_both,
    source_dies, destination_dies,
]  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A guest that writes some pages between the passes, of which there are two."""
    monkeypatch.setattr(passes, "SHORT_S", -1)
    look = SourceEngine.look
    looks: dict[SourceEngine, int] = {}

    async def look_and_write(engine: SourceEngine, *, arm: bool) -> int:
        looks[engine] = looks.get(engine, 0) + 1
        if looks[engine] in (2, 4):  # behind a pass
            for vmm in FakeVmm.at.values():
                if vmm.role == "source" and vmm.state == "running":
                    vmm.write()
        return await look(engine, arm=arm)

    monkeypatch.setattr(SourceEngine, "look", look_and_write)
    return made_clock(monkeypatch)


async def hybrid(folder: Path, faults: dict[str, Fault], **options: object) -> World:
    return await migrated(folder, faults, mode="hybrid", precopy_passes=2, **options)  # type: ignore[arg-type]


async def test_clean(tmp_path: Path, clock: Clock) -> None:
    """All of it is passed, and the result says what was done."""
    made = await hybrid(tmp_path, {})
    assert set(PASSES) - set(made.went) == set()
    result = made.source.vm.status["result"]
    assert result["mode"] == "hybrid"
    memory = result["memory"]
    # 10 pages of data, then the 5 that were written, one of them a hole before.
    assert [one["pages"] for one in result["passes"]] == [10, 5]
    assert [one["dirtyPages"] for one in result["passes"]] == [5, 5]
    assert memory["dirtyPages"] == 4 + 5
    assert memory["pushedPages"] + memory["urgentPages"] == 4
    assert result["handedOver"]
    assert "warning" not in result


@pytest.mark.parametrize("point", [*PASSES, *LATER])
@pytest.mark.parametrize("fault", ANYWHERE, ids=lambda fault: fault.__name__)
async def test_anything_breaks_anywhere(
    fault: Fault, point: str, tmp_path: Path, clock: Clock
) -> None:
    """Whatever breaks between or under the daemons, at whatever step, no guest is lost."""
    after = LATER.index(point) > 1 if point in LATER else False
    sticks = after and fault is destination_dies
    patience = 30 if sticks else LONG_S
    made = await hybrid(tmp_path, {point: fault}, patience=patience, sticks=sticks)
    if not after and fault not in (cut_data, source_dies):
        assert made.source.vmm.state == "running" or made.source.phase == "drained"
