# SPDX-License-Identifier: Apache-2.0
"""A VMM that others could run ends as soon as its guest runs elsewhere and its memory is kept, and
a guest that is taken back gets a new one: in which order, and what may fail in between."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import trio
from fake_vmm import DEVICE_STATE, PAGE, FakeDriver, FakeVmm
from patient import Clock
from session_faults import cut, goes_down, kill_source, migrated, refusing, world
from session_world import Fault, World
from test_decisions import deciding

from postcopyd.daemon import registry
from postcopyd.native import keeper
from postcopyd.native.keeper import Keeper
from postcopyd.records.store import StateNotWritten
from postcopyd.sessions.vm import Vm
from postcopyd.source import copying, resolve
from postcopyd.source.keeping import kept
from postcopyd.vmm import Region, Shape, VmmError

DEFINITION = "what it is made of"


class Made(FakeDriver):
    """What the daemon makes, and others could run."""

    makes = True
    defined: ClassVar[list[str]] = []

    async def definition(self, persistent: bool | None = None, xml: str = "") -> str:
        return DEFINITION

    @classmethod
    async def vacate(cls, name: str, socket: str, pid: int, *, undefine: bool) -> None:
        vmm = FakeVmm.at[socket]
        await vmm.reach("source.vacate")
        if vmm.pid == pid and vmm.state != "ended":
            vmm.guest.never(not vmm.guest.ran_there, "ended before it ran elsewhere")
            vmm.guest.never(not kept_now(), "ended without a keeper")
            vmm.die()
        await vmm.reach("source.vacate done")

    @classmethod
    async def remake(  # noqa: PLR0917
        cls,
        name: str,
        socket: str,
        definition: str,
        like: Shape,
        fill: Callable[[Shape], Awaitable[list[Region]]],
        device: bytes,
    ) -> Self:
        assert (definition, device) == (DEFINITION, b"".join(DEVICE_STATE))
        old = FakeVmm.at[socket]
        await old.reach("source.remake")
        vmm = FakeVmm(old.guest, "source", "stopped", old.reach)
        vmm.life = old.life
        for memory in vmm.maps:
            memory.madvise(mmap.MADV_REMOVE)
        made = cls(name, vmm)
        with closing(await made.inspect("source")) as shape:
            assert await fill(shape) == []
        assert vmm.memory() == old.memory()
        return made

    async def keep(self, definition: str) -> None:
        self.defined.append(definition)

    @classmethod
    async def define(cls, name: str, socket: str, definition: str) -> bool:
        cls.defined.append(definition)
        return True


KEPT: list[Keeper] = []


def kept_now() -> bool:
    return bool(KEPT)


@pytest.fixture
def made(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock of a world of such VMMs, with keepers that are none."""

    async def make(vmm: int, *, allow_seccomp: bool) -> Keeper:
        KEPT.append(Keeper(os.getpid(), 1, 0))
        return KEPT[-1]

    async def end(one: Keeper, vmm: int) -> None:
        KEPT.clear()

    KEPT.clear()
    Made.defined.clear()
    monkeypatch.setattr(registry, "DRIVERS", {"process": Made})
    monkeypatch.setattr(keeper, "make", make)
    monkeypatch.setattr(keeper, "end", end)
    monkeypatch.setattr(keeper, "hold", lambda one: True)
    monkeypatch.setattr(keeper, "outlives_group", lambda one: True)
    monkeypatch.setattr(Keeper, "lives", lambda one: kept_now())
    return clock


def device(made: World) -> Path:
    return made.source.store.directory / "web1.device"


def nothing_left(made: World) -> None:
    assert KEPT == []
    assert not device(made).exists()
    assert "keeper" not in made.source.store.load()["web1"]["about"]


async def vacated(made: World) -> None:
    with trio.fail_after(60):
        while not made.went["source.vacate done"]:
            await trio.sleep(0.1)


def about(made: World) -> Any:
    return made.source.store.load()["web1"]["about"].get("keeper", {})


async def test_it_ends_while_memory_follows(tmp_path: Path, made: Clock) -> None:
    """And what it can be made anew of is there then, for its owner's eyes only."""
    async with world(tmp_path, {"<- progress": goes_down}) as pair, pair.migrating():
        await pair.paused_there()
        await vacated(pair)
        assert pair.source.vmm.state == "ended"
        assert device(pair).read_bytes() == b"".join(DEVICE_STATE)
        assert device(pair).stat().st_mode & 0o777 == 0o600
        assert (about(pair)["definition"], about(pair)["vacated"]) == (DEFINITION, True)
        intent = pair.source.store.intents()["web1"]
        assert intent["definition"] == DEFINITION
        pair.down = False
        await pair.settled()
        await pair.check()
        pair.check_over()
        nothing_left(pair)


