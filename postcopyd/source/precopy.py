# SPDX-License-Identifier: Apache-2.0
"""Second phase, in the modes hybrid and precopy: copies the guest's memory in passes, while the
guest runs on here.

tracking.py finds what the guest has written again. After each pass passes.py decides, from what was
measured, whether another one pays. The blackout has the last look, once the guest is stopped.
Borrows the channel and the guest; the figures of the passes stay in `figures.passes`.
"""

from __future__ import annotations

import time

import trio
from msgspec import to_builtins

from postcopyd import protocol as p
from postcopyd.errors import PostcopydError
from postcopyd.net.channel import Channel
from postcopyd.source.guest import Guest
from postcopyd.source.migration import Migration
from postcopyd.source.passes import Pass, why_now
from postcopyd.source.tracking import Tracking
from postcopyd.tasks.nursery import open_nursery

MAX_DOWNTIME_MS = 300.0
"""The longest downtime of a precopy, if nothing else was asked for; the same as QEMU's."""

STOPPED_S = 0.1
"""Once passes have stopped a guest with direct I/O for so long in all, hybrid makes no more."""


async def track(migration: Migration, guest: Guest) -> None:
    """Begins to track what the guest writes, or warns that this is not possible. Called before the
    offer, which says whether there will be passes. Raises PostcopydError for a precopy, which needs
    them."""
    guest.touched = True
    try:
        guest.tracking = await Tracking.of(migration.vm, guest.shape, guest.engine)
    except PostcopydError as error:
        if migration.request.mode == "precopy":
            raise PostcopydError(f"{error}; --mode postcopy does not need it", error.name) from None
        migration.figures.warnings.append(f"handed over without a pass before: {error}")
        migration.log.warning("no passes", error=str(error))


class Precopy:
    """The passes of a guest that is tracked."""

    def __init__(
        self, migration: Migration, guest: Guest, tracking: Tracking, channel: Channel
    ) -> None:
        self._migration, self._figures, self._vm = migration, migration.figures, migration.vm
        self._guest, self._engine, self._tracking = guest, guest.engine, tracking
        self._channel = channel

    async def run(self) -> None:
        """Makes passes until another one would not pay. Raises PostcopydError, also for a precopy
        that does not converge."""
        request, figures = self._migration.request, self._figures
        mode, most = request.mode, request.precopy_passes
        downtime_s = (request.max_downtime_ms or MAX_DOWNTIME_MS) / 1e3
        assert mode != "postcopy"
        while not figures.why_now and (most != 0 or mode == "precopy"):
            figures.passes.append(await self._pass(await self._arm()))
            shown = [one.shown() for one in figures.passes]
            self._migration.log.info("pass", **to_builtins(shown[-1]))
            self._vm.show(passes=shown)
            figures.why_now = why_now(mode, figures.passes, most, downtime_s) or ""
            if not figures.why_now and mode == "hybrid" and self._tracking.stopped_s > STOPPED_S:
                figures.why_now = (
                    "each pass stops the guest, for its direct I/O, longer than it gains"
                )

    async def _arm(self) -> int:
        """Arms the pages, so that the next look finds what the guest writes from here on. Returns
        how many pages to send. With direct I/O the guest is held still for that; a daemon that is
        restarted then runs it again (`roll_back`)."""
        if not self._guest.shape.direct_io:
            return await self._tracking.arm()
        self._guest.note()
        self._vm.record("intent")
        pages = await self._tracking.arm_still(self._vm)
        self._vm.record("held")
        return pages

    async def _pass(self, pages: int) -> Pass:
        self._vm.show(
            phase="precopy",
            remaining=pages * self._figures.page_size,
            message=f"copying {self._vm.name} to {self._migration.peer.to} while it runs here, "
            f"pass {len(self._figures.passes) + 1}",
        )
        stats, began = self._engine.stats, time.monotonic()
        before, moved = stats.passed_pages, stats.transferred_bytes
        async with open_nursery() as nursery:
            nursery.start_soon(self._send)
            nursery.start_soon(self._migration.show_progress, before + pages)
            seen = trio.Event()
            nursery.start_soon(self._look_at_vmm, seen)  # may take longer than a short pass
            await self._channel.expect(p.Passed)
            seconds = time.monotonic() - began
            await seen.wait()
            nursery.cancel_scope.cancel()
        return Pass(
            pages=stats.passed_pages - before,
            bytes=stats.transferred_bytes - moved,
            seconds=seconds,
            left=await self._tracking.look(),
        )

    async def _send(self) -> None:
        engine = self._engine
        engine.copy(self._migration.rate(self._engine))
        await engine.watch(lambda: engine.stats.pushing == 0)
        engine.check()  # nothing is pushing after a failure either
        await self._channel.send(p.Pass(engine.stats.passed_pages))

    async def _look_at_vmm(self, seen: trio.Event) -> None:
        await self._guest.still_as_offered("was copied")
        seen.set()
