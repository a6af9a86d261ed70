# SPDX-License-Identifier: Apache-2.0
"""One guest arriving: from the offer to drained here, or given back.

Owns, for the time of one migration: the control channel, the native engine, the userfaultfds (our
duplicates; the VMM keeps its own), the page record and the descriptors of the guest's RAM. Order
and ownership are handover.py's; this file does what each step means.

What fails before the grant leaves this host as it was, or with its VMM ended, and is recorded as
*declined*. After it the guest is this host's: nothing in this file ends its VMM any more, save when
no vCPU has run. A connection that is lost then pauses the migration: the engine goes on taking
faults, and the session waits (`vm.waiting`) for the source to ask again (`resume`).
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

import trio
from msgspec import structs, to_builtins

from postcopyd import counts
from postcopyd import protocol as p
from postcopyd._native import lib
from postcopyd.dest.device_state import DeviceState
from postcopyd.dest.engine import DestinationEngine
from postcopyd.dest.restart import regions_again
from postcopyd.dest.unplugged import unplugged
from postcopyd.errors import PostcopydError, shortage
from postcopyd.handover import DESTINATION_RUNS, Destination, Happened, Machine
from postcopyd.host import procfs
from postcopyd.native.engine import Failure, faults
from postcopyd.net.connection import (
    Channel,
    ConnectionLost,
    PeerError,
    Wire,
    detach,
    detach_keyed,
    open_nursery,
)
from postcopyd.protocol import RemoteProtocolError
from postcopyd.records.schema import Ownership
from postcopyd.records.store import StateNotWritten
from postcopyd.sessions import alike, headroom, hugepages, losses
from postcopyd.sessions.hooks import run_hooks
from postcopyd.sessions.limits import in_line
from postcopyd.sessions.patience import END_S, RELEASE_S, within
from postcopyd.sessions.settings import Settings
from postcopyd.sessions.vm import Vm
from postcopyd.tasks import threads
from postcopyd.vmm import Declined, Shape, VmmTimeout

PROGRESS_S = 0.1
ACKNOWLEDGE_S = 10.0
ENDS_S = 5.0
"""How long a VMM may take to end whose memory is gone already."""
CONNECTIONS_S = 30.0
"""How long the source may take to make its data connections; they take milliseconds."""
COUNT_S = 0.001
"""How often it is looked whether all of a pass has arrived."""
HAVE_PAGES = 8 * p.DEVICE_CHUNK
"""Pages of one Have: a bit each."""


class DestinationSession:
    """Made and run by the daemon for a control connection whose offer has named a VM; `resume`d for
    each further one."""

    def __init__(self, vm: Vm, offer: p.Offer, channel: Channel, settings: Settings) -> None:
        self.vm = vm
        self.offer = offer
        self.channel = channel
        self.machine: Machine = channel.machine
        self.settings = settings
        self.identity = channel.names
        self.token = secrets.token_bytes(32)
        self._engine: DestinationEngine | None = None
        self._shape: Shape | None = None
        self._uffds: list[int] = []
        self._record = -1
        self._accepted = self._adopted = self._loading = self._all_here = False
        self._connected = trio.Event()
        self._lacking: list[bool] = []
        self._ran_ns = 0
        self._run = True
        self._ran = False
        self._told = False  # the operator's programs, that it runs here
        self._noted: list[dict[str, Any]] = []  # of guest RAM, by a daemon before this one
        self._given_up = False  # by a person, what was missing
        self.ram_here: hugepages.Ram | None = None  # once drained: for huge pages, afterwards

    @classmethod
    async def restored(
        cls, vm: Vm, about: dict[str, Any], channel: Channel, settings: Settings
    ) -> DestinationSession:
        """The session of a guest that was granted to this host before the daemon was started.

        Faults are taken again when this returns. Raises PostcopydError; nothing is closed in the
        VMM then, and who waits there goes on waiting.
        """
        offer = p.parse(about["offer"], p.Offer)
        session = cls(vm, offer, channel, settings)
        session._accepted = session._adopted = session._loading = True
        session._run, session._ran, session._told = about["run"], about["ran"], about["told"]
        session._ran_ns = about["ran_ns"]
        session._given_up = about.get("given_up", False)
        session._noted = about["ram"]  # with the files, which are not opened where none needs them
        if distrust := about.get("foreign"):
            raise PostcopydError(distrust, "NotTrusted")
        session.identity = tuple(about.get("identity", ()))
        driver = vm.attached()
        try:
            regions, gone = regions_again(driver.pid, about["ram"], files=offer.staged)
            session._shape = Shape("paused", driver.pid, regions, {}, ())
            session._uffds = await driver.adopted()
            if len(session._uffds) != about["userfaultfds"]:
                raise PostcopydError(
                    f"the VMM of {vm.name} has {len(session._uffds)} userfaultfds and not "
                    f"{about['userfaultfds']}: pages that are missing may read as zeros; stop it, "
                    f"and do not trust its guest",
                    "UserfaultfdLost",
                )
            session._record = settings.store.open_pages(vm.name, again=True)
            session._engine = DestinationEngine(
                regions, session._uffds, session._record, staged=offer.staged
            )
            if session._engine.foreign:  # the one before was killed before it could be recorded
                why = losses.foreign(vm.name, channel.peer, session._engine.sentence)
                about["foreign"] = why
                raise PostcopydError(why, "NotTrusted")
            for number in gone:
                session._engine.gone(number)
            session._engine.register(again=True)
            session._engine.settle()
        except BaseException:
            with trio.CancelScope(shield=True):
                if session._engine is not None:
                    await session._engine.aclose()
            for fd in (*session._uffds, *([session._record] if session._record >= 0 else [])):
                os.close(fd)
            if session._shape is not None:
                session._shape.close()
            session._engine = session._shape = None
            session._uffds, session._record = [], -1
            raise
        settings.arriving[vm.name] = session._shape
        session._all_here = session.complete and "answer" in about
        return session

    @property
    def log(self) -> Any:
        return self.vm.log.bind(
            migration=self.offer.migration, peer=self.channel.peer, role="destination"
        )

    @property
    def complete(self) -> bool:
        """Every page is here or lost, and perhaps the source does not know."""
        return self._engine is not None and self._engine.complete and not self.poisoned

    @property
    def ran(self) -> bool:
        """It runs here, or is paused as it was, as far as is known; else the source, when it asks,
        has it run."""
        return self._ran

    @property
    def poisoned(self) -> bool:
        """A person has given pages up that were missing."""
        return self._given_up

    @property
    def settled(self) -> bool:
        """Every page is here or lost, and that is recorded. One that is kept has lost some: the
        engine serves for as long as its VMM lives, see `poison`."""
        return self._all_here

    @property
    def lost(self) -> int:
        return self._engine.lost if self._engine is not None else 0

    async def run(self) -> None:
        """The whole arrival. What goes wrong ends in the VM's status and is told to the source."""
        await self._whole(self._arrive)

    async def resume(self, channel: Channel, asked: p.Resume) -> None:
        """The rest of it on a new connection, whose epoch the daemon has compared."""
        self.channel = channel
        channel.machine = self.machine
        self.settings.limits.arrivals.take(self, self._ram_bytes)
        await self._whole(lambda: self._go_on(asked))

    async def poison(self) -> None:
        """A person says that the source is gone for good: each page that is missing becomes a
        memory error, so that the guest goes on without them.

        The engine stays as long as the VMM: were the RAM not registered any more, the kernel could
        make zeros of what is lost (MADV_COLLAPSE does). Raises PostcopydError.
        """
        engine = self._engine
        assert engine is not None
        if not self._ran:
            self._own()  # before what cannot be undone
        engine.settle()
        try:
            pages = await trio.to_thread.run_sync(engine.poison, limiter=threads.ENGINE)
        except PostcopydError:
            await engine.disconnect()
            if self.vm.driver is None or self._vmm_ended():
                raise PostcopydError(
                    f"the VMM of {self.vm.name} could not bear a memory error and has ended: the "
                    f"guest is gone, start it from its disks",
                    "VmmGone",
                ) from None
            raise
        self._given_up = True
        if self._run and not self._ran:
            await self.vm.attached().run()
        self._ran = True
        self._note()
        self.vm.show(
            remaining=0,
            message=f"{self.vm.name} runs here without {pages} pages that were lost with "
            f"{self.channel.peer}: it gets a memory error where it touches one; shut it down when "
            f"you can, it cannot be moved",
        )
        self._record_settled(None)
        self.log.warning("ownership changed by a person", decision="poison", pages=pages)

    async def finish(self) -> None:
        """The end of an arrival that had everything when the daemon before this one died."""
        await self._whole(self._finish)

    async def _finish(self) -> None:
        await self._drained()
        self.machine.happened(Happened.LOST)
        await self._hooks("drained")
        await self._leave()

    async def drop(self) -> None:
        """The source has lost this connection and asks again: it is over for this side too."""
        await self.channel.aclose()

    async def _whole(self, steps: Callable[[], Awaitable[None]]) -> None:
        try:
            await steps()
        except PostcopydError as error:
            await self._end_early(error)
        except Exception as error:
            if (known := shortage(error)) is None:
                self.log.exception("bug in the destination's session")
            bug = PostcopydError(f"internal error: {error!r}", "InternalError")
            await self._end_early(known or bug)
        except trio.Cancelled:
            await self._end_early(PostcopydError("the daemon was stopped", "DaemonStopped"))
            raise

    async def check(self) -> None:
        """Answers an offer that only asks."""
        try:
            async with self.channel.alive():
                shape = self._shape = await self.vm.attached().inspect("destination")
            problems = self._unfit(shape) + self._lacks(shape)
        except PostcopydError as error:
            problems = [str(error)]
        finally:
            await self.close()
        await self.channel.send(p.Checked([p.sentence(problem) for problem in problems][:256]))

    async def take_data(self, stream: trio.SocketStream, hello: p.DataHello) -> None:
        """A data connection that names this migration. Raises PostcopydError."""
        token, secure = self.token, self.settings.tls is not None
        if not hmac.compare_digest(hello.token, b"" if secure else token):
            raise RemoteProtocolError(
                f"a data connection named migration {hello.migration} with a wrong token"
            )
        if hello.urgent not in self._lacking:
            raise RemoteProtocolError(
                f"a data connection too many came for migration {hello.migration}"
            )
        await stream.send_all(p.pack(p.DataWelcome(hello.migration)))
        try:
            if secure:  # its place stays free for the right one
                wire = await detach_keyed(stream, token, hello, server=True)
            else:
                wire = Wire(detach(stream))
        except OSError:
            await self.drop()  # or each side would wait for the other
            raise
        engine, here = self._engine, self.token is token and hello.urgent in self._lacking
        if engine is None or not here:
            wire.close()  # called off or lost meanwhile, or another was faster
            return
        self._lacking.remove(hello.urgent)
        engine.connect(wire.fd, tls=wire.tls, urgent=hello.urgent)
        if not self._lacking:
            self._connected.set()

    # --- the steps -----------------------------------------------------------------------------

    async def _arrive(self) -> None:
        async with self.channel.alive():
            async with open_nursery() as nursery:  # the source may take it back at any time
                nursery.start_soon(self._prepare)
                nursery.start_soon(self._watch_vmm)
                while isinstance(handover := await self._receive(), p.Pass):
                    nursery.start_soon(self._count, handover.pages)
                assert isinstance(handover, p.Handover)
                nursery.cancel_scope.cancel()
            await self._load(handover.whole)
            await self._run_guest()
            await self._drain()
        await self._leave()

    async def _prepare(self) -> None:
        """Everything up to *serving*."""
        vm, channel = self.vm, self.channel
        shape = self._shape = await vm.attached().inspect("destination")
        problems = self._unfit(shape)
        if not problems and await self._wait_for_turn():
            shape = self._shape = await vm.attached().inspect("destination")
            problems = self._unfit(shape)
        problems += self._lacks(shape)
        if problems:
            raise PostcopydError("; ".join(problems), "Refused")
        self._accept(f"preparing for {vm.name} from {channel.peer}")
        self.log.info("migration started", mode=vm.status["mode"])
        self.settings.arriving[vm.name] = shape
        await self._adopt(shape)
        await self._invite()
        await self._all_connected()
        await channel.send(p.Serving())
        await self._watch_engine()

    def _accept(self, message: str) -> None:
        """It is this VM that the source means: its status tells of the arrival."""
        self._accepted = True
        self.vm.settle(
            role="destination",
            phase="idle",
            migration=self.offer.migration,
            peer=self.channel.peer,
            mode="hybrid" if self.offer.staged else "postcopy",
            result=None,
            message=message,
        )

    async def _wait_for_turn(self) -> bool:
        """Returns when this host may take so many guests and so much memory; whether that was not
        at once. Who waits holds nothing here and has changed nothing."""
        limits = self.settings.limits
        limits.arrivals.join(self, self._ram_bytes)
        if (ahead := limits.arrivals.ahead(self)) is None:
            return False
        self._ram.close()
        self._shape = None
        self.log.info("arrival waits for its turn", ahead=ahead)
        told = -1
        with limits.peers.aside():
            while (ahead := limits.arrivals.ahead(self)) is not None:
                changed = limits.arrivals.changed
                if ahead != told:
                    self._accept(
                        f"{self.vm.name} waits for its turn to come here from "
                        f"{self.channel.peer}: {in_line(ahead)}"
                    )
                    if p.QUEUE in self.channel.features:
                        await self.channel.send(p.Queued(ahead))
                    told = ahead
                await changed.wait()
        return True

    async def _count(self, pages: int) -> None:
        """Answers a pass once as many pages have arrived in all."""
        assert self._engine is not None
        self.vm.show(phase="precopy", message=f"{self.vm.name} is copied from {self.channel.peer}")
        stats = self._engine.stats
        while stats.passed_pages < pages:
            await trio.sleep(COUNT_S)
        if stats.passed_pages != pages:
            raise RemoteProtocolError(
                f"{self.channel.peer} sent {stats.passed_pages} pages in passes and says {pages}"
            )
        await self._as_compared()
        await self.channel.send(p.Passed())

    async def _as_compared(self) -> None:
        """The VMM here is the one that was compared with the source's, while time went by."""
        assert self._shape is not None
        if await self.vm.attached().outline() != self._shape.outline:
            raise PostcopydError(
                f"somebody changed devices or disks of the VMM that waits for {self.vm.name} here: "
                f"migrate again",
                "Refused",
            )

    async def _invite(self) -> None:
        """Data connections may come, with a token that is good for this connection only."""
        self.token = secrets.token_bytes(32)
        self._connected = trio.Event()
        self._lacking = [True, *[False] * self.offer.connections]
        await self.channel.send(p.Ready(self.token))

    async def _all_connected(self) -> None:
        try:
            with trio.fail_after(CONNECTIONS_S):
                await self._connected.wait()
        except trio.TooSlowError:
            raise PostcopydError(
                f"{self.channel.peer} made no data connections within {CONNECTIONS_S:.0f} s",
                "ConnectionLost",
            ) from None

    def _unfit(self, shape: Shape) -> list[str]:
        """What time does not change: why this VMM, or this host, cannot take what is offered."""
        size = sum(region.size for region in shape.regions)
        too_large = self.settings.limits.arrivals.too_large(size)
        return [*shape.problems, *self._differences(shape), *too_large]

    def _differences(self, shape: Shape) -> list[str]:
        """What differs between the VMM that offers and the one that waits here."""
        if shape.state != "incoming":
            return [
                f"the VMM of {self.vm.name} here does not wait for a migration (it is "
                f"{shape.state}): start it as a destination"
            ]
        return alike.differences(shape, self.vm.attached().kind, self.offer)

    def _lacks(self, shape: Shape) -> list[str]:
        """Memory that this host lacks. Past the handover the kernel would kill the VMM for it."""
        promised = sum(headroom.needed(other.regions) for other in self.settings.arriving.values())
        pids = [shape.pid, os.getpid()] if self.offer.staged else [shape.pid]
        return headroom.problems(pids, shape.regions, promised)

    async def _adopt(self, shape: Shape) -> None:
        """Guest RAM empty and registered: from here on each access waits for its page."""
        self._note()
        self.vm.record("arriving")
        self._adopted = True
        self._uffds = await self.vm.attached().adopt(shape)
        self._record = self.settings.store.open_pages(self.vm.name)
        self._engine = DestinationEngine(
            shape.regions, self._uffds, self._record, staged=self.offer.staged
        )
        self._engine.register()

    async def _load(self, whole: bool) -> None:
        """Device state into the VMM, while its faults are answered by the engine: from the end of
        that state on, which is after the last page was named that is old here."""
        self.vm.show(
            phase="handover",
            mode="precopy" if whole else self.vm.status.get("mode"),
            message=f"{self.vm.name} is being handed over from {self.channel.peer}",
        )
        state = DeviceState(self.vm.name)
        async with open_nursery() as nursery:
            nursery.start_soon(self._watch_engine)
            nursery.start_soon(self._watch_vmm)
            nursery.start_soon(self._load_and_say, state, whole)
            with state:
                size = 0
                while not isinstance(message := await self._receive(), p.DeviceEnd):
                    if isinstance(message, p.Stale):
                        self._stale(message)
                        continue
                    assert isinstance(message, p.Device)
                    size += len(message.data)
                    state.put(message.data)
                self._run = message.run
                self.vm.attached().before = "running" if message.run else "paused"
                await self._seal(whole)
            if message.size != size:
                raise RemoteProtocolError(
                    f"{self.channel.peer} sent {size} bytes of device state and says {message.size}"
                )
            grant = await self._receive()
            nursery.cancel_scope.cancel()
        assert isinstance(grant, p.Grant)
        if grant.epoch != self.offer.epoch:
            raise RemoteProtocolError(
                f"{self.channel.peer} granted epoch {grant.epoch} of {self.vm.name}, "
                f"it had offered {self.offer.epoch}"
            )

    def _stale(self, message: p.Stale) -> None:
        assert self._engine is not None
        if not self.offer.staged:
            raise RemoteProtocolError(
                f"{self.channel.peer} names written pages of {self.vm.name}, but made no passes"
            )
        self._engine.stale(message.region, message.first, message.count, message.bits)

    async def _seal(self, whole: bool) -> None:
        """What has come in passes is right now, but for what was named: the guest may have it."""
        assert self._engine is not None
        self._engine.seal()
        if whole:
            await self.channel.send(p.Serving())

    async def _load_and_say(self, state: DeviceState, whole: bool) -> None:
        await self._as_compared()
        self._note()
        self.vm.record("loading")  # the guest at the source is about to stop
        self._loading = True
        async with aclosing(state.taken()) as pieces:
            await self.vm.attached().load(pieces)
        assert self._engine is not None
        if whole:
            await self._all_here_first()
        self._engine.check()  # no use in a guest whose pages cannot come
        await self.channel.send(p.Loaded())

    async def _all_here_first(self) -> None:
        """Of a guest that may run only with all of its memory: while it stands still nobody waits
        for memory that this host lacks, or for a source that sends nothing."""
        assert self._engine is not None
        stats, present, since = self._engine.stats, -1, trio.current_time()
        while not self._engine.whole:
            if stats.present_pages != present:
                present, since = stats.present_pages, trio.current_time()
            if stats.stalls:
                raise PostcopydError(
                    f"this host has no memory left for the last {stats.total_pages - present} "
                    f"pages of {self.vm.name}: free some",
                    "NoMemory",
                )
            if trio.current_time() - since > p.DEAD_S:
                raise ConnectionLost(
                    f"{self.channel.peer} has sent none of the last {stats.total_pages - present} "
                    f"pages of {self.vm.name} for {p.DEAD_S:.0f} s"
                )
            await trio.sleep(COUNT_S)

    async def _receive(self) -> p.Message:
        message = await self.channel.receive()
        if isinstance(message, p.Cancel):
            raise PeerError(f"{self.channel.peer} took it back: {message.reason}", "Cancelled")
        return message

    async def _run_guest(self) -> None:
        try:
            await self._cont()
        except (Declined, StateNotWritten) as refused:
            await self._decline(str(refused))
            raise
        await self._say_ran()
        self.log.info("guest handed over")

    async def _cont(self) -> None:
        """Runs the guest, unless it was paused; recorded first, also where the connection was lost
        between the grant and its record. The VMM may wait for a page in this, and the source may go
        meanwhile: then it is not known whether it ran, and it is told to again later."""
        self._own()
        if self._run:
            async with open_nursery() as nursery:
                nursery.start_soon(self._listen)
                await self.vm.attached().run()
                nursery.cancel_scope.cancel()

    def _own(self) -> None:
        """On record before any vCPU runs here, whoever says that it may: without it a daemon that
        is started ends the VMM. Raises PostcopydError: then nothing runs."""
        self.vm.epoch = self.offer.epoch
        self.vm.record("owned")

    async def _say_ran(self) -> None:
        assert self._engine is not None
        self._ran = True
        self._ran_ns = self._ran_ns or lib.pc_monotonic_ns()
        try:
            await self.channel.send(p.Ran())
        finally:
            self._engine.settle()
            self._note()
            self._record_settled(None)
        self.vm.show(
            phase="postcopy",
            message=f"{self.vm.name} runs here, its memory follows",
            remaining=None,
        )
        if not self._told:
            self._told = True
            await self._hooks("running")

    async def _go_on(self, asked: p.Resume) -> None:
        """After a connection was lost: new ones for the pages, the guest run if it was not yet, and
        what is here told, before the source pushes the rest."""
        self.machine.received(asked)
        engine = self._engine
        assert engine is not None
        await engine.disconnect()
        async with self.channel.alive():
            async with open_nursery() as nursery:
                nursery.start_soon(self._watch_vmm)
                await self._invite()
                if not self._ran:
                    await self._cont()
                nursery.cancel_scope.cancel()
            await self._say_ran()
            counts.recoveries["destination"] += 1
            self.log.info("migration recovered", pages=engine.stats.confirmed_pages)
            async with open_nursery() as nursery:
                nursery.start_soon(self._watch_vmm)
                nursery.start_soon(self._listen)
                await self._all_connected()
                for index, region in enumerate(self._ram.regions):
                    for first in range(0, region.pages, HAVE_PAGES):
                        count = min(HAVE_PAGES, region.pages - first)
                        bits = engine.have(index, first, count)
                        await self.channel.send(p.Have(index, first, count, bits))
                await self.channel.send(p.Serving())
                nursery.cancel_scope.cancel()
            await self._drain()
        await self._leave()

    @property
    def _ram(self) -> Shape:
        assert self._shape is not None
        return self._shape

    @property
    def _ram_bytes(self) -> int:
        return sum(region.size for region in self._ram.regions)

    def _note(self, answer: p.Message | None = None) -> None:
        """What `restored` needs, or what a source is told that asks later, for the next record."""
        ram = self._noted or [
            {"name": r.name, "pages": r.pages, "page_size": r.page_size, "address": r.address,
             "offset": r.offset, "file": r.fd is not None and procfs.file_id(r.fd)}
            for r in (self._shape.regions if self._shape else ())
        ]  # fmt: skip
        about = {
            "migration": self.offer.migration,
            "offer": to_builtins(structs.replace(self.offer, facts={}, places={})),
            "ram": ram,
            "userfaultfds": len(self._uffds),
            "run": self._run,
            "ran": self._ran,
            "told": self._told,
            "ran_ns": self._ran_ns,  # the clock of this boot, as this record
            "given_up": self._given_up,
            "identity": self.identity,
            **({"answer": to_builtins(answer)} if answer else {}),
        }
        self.vm.note(about)

    async def _decline(self, reason: str) -> None:
        """No vCPU has run: the VMM ends first, then the source may have its guest back."""
        with within(END_S, f"ending the VMM of {self.vm.name} here"):
            await self.vm.attached().end()
        declined = p.Declined(p.sentence(reason))
        self._note(declined)
        self._record_settled("declined")
        await self.channel.send(declined)

    async def _drain(self) -> None:
        engine, channel = self._engine, self.channel
        assert engine is not None
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(self._watch_vmm)
                nursery.start_soon(self._listen)
                nursery.start_soon(self._watch_answers)
                nursery.start_soon(self._say_progress)
                while not engine.complete:
                    await engine.wait()
                nursery.cancel_scope.cancel()
        except (Exception, trio.Cancelled) as error:
            if not engine.complete:
                raise
            self.log.info("all is here, and only the source not told", error=str(error))
        with trio.CancelScope(shield=True):  # a daemon that ends says this first
            await self._drained()
        try:
            with trio.move_on_after(ACKNOWLEDGE_S):
                await channel.expect(p.Acknowledged)
                self.vm.about["acknowledged"] = True
        except PostcopydError as error:
            self.log.info("drained, but the source did not acknowledge it", error=str(error))
        self.machine.happened(Happened.LOST)  # acknowledged or not
        await self._hooks("drained")

    async def _drained(self) -> None:
        """Nothing waits for pages any more, and both hosts are told."""
        engine = self._engine
        assert engine is not None
        lost = engine.lost
        if not lost:
            try:
                engine.unregister()
            except PostcopydError:  # of memory that is not there any more, all of it zeros
                await engine.disconnect()
                await self._give_up_unplugged()
                engine.unregister()
        self._all_here = True
        if self._shape is not None and not lost:
            self.ram_here = hugepages.Ram.of(self._shape.pid, self._shape.regions)
        stats = engine.stats
        last = stats.last_urgent_ns
        drained = p.Drained(
            confirmed=stats.confirmed_pages,
            zero=stats.zero_pages,
            placed=stats.urgent_pages + stats.pushed_pages,
            urgent=stats.urgent_pages,
            duplicate=stats.duplicate_pages,
            requests=stats.requests,
            discarded=stats.discarded_pages,
            brownout_ms=max(last - self._ran_ns, 0) / 1e6,
            faults=faults(stats),
            lost=lost,
        )
        sentence = losses.arrived(self.vm.name, self.channel.peer, lost)
        self.vm.settle(phase="drained", remaining=0, message=sentence)
        self._note(drained)
        self.vm.home()
        written = self._record_settled(None if lost else "held")
        # After the record: a daemon that is started in between needs them no more. Without it they
        # stay, and the page record with them, by which it sees that the guest is whole.
        if lost:
            self.log.error("memory lost", pages=lost)
        elif written:
            await self._release()
        self.log.info(
            "migration completed",
            brownout_ms=round(drained.brownout_ms, 2),
            pages=stats.confirmed_pages,
            faults=stats.faults,
        )
        with suppress(PostcopydError):  # who listens for the answer sees it too
            await self.channel.send(drained)

    async def _release(self) -> None:
        try:
            with within(RELEASE_S, f"closing the userfaultfds of {self.vm.name}"):
                await self.vm.attached().release()
        except Exception as error:  # an unused descriptor stays in the VMM
            self.log.warning("the VMM keeps its userfaultfd", error=str(error))

    async def _leave(self) -> None:
        """Nothing is due any more: all is closed, but where pages were lost (`settled`)."""
        engine = self._engine
        if engine is None or not engine.lost:
            await self.close()
            return
        with trio.CancelScope(shield=True):
            await engine.disconnect()
        self.settings.arriving.pop(self.vm.name, None)  # its memory is there, or is not wanted
        self.vm.waiting = self

    async def _listen(self) -> None:
        """Nothing is due from the source now; but it may fail, or be gone."""
        message = await self.channel.receive()
        raise RemoteProtocolError(f"{self.channel.peer} sent {type(message).__name__} too late")

    async def _say_progress(self) -> None:
        assert self._engine is not None
        stats = self._engine.stats
        while True:
            remaining = self._remaining()
            self.vm.show(remaining=remaining)
            await self.channel.send(p.Progress(stats.confirmed_pages, remaining, faults(stats)))
            await trio.sleep(PROGRESS_S)

    async def _watch_answers(self) -> None:
        """Every page asked for is answered: a connection that is up and brings none is lost."""
        assert self._engine is not None
        stats, answers, since = self._engine.stats, -1, trio.current_time()
        while True:
            if stats.unanswered <= 0 or stats.requests - stats.unanswered != answers:
                answers, since = stats.requests - stats.unanswered, trio.current_time()
            if trio.current_time() - since > p.DEAD_S:
                raise ConnectionLost(
                    f"{self.channel.peer} has sent none of {stats.unanswered} pages for "
                    f"{p.DEAD_S:.0f} s that the guest waits for"
                )
            await trio.sleep(p.KEEPALIVE_S)

    def _remaining(self) -> int:
        """Bytes that are not here yet; an estimate where regions have pages of several sizes."""
        assert self._engine is not None and self._shape is not None
        stats, total = self._engine.stats, sum(r.size for r in self._shape.regions)
        return int(total * (stats.total_pages - stats.confirmed_pages) // stats.total_pages)

    async def _watch_engine(self) -> None:
        assert self._engine is not None
        await self._engine.watch()

    def _vmm_ended(self) -> bool:
        """Certainly: who cannot look does not know."""
        with suppress(OSError):
            return not procfs.started(self.vm.attached().pid)
        return False

    async def _watch_vmm(self) -> None:
        await self.vm.attached().gone()
        raise PostcopydError(f"the VMM of {self.vm.name} here has ended by itself", "VmmGone")

    # --- when it goes wrong ----------------------------------------------------------------------

    async def _end_early(self, error: PostcopydError) -> None:
        with trio.CancelScope(shield=True):
            if self._all_here:
                self.log.warning("after drained", error=str(error))
                self.machine.happened(Happened.LOST)
                await self._leave()
            elif self.machine.state in DESTINATION_RUNS:
                await self._paused(error)
            else:
                await self._called_off(error)

    async def _called_off(self, error: PostcopydError) -> None:
        """This host as it was: nothing registered, no descriptor left, the VMM waiting again, or
        ended if it had begun to load (QEMU takes one migrate-incoming only)."""
        vm = self.vm
        if self.machine.state not in (Destination.CALLED_OFF, Destination.DECLINED):
            if not isinstance(error, ConnectionLost | PeerError):
                await self.channel.tell_error(error)
            self.machine.happened(Happened.FAILED)
        message = f"{vm.name} did not come here: {error}"
        driver, clean = vm.driver, True
        try:
            if self._loading and driver is not None:
                with within(END_S, f"ending the VMM of {vm.name} here"):
                    await driver.end()  # before its RAM is let go: it must not go on with zeros
                message += "; its VMM here has ended, start it anew for another attempt"
            if self._engine is not None:
                self._engine.unregister(called_off=True)
            if self._adopted and not self._loading and driver is not None:
                with within(RELEASE_S, f"letting go of guest RAM of {vm.name}"):
                    await driver.release()
                    if self.offer.staged and self._shape is not None:
                        await driver.discard(self._shape)
        except Exception as trouble:  # a driver's bug too: the rest must happen
            clean = False
            later = "the source asks again" if self._loading else "a guest arrives here again"
            message += f"; cleaning up here, which is tried again when {later}: {trouble}"
            self.log.error("cleaning up failed", error=str(trouble))
        if self._accepted:  # or it may be a guest of this host that was named by mistake
            how: counts.Result = "cancelled" if error.name == "Cancelled" else "failed"
            vm.settle(counted_as=how, phase="failed", remaining=0, message=message)
            # A source that has granted is told so only once the VMM here has certainly ended.
            with suppress(PostcopydError):  # of an answer before this one, which is kept then
                self._note(p.Declined(p.sentence(message)) if clean or not self._loading else None)
            self._record_settled("declined" if clean or not self._loading else None)
        if error.name == "Cancelled":
            self.log.info("migration cancelled", error=str(error))
        else:
            self.log.warning("migration failed", error=str(error))
        await self.close()
        if self._loading and driver is not None and clean:  # or it is there still
            with suppress(VmmTimeout), within(RELEASE_S, "closing its socket"):
                await vm.leave()
        await self._hooks("failed", message=str(error))

    async def _paused(self, error: PostcopydError) -> None:
        """The guest is this host's: it waits for what it lacks, and nothing ends it."""
        vm = self.vm
        self.machine.happened(Happened.LOST)
        await self.channel.aclose()
        self.token = secrets.token_bytes(32)  # what still comes with the old one is of no use
        peer = self.channel.peer
        if driver := vm.driver:
            # Who has ended is seen here in several ways, and its last words come a moment later.
            ends = error.name == "VmmGone" or getattr(error, "failure", None) is Failure.VMM_GONE
            with trio.move_on_after(ENDS_S if ends or self._vmm_ended() else 0):
                await driver.gone()
        if driver is None or self._vmm_ended():
            await self.vmm_ended(driver.farewell if driver else None)
            return
        message = (
            f"{vm.name} {'runs here' if self._ran else 'was granted to this host'} and waits "
            f"for pages that are still at {peer}: {error}; that host connects again by itself"
        )
        if self._engine is not None:
            await self._engine.disconnect()
            if getattr(error, "failure", None) is Failure.MEMORY:
                await self._give_up_unplugged()
            vm.waiting = self
        if self._engine is not None and self._engine.foreign:
            vm.waiting = None
            message = losses.foreign(vm.name, peer, self._engine.sentence)
            vm.about["foreign"] = message  # no engine after this one takes it for explained
            await self.close()
        vm.show(phase="paused", message=message)
        self._record_settled(None)
        self.log.warning("migration paused", error=str(error))

    async def _give_up_unplugged(self) -> None:
        """Guest RAM that was unplugged here meanwhile needs no pages any more."""
        engine, shape = self._engine, self._ram
        assert engine is not None
        try:
            for number in unplugged(shape.pid, shape.regions):
                await trio.to_thread.run_sync(engine.gone, number, limiter=threads.ENGINE)
                self.log.warning("guest RAM was unplugged", region=shape.regions[number].name)
        except (OSError, PostcopydError) as error:  # then its pages lack, as far as is known
            self.log.error("unplugged guest RAM not looked for", error=str(error))

    async def vmm_ended(self, farewell: str | None) -> None:
        """Of a guest that was this host's: it can go on nowhere. Where that was meant it is over,
        and a source that asks is told; else a person decides, as disks may have been changed."""
        vm, peer = self.vm, self.channel.peer
        await self.close()
        if vm.status["phase"] == "failed":
            return  # a person was faster
        if self._all_here:  # but for what was lost: its move was over, and the answer stands
            vm.show(
                message=f"{vm.name} was here, with all of its memory but some lost pages, and its "
                f"VMM has ended since; it may be started again"
            )
            self._record_settled("held")
            return
        if vm.ownership == "loading":  # it was not on record that it may run, so nothing ran
            message = f"{vm.name} did not come here: its VMM has ended before it was run"
            self._note(p.Declined(p.sentence(message)))
            vm.settle(phase="failed", remaining=0, message=message)
            self._record_settled("declined")
            self.log.warning("migration failed", error=message)
            await self._hooks("failed", message=message)
            return
        if farewell is None:
            vm.show(
                phase="paused",
                message=f"the VMM of {vm.name} here has ended in the middle of its move from "
                f"{peer}, where part of its memory still is: the guest is lost",
            )
            self._record_settled(None)
            self.log.error("migration paused", error="the VMM here has ended")
            return
        said = f"{vm.name} has ended there before all of its memory had come: {farewell}"
        self._note(p.Error(name=p.ENDED, message=p.sentence(said)))
        vm.settle(
            counted_as="ended",
            phase="failed",
            remaining=0,
            message=f"{vm.name} has ended here before all of its memory had come from {peer}: "
            f"{farewell}; it may be started again",
        )
        vm.home()
        self._record_settled("held")
        self.log.warning("guest ended while its memory followed", why=farewell)
        await self._hooks("ended", message=farewell)

    def _record_settled(self, ownership: Ownership | None) -> bool:
        return self.vm.record_settled(ownership)

    async def close(self) -> None:
        """Only when nothing is registered any more, or the VMM has ended."""
        with trio.CancelScope(shield=True):
            engine, self._engine = self._engine, None  # no data connection is taken any more
            if engine is not None:
                await engine.aclose()
            for fd in (*self._uffds, *([self._record] if self._record >= 0 else [])):
                os.close(fd)
            if self._record >= 0 and not (self._all_here and self.vm.unwritten):
                self.vm.remove_pages()
            if self._shape is not None:
                if self.settings.arriving.get(self.vm.name) is self._shape:
                    del self.settings.arriving[self.vm.name]
                self._shape.close()
            self._uffds, self._record, self._shape = [], -1, None

    async def _hooks(self, phase: str, **about: Any) -> None:
        await run_hooks(
            self.settings.hooks,
            self.vm.name,
            "destination",
            phase,
            migration=self.offer.migration,
            peer=self.channel.peer,
            **about,
        )