@pytest.mark.parametrize("point", ["source.vacate", "source.vacate done"])
async def test_a_daemon_that_is_killed_meanwhile(point: str, tmp_path: Path, made: Clock) -> None:
    """The next one does it again, and sends the rest of the memory."""
    faults: dict[str, Fault] = {point: kill_source, "<- progress": cut}
    async with world(tmp_path, faults) as pair:
        await pair.migrate()
        await pair.check()
        pair.check_over()
        nothing_left(pair)


async def test_one_that_does_not_end(tmp_path: Path, made: Clock) -> None:
    """As libvirt does not answer: draining is not held up by it, and it is ended then."""
    faults = {"source.vacate": refusing(VmmError("libvirt has not answered"))}
    pair = await migrated(tmp_path, faults, reached=False)  # all of its memory may be here first
    assert pair.went["source.finish"]
    nothing_left(pair)


async def test_it_is_tried_again(tmp_path: Path, made: Clock) -> None:
    faults: dict[str, Fault] = {
        "<- progress": goes_down,
        "source.vacate": refusing(VmmError("libvirt has not answered")),
    }
    async with world(tmp_path, faults) as pair, pair.migrating():
        await pair.paused_there()
        await vacated(pair)
        assert pair.source.vmm.state == "ended"
        pair.down = False
        await pair.settled()
        nothing_left(pair)


