# SPDX-License-Identifier: Apache-2.0
"""One guest leaving: from the offer to drained, or back to running here.

Owns, for the time of one migration: the control channel, the native engine, the descriptors of the
guest's RAM (`Shape`). Order and ownership are handover.py's; this file does what each step means.
Whatever fails before the grant ends in `_rolled_back`, whatever fails after it in `_paused`.
"""

from __future__ import annotations

import time
from contextlib import suppress
from itertools import pairwise
from typing import Any

import structlog
import trio

from postcopyd import protocol as p
from postcopyd.config import parse_address
from postcopyd.connection import Channel, ConnectionLost, detach, dial, open_nursery, receive_object
from postcopyd.control import MigrateRequest
from postcopyd.errors import PostcopydError
from postcopyd.handover import Happened, Machine, Source
from postcopyd.hooks import run_hooks
from postcopyd.protocol import RemoteProtocolError
from postcopyd.settings import Settings
from postcopyd.source.engine import SourceEngine
from postcopyd.vm import Vm
from postcopyd.vmm import Shape

ROLLBACK_S = 30.0
"""How long a VMM may take to run its guest again before the operator is told that it did not."""

SHOW_S = 0.1
"""How often progress is shown."""


class SourceSession:
    """Made and run by the daemon; `cancel` may be called meanwhile."""

    def __init__(self, vm: Vm, request: MigrateRequest, settings: Settings, migration: str) -> None:
        self.vm = vm
        self.request = request
        self.settings = settings
        self.migration = migration
        self.machine = Machine(Source.GREETING)
        self.log = structlog.get_logger().bind(
            vm=vm.name, migration=migration, peer=request.to, role="source"
        )
        self._cancelling = trio.CancelScope()
        self._committed = False
        self._channel: Channel | None = None
        self._engine: SourceEngine | None = None
        self._shape: Shape | None = None
        self._touched = False
        self._began = time.monotonic()
        self._stopped_at = self._saved_at = self._loaded_at = self._ran_at = 0.0
        self._faults = p.Faults()
        self._completed: dict[str, Any] | None = None

    def cancel(self) -> None:
        """Takes the guest back; raises PostcopydError after the grant."""
        if self._committed:
            raise PostcopydError(
                f"{self.vm.name} was granted to {self.request.to} already: it can only go on there",
                "AfterGrant",
            )
        self._cancelling.cancel()

    async def run(self) -> None:
        """The whole migration. What goes wrong ends in the VM's status, and is not raised."""
        vm, to = self.vm, self.request.to
        vm.settle(
            role="source",
            phase="idle",
            migration=self.migration,
            peer=to,
            mode="postcopy",
            result=None,
            message=f"preparing to move {vm.name} to {to}",
        )
        self.log.info("migration begins", bandwidth=self._bandwidth)
        try:
            with self._cancelling:
                await self._migrate()
            if self._cancelling.cancelled_caught:
                await self._end_early(PostcopydError("cancelled by request", "Cancelled"))
        except PostcopydError as error:
            await self._end_early(error)
        except Exception as error:
            self.log.exception("bug in the source's session")
            await self._end_early(PostcopydError(f"internal error: {error!r}", "InternalError"))
        except trio.Cancelled:  # the daemon is going down
            await self._end_early(PostcopydError("the daemon was stopped", "DaemonStopped"))
            raise
        finally:
            with trio.CancelScope(shield=True):
                await self._close()

    async def check(self) -> list[str]:
        """What would keep the migration from going, on both hosts. Touches nothing."""
        shape = self._shape = await self.vm.attached().inspect("source")
        problems = [*shape.problems]
        try:
            channel = await self._greeted()
            await channel.send(self._offer(shape, check=True))
            problems += (await channel.expect(p.Checked)).problems
        except PostcopydError as error:
            problems.append(str(error))
        finally:
            await self._close()
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
        async with channel.alive():
            await channel.send(self._offer(shape))
            token = (await channel.expect(p.Ready)).token
            await self._connect(shape, token)
            await channel.expect(p.Serving)
            assert self._engine is not None
            async with open_nursery() as nursery:  # nothing is due; but the destination may fail
                nursery.start_soon(self._watch_engine)
                nursery.start_soon(channel.receive)
                await self._engine.scan()
                self._touched = True
                await driver.prepare()
                await self._hooks("handover")
                nursery.cancel_scope.cancel()
            self._engine.check()
            self.vm.record("intent", durable=True, peer=self.request.to, run=self._run)
            await self._hand_over(channel)
            await self._drain(channel)

    async def _greeted(self) -> Channel:
        address = parse_address(self.request.to)
        stream = await dial(address.host, address.port, p.CONTROL)
        self._channel = Channel(stream, self.machine, f"postcopyd at {self.request.to}")
        await self._channel.greet()
        return self._channel

    def _offer(self, shape: Shape, *, check: bool = False) -> p.Offer:
        return p.Offer(
            migration=self.migration,
            vm=self.vm.name,
            driver=self.vm.attached().kind,
            regions=[p.RegionOffer(r.name, r.pages, r.page_size) for r in shape.regions],
            facts={key: p.fact(value) for key, value in shape.facts.items()},
            connections=self.settings.connections,
            epoch=self.vm.epoch + 1,
            check=check,
        )

    async def _connect(self, shape: Shape, token: bytes) -> None:
        """The data connections: one urgent, the others for pushing."""
        self._engine = SourceEngine(shape.regions, shape.pid)
        address = parse_address(self.request.to)
        for urgent in (True, *[False] * self.settings.connections):
            stream = await dial(address.host, address.port, p.DATA)
            try:
                await stream.send_all(p.pack(p.DataHello(self.migration, token, urgent)))
                await receive_object(stream, p.DataWelcome)
            except (trio.BrokenResourceError, trio.TooSlowError):
                await trio.aclose_forcefully(stream)
                raise ConnectionLost(f"{self.request.to} refused a data connection") from None
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
            self._engine.connect(detach(stream), urgent=urgent)

    async def _hand_over(self, channel: Channel) -> None:
        """Stop here, device state across, grant, run there: the blackout."""
        self.vm.show(phase="handover", message=f"handing {self.vm.name} over to {self.request.to}")
        await channel.send(p.Handover())
        async with open_nursery() as nursery:
            nursery.start_soon(self._watch_engine)
            nursery.start_soon(self._save, channel)
            await channel.expect(p.Loaded)
            self._loaded_at = time.monotonic()
            self._commit()
            await channel.send(p.Grant(self.vm.epoch))
            nursery.cancel_scope.cancel()
        answer = await channel.receive()
        if isinstance(answer, p.Declined):
            raise PostcopydError(
                f"the destination could not run {self.vm.name}: {answer.reason}", "Declined"
            )
        self._ran_at = time.monotonic()
        self.log.info("guest runs at the destination", downtime_ms=self._downtime_ms)

    async def _save(self, channel: Channel) -> None:
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
        self._engine.serve()
        await channel.send(p.DeviceEnd(size, run=self.vm.attached().before != "paused"))

    def _commit(self) -> None:
        """The point of no return: recorded first, and no await between the looks and the record."""
        if self._cancelling.cancel_called:
            raise PostcopydError("cancelled by request", "Cancelled")
        assert self._engine is not None
        self._engine.check()
        self.vm.epoch += 1
        try:
            self.vm.record("granted", peer=self.request.to)
        except PostcopydError:
            self.vm.epoch -= 1
            raise
        self._committed = True

    async def _drain(self, channel: Channel) -> None:
        engine = self._engine
        assert engine is not None
        self.vm.show(
            phase="postcopy",
            message=f"{self.vm.name} runs at {self.request.to}, its memory follows",
        )
        engine.push(self._bandwidth)
        async with open_nursery() as nursery:
            nursery.start_soon(self._watch_engine)
            nursery.start_soon(self._show_progress)
            while not isinstance(message := await channel.receive(), p.Drained):
                if isinstance(message, p.Progress):
                    self._faults = message.faults
                    self.vm.show(remaining=message.remaining)
            nursery.cancel_scope.cancel()
        if message.confirmed != engine.stats.total_pages:
            raise RemoteProtocolError(
                f"{self.request.to} counts {message.confirmed} pages as drained, "
                f"but the guest has {engine.stats.total_pages}"
            )
        self._faults = message.faults
        moved = time.monotonic()
        await engine.disconnect()  # its threads count what they have sent to the last
        result = self._result(message, at=moved)
        self._completed = result
        sentence = f"{self.vm.name} is at {self.request.to}, with all of its memory"
        self.vm.settle(phase="drained", remaining=0, message=sentence)
        self._record_settled("granted")
        await self._acknowledge(channel)
        trouble = await self._let_go()
        # Who waits for the result is told last, and finds the VMM here as it shall be.
        self.vm.show(result=result, message=sentence + trouble)
        self._record_settled("granted")
        self.log.info("drained", **{k: v for k, v in result.items() if k.endswith("Ms")})
        await self._hooks("drained")

    async def _acknowledge(self, channel: Channel) -> None:
        try:
            await channel.send(p.Acknowledged())
        except PostcopydError:  # the destination has all it needs
            self.log.warning("the destination went before it was acknowledged")

    async def _let_go(self) -> str:
        """Ends the VMM here, or leaves it; returns what the operator has to be told."""
        driver = self.vm.driver
        if driver is None:
            return ""
        try:
            await driver.finish(self.request.keep_source)
        except PostcopydError as error:
            self.log.warning("the source VMM did not end as told", error=str(error))
            return f"; the VMM here: {error}"
        finally:
            if not self.request.keep_source:
                await driver.aclose()
                self.vm.driver = None
        return ""

    # --- when it goes wrong ----------------------------------------------------------------------

    async def _end_early(self, error: PostcopydError) -> None:
        with trio.CancelScope(shield=True):
            if self.machine.gave_away:
                self._paused(error)
            else:
                await self._rolled_back(error)

    def _paused(self, error: PostcopydError) -> None:
        """After the grant nobody here runs the guest, whatever happened."""
        if self._completed is not None:
            self.log.warning("after drained", error=str(error))
            if "result" not in self.vm.status:
                message = f"{self.vm.status['message']}; the VMM here was not ended: {error}"
                self.vm.show(result=self._completed, message=message)
                self._record_settled("granted")
            return
        where = "runs" if self.machine.state in (Source.RAN, Source.DRAINED) else "was granted"
        self.machine.happened(Happened.LOST)
        self.vm.show(
            phase="paused",
            result=self._result(None, event="paused", error=str(error)),
            message=f"{self.vm.name} {where} at {self.request.to} and part of its memory is still "
            f"here: {error}; keep this VMM as it is, it must not run",
        )
        self._record_settled(None)
        self.log.error("migration paused after the grant", error=str(error))

    async def _rolled_back(self, error: PostcopydError) -> None:
        """Before the grant: the guest as it was, and the destination told."""
        name, vm = self.vm.name, self.vm
        cancelled = error.name == "Cancelled"
        if self.machine.state not in (Source.DECLINED, Source.ROLLED_BACK):
            self.machine.happened(Happened.FAILED)
        if self._engine is not None:
            await self._engine.disconnect()
        sentence = f"{name} was not moved and is at this host as it was: {error}"
        if self.machine.state is Source.DECLINED:
            # Ours again, recorded before it runs. What the destination may still say is of an epoch
            # that is over.
            vm.epoch += 1
            self._record_settled("held")
            self._committed = False
        if self._touched and vm.driver is not None:
            try:
                with trio.fail_after(ROLLBACK_S):
                    await vm.driver.rollback()
            except Exception as trouble:  # a driver's bug too: the rest must happen
                why = str(trouble) or f"no answer within {ROLLBACK_S:.0f} s"
                sentence = (
                    f"{name} was not moved ({error}) and its VMM here did not run it again: {why}; "
                    f"it is this host's, run it by the VMM's own means"
                )
                self.log.critical("rollback failed", error=why)
        if self._channel is not None and self.machine.state is Source.ROLLED_BACK:
            # After the guest runs again: a peer that hears nothing would hold it up.
            with suppress(PostcopydError):
                if cancelled:
                    await self._channel.send(p.Cancel(p.sentence(str(error))), within=1)
                else:
                    await self._channel.tell_error(error)
        vm.settle(
            phase="failed",
            remaining=0,
            message=sentence,
            result=self._result(None, event="cancelled" if cancelled else "failed", error=sentence),
        )
        self._record_settled("held")
        self.log.warning("migration ended before the grant", error=str(error))
        await self._hooks("failed", message=str(error))

    def _record_settled(self, ownership: str | None) -> None:
        try:
            self.vm.record(ownership, peer=self.request.to)
        except PostcopydError as error:
            # What was recorded before it stands, and is the careful side of the truth.
            self.log.error("record not written", error=str(error))

    async def _close(self) -> None:
        if self._channel is not None:
            await self._channel.aclose()
        if self._engine is not None:
            await self._engine.aclose()
        if self._shape is not None:
            self._shape.close()
        self._channel = self._engine = self._shape = None

    # --- what people see -------------------------------------------------------------------------

    @property
    def _bandwidth(self) -> int:
        return self.request.bandwidth or self.settings.bandwidth

    @property
    def _run(self) -> bool:
        return self._shape is not None and self._shape.state == "running"

    @property
    def _downtime_ms(self) -> float:
        return round((self._ran_at - self._stopped_at) * 1e3, 2)

    @property
    def _downtime_parts(self) -> dict[str, float]:
        """What the guest waited for: its VMM here giving the device state, the one there taking the
        rest of it, and running it there; a round trip is in the second and in the third."""
        if not self._ran_at:
            return {}
        times = (self._stopped_at, self._saved_at, self._loaded_at, self._ran_at)
        parts = zip(("save", "load", "run"), pairwise(times), strict=True)
        return {name: round((after - before) * 1e3, 2) for name, (before, after) in parts}

    async def _hooks(self, phase: str, **about: Any) -> None:
        await run_hooks(
            self.settings.hooks,
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

    async def _show_progress(self) -> None:
        assert self._engine is not None
        stats, before, at = self._engine.stats, 0, time.monotonic()
        while True:
            await trio.sleep(SHOW_S)
            now, moved = time.monotonic(), stats.transferred_bytes
            self.vm.show(
                totalBytes=self._total_bytes,
                transferredBytes=moved,
                bytesPerSecond=round((moved - before) / (now - at)),
                faults=faults_json(self._faults),
                elapsedMs=round((now - self._began) * 1e3),
                downtimeMs=self._downtime_ms,
            )
            before, at = moved, now

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
        """The result object that design and CLI promise; `at` is when the migration was over."""
        at = at or time.monotonic()
        elapsed = at - self._began
        stats: Any = self._engine.stats if self._engine is not None else None
        since = at - self._ran_at if self._ran_at else 0.0
        moved = stats.transferred_bytes if stats else 0
        return {
            "event": event,
            "vm": self.vm.name,
            "migration": self.migration,
            "peer": self.request.to,
            "mode": "postcopy",
            "downtimeMs": self._downtime_ms if self._ran_at else 0.0,
            "downtimePartsMs": self._downtime_parts,
            "totalMs": round(elapsed * 1e3, 2),
            "brownoutMs": round(drained.brownout_ms, 2) if drained else 0.0,
            "memory": {
                "totalBytes": self._total_bytes,
                "pageSize": self._shape.regions[0].page_size if self._shape else 4096,
                "pages": stats.total_pages if stats else 0,
                "zeroPages": drained.zero if drained else 0,
                "precopyPages": 0,
                "dirtyPages": 0,
                "pushedPages": drained.placed - drained.urgent if drained else 0,
                "urgentPages": drained.urgent if drained else 0,
                "duplicatePages": drained.duplicate if drained else 0,
            },
            "faults": faults_json(self._faults),
            "transferredBytes": moved,
            "bytesPerSecond": round(moved / since) if since else 0,
            "recoveries": 0,
            **({"error": error} if error else {}),
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
