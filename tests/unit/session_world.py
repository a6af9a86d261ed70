# SPDX-License-Identifier: Apache-2.0
"""Two daemons, one guest and a network, in one trio loop; and what goes wrong between them.

Everything that happens in a migration passes a *point* with a name: a call of a driver
("source.save"), a record ("destination.record owned"), a message on its way ("-> grant", "<- ran"),
a data connection ("data"), the end of registration ("destination.unregister"). A fault is a
function that is called when its point is reached the first time. Afterwards `check` holds whatever
came out to the invariants.

A daemon that is stopped or killed is started again. One that is killed does nothing further: its
sessions are dropped, their descriptors and connections closed; records, VMMs and what is registered
in them stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import trio
from fake_vmm import FakeVmm, Guest, Killed, Life
from msgspec import to_builtins
from msgspec.structs import replace

from postcopyd import protocol as p
from postcopyd.daemon.daemon import Daemon
from postcopyd.dest.engine import DestinationEngine
from postcopyd.dest.session import DestinationSession
from postcopyd.errors import PostcopydError
from postcopyd.handover import Destination, Source
from postcopyd.model import MigrateRequest
from postcopyd.net.codec import Codec, pack, parse_message
from postcopyd.records.store import StateNotWritten, Store
from postcopyd.sessions.shared import Shared
from postcopyd.vmm import Role, State

Fault = Callable[["World", str], Any]

LONG_S = 100.0
"""Of the test's clock: a migration that is not over then is stuck."""

START_S = 0.4
"""How long after its end a daemon is started again."""

SILENCE_S = 15.0
"""How long a network is silent: both sides have given the other up by then."""

SOME_PAGES = 3 * 4096
"""Bytes of pushed pages that come before the first *progress*: two pages, and part of the third."""

BUGS: list[Fault] = []
"""Faults that are bugs: the daemons may log them as such."""


class Instead(NamedTuple):
    """What a fault at a message has the network do: another message, only some bytes, an end; or
    the message only once `when` is so."""

    message: p.Message | None = None
    bytes: int | None = None
    then_cut: bool = False
    when: Callable[[], bool] = lambda: True


class FullStore(Store):
    """A store that may have no room, of one daemon."""

    def __init__(self, directory: Path, world: World, role: Role, life: Life) -> None:
        super().__init__(directory)
        self.full = False
        self.life = life
        self._world, self._role = world, role

    def save(self, name: str, record: dict[str, Any], *, durable: bool = False) -> None:
        self.life.check()
        before, after = self._world.hosts[self._role].recorded(), record["ownership"]
        self._world.reach(f"{self._role}.record {after}")
        self.life.check()
        if self.full:
            raise StateNotWritten(f"writing the record of {name}: No space left on device")
        self._world.guest.record(self._role, before, after)
        super().save(name, record, durable=durable)

    def remove_pages(self, name: str) -> None:
        if not self.life.over:
            super().remove_pages(name)


class ToldEngine(DestinationEngine):
    """Passes points when it unregisters."""

    world: ClassVar[World]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._life = self.world.destination.life

    def unregister(self, *, called_off: bool = False) -> None:
        self._life.check()
        self.world.reach("destination.unregister")
        self._life.check()
        super().unregister(called_off=called_off)
        self.world.reach("destination.unregister done")
        self._life.check()


