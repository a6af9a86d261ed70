# SPDX-License-Identifier: Apache-2.0
"""Two daemons, one guest and a network, in one trio loop; and what goes wrong between them.

Everything that happens in a migration passes a *point* with a name: a call of a driver
("source.save"), a record ("destination.record owned"), a message on its way ("-> grant", "<- ran").
A fault is a function that is called when its point is reached the first time. Afterwards `check`
holds whatever came out to the invariants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import trio
from fake_vmm import FakeVmm, Guest

from postcopyd import daemon
from postcopyd import protocol as p
from postcopyd.control import MigrateRequest
from postcopyd.errors import PostcopydError
from postcopyd.handover import Destination, Source
from postcopyd.settings import Settings
from postcopyd.store import StateNotWritten, Store
from postcopyd.vmm import Role, State

Fault = Callable[["World", str], Any]

LONG_S = 1000.0
"""Of the test's clock: a migration that is not over then is stuck."""

BUGS: list[Fault] = []
"""Faults that are bugs: the daemons may log them as such."""


class Instead(NamedTuple):
    """What a fault at a message has the network do: another message, only some bytes, an end."""

    message: p.Message | None = None
    bytes: int | None = None
    then_cut: bool = False


class FullStore(Store):
    """A store that may have no room."""

    def __init__(self, directory: Path, world: World, role: Role) -> None:
        super().__init__(directory)
        self.full = False
        self._world, self._role = world, role

    def save(self, name: str, record: dict[str, Any], *, durable: bool = False) -> None:
        self._world.reach(f"{self._role}.record {record['ownership']}")
        if self.full:
            raise StateNotWritten(f"writing the record of {name}: No space left on device")
        super().save(name, record, durable=durable)
        self._world.guest.granted |= record["ownership"] == "granted"


class Host:
    """One daemon and its VMM; `stop` is its SIGTERM."""

    def __init__(self, world: World, role: Role, state: State, folder: Path) -> None:
        self.role = role
        self.store = FullStore(folder / role, world, role)
        self.vmm = FakeVmm(world.guest, role, state, world.arrive)
        self.session: Any = None
        self._hooks = folder / f"{role}-hooks"
        self._scope = trio.CancelScope()

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        with self._scope:
            async with trio.open_nursery() as self.nursery:
                settings = Settings(self.store, hooks=self._hooks, connections=1)
                self.daemon = daemon.Daemon(settings, self.nursery)
                await self.daemon.attach("web1", "process", self.vmm.socket)
                self.vm = self.daemon.vms["web1"]
                listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
                self.port = listeners[0].socket.getsockname()[1]
                await self.nursery.start(trio.serve_listeners, self.daemon.serve_peer, listeners)
                task_status.started()
                await trio.sleep_forever()

    def stop(self) -> None:
        self._scope.cancel()

    def recorded(self) -> str:
        record: dict[str, str] = self.store.load().get("web1", {})
        return record.get("ownership", "")

    @property
    def phase(self) -> str:
        return str(self.vm.status["phase"])

    @property
    def peers(self) -> int:
        return self.daemon._peers.borrowed_tokens

    @property
    def busy(self) -> bool:
        return self.vm.claimed_by is not None


