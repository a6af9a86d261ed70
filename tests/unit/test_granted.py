# SPDX-License-Identifier: Apache-2.0
"""A source whose guest was granted, while two things happen at once: a person decides and says
another address, a migration is over and its daemon is stopped. In the world of two fake hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from session_faults import Clock, full, goes_down, refusing, stop_here, world
from session_world import Fault, Instead, World
from test_decisions import deciding
from test_guest_ends import FAREWELL, shuts_down

from postcopyd import protocol as p
from postcopyd.native.engine import EngineError, Failure
from postcopyd.source.decision import TAKE_BACK_S
from postcopyd.source.engine import SourceEngine
from postcopyd.source.migration import Migration
from postcopyd.vmm import VmmError

# --- a decision and an address -------------------------------------------------------------------


async def test_another_address_ends_a_decision(tmp_path: Path, clock: Clock) -> None:
    """A destination is called dead while a wrong address is asked, which is silent. Who then says
    the right one does not have its guest run here too: it is asked there first."""
    async with (
        world(tmp_path, {"<- progress": goes_down}) as made,
        made.migrating(),
        trio.open_nursery() as nursery,
    ):
        await made.paused_there()
        silent = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, sleeps, silent)
        await made.source.daemon.recover("web1", f"127.0.0.1:{silent[0].socket.getsockname()[1]}")
        await trio.sleep(TAKE_BACK_S / 2)  # in the middle of an attempt
        said: list[str] = []
        made._nursery = nursery
        deciding("take_back", said)(made, "")
        await trio.sleep(TAKE_BACK_S * 0.9)
        assert said == []
        made.down = False
        await made.source.daemon.recover("web1", made.to)
        await made.settled()
        assert made.guest.broken == []
        assert "it is to be asked there first" in said[0]
        await made.check()
        made.check_over()
        assert made.source.phase == "drained"
        nursery.cancel_scope.cancel()


async def sleeps(stream: trio.SocketStream) -> None:
    """Takes whatever comes, and says nothing."""
    async with stream:
        await trio.sleep_forever()


async def test_what_was_refused_is_not_carried_out(tmp_path: Path, clock: Clock) -> None:
    """A guest is not taken back, whatever the destination says later, for a person who was told
    that it is not."""
    faults: dict[str, Fault] = {
        "<- progress": goes_down,
        "<- ran#2": lambda made, point: Instead(p.Error(p.LOST, "it runs nowhere")),
    }
    async with world(tmp_path, faults) as made, made.migrating(), trio.open_nursery() as nursery:
        await made.paused_there()
        said: list[str] = []
        made._nursery = nursery
        deciding("take_back", said)(made, "")
        await trio.sleep(TAKE_BACK_S / 2)
        made.down = False
        await trio.sleep(60)
        assert made.went["<- ran#2"]
        assert "not known to be dead" in said[0]
        assert made.guest.broken == []
        assert (made.source.vm.epoch, made.source.recorded()) == (1, "granted")


# --- what is over stays so -----------------------------------------------------------------------


async def test_declined_is_over(tmp_path: Path, clock: Clock) -> None:
    """A guest that was declined when it was asked for is here, once: a daemon that is stopped a
    second later does not take it back again."""
    faults: dict[str, Fault] = {
        "destination.record owned": full,
        "destination.end": refusing(VmmError("does not quit")),
        "<- hello#2": goes_down,
    }
    async with world(tmp_path, faults) as made, made.migrating():
        await made.paused_there()
        made.destination.vmm.die()
        await trio.sleep(5)
        made.down = made.destination.store.full = False
        with trio.fail_after(100):
            while made.source.phase != "failed":
                await trio.sleep(0.1)
        await trio.sleep(1)
        assert made.source.vm.claimed_by is None
        made.source.stop(again=True)
        await trio.sleep(30)
        assert made.went["source.rollback"] == 1
        assert "destination did not run web1" in made.source.vm.status.message
        assert (made.source.vmm.state, made.source.recorded()) == ("running", "held")


async def test_stopped_after_the_guest_has_ended(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that was shut down at its destination is over for its source too, though its daemon
    is stopped while the hooks are told."""
    hooks, told = Migration.hooks, list[str]()

    async def stopped_meanwhile(migration: Migration, phase: str, **about: Any) -> None:
        if phase == "ended":
            told.append(phase)
            made.source.stop(again=True)
            await trio.sleep_forever()
        await hooks(migration, phase, **about)

    monkeypatch.setattr(Migration, "hooks", stopped_meanwhile)
    async with world(tmp_path, {"<- ran": shuts_down}) as made:
        await made.migrate()
        assert told
        assert (made.source.phase, made.source.recorded()) == ("failed", "held")
        assert FAREWELL in made.source.vm.status.message
        assert made.result["event"] == "ended"


async def test_stopped_after_a_long_pause(tmp_path: Path, clock: Clock) -> None:
    """Of a migration that was paused for so long that people were told, and was then over, the
    result is that, though the daemon is stopped before the VMM here has ended."""
    faults: dict[str, Fault] = {"<- drained": goes_down, "source.finish": stops_and_waits}
    async with world(tmp_path, faults) as made, made.migrating():
        await trio.sleep(60)
        assert made.result["event"] == "paused"
        made.down = False
        await made.settled()
        await made.check()
        assert (made.source.phase, made.source.vmm.state) == ("drained", "ended")
        assert made.result["event"] == "completed"


async def stops_and_waits(made: World, point: str) -> None:
    stop_here(made, point)
    await trio.sleep_forever()


# --- memory that is gone -------------------------------------------------------------------------


async def test_memory_that_went_with_its_vmm(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of private memory nothing is left once the VMM here has ended. Nobody asks again and again
    for what cannot come; a person is told what to decide, and can."""
    gone = EngineError(Failure.VMM_GONE, "the VMM has ended while its memory was read")
    async with world(tmp_path, {"<- progress": goes_down}) as made, made.migrating():
        await made.paused_there()

        def check(engine: SourceEngine) -> None:
            raise gone

        monkeypatch.setattr(SourceEngine, "check", check)
        made.down = False
        await trio.sleep(100)
        asked = made.went["-> resume"]
        await trio.sleep(100)
        assert made.went["-> resume"] == asked
        status = made.source.vm.status
        assert (status.phase, status.result.event) == ("paused", "paused")
        assert "`postcopyd resolve web1 --kill`" in status.message
        assert "`--poison`" in status.result.error
        await made.source.daemon.resolve("web1", "kill")
        assert made.source.recorded() == "declined"
