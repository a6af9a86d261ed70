# SPDX-License-Identifier: Apache-2.0
"""A migration in a `session_world`, and the faults that it may meet, by name.

A fault is called with the world and the name of the point that was reached; what it returns or
raises is that point's."""

from __future__ import annotations

import gc
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import pytest
import structlog
import trio
import trio.testing
from fake_vmm import FakeDriver, FakeVmm
from patient import Clock, patient_clock
from session_world import BUGS, LONG_S, Fault, FullStore, Host, Instead, ToldEngine, World

from postcopyd import protocol as p
from postcopyd.daemon import accepting, registry
from postcopyd.dest import arrival, drain, load, memory
from postcopyd.dest.session import DestinationSession
from postcopyd.host import procfs
from postcopyd.net import connection
from postcopyd.net.channel import ConnectionLost
from postcopyd.net.codec import parse
from postcopyd.records import locks
from postcopyd.records.store import StateNotWritten
from postcopyd.sessions.vm import Vm
from postcopyd.source import migration
from postcopyd.source import session as leaving
from postcopyd.vmm import State


def made_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of a world, and the parts of it that are made."""
    monkeypatch.setattr(registry, "DRIVERS", {"process": FakeDriver})
    monkeypatch.setattr(procfs, "started", FakeVmm.started)
    monkeypatch.setattr(locks, "process", FakeVmm.locked)
    for name in ("mappings", "open_mapped"):  # guest RAM of a FakeVmm is mapped here
        monkeypatch.setattr(procfs, name, partial(_of_this_process, getattr(procfs, name)))
    monkeypatch.setattr(memory, "DestinationEngine", ToldEngine)
    monkeypatch.setattr(drain, "PROGRESS_S", 1.0)
    for module in (arrival, load):
        monkeypatch.setattr(module, "COUNT_S", 0.1)
    monkeypatch.setattr(accepting, "accepted_kind", accepted_at_once)
    for module in (connection, accepting):
        monkeypatch.setattr(module, "receive_object", received_at_once)
    for kind in (leaving.SourceSession, DestinationSession):
        monkeypatch.setattr(kind, "__init__", noted(kind.__init__))
    monkeypatch.setattr(migration, "SHOW_S", 1.0)
    return patient_clock()


def _of_this_process(look: Any, pid: int, *args: Any) -> Any:
    return look(os.getpid(), *args)


async def accepted_at_once(stream: trio.SocketStream) -> str:
    """As connection.accepted_kind, which takes a turn of the loop for each byte; the world has sent
    them together."""
    size = await stream.receive_some(1)
    return bytes(await stream.receive_some(size[0] & 0x1F)).decode() if size else ""


async def received_at_once(stream: trio.SocketStream, kind: type[Any]) -> Any:
    """As connection.receive_object, in the same way."""
    try:
        while data := await stream.socket.recv(1000, socket.MSG_PEEK):
            unpacker = msgpack.Unpacker(raw=False)
            unpacker.feed(data)
            with suppress(msgpack.OutOfData):
                found = parse(unpacker.unpack(), kind)
                await stream.socket.recv(unpacker.tell())
                return found
            await trio.sleep(0.01)
    except OSError as error:
        raise trio.BrokenResourceError from error
    raise ConnectionLost("the peer closed a data connection while it was set up")


def noted(init: Any) -> Any:
    """A session that the daemon's life knows of."""

    def made(session: Any, vm: Vm, *args: Any) -> None:
        init(session, vm, *args)
        store = vm._store
        assert isinstance(store, FullStore)
        store.life.sessions.append(session)

    return made


@asynccontextmanager
async def world(
    folder: Path, faults: dict[str, Fault], state: State = "running"
) -> AsyncIterator[World]:
    """A world; after the body nothing may be left open."""
    descriptors = open_descriptors()
    made = World(folder, faults, state)
    told = [structlog.processors.format_exc_info]
    with structlog.testing.capture_logs(told) as made.logs:
        async with trio.open_nursery() as nursery:
            for host in made.hosts.values():
                await nursery.start(Host.serve, host)
            try:
                yield made
            finally:
                for host in made.hosts.values():
                    host.stop()
    for host in made.hosts.values():
        host.vmm.free()
    if open_descriptors() - descriptors:
        gc.collect()  # a traceback may hold what a test has made
    assert not open_descriptors() - descriptors


