# SPDX-License-Identifier: Apache-2.0
"""One guest leaving: from the offer to drained, or back to running here.

Owns, for the time of one migration: the control channel, the native engine, the descriptors of the
guest's RAM (`Shape`). Order and ownership are handover.py's; this file does what each step means.
Whatever fails before the grant ends in `_rolled_back`. Whatever fails after it pauses the migration
(`_paused`), and `_recover` dials and asks again until the destination has all, or has declined.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import msgspec
import trio

from postcopyd import counts
from postcopyd import protocol as p
from postcopyd.errors import PostcopydError, shortage
from postcopyd.handover import Happened, Machine, Source
from postcopyd.host import kernel
from postcopyd.model import MigrateRequest
from postcopyd.net.channel import Channel, PeerError
from postcopyd.net.connection import dial_control, dial_data
from postcopyd.net.tls import Names, same_peer
from postcopyd.protocol import RemoteProtocolError
from postcopyd.records.schema import Ownership
from postcopyd.sessions import alike, losses
from postcopyd.sessions.hooks import run_hooks
from postcopyd.sessions.limits import Uplink, in_line
from postcopyd.sessions.patience import END_S, within
from postcopyd.sessions.shared import Shared
from postcopyd.sessions.vm import Vm
from postcopyd.source.back import known_again, undone, untouched
from postcopyd.source.decision import GIVEN_UP, SILENT, UNKNOWN, Choice, Decision, still_there
from postcopyd.source.engine import Look, SourceEngine
from postcopyd.source.granted import Granted, unknowing
from postcopyd.source.passes import Pass, why_now
from postcopyd.source.retry import AGAIN_S, PATIENCE_S, Retry
from postcopyd.source.tracking import Tracking
from postcopyd.tasks import threads
from postcopyd.tasks.nursery import open_nursery
from postcopyd.vmm import Shape

SHOW_S = 0.1
"""How often progress is shown."""

MAX_DOWNTIME_MS = 300.0
"""Of a precopy, where nothing else was asked for; as QEMU's."""

STOPPED_S = 0.1
"""How long passes may stop a guest that does direct I/O, all together, before no more are made."""

STALE_PAGES = 8 * p.DEVICE_CHUNK
"""Pages of one Stale: a bit each. One without a page to name is not sent."""