@pytest.mark.parametrize("lack", ["keeper", "group", "state"])
async def test_what_is_not_kept_stays(
    lack: str, tmp_path: Path, made: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VMM stays, stopped, as long as anything of the guest would end with it."""

    async def none(vmm: int, *, allow_seccomp: bool) -> Keeper:
        raise VmmError("it has a filter")

    if lack == "keeper":
        monkeypatch.setattr(keeper, "make", none)
    elif lack == "group":
        monkeypatch.setattr(keeper, "outlives_group", lambda one: False)
    else:
        monkeypatch.setattr("postcopyd.source.vacating.MOST_STATE", 3)
    async with world(tmp_path, {"<- progress": goes_down}) as pair, pair.migrating():
        await pair.paused_there()
        await trio.sleep(20)
        assert pair.source.vmm.state == "stopped"
        assert not pair.went["source.vacate"]
        pair.down = False
        await pair.settled()
        assert pair.source.vmm.state == "ended"
        nothing_left(pair)


async def test_one_that_may_come_back_stays(tmp_path: Path, made: Clock) -> None:
    """As long as the destination may say that it did not run the guest."""
    async with world(tmp_path, {"<- ran": goes_down}) as pair, pair.migrating():
        await pair.paused_there()
        await trio.sleep(20)
        assert kept(pair.source.vm)
        assert pair.source.vmm.state == "stopped"
        pair.down = False
        await pair.settled()
        nothing_left(pair)


async def test_one_that_is_kept_stays(tmp_path: Path, made: Clock) -> None:
    pair = await migrated(tmp_path, {}, keep_source=True)
    assert pair.source.vmm.state == "kept"
    assert not pair.went["source.vacate"]
    nothing_left(pair)


async def lost(pair: World) -> None:
    """The destination's host has burnt down, after the VMM here was ended."""
    await pair.paused_there()
    await vacated(pair)
    pair.guest.given_up = True
    pair.destination.vmm.die()
    pair.destination.stop()


@pytest.mark.parametrize("restarted", [False, True])
async def test_taken_back(restarted: bool, tmp_path: Path, made: Clock) -> None:
    """It gets a new VMM, with all of its memory and its definition, and runs."""
    async with world(tmp_path, {"<- progress": goes_down}) as pair, pair.migrating():
        await lost(pair)
        if restarted:
            pair.source.kill()
            await trio.sleep(1)
        old = pair.source.vmm
        await pair.source.daemon.resolve("web1", "take_back")
        new = pair.source.vmm = FakeVmm.at["/fake/source"]
        assert new is not old
        assert (new.state, pair.source.recorded()) == ("running", "held")
        assert new.memory() == old.memory()
        assert Made.defined == [DEFINITION]
        assert pair.source.store.load()["web1"]["pid"] == new.pid
        nothing_left(pair)
        new.die()  # which the daemon notices
        with trio.fail_after(10):
            while pair.source.vm.driver is not None:
                await trio.sleep(0.1)
        old.free()


async def test_not_taken_back_without_room(
    tmp_path: Path, made: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost, and it can be said again."""
    problems: list[str] = []
    monkeypatch.setattr(copying.headroom, "problems", lambda *_: problems)
    async with world(tmp_path, {"<- progress": goes_down}) as pair, pair.migrating():
        await lost(pair)
        old = pair.source.vmm
        problems.append("The guest's memory needs more.")
        with pytest.raises(Exception, match="memory needs more"):
            await pair.source.daemon.resolve("web1", "take_back")
        assert kept_now()
        assert device(pair).exists()
        assert pair.source.recorded() == "granted"
        FakeVmm.at["/fake/source"].free()
        problems.clear()
        await pair.source.daemon.resolve("web1", "take_back")
        pair.source.vmm = FakeVmm.at["/fake/source"]
        assert pair.source.vmm.state == "running"
        old.free()


async def test_it_is_defined_only_when_it_is_on_record(
    tmp_path: Path, made: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then a host that restarts could start what is defined; it can be said again."""
    full = [StateNotWritten("the disk is full")]
    own_again = resolve.own_again

    def own(vm: Vm) -> None:
        if full:
            raise full.pop()
        own_again(vm)

    monkeypatch.setattr(resolve, "own_again", own)
    async with world(tmp_path, {"<- progress": goes_down}) as pair, pair.migrating():
        await lost(pair)
        old = pair.source.vmm
        with pytest.raises(Exception, match="disk is full"):
            await pair.source.daemon.resolve("web1", "take_back")
        assert (pair.source.recorded(), Made.defined) == ("granted", [])
        await pair.source.daemon.resolve("web1", "take_back")
        pair.source.vmm = FakeVmm.at["/fake/source"]
        assert (pair.source.vmm.state, Made.defined) == ("running", [DEFINITION])
        old.free()


async def test_a_definition_that_cannot_be_put_back(
    tmp_path: Path, made: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest runs here all the same, and the person is told."""

    async def keep(self: Made, definition: str) -> None:
        raise VmmError("libvirt does not answer")

    monkeypatch.setattr(Made, "keep", keep)
    async with world(tmp_path, {"<- progress": goes_down}) as pair, pair.migrating():
        await lost(pair)
        old = pair.source.vmm
        with pytest.raises(Exception, match=r"not defined here any more.*define it by hand"):
            await pair.source.daemon.resolve("web1", "take_back")
        pair.source.vmm = FakeVmm.at["/fake/source"]
        assert (pair.source.vmm.state, pair.source.recorded()) == ("running", "held")
        old.free()


async def test_a_destination_that_answers_meanwhile(tmp_path: Path, made: Clock) -> None:
    """While the memory is copied: it has the guest, and the new VMM ends without having run."""

    def back(pair: World, point: str) -> None:
        pair.down = False

    said: list[str] = []
    faults: dict[str, Fault] = {"<- progress": goes_down, "source.remake": back}
    async with world(tmp_path, faults) as pair, pair.migrating():
        await pair.paused_there()
        await vacated(pair)
        old = pair.source.vmm
        async with trio.open_nursery() as nursery:
            pair._nursery = nursery
            deciding("take_back", said)(pair, "")
        await pair.settled()
        assert "not known to be dead" in said[0]
        new, pair.source.vmm = FakeVmm.at["/fake/source"], old
        assert new.state == "ended"
        assert pair.guest.broken == []
        assert pair.source.phase == "drained"
        nothing_left(pair)
        new.free()


async def test_given_up(tmp_path: Path, made: Clock) -> None:
    """What it was made of can be started again, from its disks."""
    async with world(tmp_path, {"<- progress": goes_down}) as pair, pair.migrating():
        await lost(pair)
        await pair.source.daemon.resolve("web1", "kill")
        assert Made.defined == [DEFINITION]
        assert "defined here again" in pair.source.vm.status.message
        nothing_left(pair)


def test_where_there_is_data(tmp_path: Path) -> None:
    """Of private memory by the page map, of files by their holes; nothing else is copied."""
    size = 3 * copying.BLOCK
    private = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    private[copying.BLOCK + 5 * PAGE] = 1
    address = ctypes.addressof(ctypes.c_char.from_buffer(private))
    region = Region("ram", size // PAGE, PAGE, address, None, 0)
    [(at, there)] = copying.data(os.getpid(), region)
    assert at == copying.BLOCK
    assert PAGE <= there <= copying.BLOCK
    with (tmp_path / "ram").open("w+b") as file:
        os.ftruncate(file.fileno(), size + PAGE)
        os.pwrite(file.fileno(), b"x", PAGE + copying.BLOCK)
        region = Region("ram", size // PAGE, PAGE, 0, file.fileno(), PAGE)
        assert {at for at, _ in copying.data(0, region)} <= {0, copying.BLOCK}
        assert sum(size for _, size in copying.data(0, region)) < copying.BLOCK
    block = bytes(PAGE) + b"x" * 2 * PAGE + bytes(PAGE) + b"y" * PAGE
    assert [*copying._written(block)] == [(PAGE, 3 * PAGE), (4 * PAGE, 5 * PAGE)]
