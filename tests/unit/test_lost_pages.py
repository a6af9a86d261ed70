# SPDX-License-Identifier: Apache-2.0
"""Guest memory that cannot be read at the source, and what the kernel puts into it at the
destination: what the daemons make of it. (What the engines do: tests/native/loss_test.c.)"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio
from fake_vmm import PAGE
from needs import missing
from session_faults import Clock, cut, kill_destination, world
from session_world import Fault, World
from test_session_cases import asking

from postcopyd import protocol as p
from postcopyd.errors import PostcopydError
from postcopyd.model import MigrateRequest
from postcopyd.sessions import losses

LEFT = 21
"""Pages of the first region that can be read; the 22nd and the 24th are zeros or holes, the 23rd
is data: all three are lost."""


def cut_short(made: World, point: str) -> None:
    """The end of the guest's RAM file is gone."""
    os.ftruncate(made.source.vmm.files[0], LEFT * PAGE)


def poisons(made: World) -> None:
    if "UFFDIO_POISON" in made.destination.vm.status.message:
        missing("UFFDIO_POISON, of Linux 6.6")


async def check_lost(made: World) -> None:
    """It is over, the guest runs there without three pages, and everybody is told."""
    poisons(made)
    source, destination = made.source, made.destination
    assert not made.stuck
    assert made.guest.broken == []
    assert (source.phase, destination.phase) == ("drained", "drained")
    assert (source.vmm.state, destination.vmm.state) == ("ended", "running")
    assert source.vm.status.result.event == "completed"
    assert source.vm.status.result.memory.lost_pages == 3
    for host in made.hosts.values():
        assert "3 pages that could not be read" in host.vm.status.message
    assert any(entry["event"] == "memory lost" and entry["pages"] == 3 for entry in made.logs)
    assert destination.vmm.registered()  # or the errors would become zeros
    assert destination.recorded() == "owned"
    with pytest.raises(PostcopydError, match="3 pages"):
        await destination.daemon.migrate("web1", MigrateRequest(made.to))
    with pytest.raises(PostcopydError, match="3 pages"):
        await destination.daemon.check("web1", made.to)
    with pytest.raises(PostcopydError, match="shut it down"):
        await destination.daemon.detach("web1")


@pytest.mark.parametrize(
    ("mode", "when"),
    [
        ("postcopy", "source.save stopped"),
        ("hybrid", "source.inspect"),
        ("precopy", "source.inspect"),
    ],
)
async def test_all_others_follow(mode: str, when: str, tmp_path: Path, clock: Clock) -> None:
    """Pages that cannot be read are lost, in passes too; nothing else is, and it does not end the
    migration."""
    async with world(tmp_path, {when: cut_short}) as made:
        await made.migrate(mode=mode)
        await check_lost(made)


@pytest.mark.parametrize("fault", [cut, kill_destination])
async def test_the_rest_comes_after_a_recovery(fault: Fault, tmp_path: Path, clock: Clock) -> None:
    """A guest that has lost pages and lacks others still gets those, on another connection."""
    faults = {"source.save stopped": cut_short, "<- progress": fault}
    async with world(tmp_path, faults) as made:
        await made.migrate()
        await check_lost(made)


async def test_the_engine_stays(tmp_path: Path, clock: Clock) -> None:
    """After a restart of the daemon too: nobody else can answer a fault there. A source that asks
    again is told once more, and the VMM's end ends it."""
    async with world(tmp_path, {"source.save stopped": cut_short}) as made, made.migrating():
        await made.settled()
        made.kill("destination")
        with trio.fail_after(100):
            while len(made.destination.lives) < 2 or not made.destination.quiet:
                await trio.sleep(1)
        await check_lost(made)
        assert made.destination.vm.waiting is not None
        migration = made.destination.vm.status.migration
        async with asking(made, migration, 1) as channel:
            drained = await channel.expect(p.Drained)
            assert (drained.confirmed, drained.lost) == (32, 3)
        made.destination.vmm.die()
        with trio.fail_after(100):
            while made.destination.vm.waiting is not None:
                await trio.sleep(1)


async def test_killed_before_it_is_recorded(tmp_path: Path, clock: Clock) -> None:
    """A daemon that dies once all is there or lost is followed by one that says so."""
    faults: dict[str, Fault] = {
        "source.save stopped": cut_short,
        "<- drained": kill_destination,
    }
    async with world(tmp_path, faults) as made:
        await made.migrate()
        await check_lost(made)


