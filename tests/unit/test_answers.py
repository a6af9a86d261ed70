# SPDX-License-Identifier: Apache-2.0
"""A source that asks after a guest of which its destination has another thing to say by now, or
nothing: how the move ended outlives what became of the VM there. In the world of two fake hosts."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from session_faults import Clock, goes_down, world
from session_world import World

from postcopyd.errors import PostcopydError
from postcopyd.records.store import KEPT, Store
from postcopyd.sessions.vm import Vm

ARRIVED = {
    "migration": "one",
    "offer": {"epoch": 3},
    "identity": ["host1"],
    "answer": {"type": "drained", "confirmed": 7},
}


async def drained_there(made: World) -> None:
    with trio.fail_after(100):
        while made.destination.phase != "drained" or made.destination.vm.claimed_by is not None:
            await trio.sleep(1)
    assert made.source.recorded() == "granted"
    assert made.source.vmm.state == "stopped"


@pytest.mark.parametrize("restarts", [False, True])
async def test_detached_before_its_source_knows(
    restarts: bool, tmp_path: Path, clock: Clock
) -> None:
    """A guest that is whole, and was detached, runs at the destination: its source is told so."""
    async with world(tmp_path, {"<- drained": goes_down}) as made, made.migrating():
        await drained_there(made)
        there = made.destination
        await there.daemon.detach("web1")
        assert not there.store.load()
        if restarts:
            there.kill()
            await trio.sleep(10)
        made.down = False
        with trio.fail_after(100):
            while made.source.phase != "drained":
                await trio.sleep(1)
        assert (made.source.vmm.state, there.vmm.state) == ("ended", "running")
        with pytest.raises(PostcopydError, match="no paused migration"):
            await made.source.daemon.resolve("web1", "take_back")
        assert made.guest.broken == []
        await there.daemon.attach("web1", "process", there.vmm.socket)


async def test_no_take_back_over_an_unread_record(tmp_path: Path, clock: Clock) -> None:
    """A destination that cannot read its record does not know that it has nothing of the guest."""
    async with world(tmp_path, {"<- progress": goes_down}) as made, made.migrating():
        await made.paused_there()
        made.destination.kill()
        (made.destination.store.directory / "web1.json").write_text("torn")
        await trio.sleep(10)
        made.down = False
        await trio.sleep(20)
        with pytest.raises(PostcopydError, match=r"not known to be dead.*reading the record"):
            await made.source.daemon.resolve("web1", "take_back")
        assert made.source.vmm.state == "stopped"
        assert made.guest.broken == []


def test_moved_on_before_its_source_knows(tmp_path: Path) -> None:
    """The next migration of a VM does not have the last one's answer forgotten."""
    vm = Vm("web1", Store(tmp_path), None)
    vm.note(ARRIVED)
    vm.note({**ARRIVED, "told": True})
    assert Store(tmp_path).answered("web1", "one") == {}
    vm.note({"migration": "two"})
    assert Store(tmp_path).answered("web1", "one") == ARRIVED
    assert Store(tmp_path).answered("web1", "two") == {}
    assert vm.about == {"migration": "two"}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """A VM that comes and goes for years takes no more room."""
    vm = Vm("web1", Store(tmp_path), None)
    for number in range(KEPT + 2):
        vm.note({**ARRIVED, "migration": str(number)})
    store = Store(tmp_path)
    kept = [number for number in range(KEPT + 2) if store.answered("web1", str(number))]
    assert kept == [*range(1, KEPT + 1)]


@pytest.mark.parametrize(
    "about",
    [{**ARRIVED, "acknowledged": True}, {**ARRIVED, "answer": {"type": "declined", "reason": ""}}],
)
def test_what_nobody_will_ask(about: dict[str, object], tmp_path: Path) -> None:
    """What the source has acknowledged, and what it may run its guest upon anyway."""
    vm = Vm("web1", Store(tmp_path), None)
    vm.note(about)
    vm.note({"migration": "two"})
    assert Store(tmp_path).answered("web1", "one") == {}


def test_what_cannot_be_kept_stays(tmp_path: Path) -> None:
    """Where it cannot be written, nothing takes the place of what is known."""
    vm = Vm("web1", Store(tmp_path), None)
    vm.note(ARRIVED)
    (tmp_path / "web1.answers").write_text("torn")
    with pytest.raises(PostcopydError, match="reading the record"):
        vm.note({"migration": "two"})
    assert vm.about == ARRIVED