class Host:
    """One VMM and its daemons, one after the other; `stop` is SIGTERM and `kill` SIGKILL."""

    def __init__(self, world: World, role: Role, state: State, folder: Path) -> None:
        self.role = role
        self.vmm = FakeVmm(world.guest, role, state, world.arrive)
        self.lives: list[Life] = []
        self.port = 0  # while nobody listens
        self.which: p.DaemonId | None = p.DaemonId(f"machine of {role}", f"boot of {role}", "-")
        self.up = self.over = False
        self._world, self._folder = world, folder
        self._scope = trio.CancelScope()
        self._again = self._ending = False
        self._start()

    def _start(self) -> None:
        self.vmm.life = Life()
        self.lives.append(self.vmm.life)
        self.store = FullStore(self._folder / self.role, self._world, self.role, self.life)

    @property
    def life(self) -> Life:
        return self.lives[-1]

    @property
    def session(self) -> Any:
        """The newest of this daemon, and not of an offer that found the VM claimed by another."""
        sessions = [one for one in self.life.sessions if getattr(one, "accepted", True)]
        return sessions[-1] if sessions else None

    @property
    def engine(self) -> Any:
        """Of the newest session, which has one."""
        if self.role == "source":
            return self.session._rollback.guest.engine
        return self.session.memory.engine

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        while True:
            with trio.CancelScope() as self._scope:
                try:
                    await self._daemon(task_status)
                except* Killed:
                    pass
            self.up, self.port, self.life.over = False, 0, True
            for session in self.life.sessions:  # as the end of a process does
                end = session.close if isinstance(session, DestinationSession) else session._close
                await end()
            for vm in self.daemon.vms.values():
                vm.unlock()
            if self._again:
                await trio.sleep(START_S)
            if self._ending:
                break
            self._start()
        self.over = True

    async def _daemon(self, task_status: trio.TaskStatus[None]) -> None:
        self.which = self.which and replace(self.which, state=self.store.identity())
        shared = Shared(
            self.store, self._folder / f"{self.role}-hooks", connections=1, daemon=self.which
        )
        async with trio.open_nursery() as nursery:
            self.daemon = Daemon(shared, nursery)
            if len(self.lives) == 1:
                await self.daemon.attach("web1", "process", self.vmm.socket)
            else:
                self.daemon.restore()
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            await nursery.start(trio.serve_listeners, self.daemon.serve_peer, listeners)
            self.port, self.up = listeners[0].socket.getsockname()[1], True
            if len(self.lives) == 1:
                task_status.started()
            await trio.sleep_forever()

    def stop(self, *, again: bool = False) -> None:
        self._again, self.up = again, False
        self._ending |= not again
        self._scope.cancel()

    def kill(self) -> None:
        self.life.over = True
        self.stop(again=True)

    @property
    def vm(self) -> Any:
        return self.daemon.vms["web1"]

    def recorded(self) -> str:
        record: dict[str, str] = self.store.load().get("web1", {})
        return record.get("ownership", "")

    @property
    def phase(self) -> str:
        return str(self.vm.status.phase)

    @property
    def quiet(self) -> bool:
        """Nothing goes on here."""
        return self.up and not self.daemon.shared.limits.peers and self.vm.claimed_by is None