async def test_a_destination_that_cannot_be_told(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older version has all else, and a person gives up there what lacks."""
    monkeypatch.setattr(p, "FEATURES", frozenset({p.QUEUE}))
    async with world(tmp_path, {"source.save stopped": cut_short}) as made, made.migrating():
        with trio.fail_after(1000):
            while "cannot be told" not in made.source.vm.status.message:
                await trio.sleep(0.1)
        made.down = True
        made.cut(p.CONTROL, p.DATA)
        await made.paused_there()
        assert made.destination.vmm.state == "running"
        assert made.destination.vm.waiting.lost == 0
        try:
            await made.destination.daemon.resolve("web1", "poison")
        except PostcopydError:
            poisons(made)
            raise
        assert made.destination.vm.waiting.lost == 3
        assert made.destination.vmm.memory() == made.source.vmm.memory()
        made.down = False
        with trio.fail_after(1000):
            while "given up" not in made.source.vm.status.message:
                await trio.sleep(1)


@pytest.mark.parametrize("farewell", ["its guest shut down", None])
async def test_end_after_drained(farewell: str | None, tmp_path: Path, clock: Clock) -> None:
    """A guest that has lost pages is shut down in the end, or crashes: its move was over, and it
    may be attached anew."""
    async with world(tmp_path, {"source.save stopped": cut_short}) as made:
        await made.migrate()
        await check_lost(made)
        there = made.destination
        there.vmm.die(farewell)
        await trio.sleep(5)
        assert (there.phase, there.recorded()) == ("drained", "held")
        assert "its VMM has ended since" in there.vm.status.message
        assert there.vm.about["answer"]["type"] == "drained"
        assert there.vm.driver is there.vm.waiting is None
        await there.daemon.detach("web1")


def foreign(made: World, point: str) -> None:
    """The kernel makes a huge page of registered memory: zeros where pages are to come."""
    fd = made.destination.vmm.files[0]
    for page in range(4, LEFT):
        os.pwrite(fd, bytes(PAGE), page * PAGE)


async def test_killed_before_foreign_is_recorded(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that is killed between its engine's seeing them and its record of that: the next one
    knows it all the same, and gives the guest nothing more."""
    real = losses.foreign
    async with world(tmp_path, {"<- ran": foreign}) as made, made.migrating():
        there = made.destination

        def killed(*args: Any) -> str:
            monkeypatch.setattr(losses, "foreign", real)
            made.kill("destination")
            return real(*args)

        monkeypatch.setattr(losses, "foreign", killed)
        with trio.fail_after(1000):
            while len(there.lives) < 2 or not there.quiet:
                await trio.sleep(0.1)
        assert "foreign" not in there.store.load()["web1"]["about"]
        await trio.sleep(60)
        assert "page 4 of region 0" in there.vm.status.message
        assert "not to be trusted" in there.vm.status.message
        assert "not to be trusted" in made.source.vm.status.message
        assert (there.phase, there.recorded()) == ("paused", "owned")
        assert there.vm.waiting is None
        assert there.vmm.registered()
        made.guest.given_up = True


async def test_foreign_pages_end_it(tmp_path: Path, clock: Clock) -> None:
    """A guest that may have read zeros is given nothing more, whoever asks and however often the
    daemon is started; a person ends it, and has it as it was where it came from."""
    async with world(tmp_path, {"<- ran": foreign}) as made, made.migrating():
        there = made.destination
        with trio.fail_after(1000):
            while "not to be trusted" not in there.vm.status.message:
                await trio.sleep(0.1)
        for life in (1, 2):
            assert "page 4 of region 0" in there.vm.status.message or life == 2
            assert "khugepaged" in there.vm.status.message
            assert (there.phase, there.recorded()) == ("paused", "owned")
            assert there.vm.waiting is None
            assert there.vmm.registered()
            await trio.sleep(20)
            assert "not to be trusted" in made.source.vm.status.message
            if life == 1:
                made.kill("destination")
                with trio.fail_after(100):
                    while len(there.lives) < 2 or not there.quiet:
                        await trio.sleep(1)
        made.guest.given_up = True
        await there.daemon.resolve("web1", "kill")
        assert (there.vmm.state, there.phase) == ("ended", "failed")
        await made.source.daemon.resolve("web1", "take_back")
        assert made.source.vmm.state == "running"
        assert made.guest.broken == []