class World:
    """`faults` by point. `went` is every point that was passed, repeated ones as "name#2".

    The pages that are pushed wait until the point "<- progress" has been passed, so that up to it
    pages are missing at the destination and soon after it none is.
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
        self.logs: Any = []
        self._armed = False
        self._pushing = trio.Event()
        self._dropped = trio.Event()
        self._sending = trio.Lock()
        self._ends: dict[str, trio.SocketStream] = {}
        self._streams: dict[trio.SocketStream, str] = {}
        self.hosts = {
            "source": Host(self, "source", guest_state, folder),
            "destination": Host(self, "destination", "incoming", folder),
        }
        self.source, self.destination = self.hosts["source"], self.hosts["destination"]
        self.guest.recorded = lambda role: self.hosts[role].recorded()

    # --- points

    def reach(self, point: str) -> Any:
        """Passes a point; what a fault gives back is for the point to use."""
        if not self._armed:
            return None
        for host in self.hosts.values():
            host.session = host.vm.claimed_by or host.session
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
        self._armed = True
        async with self.network() as port:
            await self.source.daemon.migrate("web1", MigrateRequest(f"127.0.0.1:{port}", **request))
            self._nursery.start_soon(self._tick)
            with trio.move_on_after(self.patience) as patience:
                await self._over()
            self.stuck = patience.cancelled_caught
            if self.stuck:
                for host in self.hosts.values():
                    host.stop()
                with trio.fail_after(LONG_S):
                    await self._over()

    async def _tick(self) -> None:
        """The clock jumps when nothing moves, and threads of engines do not count as moving: no
        jump is longer than this."""
        while True:
            await trio.sleep(1)

    async def _over(self) -> None:
        destination = self.destination
        while self._streams or destination.peers or self.source.busy or destination.busy:
            await self.source.vm.free.wait()
            await destination.vm.free.wait()
            if self._streams:
                await self._dropped.wait()
            elif destination.peers:
                await trio.sleep(1)

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
        if not first:
            return  # given up before it began
        kind = bytes(await source.receive_some(first[0] & 0x1F)).decode()
        try:
            there = await trio.open_tcp_stream("127.0.0.1", self.destination.port)
        except OSError:  # that daemon was stopped
            await trio.aclose_forcefully(source)
            return
        await there.send_all(first + kind.encode())
        self._streams |= {source: kind, there: kind}
        if kind == p.CONTROL:
            self._ends = {"source": source, "destination": there}
        try:
            async with trio.open_nursery() as nursery:
                if kind == p.CONTROL:
                    nursery.start_soon(self._messages, source, there, "->")
                    nursery.start_soon(self._messages, there, source, "<-")
                else:
                    nursery.start_soon(self._pages, source, there, self._pushing)
                    nursery.start_soon(self._pages, there, source, None)
        finally:
            self._pushing.set()  # nothing waits for a network that is gone
            for stream in (source, there):
                del self._streams[stream]
                stream.socket.close()
            self._dropped.set()
            self._dropped = trio.Event()

    async def _pages(
        self, source: trio.SocketStream, to: trio.SocketStream, wait: trio.Event | None
    ) -> None:
        try:
            # What a data connection begins with; frames are let through later.
            if wait is not None:
                await to.send_all(await source.receive_some(100))
                data = await source.receive_some()
                if data:
                    await wait.wait()
                    await to.send_all(data)
            async for data in source:
                await to.send_all(data)
            await to.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self._drop(source, to)

    async def _messages(self, source: trio.SocketStream, to: trio.SocketStream, way: str) -> None:
        codec = p.Codec()
        try:
            async for data in source:
                codec.feed(bytes(data))
                for obj in codec.objects():
                    await self._message(p.parse_message(obj), to, way)
            async with self._sending:
                await to.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self._drop(source, to)

    async def _message(self, message: p.Message, to: trio.SocketStream, way: str) -> None:
        data, then_cut = p.pack(message), False
        if not isinstance(message, p.Keepalive):
            tag = str(message.__struct_config__.tag)
            instead: Instead = self.reach(f"{way} {tag}") or Instead()
            data = p.pack(instead.message) if instead.message else data[: instead.bytes]
            then_cut = instead.then_cut
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
            self._nursery.start_soon(self._say, stream, p.pack(message))

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
        assert self.guest.broken == []
        # The guest is somewhere, with all of its memory.
        all_there = there.memory() == here.memory()
        if not there.died:
            if self.guest.ran_there:
                assert there.state == "running"
                assert here.state not in ("kept", "ended") or here.died or all_there
            else:
                settled = destination.phase == "drained" and all_there
                assert here.state not in ("kept", "ended") or here.died or settled
        # Before the grant it is at the source as it was.
        if not granted and not here.died and not self.may("source.rollback", "source.record held"):
            assert here.state == self.before
        bugs = [entry for entry in self.logs if str(entry["event"]).startswith("bug")]
        assert bugs == [] or any(fault in BUGS for fault in self.faults.values())
        self._check_statuses()
        self._check_machines()
        self._check_left_behind()

    def may(self, *points: str) -> bool:
        """Whether the test itself breaks one of these."""
        return any(fault.split("#")[0] in points for fault in self.faults)

    def _check_statuses(self) -> None:
        for host in self.hosts.values():
            status = host.vm.status
            assert status["phase"] in ("idle", "failed", "paused", "drained"), status
            assert len(status["message"]) > 10
            assert not status["message"].endswith((": ", "; ")), status
        if self.source.phase != "idle":
            result = self.source.vm.status["result"]
            event = {"drained": ["completed"], "paused": ["paused"]}
            assert result["event"] in event.get(self.source.phase, ["failed", "cancelled"])
        if self.source.phase == "drained":
            assert self.destination.phase == "drained"

    def _check_machines(self) -> None:
        states = {
            "idle": set[Any](),
            "failed": {
                Source.ROLLED_BACK,
                Source.CHECKED,
                Source.DECLINED,
                Destination.CALLED_OFF,
                Destination.DECLINED,
            },
            "paused": {
                Source.GRANTED_LOST,
                Source.RAN_LOST,
                Source.DRAINED,  # and the counts differ
                Destination.IN_DOUBT,
                Destination.GRANTED_LOST,
                Destination.RUNNING_LOST,
            },
            "drained": {Source.DRAINED, Destination.DONE, Destination.RUNNING_LOST},
        }
        for host in self.hosts.values():
            if host.session is not None and host.phase != "idle":
                assert host.session.machine.state in states[host.phase], host.role

    def _check_left_behind(self) -> None:
        destination, there = self.destination, self.destination.vmm
        assert destination.daemon._arrivals == {}
        assert destination.daemon.settings.arriving == {} or destination.phase == "paused"
        if destination.phase in ("failed", "drained", "idle"):
            assert destination.vm.waiting is None
            assert not there.registered() or self.may("destination.end", "destination.release")
            assert not (destination.store.directory / "web1.pages").exists()
        if destination.phase == "failed" and there.state != "incoming":
            assert there.state == "ended" or self.may("destination.end")
        if destination.phase == "paused" and not there.died:
            assert there.registered()