class World:
    """`faults` by point. `went` is every point that was passed, repeated ones as "name#2".

    On each new control connection the pages that are pushed after the handover wait, but for
    SOME_PAGES of them on the first, until the point "<- progress" has been passed on it: up to it
    pages are missing at the destination, and soon after it none is.
    """

    def __init__(self, folder: Path, faults: dict[str, Fault], guest_state: State) -> None:
        self.guest = Guest()
        self.before = guest_state
        self.faults = faults
        self.went: Counter[str] = Counter()
        self.refused: list[str] = []  # cancels
        self.patience = LONG_S
        self.stuck = False
        self.silent = False
        self.down = False  # the network
        self.logs: Any = []
        self._armed = False
        self._pushing = trio.Event()
        self._some = SOME_PAGES
        self._passing = False  # pages come before the guest runs there, and are not held up
        self._sending = trio.Lock()
        self._ends: dict[str, trio.SocketStream] = {}
        self._streams: dict[trio.SocketStream, str] = {}
        self.hosts = {
            "source": Host(self, "source", guest_state, folder),
            "destination": Host(self, "destination", "incoming", folder),
        }
        self.source, self.destination = self.hosts["source"], self.hosts["destination"]
        self.guest.recorded = lambda role: self.hosts[role].recorded()
        ToldEngine.world = self

    # --- points

    def reach(self, point: str) -> Any:
        """Passes a point; what a fault gives back is for the point to use."""
        if not self._armed:
            return None
        self.went[point] += 1
        if self.went[point] > 1:
            point = f"{point}#{self.went[point]}"
            self.went[point] += 1
        fault = self.faults.get(point)
        return fault(self, point) if fault else None

    async def arrive(self, point: str) -> None:
        """Passes a point that may take its time."""
        await trio.lowlevel.checkpoint()
        waiting = self.reach(point)
        if waiting is not None:
            await waiting

    # --- the migration

    async def migrate(self, **request: Any) -> None:
        """One migration from the offer to its end on both hosts, whatever that is."""
        async with self.migrating(**request):
            with trio.move_on_after(self.patience) as patience:
                await self.settled()
            self.stuck = patience.cancelled_caught
            if self.stuck:
                for host in self.hosts.values():
                    host.stop()
                with trio.fail_after(LONG_S):
                    while not all(host.over for host in self.hosts.values()):
                        await trio.sleep(1)

    @asynccontextmanager
    async def migrating(self, **request: Any) -> AsyncIterator[None]:
        """A migration that goes on in the body."""
        self._armed = True
        async with self.network() as port:
            self.to = f"127.0.0.1:{port}"
            request = {"mode": "postcopy", **request}
            await self.source.daemon.migrate("web1", MigrateRequest(self.to, **request))
            yield

    async def settled(self) -> None:
        """Nothing goes on any more. The clock jumps when nothing moves, and threads of engines do
        not count as moving: no jump is longer than this looks apart."""
        while self._streams or not all(host.quiet for host in self.hosts.values()):
            await trio.sleep(1)

    async def paused_there(self) -> None:
        """The destination has the guest and waits for pages."""
        with trio.fail_after(LONG_S):
            while self.destination.vm.waiting is None or self._streams:
                await trio.sleep(0.1)

    # --- the network

    @asynccontextmanager
    async def network(self) -> AsyncIterator[int]:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(trio.serve_listeners, self._carry, listeners)
            yield listeners[0].socket.getsockname()[1]
            nursery.cancel_scope.cancel()

    async def _carry(self, source: trio.SocketStream) -> None:
        first = bytes(await source.receive_some(1))
        if not first or self.down:
            await trio.aclose_forcefully(source)
            return
        kind = bytes(await source.receive_some(first[0] & 0x1F)).decode()
        try:
            there = await trio.open_tcp_stream("127.0.0.1", self.destination.port)
        except OSError:  # that daemon was stopped
            await self._drop(source)
            return
        try:
            await there.send_all(first + kind.encode())
        except trio.BrokenResourceError:  # just then
            await self._drop(source, there)
            return
        self._streams |= {source: kind, there: kind}
        if kind == p.CONTROL:
            self._ends = {"source": source, "destination": there}
            self._pushing = trio.Event()
        else:
            self.reach("data")
        pushing = self._pushing
        try:
            async with trio.open_nursery() as nursery:
                if kind == p.CONTROL:
                    nursery.start_soon(self._messages, source, there, "->")
                    nursery.start_soon(self._messages, there, source, "<-")
                else:
                    nursery.start_soon(self._pages, source, there, pushing)
                    nursery.start_soon(self._pages, there, source, None)
        finally:
            pushing.set()  # nothing waits for a network that is gone
            for stream in (source, there):
                del self._streams[stream]
                stream.socket.close()

    async def _pages(
        self, source: trio.SocketStream, to: trio.SocketStream, wait: trio.Event | None
    ) -> None:
        try:
            # What a data connection begins with; frames are let through later.
            if wait is not None:
                await to.send_all(await source.receive_some(100))
                while not wait.is_set() and (data := await source.receive_some(SOME_PAGES)):
                    if not self._some and not self._passing:
                        await wait.wait()
                    if not self._passing:
                        self._some -= min(len(data), self._some)
                    await to.send_all(data)
            async for data in source:
                await to.send_all(data)
            await to.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self._drop(source, to)

    async def _messages(self, source: trio.SocketStream, to: trio.SocketStream, way: str) -> None:
        codec = Codec()
        try:
            async for data in source:
                codec.feed(bytes(data))
                for obj in codec.objects():
                    await self._message(parse_message(obj), to, way)
            async with self._sending:
                await to.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self._drop(source, to)

    async def _message(self, message: p.Message, to: trio.SocketStream, way: str) -> None:
        data, then_cut = pack(message), False
        if isinstance(message, p.Offer | p.Handover | p.Resume):
            self._passing = getattr(message, "staged", False) or getattr(message, "whole", False)
        if not isinstance(message, p.Keepalive):
            tag = str(message.__struct_config__.tag)
            instead: Instead = self.reach(f"{way} {tag}") or Instead()
            data = pack(instead.message) if instead.message else data[: instead.bytes]
            then_cut = instead.then_cut
            while not instead.when():
                await trio.sleep(0.01)
        if not self.silent:
            async with self._sending:
                await to.send_all(data)
        if then_cut:
            self.cut(p.CONTROL, p.DATA)
        if isinstance(message, p.Progress):
            self._pushing.set()

    async def _drop(self, *streams: trio.SocketStream) -> None:
        for stream in streams:
            await trio.aclose_forcefully(stream)

    def cut(self, *kinds: str) -> None:
        for stream, kind in self._streams.items():
            if kind in kinds:
                stream.socket.close()
                self._pushing.set()

    def say(self, role: Role, message: p.Message) -> None:
        """Sends a host what the other has not said."""
        if stream := self._ends.get(role):
            self._nursery.start_soon(self._say, stream, pack(message))

    async def _say(self, stream: trio.SocketStream, data: bytes) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with self._sending:
                await stream.send_all(data)

    def later(self, call: Callable[[], None]) -> None:
        """Once nothing moves any more."""

        async def wait_and_call() -> None:
            await trio.sleep(0.05)
            call()

        trio.lowlevel.spawn_system_task(wait_and_call)

    def silence(self) -> None:
        """Messages are lost for a while, and nobody is told."""
        self.silent = True

        async def end() -> None:
            await trio.sleep(SILENCE_S)
            self.silent = False

        self._nursery.start_soon(end)

    def kill(self, *roles: Role) -> None:
        self.cut(p.CONTROL, p.DATA)
        for role in roles:
            self.hosts[role].kill()

    def cancel(self) -> None:
        """What an operator says; a refusal is kept."""
        session = self.source.vm.claimed_by
        if session is None:
            return
        try:
            session.cancel()
        except PostcopydError as error:
            self.refused.append(error.name)

    # --- afterwards

    async def check(self) -> None:
        """The invariants that hold whatever went wrong."""
        source, destination = self.source, self.destination
        here, there = source.vmm, destination.vmm
        granted = source.recorded() == "granted"
        assert self.guest.broken == [], self.guest.broken
        # The guest is somewhere, with all of its memory.
        all_there = there.memory() == here.memory()
        if not there.died and not self.guest.given_up:
            if self.guest.ran_there:
                assert there.state == "running"
                assert here.state not in ("kept", "ended") or here.died or all_there
            else:
                settled = destination.phase == "drained" and all_there
                assert here.state not in ("kept", "ended") or here.died or settled
        # Before the grant it is at the source as it was.
        if not granted and not here.died and not self.may("source.rollback", "source.record held"):
            assert here.state in (self.before, "taken")
        bugs = [entry for entry in self.logs if str(entry["event"]).startswith("bug")]
        assert bugs == [] or any(fault in BUGS for fault in self.faults.values()), bugs
        self._check_statuses()
        self._check_machines()
        self._check_left_behind()

    def check_over(self) -> None:
        """Nothing is left to do for anybody: the guest is at one host, whole, and both know it."""
        assert not self.stuck
        phases = (self.source.phase, self.destination.phase)
        assert "paused" not in phases
        if "drained" in phases:
            assert phases == ("drained", "drained")
            assert self.destination.vmm.memory() == self.source.vmm.memory()
            stays = self.source.vm.unwritten or self.may("source.finish")
            assert stays or self.source.vmm.state in ("ended", "kept")
        if not any(".record " in fault for fault in self.faults):  # that one is not written
            records = (self.source.recorded(), self.destination.recorded())
            ends = [("held", "held"), ("held", "declined")]
            if self.may("destination.end", "destination.end done"):
                ends.append(("held", "loading"))  # its end was not seen: a restart tries again
            assert records in ([("granted", "held")] if "drained" in phases else ends)

    def may(self, *points: str) -> bool:
        """Whether the test itself breaks one of these."""
        return any(fault.split("#")[0] in points for fault in self.faults)

    @property
    def result(self) -> Any:
        """How it ended, as people see it at the source."""
        return to_builtins(self.source.vm.status.result)

    def _check_statuses(self) -> None:
        for host in self.hosts.values():
            status = host.vm.status
            assert status.phase in ("idle", "failed", "paused", "drained"), status
            assert len(status.message) > 10
            assert not status.message.endswith((": ", "; ")), status
        # One daemon shows the result of what it began or went on with.
        if self.source.phase != "idle" and (self.source.session or len(self.source.lives) == 1):
            event = (self.result or {}).get("event")
            events = {"drained": ["completed"], "paused": ["paused", None]}
            assert event in events.get(self.source.phase, ["failed", "cancelled"])
        if self.source.phase == "drained":
            assert self.destination.phase == "drained"

    def _check_machines(self) -> None:
        states = {
            "failed": {
                Source.ROLLED_BACK,
                Source.CHECKED,
                Source.DECLINED,
                Source.TAKEN_BACK,
                Destination.CALLED_OFF,
                Destination.DECLINED,
            },
            "paused": {
                Source.GRANTED_LOST,
                Source.RAN_LOST,
                Source.DRAINED,  # and the counts differ
                Destination.RUNNING_LOST,
            },
            "drained": {Source.DRAINED, Destination.DONE},
        }
        for host in self.hosts.values():
            if host.session is not None and host.phase != "idle":
                state = host.session.machine.state
                assert state in states[host.phase], (host.role, host.phase, state)

    def _check_left_behind(self) -> None:
        destination, there = self.destination, self.destination.vmm
        assert destination.daemon.acceptor.sessions == {}
        assert destination.daemon.shared.arriving == {} or destination.phase == "paused"
        if destination.phase in ("failed", "drained", "idle"):
            assert destination.vm.waiting is None
            assert not there.registered() or self.may("destination.end", "destination.release")
            # Which shows that the guest is whole, where the record cannot say so yet.
            kept = destination.phase == "drained" and destination.vm.unwritten
            assert kept or not (destination.store.directory / "web1.pages").exists()
        if destination.phase == "failed" and there.state != "incoming":
            assert there.state == "ended" or self.may("destination.end")
        if destination.phase == "paused" and there.state != "ended":
            assert there.registered()
