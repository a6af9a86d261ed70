# SPDX-License-Identifier: Apache-2.0
"""Somebody else pauses the guest, or moves it away by the VMM's own means, while it is to be moved:
whatever ends the migration then, nobody runs it, and nobody is told that all is as it was."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from session_faults import (
    Clock,
    cancel,
    cut,
    kill_source,
    migrated,
    somebody_moves,
    somebody_pauses,
    stop_destination,
    stop_source,
)
from session_world import Fault, World


def both(first: Fault, then: Fault) -> Fault:
    def fault(world: World, point: str) -> None:
        first(world, point)
        world.later(partial(then, world, point))

    return fault


@pytest.mark.parametrize("theirs", [somebody_pauses, somebody_moves], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "end", [cancel, cut, stop_destination, stop_source, kill_source], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("point", ["-> pass", "source.prepare", "source.save"])
async def test_what_others_do_is_left(
    theirs: Fault, end: Fault, point: str, tmp_path: Path, clock: Clock
) -> None:
    faults = {point: both(theirs, end)}
    made = await migrated(tmp_path, faults, mode="hybrid", precopy_passes=2)
    _left(made)


@pytest.mark.parametrize("theirs", [somebody_pauses, somebody_moves], ids=lambda f: f.__name__)
@pytest.mark.parametrize("again", [kill_source, stop_source], ids=lambda f: f.__name__)
@pytest.mark.parametrize("point", ["source.save stopped", "source.save sent", "<- loaded"])
async def test_what_others_do_between_two_daemons_is_left(
    theirs: Fault, again: Fault, point: str, tmp_path: Path, clock: Clock
) -> None:
    """The record says that the guest ran and was about to be stopped; that it is stopped is not our
    doing any more."""
    made = await migrated(tmp_path, {point: again, "source.rollback": theirs})
    _left(made)


def _left(made: World) -> None:
    assert made.source.vmm.state == "taken"
    message = made.source.vm.status.message
    assert "as it was:" not in message
    if made.went["source.rollback"]:
        assert "was left here as it was found: somebody else has it" in message
    assert made.source.recorded() == "held"