def open_descriptors() -> Counter[str]:
    """What this process has open, by kind; sockets of trio's own do not change meanwhile."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            found[os.readlink(f"/proc/self/fd/{fd}").split(":")[0]] += 1
    return found


async def migrated(
    folder: Path,
    faults: dict[str, Fault],
    state: State = "running",
    *,
    patience: float = LONG_S,
    reached: bool = True,
    sticks: bool = False,
    **request: Any,
) -> World:
    """One migration with these faults, held to the invariants. `reached`: by each of the faults;
    `sticks`: it may wait for a person in the end."""
    async with world(folder, faults, state) as made:
        made.patience = patience
        await made.migrate(**request)
        for point in faults:
            assert made.went[point] or not reached, f"{point} was not reached"
        await made.check()
        if not sticks:
            made.check_over()
    return made


# --- faults --------------------------------------------------------------------------------------


def refusing(error: Exception) -> Fault:
    def refuse(world: World, point: str) -> None:
        raise error

    if isinstance(error, RuntimeError):
        BUGS.append(refuse)
    return refuse


def hanging(then: Fault) -> Fault:
    """A call that would not end by itself, until something else happens."""

    async def hang(world: World, point: str) -> None:
        world.later(partial(then, world, point))
        await trio.sleep_forever()

    return hang


def no_room(world: World, point: str) -> None:
    raise StateNotWritten("writing the record of web1: No space left on device")


def full(world: World, point: str) -> None:
    world.hosts[point.partition(".")[0]].store.full = True


def cut(world: World, point: str) -> None:
    world.cut(p.CONTROL, p.DATA)


def cut_data(world: World, point: str) -> None:
    world.cut(p.DATA)


def cut_control(world: World, point: str) -> None:
    world.cut(p.CONTROL)


def goes_down(world: World, point: str) -> None:
    """The network, until somebody mends it."""
    world.cut(p.CONTROL, p.DATA)
    world.down = True


def silence(world: World, point: str) -> None:
    world.silence()


def cancel(world: World, point: str) -> None:
    world.cancel()


def source_says_error(world: World, point: str) -> None:
    world.say("destination", p.Error("Broken", "it broke"))


def destination_says_error(world: World, point: str) -> None:
    world.say("source", p.Error("Broken", "it broke"))


def source_ends(world: World, point: str) -> None:
    """Its daemon, for good; what it has sent and nobody has read is lost."""
    world.cut(p.CONTROL, p.DATA)
    world.source.stop()


def stop_source(world: World, point: str) -> None:
    world.source.stop(again=True)


def stop_destination(world: World, point: str) -> None:
    world.destination.stop(again=True)


def stop_here(world: World, point: str) -> None:
    world.hosts[point.partition(".")[0]].stop(again=True)


def kill_source(world: World, point: str) -> None:
    world.kill("source")


def kill_destination(world: World, point: str) -> None:
    world.kill("destination")


def kill_here(world: World, point: str) -> None:
    world.kill("source" if point.startswith("source") else "destination")


def kill_both(world: World, point: str) -> None:
    world.kill("source", "destination")


def somebody_pauses(world: World, point: str) -> None:
    world.source.vmm.taken(away=False)


def somebody_moves(world: World, point: str) -> None:
    """To a third host, by the VMM's own means."""
    world.source.vmm.taken(away=True)


def source_dies(world: World, point: str) -> None:
    world.source.vmm.die()


def destination_dies(world: World, point: str) -> None:
    world.destination.vmm.die()


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


def kill_sender(world: World, point: str) -> Instead:
    """Whoever has just sent this, and it arrives."""
    world.hosts["source" if point.startswith("->") else "destination"].kill()
    return Instead(then_cut=True)


def kill_receiver(world: World, point: str) -> Instead:
    """Whoever receives it, and then perhaps has read it already."""
    world.later(partial(world.kill, "destination" if point.startswith("->") else "source"))
    return Instead()


def grant(world: World, point: str) -> Instead:
    return Instead(p.Grant(99))
