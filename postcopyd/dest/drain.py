# SPDX-License-Identifier: Apache-2.0
"""The fifth phase of an arrival, from `ran` to `drained`: the rest of the memory follows the guest.

The engine asks for the pages and places them. This file watches it and tells the source how far it
is. Once everything is here, it gives guest RAM back to the kernel and records the guest as this
host's. Owns the tasks that watch and tell, which end with `until_drained`.
"""

from __future__ import annotations

from contextlib import suppress

import trio

from postcopyd import protocol as p
from postcopyd.dest.memory import Memory
from postcopyd.dest.migration import Migration, Stage
from postcopyd.errors import PostcopydError
from postcopyd.handover import Happened
from postcopyd.native.engine import faults
from postcopyd.sessions import hugepages, losses
from postcopyd.sessions.patience import RELEASE_S, within
from postcopyd.tasks.nursery import open_nursery

PROGRESS_S = 0.1
"""How long until the source is told again how far the destination is."""
ACKNOWLEDGE_S = 10.0
"""How long the source may take to acknowledge the end."""


class Drain:
    """The drain of a guest that was granted to this host."""

    def __init__(self, m: Migration, memory: Memory) -> None:
        self._m = m
        self._memory = memory
        self._engine = memory.engine
        self._stats = memory.engine.stats

    async def until_drained(self) -> None:
        """Returns when every page is here and the source has acknowledged it, or will ask. Raises
        PostcopydError while pages are missing."""
        m = self._m
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(m.watch_vmm)
                nursery.start_soon(m.listen)
                nursery.start_soon(self._memory.watch_answers, m)
                nursery.start_soon(self._say_progress)
                while not self._engine.complete:
                    await self._engine.wait()
                nursery.cancel_scope.cancel()
        except (Exception, trio.Cancelled) as error:
            if not self._engine.complete:
                raise
            m.log.info("all is here, and only the source not told", error=str(error))
        with trio.CancelScope(shield=True):  # a daemon that is stopped still does this
            await self.end()
        try:
            with trio.move_on_after(ACKNOWLEDGE_S):
                await m.channel.expect(p.Acknowledged)
                m.vm.about["acknowledged"] = True
        except PostcopydError as error:
            m.log.info("drained, but the source did not acknowledge it", error=str(error))
        await self.told()

    async def end(self) -> None:
        """Ends the arrival, as every page is here or lost: unregisters guest RAM unless pages were
        lost, records the end, and tells the source."""
        m, vm, lost = self._m, self._m.vm, self._engine.lost
        if not lost:
            await self._unregister()
        trouble = await self._keep()
        m.stage = Stage.HERE
        if not lost:
            m.huge = hugepages.Ram.of(self._memory.shape.pid, self._memory.shape.regions)
        drained = self._counted()
        sentence = losses.arrived(vm.name, m.peer, lost) + trouble
        vm.conclude(phase="drained", remaining=0, message=sentence)
        m.note(drained)
        vm.home()
        written = vm.record_soon(None if lost else "held")
        # The userfaultfds go after the record is written: a daemon that starts then needs them no
        # more. If it is not written they stay, and the page record with them, by which the next
        # daemon sees that the guest is whole.
        if lost:
            m.log.error("memory lost", pages=lost)
        elif written:
            await self._release()
        m.log.info(
            "migration completed",
            brownout_ms=round(drained.brownout_ms, 2),
            pages=drained.confirmed,
            faults=drained.faults.count,
        )
        with suppress(PostcopydError):  # the wait for the acknowledgement sees the same error
            await m.channel.send(drained)

    async def told(self) -> None:
        """Runs the last hooks: the source knows of the end, or will ask."""
        self._m.machine.happened(Happened.LOST)
        await self._m.hooks("drained")

    async def _keep(self) -> str:
        """Has what the source's VMM was outlast this one, before the source forgets it. Returns a
        clause for the operator if that failed."""
        m, vm = self._m, self._m.vm
        if not m.offer.definition:
            return ""
        try:
            with within(RELEASE_S, f"keeping the definition of {vm.name}"):
                await vm.attached().keep(m.offer.definition)
        except Exception as error:  # the guest is here, whatever becomes of its definition
            m.log.error("definition not kept", error=str(error))
            return f"; but its definition is not kept here: {error}"
        return ""

    async def _unregister(self) -> None:
        try:
            self._engine.unregister()
        except PostcopydError:  # some RAM was unplugged; of zeros only, or placing had noticed it
            await self._engine.disconnect()
            await self._memory.give_up_unplugged(self._m.log)
            self._engine.unregister()

    def _counted(self) -> p.Drained:
        stats = self._stats
        return p.Drained(
            confirmed=stats.confirmed_pages,
            zero=stats.zero_pages,
            placed=stats.urgent_pages + stats.pushed_pages,
            urgent=stats.urgent_pages,
            duplicate=stats.duplicate_pages,
            requests=stats.requests,
            discarded=stats.discarded_pages,
            brownout_ms=max(stats.last_urgent_ns - self._m.ran_ns, 0) / 1e6,
            faults=faults(stats),
            lost=self._engine.lost,
        )

    async def _release(self) -> None:
        vm = self._m.vm
        try:
            with within(RELEASE_S, f"closing the userfaultfds of {vm.name}"):
                await vm.attached().release()
        except Exception as error:  # an unused descriptor stays in the VMM
            self._m.log.warning("the VMM keeps its userfaultfd", error=str(error))

    async def _say_progress(self) -> None:
        m, stats = self._m, self._stats
        while True:
            remaining = self._memory.remaining
            m.vm.show(remaining=remaining)
            await m.channel.send(p.Progress(stats.confirmed_pages, remaining, faults(stats)))
            await trio.sleep(PROGRESS_S)