class SourceSession:
    """Made and run by the daemon; `cancel` may be called meanwhile."""

    def __init__(self, vm: Vm, request: MigrateRequest, shared: Shared, migration: str) -> None:
        self.vm = vm
        self.request = request
        self.shared = shared
        self.migration = migration
        self.machine = Machine(Source.GREETING)
        self._cancelling = trio.CancelScope()
        self._committed = False
        self._channel: Channel | None = None
        self._identity: Names = ()
        self._granted = self._answers = Granted(request.to)
        self._engine: SourceEngine | None = None
        self._shape: Shape | None = None
        self._touched = False
        self._began = time.monotonic()
        self._stopped_at = self._saved_at = self._loaded_at = self._ran_at = 0.0
        self._downtime_ms = 0.0
        self._downtime_parts: dict[str, float] = {}
        self._faults = p.Faults()
        self._tracking: Tracking | None = None
        self._passes: list[Pass] = []
        self._why_now = ""
        self._as_offered = trio.Event()  # the guest that was stopped
        self._warnings: list[str] = []
        self._tracked: dict[str, float] = {}
        self._completed: dict[str, Any] | None = None
        self._recoveries = 0
        self._arrived = 0  # pages, as far as the destination has said
        self._heard = False  # from the destination, since it was asked last
        self._poke = trio.Event()
        self._ending = False
        self._not_here: PostcopydError | None = None  # after a rollback that failed
        self._decision: Decision | None = None

    @classmethod
    async def restored(
        cls, vm: Vm, about: dict[str, Any], shared: Shared, machine: Machine
    ) -> SourceSession:
        """The session of a guest that was granted before the daemon was started, for `resume`.

        Raises PostcopydError when the VMM cannot be asked for its RAM.
        """
        request = msgspec.convert(about["request"], MigrateRequest)
        session = cls(vm, request, shared, about["migration"])
        session.machine = machine
        session._committed = True
        session._identity = tuple(about.get("identity", ()))
        if "granted" in about:
            session._granted = Granted.recorded(about["granted"])
        session._downtime_ms, session._downtime_parts = about["downtime"]
        session._recoveries = about["recoveries"]
        session._passes = [Pass(**one) for one in about.get("passes", [])]
        session._why_now = about.get("why_now", "")
        session._touched = True
        await known_again(vm)
        shape = session._shape = await vm.attached().inspect("source")
        regions = [[r.name, r.pages, r.page_size] for r in shape.regions]
        if regions != about["regions"]:
            shape.close()
            raise PostcopydError(
                f"the VMM of {vm.name} here has other RAM than the one that was migrated"
            )
        # What the guest did before it was stopped for this is what it goes back to.
        session._shape = replace(shape, state=vm.attached().before or "paused")
        session._engine = SourceEngine(shape.regions, shape.pid)
        return session

    @property
    def log(self) -> Any:
        return self.vm.log.bind(migration=self.migration, peer=self.request.to, role="source")

    def cancel(self) -> None:
        """Takes the guest back, or ends a check; raises PostcopydError after the grant, and when
        there is nothing left to cancel."""
        if self._ending:
            raise PostcopydError(
                f"cancelling the migration of {self.vm.name}: it has failed already and is at its "
                f"last steps, see `postcopyd status {self.vm.name}`",
                "NotMigrating",
            )
        if self._committed:
            raise PostcopydError(
                f"{self.vm.name} was granted to {self.request.to} already: it can only go on there",
                "AfterGrant",
            )
        self._cancelling.cancel()

    def recover(self, to: str | None) -> None:
        """Asks the destination again at once; `to` is another address of it."""
        if to is not None:
            self.request = replace(self.request, to=to)
            self._note()
            self.vm.show(peer=to)
            self._record_soon(None)
        self._poke.set()

    async def resolve(self, choice: Choice) -> None:
        """Carries out what a person has decided about a paused migration; returns once it is done.
        Raises PostcopydError: it was not, and why."""
        name, to = self.vm.name, self.request.to
        if self.machine.state is Source.DRAINED:
            raise still_there(name, to, choice, "it says that it has all of the guest")
        if self._decision is not None or self._ending:
            raise PostcopydError(
                f"{name}: it was decided about just now; see `postcopyd status {name}`",
                "Busy",
            )
        self._decision = decision = Decision(choice)
        self._poke.set()
        try:
            await decision.outcome()
        finally:
            if self._ending:  # who has an answer finds the VM free
                await self.vm.free.wait()

    async def resume(self) -> None:
        """The rest of a migration whose guest was granted before the daemon was started."""
        await self._whole(self._recover)

    async def run(self) -> None:
        """The whole migration. What goes wrong ends in the VM's status, and is not raised."""
        vm, to = self.vm, self.request.to
        vm.conclude(
            role="source",
            phase="idle",
            migration=self.migration,
            peer=to,
            mode=self.request.mode,
            result=None,
            message=f"preparing to move {vm.name} to {to}",
        )
        self.log.info("migration started", mode=self.request.mode, bandwidth=self._bandwidth)
        if (self.request.bandwidth or 0) > self._bandwidth:
            self._warnings.append(
                f"sent {self._bandwidth} bytes a second at most, as the configuration of the "
                f"source has it, and not {self.request.bandwidth} as asked for"
            )
        await self._whole(self._migrate)

    async def _whole(self, steps: Callable[[], Awaitable[None]]) -> None:
        try:
            try:
                with self._cancelling:
                    await steps()
                if self._cancelling.cancelled_caught:
                    await self._end_early(PostcopydError("cancelled by request", "Cancelled"))
            except Exception as error:
                await self._end_early(self._ours(error))
                if self.machine.gave_away and self._completed is None:
                    await self._recover()
        except trio.Cancelled:  # the daemon is going down
            await self._end_early(PostcopydError("the daemon was stopped", "DaemonStopped"))
            raise
        finally:
            self._ending = True
            if self._decision is not None:
                ended = f"{self.vm.name}: its migration has ended: {self.vm.status.message}"
                self._decision.done(PostcopydError(ended, "NotMigrating"))
            with trio.CancelScope(shield=True):
                await self._close()

    def _ours(self, error: Exception) -> PostcopydError:
        if isinstance(error, PostcopydError):
            return error
        if short := shortage(error):
            return short
        self.log.exception("bug in the source's session")
        return PostcopydError(f"internal error: {error!r}", "InternalError")

    async def check(self) -> tuple[list[str], list[str]]:
        """What would keep the migration from going, on both hosts, and what would make it another
        than was asked for. Touches nothing. Raises PostcopydError, also when it was cancelled."""
        with self._cancelling:
            try:
                return await self._problems(), self._warnings
            finally:
                with trio.CancelScope(shield=True):
                    await self._close()
        raise PostcopydError(f"the check of {self.vm.name} was cancelled by request", "Cancelled")

    async def _problems(self) -> list[str]:
        shape = self._shape = await self.vm.attached().inspect("source")
        problems = [*shape.problems]
        if why := shape.untracked or kernel.why_no_passes():
            self._warnings.append(f"it would be moved by postcopy alone, without passes: {why}")
        try:
            if shape.regions or not problems:  # without any, there is nothing to offer
                channel = await self._greeted()
                self._compares_disks(channel, shape)
                await channel.send(self._offer(shape, check=True))
                problems += (await channel.expect(p.Checked)).problems
        except PostcopydError as error:
            problems.append(str(error))
        return problems

    # --- the steps -----------------------------------------------------------------------------

    async def _migrate(self) -> None:
        driver = self.vm.attached()
        shape = self._shape = await driver.inspect("source")
        if shape.problems:
            raise PostcopydError("; ".join(shape.problems), "Refused")
        if shape.state == "incoming":
            raise PostcopydError(
                f"{self.vm.name} is itself waiting for an incoming migration here", "Refused"
            )
        await self._hooks("prepare")
        channel = await self._greeted()  # closed in `_close`: the peer is told why it ends
        self._compares_disks(channel, shape)
        async with channel.alive():
            self._engine = SourceEngine(shape.regions, shape.pid)
            if self.request.mode != "postcopy":
                self._touched = True
                await self._track(shape)
            await channel.send(self._offer(shape))
            await self._connect(await self._turn(channel))
            await channel.expect(p.Serving)
            if self._tracking is not None:
                await self._copy(channel)
            async with open_nursery() as nursery:  # nothing is due; but the destination may fail
                nursery.start_soon(self._watch_engine)
                nursery.start_soon(channel.receive)
                await self._engine.scan()
                self._touched = True
                await driver.prepare()
                await self._hooks("handover")
                if not self._passes:  # these have looked, and the guest writes again what crosses
                    await self._still_seen(trio.Event(), "was prepared")
                nursery.cancel_scope.cancel()
            self._engine.check()
            await self._intend()
            await self._hand_over(channel)
            await self._drain(channel)

    async def _intend(self) -> None:
        """On disk before the stop: a host that comes up again asks before it starts this guest."""
        driver = self.vm.attached()
        intent = {
            "migration": self.migration,
            "peer": self.request.to,
            "epoch": self.vm.epoch + 1,
            "driver": driver.kind,
            "socket": driver.socket,
            "identity": self._identity,
            "granted": self._granted.json(),
        }
        self.vm.leaving()
        save = self.shared.store.save_intent
        await trio.to_thread.run_sync(save, self.vm.name, intent, limiter=threads.DISK)
        self._note()
        self.vm.record("intent")

    async def _greeted(self) -> Channel:
        """The destination: one that guests may go to, and the same one ever after."""
        to = self.request.to  # a person may say another meanwhile
        channel = await dial_control(to, self.machine, self.shared)
        self._channel = channel
        if self.shared.tls is not None and not self._identity:
            self.shared.tls.allow(channel.names, "receive")
        same_peer(self._identity, channel.names, self.vm.name)
        self._identity = self._identity or channel.names
        self._answers = Granted.greeted(to, await channel.greet())
        if not self._committed:
            self._granted = self._answers
        return channel

    def _compares_disks(self, channel: Channel, shape: Shape) -> None:
        if shape.disks and p.DISKS not in channel.features and not self.request.unsafe:
            raise PostcopydError(
                f"the postcopyd at {self.request.to} is too old to see that the disks of "
                f"{self.vm.name} are the same there: upgrade it, {alike.INSIST}",
                "Refused",
            )

    def _offer(self, shape: Shape, *, check: bool = False) -> p.Offer:
        return p.Offer(
            migration=self.migration,
            vm=self.vm.name,
            driver=self.vm.attached().kind,
            regions=[p.RegionOffer(r.name, r.pages, r.page_size) for r in shape.regions],
            facts={key: p.fact(value) for key, value in shape.facts.items()},
            connections=self.shared.connections,
            epoch=self.vm.epoch + 1,
            check=check,
            staged=self._tracking is not None,
            disks=alike.offered(shape.disks),
            unsafe=self.request.unsafe,
            places={key: p.fact(value) for key, value in shape.places.items()},
        )

    async def _turn(self, channel: Channel) -> bytes:
        """Waits until the destination takes this guest; the token for data connections. Until then
        it runs here as ever, and what was seen of its VMM may be old."""
        queued = False
        async with open_nursery() as nursery:
            nursery.start_soon(self._watch_vmm)
            while isinstance(answer := await channel.receive(), p.Queued):
                queued = True
                self.vm.show(
                    message=f"{self.vm.name} runs on here and waits for its turn at "
                    f"{self.request.to}: {in_line(answer.ahead)}"
                )
            nursery.cancel_scope.cancel()
        if not isinstance(answer, p.Ready):
            raise RemoteProtocolError(
                f"{self.request.to} sent {type(answer).__name__} where Ready was due"
            )
        if queued:
            await self._still_seen(trio.Event(), "waited for its turn")
        return answer.token

    async def _watch_vmm(self) -> None:
        await self.vm.attached().gone()
        raise PostcopydError(f"the VMM of {self.vm.name} here has ended by itself", "VmmGone")

    async def _connect(self, token: bytes) -> None:
        """The data connections: one urgent, the others for pushing."""
        assert self._engine is not None and self._channel is not None
        self._engine.tell_losses(p.LOSSES in self._channel.features)
        for urgent in (True, *[False] * self.shared.connections):
            wire = await dial_data(
                self.request.to, self.shared, self.migration, token, urgent=urgent
            )
            self._engine.connect(wire.fd, tls=wire.tls, urgent=urgent)

    async def _track(self, shape: Shape) -> None:
        """Sees what the guest writes from here on, or notes why that cannot be."""
        assert self._engine is not None
        try:
            self._tracking = await Tracking.of(self.vm, shape, self._engine)
        except PostcopydError as error:
            if self.request.mode == "precopy":
                raise PostcopydError(
                    f"{error}; --mode postcopy does not need it", error.name
                ) from None
            self._warnings.append(f"handed over without a pass before: {error}")
            self.log.warning("no passes", error=str(error))

    async def _arm(self) -> int:
        """Has what the guest writes from here on seen by the next look. With direct I/O it is held
        still for that, and a daemon that is started again then runs it (`roll_back`)."""
        assert self._tracking is not None and self._shape is not None
        if not self._shape.direct_io:
            return await self._tracking.arm()
        self._note()
        self.vm.record("intent")
        pages = await self._tracking.arm_still(self.vm)
        self.vm.record("held")
        return pages

    async def _copy(self, channel: Channel) -> None:
        """The guest's memory in passes, while it runs on here, until another would not pay."""
        engine, tracking = self._engine, self._tracking
        assert engine is not None and tracking is not None
        mode, most = self.request.mode, self.request.precopy_passes
        downtime_s = (self.request.max_downtime_ms or MAX_DOWNTIME_MS) / 1e3
        assert mode != "postcopy"
        while not self._why_now and (most != 0 or mode == "precopy"):
            pages = await self._arm()
            self.vm.show(
                phase="precopy",
                remaining=pages * self._page_size,
                message=f"copying {self.vm.name} to {self.request.to} while it runs here, pass "
                f"{len(self._passes) + 1}",
            )
            stats, began = engine.stats, time.monotonic()
            before, moved = stats.passed_pages, stats.transferred_bytes
            async with open_nursery() as nursery:
                nursery.start_soon(self._pass, channel)
                nursery.start_soon(self._show_progress, before + pages)
                still_seen = trio.Event()
                nursery.start_soon(self._still_seen, still_seen)  # takes longer than a short pass
                await channel.expect(p.Passed)
                seconds = time.monotonic() - began
                await still_seen.wait()
                nursery.cancel_scope.cancel()
            self._passes.append(
                Pass(
                    pages=stats.passed_pages - before,
                    bytes=stats.transferred_bytes - moved,
                    seconds=seconds,
                    left=await tracking.look(),
                )
            )
            self.log.info("pass", **self._passes[-1].json())
            self.vm.show(passes=[one.json() for one in self._passes])
            self._why_now = why_now(mode, self._passes, most, downtime_s) or ""
            if not self._why_now and mode == "hybrid" and tracking.stopped_s > STOPPED_S:
                self._why_now = (
                    "each pass stops the guest, for its direct I/O, longer than it gains"
                )

    async def _still_seen(self, seen: trio.Event, meanwhile: str = "was copied") -> None:
        """Passes take their time, and so does waiting: what was offered must be so still. Only
        whether the guest runs may have changed."""
        assert self._shape is not None
        was, now = self._shape, await self.vm.attached().inspect("source")
        now.close()
        if news := alike.changes(was, now):
            raise PostcopydError(
                f"the VMM of {self.vm.name} has changed while it {meanwhile}: {'; '.join(news)}; "
                f"migrate again",
                "Refused",
            )
        self._shape = replace(was, state=now.state, outline=now.outline)
        seen.set()

    async def _pass(self, channel: Channel) -> None:
        engine = self._engine
        assert engine is not None
        engine.copy(self._rate())
        await engine.watch(lambda: engine.stats.pushing == 0)
        engine.check()  # threads that have failed push no more either
        await channel.send(p.Pass(engine.stats.passed_pages))

    async def _name_stale(self, channel: Channel) -> None:
        """What the destination has an old copy of; guest RAM is final."""
        engine = self._engine
        assert engine is not None and self._shape is not None and self._tracking is not None
        await self._tracking.look(Look.STOPPED)
        for index, region in enumerate(self._shape.regions):
            for first in range(0, region.pages, STALE_PAGES):
                count = min(STALE_PAGES, region.pages - first)
                if bits := engine.stale(index, first, count):
                    await channel.send(p.Stale(index, first, count, bits))

    async def _hand_over(self, channel: Channel) -> None:
        """Stop here, device state across, grant, run there: the blackout."""
        self.vm.show(phase="handover", message=f"handing {self.vm.name} over to {self.request.to}")
        assert self._engine is not None
        async with open_nursery() as nursery:
            nursery.start_soon(self._watch_engine)
            nursery.start_soon(self._save, channel)
            while not isinstance(answer := await channel.receive(), p.Loaded):  # Serving
                if self.request.mode != "precopy":
                    raise RemoteProtocolError(
                        f"{self.request.to} sent {type(answer).__name__} where Loaded was due"
                    )
                self._engine.push(self._rate())
            self._loaded_at = time.monotonic()
            if not self._as_offered.is_set():
                async with (
                    open_nursery() as waiting
                ):  # nothing is due; but the destination may fail
                    waiting.start_soon(channel.receive)
                    await self._as_offered.wait()
                    waiting.cancel_scope.cancel()
            self._commit()
            await channel.send(p.Grant(self.vm.epoch))
            nursery.cancel_scope.cancel()
        answer = await channel.receive()
        if isinstance(answer, p.Declined):
            raise PostcopydError(
                f"the destination could not run {self.vm.name}: {answer.reason}", "Declined"
            )
        self._ran()
        parts = {f"{name}_ms": ms for name, ms in self._downtime_parts.items()}
        self.log.info("guest handed over", downtime_ms=self._downtime_ms, **parts)

    async def _save(self, channel: Channel) -> None:
        assert self._shape is not None
        if await self.vm.attached().outline() != self._shape.outline:
            await self._still_seen(trio.Event(), "was prepared")
        await channel.send(p.Handover(whole=self.request.mode == "precopy"))
        size = 0

        async def send(data: bytes) -> None:
            nonlocal size
            for at in range(0, len(data), p.DEVICE_CHUNK):
                await channel.send(p.Device(bytes(data[at : at + p.DEVICE_CHUNK])))
            size += len(data)

        def stopped() -> None:
            self._stopped_at = time.monotonic()

        await self.vm.attached().save(send, stopped)
        self._saved_at = time.monotonic()
        # Only now is RAM final, disk reads that were under way at the stop included. What the
        # destination has asked for meanwhile waits in the urgent socket.
        assert self._engine is not None
        if self._tracking is not None:
            await self._name_stale(channel)
        self._engine.serve()
        await channel.send(p.DeviceEnd(size, run=self.vm.attached().before != "paused"))
        # While the destination loads it, so that the guest waits no longer for this.
        if await self.vm.attached().outline() != self._shape.outline:
            raise PostcopydError(
                f"somebody changed devices or disks of {self.vm.name} as it was handed over: "
                f"migrate again",
                "Refused",
            )
        self._as_offered.set()

    def _commit(self) -> None:
        """The point of no return: recorded first, and no await between the looks and the record."""
        if self._cancelling.cancel_called:
            raise PostcopydError("cancelled by request", "Cancelled")
        assert self._engine is not None
        self._engine.check()
        self.vm.attached().check_saved()
        self.vm.epoch += 1
        try:
            self.vm.record("granted")
        except PostcopydError:
            self.vm.epoch -= 1
            raise
        self._committed = True

    def _ran(self) -> None:
        """The guest runs there: what it waited for. `save` is its VMM here giving the device state,
        `load` the one there taking the rest of it, `run` running it there; a round trip is in the
        second and in the third."""
        self._ran_at = time.monotonic()
        times = (self._stopped_at, self._saved_at, self._loaded_at, self._ran_at)
        parts = zip(("save", "load", "run"), pairwise(times), strict=True)
        self._downtime_parts = {
            name: round((after - before) * 1e3, 2) for name, (before, after) in parts
        }
        self._downtime_ms = round((self._ran_at - self._stopped_at) * 1e3, 2)

    async def _drain(self, channel: Channel) -> None:
        """Its memory follows. On a connection that resumes, what the destination has comes first
        and nothing is pushed before it."""
        engine = self._engine
        assert engine is not None
        self.vm.show(
            phase="postcopy",
            downtime_ms=self._downtime_ms or None,
            message=f"{self.vm.name} runs at {self.request.to}, its memory follows",
        )
        if not self._recoveries and self.request.mode != "precopy":
            engine.push(self._rate())
        self._note()
        self._record_soon(None)
        async with open_nursery() as nursery:
            nursery.start_soon(self._watch_engine)
            nursery.start_soon(self._show_progress)
            while not isinstance(message := await channel.receive(), p.Drained):
                if isinstance(message, p.Progress):
                    self._arrived = max(self._arrived, message.confirmed)
                    self._faults = message.faults
                    self.vm.show(remaining=message.remaining)
                elif isinstance(message, p.Have):
                    engine.have(message.region, message.first, message.count, message.bits)
                else:
                    engine.push(self._rate())
            nursery.cancel_scope.cancel()
        await self._drained(channel, message)

    async def _drained(self, channel: Channel, message: p.Drained) -> None:
        engine = self._engine
        assert engine is not None
        if message.confirmed != engine.stats.total_pages:
            self.machine.happened(Happened.MISCOUNTED)
            raise RemoteProtocolError(
                f"{self.request.to} counts {message.confirmed} pages as drained, "
                f"but the guest has {engine.stats.total_pages}"
            )
        self._faults = message.faults
        moved = time.monotonic()
        await engine.disconnect()  # its threads count what they have sent to the last
        self._uplink.leave(self)
        await self._untrack()
        result = self._result(message, at=moved)
        self._completed = result
        sentence = (
            f"{self.vm.name} is at {self.request.to}, with all of its memory"
            f"{losses.but(message.lost)}"
        )
        if message.lost:
            self.log.error("memory lost", pages=message.lost)
        self.vm.conclude(phase="drained", remaining=0, message=sentence)
        self._record_soon("granted")
        await self._acknowledge(channel)
        trouble = await self._let_go()
        # Who waits for the result is told last, and finds the VMM here as it shall be.
        self.vm.show(result=result, message=sentence + trouble)
        self._record_soon("granted")
        self.log.info(
            "migration completed",
            downtime_ms=result["downtimeMs"],
            brownout_ms=result["brownoutMs"],
            total_ms=result["totalMs"],
            bytes=result["transferredBytes"],
            faults=result["faults"]["count"],
            recoveries=self._recoveries,
            phases=", ".join(f"{one['phase']} {one['ms']:.1f} ms" for one in result["phases"]),
        )
        await self._hooks("drained")

    async def _acknowledge(self, channel: Channel) -> None:
        try:
            await channel.send(p.Acknowledged())
        except PostcopydError:  # the destination has all it needs
            self.log.info("the destination went before it was acknowledged")

    async def _let_go(self) -> str:
        """Ends the VMM here, or leaves it; returns what the operator has to be told."""
        driver = self.vm.driver
        if driver is None:
            return ""
        try:
            await driver.finish(self.request.keep_source)
        except PostcopydError as error:
            self.log.error("the source VMM did not end as told", error=str(error))
            return f"; the VMM here: {error}"
        finally:
            if not self.request.keep_source:
                await self.vm.leave()
        return ""

    # --- after a connection was lost -------------------------------------------------------------

    async def _recover(self) -> None:
        """Until nobody needs this source any more: the guest is there whole, or was declined, or a
        person has decided (`resolve`)."""
        now = trio.current_time()
        patience = 0.0 if self.vm.status.result is not None else PATIENCE_S
        retry = Retry(now, now + patience, self._arrived)
        while self.machine.gave_away and self._completed is None:
            self._poke, recoveries, decision = trio.Event(), self._recoveries, self._decision
            if decision is not None and decision.choice == "kill":
                if await self._killed(decision):
                    return
                continue
            try:
                await self._ask()
                return
            except Exception as error:
                trouble = self._ours(error)
                if trouble.name == p.ENDED:
                    await self._guest_ended(str(trouble))
                    return
                await self._end_early(trouble)
            now = trio.current_time()
            went_on = self._recoveries > recoveries
            wait = retry.failed(trouble.name, now, self._arrived, went_on)
            if now >= retry.told:
                self._tell_paused(trouble)
            lost = self.machine.gave_away
            if decision is not None and lost and await self._taken_back(decision, trouble):
                return
            with trio.move_on_after(wait if self._decision is None else AGAIN_S):
                await self._poke.wait()
        if self._decision is not None and self._decision.choice == "take_back":
            self._decision.done(self._not_here)  # it was declined just then

    async def _guest_ended(self, said: str) -> None:
        """It ran at the destination and was ended there, as was meant: the copy here is of no use
        to anybody, and the guest may be started again, on any host."""
        vm, name, to = self.vm, self.vm.name, self.request.to
        trouble = await self._let_go()
        ended = f"{name} ran at {to} and was ended there before all of its memory had come: {said}"
        over = vm.driver is None and not trouble
        if not over:
            ended += f"{trouble}; its VMM here is left: end it before you start {name} again"
        vm.conclude(
            counted_as="ended",
            phase="failed",
            remaining=0,
            message=ended,
            result=self._result(None, event="ended", error=ended),
        )
        if over:
            vm.home()
        self._record_soon("held" if over else "granted")
        self.log.warning("guest ended while its memory followed", why=said)
        await self._hooks("ended", message=said)

    def _tell_paused(self, trouble: PostcopydError) -> None:
        """Who waits for the result is told that it is a pause, which is a long one."""
        status = self.vm.status
        if status.phase == "paused" and status.result is None:
            self.log.error("migration paused", error=str(trouble))
            self.vm.show(result=self._result(None, event="paused", error=str(trouble)))

    async def _killed(self, decision: Decision) -> bool:
        """A person has given the copy here up: whether its VMM has ended."""
        vm = self.vm
        self._decision = None
        by = f"by an operator's decision, in the middle of the move to {self.request.to}"
        self.log.warning("ownership changed by a person", decision=decision.choice)
        if vm.driver is not None:
            try:
                with within(END_S, f"ending the VMM of {vm.name} here"):
                    await vm.driver.end()
            except Exception as trouble:
                refusal = f"{trouble}; the migration of {vm.name} is as it was"
                self.log.error("decision not carried out", error=refusal)
                decision.done(PostcopydError(refusal, "VmmFailed"))
                return False
        message = (
            f"the VMM of {vm.name} here was ended {by}; memory that the guest there still lacks "
            f"is lost: if it waits, `postcopyd resolve {vm.name}` there too; `postcopyd detach "
            f"{vm.name}` here once you know where it runs"
        )
        result = self._result(None, event="paused", error=f"ended {by}")
        vm.conclude(phase="failed", message=message, result=result)
        self._ending = True
        try:
            vm.record("declined")
        except PostcopydError as error:
            unwritten = f"the VMM of {vm.name} here was ended {by}, which is not on record: {error}"
            vm.conclude(phase="paused", message=unwritten)
            decision.done(PostcopydError(f"{unwritten}; then say it again", error.name))
        decision.done()
        return True

    async def _taken_back(self, decision: Decision, trouble: PostcopydError) -> bool:
        """A person says that the destination is dead, and it was asked once more: whether the
        migration is over. It goes on when there was any word from there."""
        if trouble.name not in GIVEN_UP:
            if self._heard or trouble.name not in SILENT:
                self._refuse(str(trouble))
                return False
            if trio.current_time() < decision.until:
                return False
        if not self._granted.has_told(trouble.name) and (said := await self._where_granted()):
            self._refuse(said)
            return False
        self._decision = None
        self.log.warning("ownership changed by a person", decision=decision.choice)
        try:
            self._own_again()  # or it does not run
        except PostcopydError as error:
            decision.done(error)
            return False
        self.machine.happened(Happened.TAKEN_BACK)
        by = f"by an operator's decision, in the middle of the move to {self.request.to}"
        taken = PostcopydError(f"taken back {by}, as it was when it stopped here", "TakenBack")
        await self._end_early(taken)
        decision.done(self._not_here)
        return True

    async def _where_granted(self) -> str:
        """A person may have said a wrong address (`recover`), and nothing that is heard or not
        heard there tells of the destination: what is heard of it where it was."""
        at, name = self._granted.at, self.vm.name
        if at == self.request.to:
            return ""
        try:
            async with await dial_control(at, Machine(Source.GREETING), self.shared) as channel:
                answers = Granted.greeted(at, await channel.greet())
        except PostcopydError as error:
            return "" if error.name in SILENT else f"where {name} was granted: {error}"
        if not self._granted.would_know(answers):
            return ""
        return f"it answers at {at}, and `postcopyd recover {name} --to {at}` asks it there"

    def _refuse(self, said: str) -> None:
        """Whatever a person has decided: the destination lives."""
        decision, self._decision = self._decision, None
        if decision is not None:
            decision.done(still_there(self.vm.name, self.request.to, decision.choice, said))

    def _own_again(self) -> None:
        """On record before the guest runs here again: a daemon that is started then runs it. What
        the destination may still say is of an epoch that is over. Raises PostcopydError."""
        self.vm.epoch += 1
        try:
            self.vm.record("intent")
        except PostcopydError:
            self.vm.epoch -= 1
            raise

    async def _ask(self) -> None:
        """One attempt: what became of the guest, and the rest of its memory."""
        engine = self._engine
        assert engine is not None
        self._heard = False
        if self._channel is not None:
            await self._channel.aclose()
        await engine.disconnect()
        channel = await self._greeted()
        self._heard = True
        async with channel.alive():
            await channel.send(p.Resume(self.migration, self.vm.name, self.vm.epoch))
            answer = await self._told(channel)
            if not isinstance(answer, p.Declined):
                self._refuse("it has the guest, and goes on with it")
            if isinstance(answer, p.Ready):
                await self._connect(answer.token)
                engine.serve()  # the guest may wait for any of it
                answer = await channel.receive()
            if isinstance(answer, p.Declined):
                raise PostcopydError(
                    f"the destination did not run {self.vm.name}: {answer.reason}", "Declined"
                )
            if isinstance(answer, p.Drained):
                await self._drained(channel, answer)
                return
            if not isinstance(answer, p.Ran):
                raise RemoteProtocolError(
                    f"{self.request.to} sent {type(answer).__name__} where Ran was due"
                )
            self._granted = self._answers  # wherever it was: it is there
            self._recoveries += 1
            if not self._downtime_ms and self._stopped_at:
                self._ran()
            counts.recoveries["source"] += 1
            self.vm.show(result=None)
            self.log.info("migration recovered", recoveries=self._recoveries)
            await self._drain(channel)

    async def _told(self, channel: Channel) -> p.Message:
        """What became of the guest; that nothing is known of it only from who would know."""
        try:
            return await channel.receive()
        except PeerError as error:
            if error.name in UNKNOWN and not self._granted.would_know(self._answers):
                raise unknowing(self.vm.name, self._granted, self._answers) from None
            raise

    def _note(self) -> None:
        """What `restored` needs, for the next record."""
        assert self._shape is not None
        about = {
            "migration": self.migration,
            "request": asdict(self.request),
            "regions": [[r.name, r.pages, r.page_size] for r in self._shape.regions],
            "run": self._shape.state == "running",  # before its stop
            "marked": True,
            "downtime": [self._downtime_ms, self._downtime_parts],
            "recoveries": self._recoveries,
            "passes": [asdict(one) for one in self._passes],
            "why_now": self._why_now,
            "identity": self._identity,
            "granted": self._granted.json(),
        }
        self.vm.note(about)

    # --- when it goes wrong ----------------------------------------------------------------------

    async def _end_early(self, error: PostcopydError) -> None:
        self._ending = not self.machine.gave_away
        self._uplink.leave(self)
        with trio.CancelScope(shield=True):
            if self.machine.gave_away:
                self._paused(error)
            else:
                await self._rolled_back(error)

    def _paused(self, error: PostcopydError) -> None:
        """After the grant nobody here runs the guest, whatever happened."""
        if self._completed is not None:
            self.log.warning("after drained", error=str(error))
            if self.vm.status.result is None:
                message = f"{self.vm.status.message}; the VMM here was not ended: {error}"
                self.vm.show(result=self._completed, message=message)
                self._record_soon("granted")
            return
        self.machine.happened(Happened.LOST)
        ran = self.machine.state is Source.RAN_LOST
        message = (
            f"{self.vm.name} {'runs at' if ran else 'was granted to'} {self.request.to} and part "
            f"of its memory is still here: {error}; it is tried again, keep this VMM as it is"
        )
        if error.name in (p.LOST, p.POISONED):
            message = f"{self.request.to} needs the memory of {self.vm.name} no more: {error}"
        news = self.vm.status.message != message
        if news or self.vm.status.phase != "paused":
            self.vm.show(phase="paused", message=message)
            self._record_soon(None)
            self.log.warning("migration paused", error=str(error))

    async def _rolled_back(self, error: PostcopydError) -> None:
        """Before the grant: the guest as it was, and the destination told."""
        name, vm = self.vm.name, self.vm
        cancelled = error.name == "Cancelled"
        if self.machine.state not in (Source.DECLINED, Source.ROLLED_BACK, Source.TAKEN_BACK):
            self.machine.happened(Happened.FAILED)
        if self._engine is not None:
            await self._engine.disconnect()
        sentence = untouched(name, str(error))
        if self.machine.state is Source.DECLINED:
            try:
                self._own_again()
            except PostcopydError as trouble:  # a daemon that is started again is told the same
                self.log.error("record not written", error=str(trouble))
                vm.epoch += 1
        if self._touched and vm.driver is not None:
            sentence, here = await undone(vm, str(error))
            if not here:
                self._not_here = PostcopydError(sentence, "VmmFailed")
        await self._untrack()
        if self._channel is not None and self.machine.state is Source.ROLLED_BACK:
            # After the guest runs again: a peer that hears nothing would hold it up.
            with suppress(PostcopydError):
                if cancelled:
                    await self._channel.send(p.Cancel(p.sentence(str(error))), within=1)
                else:
                    await self._channel.tell_error(error)
        vm.conclude(
            phase="failed",
            counted_as="cancelled" if cancelled else "failed",
            remaining=0,
            message=sentence,
            result=self._result(None, event="cancelled" if cancelled else "failed", error=sentence),
        )
        vm.home()
        self._record_soon("held")
        if cancelled:
            self.log.info("migration cancelled", error=str(error))
        else:
            self.log.warning("migration failed", error=str(error))
        await self._hooks("failed", message=str(error))

    def _record_soon(self, ownership: Ownership | None) -> None:
        # Where it is not written, what was recorded before stands: the careful side of the truth.
        self.vm.record_soon(ownership)

    async def _untrack(self) -> None:
        tracking, self._tracking = self._tracking, None
        if tracking is not None:
            try:
                await tracking.aclose()
            except Exception:  # a bug: the rest must happen, and tracking ends with the daemon
                self.log.exception("bug in the end of tracking")
            self._tracked = tracking.json()

    async def _close(self) -> None:
        self._uplink.leave(self)
        if self._channel is not None:
            await self._channel.aclose()
        await self._untrack()
        if self._engine is not None:
            await self._engine.aclose()
        if self._shape is not None:
            self._shape.close()
        self._channel = self._engine = self._shape = None

    # --- what people see -------------------------------------------------------------------------

    @property
    def _bandwidth(self) -> int:
        """Of this migration: what was asked for, within what the configuration allows."""
        asked, most = self.request.bandwidth or 0, self.shared.bandwidth
        return min(asked, most) if asked and most else asked or most

    @property
    def _uplink(self) -> Uplink:
        return self.shared.limits.uplink

    def _rate(self) -> int:
        """What it may send from now on; how much that is changes as others begin and end."""
        return self._uplink.join(self, self._bandwidth, self._limit)

    def _limit(self, rate: int) -> None:
        if self._engine is not None:
            self._engine.limit(rate)

    async def _hooks(self, phase: str, **about: Any) -> None:
        await run_hooks(
            self.shared.hooks,
            self.vm.name,
            "source",
            phase,
            migration=self.migration,
            peer=self.request.to,
            **about,
        )

    async def _watch_engine(self) -> None:
        assert self._engine is not None
        await self._engine.watch()

    async def _show_progress(self, until: int | None = None) -> None:
        """`until`: how many pages will have been sent in passes at the end of this one."""
        assert self._engine is not None
        stats, before, at = self._engine.stats, 0, time.monotonic()
        while True:
            await trio.sleep(SHOW_S)
            now, moved = time.monotonic(), stats.transferred_bytes
            self.vm.show(
                total_bytes=self._total_bytes,
                transferred_bytes=moved,
                bytes_per_second=round((moved - before) / (now - at)),
                faults=faults_json(self._faults),
                elapsed_ms=round((now - self._began) * 1e3),
                downtime_ms=self._downtime_ms,
            )
            if until is not None:
                self.vm.show(remaining=max(until - stats.passed_pages, 0) * self._page_size)
            before, at = moved, now

    @property
    def _page_size(self) -> int:
        return self._shape.regions[0].page_size if self._shape and self._shape.regions else 4096

    @property
    def _total_bytes(self) -> int:
        return sum(region.size for region in self._shape.regions) if self._shape else 0

    def _result(
        self,
        drained: p.Drained | None,
        event: str = "completed",
        error: str | None = None,
        at: float | None = None,
    ) -> dict[str, Any]:
        """The result object that design and CLI promise; `at` is when the migration was over.
        Figures that cannot be had, by a bug, keep nobody from being told the rest."""
        figures: dict[str, Any] = {}
        try:
            figures = self._figures(drained, at or time.monotonic())
        except Exception:
            self.log.exception("bug in the figures of a result")
        return {
            "event": event,
            "vm": self.vm.name,
            "migration": self.migration,
            "peer": self.request.to,
            "mode": self.request.mode,
            **figures,
            **({"handedOver": self._why_now} if self._why_now else {}),
            **({"tracking": self._tracked} if self._tracked else {}),
            **({"warning": "; ".join(self._warnings)} if self._warnings else {}),
            **({"error": error} if error else {}),
        }

    def _figures(self, drained: p.Drained | None, at: float) -> dict[str, Any]:
        elapsed = at - self._began
        stats: Any = self._engine.stats if self._engine is not None else None
        since = at - self._ran_at if self._ran_at else 0.0
        since += sum(one.seconds for one in self._passes)
        moved = stats.transferred_bytes if stats else 0
        return {
            "downtimeMs": self._downtime_ms,
            "downtimePartsMs": self._downtime_parts,
            "totalMs": round(elapsed * 1e3, 2),
            "brownoutMs": round(drained.brownout_ms, 2) if drained else 0.0,
            "memory": {
                "totalBytes": self._total_bytes,
                "pageSize": self._page_size,
                "pages": stats.total_pages if stats else 0,
                "zeroPages": drained.zero if drained else 0,
                "precopyPages": stats.precopied_pages if stats else 0,
                "dirtyPages": stats.dirty_pages if stats else 0,
                "pushedPages": drained.placed - drained.urgent if drained else 0,
                "urgentPages": drained.urgent if drained else 0,
                "duplicatePages": drained.duplicate if drained else 0,
                "lostPages": drained.lost if drained else 0,
            },
            "faults": faults_json(self._faults),
            "transferredBytes": moved,
            "bytesPerSecond": round(moved / since) if since else 0,
            "recoveries": self._recoveries,
            "phases": self.vm.phases(at),
            "passes": [one.json() for one in self._passes],
        }


def faults_json(faults: p.Faults) -> dict[str, Any]:
    """The `faults` object of results and status."""
    return {
        "count": faults.count,
        "p50Us": faults.p50_us,
        "p99Us": faults.p99_us,
        "maxUs": faults.max_us,
        "histogramUs": faults.histogram,
    }
