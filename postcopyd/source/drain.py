# SPDX-License-Identifier: Apache-2.0
"""Fourth phase: the guest runs at the destination, and the rest of its memory follows.

Threads of the engine answer requests and push pages. This file starts them, shows how far they are,
and compares the counts at the end. Then nobody needs the copy here, and the VMM is ended. If the
connection is lost meanwhile, recovery.py makes a Drain for the next one. Borrows the channel and
the guest.
"""

from __future__ import annotations

import time

from postcopyd import protocol as p
from postcopyd.errors import PostcopydError
from postcopyd.handover import Happened
from postcopyd.model import Result
from postcopyd.net.channel import Channel
from postcopyd.protocol import RemoteProtocolError
from postcopyd.sessions import losses
from postcopyd.source.guest import Guest
from postcopyd.source.keeping import let_go
from postcopyd.source.migration import Migration
from postcopyd.source.vacating import has_vacated
from postcopyd.tasks.nursery import open_nursery


class Drain:
    """The drain over one connection."""

    def __init__(self, migration: Migration, guest: Guest, channel: Channel) -> None:
        self._migration, self._figures, self._vm = migration, migration.figures, migration.vm
        self._guest, self._engine, self._channel = guest, guest.engine, channel

    async def run(self) -> None:
        """Returns when all memory is there. On a connection that resumes, the destination first
        says which pages it has; nothing is pushed before that. Raises PostcopydError."""
        figures, vm = self._figures, self._vm
        vm.show(
            phase="postcopy",
            downtime_ms=figures.downtime_ms or None,
            message=f"{vm.name} runs at {self._migration.peer.to}, its memory follows",
        )
        if not figures.recoveries and self._migration.request.mode != "precopy":
            self._engine.push(self._migration.rate(self._engine))
        self._guest.note()
        vm.record_soon(None)
        async with open_nursery() as nursery:
            nursery.start_soon(self._engine.watch)
            nursery.start_soon(self._migration.show_progress)
            nursery.start_soon(self._guest.vacating.run)
            while not isinstance(message := await self._channel.receive(), p.Drained):
                if isinstance(message, p.Progress):
                    figures.arrived = max(figures.arrived, message.confirmed)
                    figures.faults = message.faults
                    vm.show(remaining=message.remaining)
                    self._guest.keeping.hold()
                elif isinstance(message, p.Have):
                    self._engine.have(message.region, message.first, message.count, message.bits)
                else:
                    self._engine.push(self._migration.rate(self._engine))
            nursery.cancel_scope.cancel()
        await self.over(message)

    async def over(self, drained: p.Drained) -> None:
        """Ends the migration: the destination says that it has all. Raises PostcopydError if the
        two sides count differently."""
        migration, vm = self._migration, self._vm
        if drained.confirmed != self._engine.stats.total_pages:
            migration.machine.happened(Happened.MISCOUNTED)
            raise RemoteProtocolError(
                f"{migration.peer.to} counts {drained.confirmed} pages as drained, "
                f"but the guest has {self._engine.stats.total_pages}"
            )
        result = migration.completed = await self._counted(drained)
        sentence = (
            f"{vm.name} is at {migration.peer.to}, with all of its memory{losses.but(drained.lost)}"
        )
        if drained.lost:
            migration.log.error("memory lost", pages=drained.lost)
        vm.conclude(phase="drained", remaining=0, message=sentence, result=None)
        # If this cannot be written, the previous record stands: by it the next daemon asks again,
        # for which it needs the VMM.
        written = vm.record_soon("granted")
        await self._acknowledge()
        trouble = await finish_vmm(migration) if written else UNWRITTEN
        # The result is shown last: a client that waits for it then finds the VMM in its last state.
        vm.show(result=result, message=sentence + trouble)
        vm.record_soon("granted")
        self._log(result)
        await migration.hooks("drained")

    async def _counted(self, drained: p.Drained) -> Result:
        """Ends the sending, and returns the result with every byte counted."""
        self._figures.faults = drained.faults
        moved = time.monotonic()
        await self._engine.disconnect()  # joins its threads, so that their counts are final
        self._migration.stop_sending()
        await self._guest.untrack()
        return self._migration.result("completed", drained=drained, at=moved)

    async def _acknowledge(self) -> None:
        try:
            await self._channel.send(p.Acknowledged())
        except PostcopydError:  # the destination does not depend on it
            self._migration.log.info("the destination went before it was acknowledged")

    def _log(self, result: Result) -> None:
        self._migration.log.info(
            "migration completed",
            downtime_ms=result.downtime_ms,
            brownout_ms=result.brownout_ms,
            total_ms=result.total_ms,
            bytes=result.transferred_bytes,
            faults=result.faults and result.faults.count,
            recoveries=self._figures.recoveries,
            phases=", ".join(f"{one.phase} {one.ms:.1f} ms" for one in result.phases or []),
        )


UNWRITTEN = "; its VMM here stays, stopped, until that is on record"
"""Told of a guest that has left for good, while the state folder is full."""


async def finish_vmm(migration: Migration) -> str:
    """Ends the VMM here, or leaves it stopped for `keep_source`. Returns a clause for the operator
    if that failed, else an empty string."""
    vm, keep = migration.vm, migration.request.keep_source
    ended = has_vacated(vm)
    await let_go(vm)
    try:
        if vm.driver is not None and not ended:
            vm.driver.undefines = migration.request.undefines
            await vm.driver.finish(keep)
    except PostcopydError as error:
        migration.log.error("the source VMM did not end as told", error=str(error))
        return f"; the VMM here: {error}"
    finally:
        if not keep:
            await vm.leave()
    return ""
