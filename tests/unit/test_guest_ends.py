# SPDX-License-Identifier: Apache-2.0
"""Guests that are ended at their destination while their memory follows: by themselves, or by
somebody who told their VMM. Both hosts settle, and either may start the guest again."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from msgspec import to_builtins
from session_faults import (
    Clock,
    destination_dies,
    full,
    goes_down,
    refusing,
    source_ends,
    world,
)
from session_world import Fault, World

from postcopyd import counts
from postcopyd.cli import verbs
from postcopyd.vmm import Role, VmmError
from postcopyd.vmm.qemu import farewell as qemu_farewell
from postcopyd.vmm.qemu.driver import QemuVmm

FAREWELL = "its guest shut down"


@pytest.fixture
def clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(counts, "ended", Counter())
    return clock


def shuts_down(made: World, point: str) -> None:
    made.destination.vmm.die(FAREWELL)


def assert_over(made: World) -> None:
    """Nothing is left for anybody to do, and any host may start the guest."""
    assert made.guest.broken == []
    assert counts.ended == {(role, "postcopy", "ended"): 1 for role in made.hosts}
    for host in made.hosts.values():
        status = host.vm.status
        assert host.vmm.state == "ended"
        assert (host.phase, host.recorded()) == ("failed", "held")
        assert FAREWELL in status.message
        assert host.vm.claimed_by is host.vm.waiting is None
        assert not host.store.intents()
        assert not (host.store.directory / "web1.pages").exists()
        assert verbs._stays_here(to_builtins(status))
    assert not [entry for entry in made.logs if str(entry["event"]).startswith("bug")]


@pytest.mark.parametrize(
    "point", ["destination.run done", "<- ran", "destination.record owned#2", "<- progress"]
)
async def test_guest_shuts_down(point: str, tmp_path: Path, clock: Clock) -> None:
    """A guest that is shut down by its user is over for both hosts, by themselves, and who waits
    for the migration is told so."""
    async with world(tmp_path, {point: shuts_down}) as made:
        await made.migrate()
        assert not made.stuck
        assert_over(made)
        result = made.result
        assert result["event"] == "ended"
        assert "web1 ran at" in result["error"]


@pytest.mark.parametrize("then", [[], ["destination"]])
@pytest.mark.parametrize("killed", [[], ["source"], ["destination"]])
async def test_guest_shuts_down_in_a_pause(
    killed: list[Role], then: list[Role], tmp_path: Path, clock: Clock
) -> None:
    """The same while the source is away: it is told when it asks, also by a daemon that was
    started after the end."""
    async with world(tmp_path, {"<- progress": goes_down}) as made, made.migrating():
        await made.paused_there()
        made.kill(*killed)
        await trio.sleep(5)
        made.destination.vmm.die(FAREWELL)
        await trio.sleep(5)
        assert made.destination.phase == "failed"
        made.kill(*then)
        await trio.sleep(5)
        made.down = False
        await made.settled()
        assert_over(made)


async def test_poisoned_guest_shuts_down(tmp_path: Path, clock: Clock) -> None:
    """A guest with lost pages, which is to be shut down when that can be, is over then."""
    async with world(tmp_path, {"<- progress": source_ends}) as made, made.migrating():
        await made.paused_there()
        await made.destination.daemon.resolve("web1", "poison")
        made.destination.vmm.die(FAREWELL)
        await trio.sleep(5)
        assert (made.destination.phase, made.destination.recorded()) == ("failed", "held")


async def test_source_vmm_is_kept(tmp_path: Path, clock: Clock) -> None:
    """With --keep-source its VMM is left, and so is what forbids to start the guest beside it."""
    async with world(tmp_path, {"<- progress": shuts_down}) as made:
        await made.migrate(keep_source=True)
        assert made.guest.broken == []
        assert made.source.recorded() == "granted"
        assert made.source.store.intents()
        assert made.result["event"] == "ended"


@pytest.mark.parametrize("farewell", [FAREWELL, None])
async def test_end_of_a_guest_that_has_not_run(
    farewell: str | None, tmp_path: Path, clock: Clock
) -> None:
    """A VMM that loaded a guest, and could neither be told to run it nor to end, is ended by hand:
    no vCPU has run there, and the source has its guest back."""
    faults: dict[str, Fault] = {
        "destination.record owned": full,
        "destination.end": refusing(VmmError("does not quit")),
        "<- hello#2": goes_down,
    }
    async with world(tmp_path, faults) as made, made.migrating():
        await made.paused_there()
        assert (made.destination.vmm.state, made.destination.recorded()) == ("loaded", "loading")
        made.destination.vmm.die(farewell)
        await trio.sleep(5)
        assert made.destination.phase == "failed"
        made.down = made.destination.store.full = False
        await made.settled()
        assert (made.source.vmm.state, made.source.recorded()) == ("running", "held")
        with trio.fail_after(100):
            while made.destination.vm.unwritten:  # its disk was full
                await trio.sleep(0.1)
        assert made.destination.recorded() == "declined"
        assert made.guest.broken == []


async def test_crash_is_no_end(tmp_path: Path, clock: Clock) -> None:
    """A VMM that ends without a word leaves it to a person: its guest may be taken back."""
    async with world(tmp_path, {"<- progress": destination_dies}) as made, made.migrating():
        await trio.sleep(30)
        assert (made.source.phase, made.destination.phase) == ("paused", "paused")
        assert made.source.recorded() == "granted"


async def test_killed_guest_is_no_end(tmp_path: Path, clock: Clock) -> None:
    """What a person has ended by `resolve --kill` is told as that, whatever its VMM says of it."""
    async with world(tmp_path, {"<- progress": goes_down}) as made, made.migrating():
        await made.paused_there()
        made.guest.given_up = True
        made.destination.vmm.farewell = "its VMM was told to quit"
        await made.destination.daemon.resolve("web1", "kill")
        await trio.sleep(5)
        assert made.destination.recorded() == "declined"
        assert "operator's decision" in made.destination.vm.status.message
        made.down = False
        await trio.sleep(20)
        assert made.source.phase == "paused"


class Saying:
    """A QEMU's monitor, as far as its end needs one: it says why it ends, and ends."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.queue: list[dict[str, Any]] = []

    def last(self, *names: str) -> Saying:
        return self

    async def open(self, patience: float) -> None:
        """It is."""

    @contextmanager
    def events(self, *names: str) -> Iterator[Saying]:
        yield self

    async def next(self) -> None:
        """It says nothing else."""
        await trio.sleep_forever()

    async def execute(self, command: str, arguments: Any = None) -> None:
        assert command == "quit"
        self.queue.append({"event": "SHUTDOWN", "data": {"reason": "host-qmp-quit"}})
        self.process.kill()

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize("ours", [True, False])
async def test_end_of_ours_is_no_farewell(ours: bool) -> None:
    """A QEMU that this daemon tells to quit says so like any other, and nobody has meant the end of
    its guest by that: the source may need what it has."""
    with subprocess.Popen(["sleep", "100"]) as process:
        said = Saying(process)
        try:
            qemu = QemuVmm("web1", "/qmp", said, process.pid, os.pidfd_open(process.pid))
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(qemu.gone)
                    await trio.testing.wait_all_tasks_blocked()
                    await (qemu.end() if ours else said.execute("quit"))
        finally:
            process.kill()
        assert qemu.farewell == (None if ours else "its VMM was told to quit")
        await qemu.aclose()


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-shutdown"}}, FAREWELL),
        ({"event": "SHUTDOWN", "data": {"guest": False, "reason": "host-error"}}, None),
        ({"event": "SHUTDOWN", "data": {"guest": False, "reason": ["odd"]}}, None),
        ({"event": "SHUTDOWN", "data": "odd"}, None),
        ({"event": "SHUTDOWN"}, None),
        ({"event": "RESET", "data": {"reason": "guest-shutdown"}}, None),
        ({"event": "RESUME"}, None),
        (None, None),
    ],
)
def test_last_words_of_qemu(event: Any, said: str | None) -> None:
    """Only a shutdown that was meant is an end, and only if nothing came after it."""
    assert qemu_farewell.farewell(event) == said
