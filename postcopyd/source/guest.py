# SPDX-License-Identifier: Apache-2.0
"""The guest at the source, as the phases use it: its VMM as it was offered, the engine that reads
its RAM, the tracking of what it writes, the keeper of its memory, and what becomes of its VMM.

Owns the engine and the tracking, and ends both in `aclose`, which the session calls at its end. The
session owns the descriptors of guest RAM, which outlive the engine that reads by them. One task at
a time calls the engine.
"""

from __future__ import annotations

from dataclasses import replace

from postcopyd.errors import PostcopydError
from postcopyd.records import schema
from postcopyd.sessions import alike
from postcopyd.source.engine import SourceEngine
from postcopyd.source.figures import NO_STATS
from postcopyd.source.keeping import Keeping
from postcopyd.source.migration import Migration
from postcopyd.source.tracking import Tracking
from postcopyd.source.vacating import Vacating
from postcopyd.vmm import Shape, State


class Guest:
    """`touched`: something was done to its VMM that a rollback has to undo. `tracking` is None if
    there are no passes."""

    def __init__(self, migration: Migration, shape: Shape) -> None:
        self.shape = shape
        self.engine = SourceEngine(shape.regions, shape.pid)
        self.tracking: Tracking | None = None
        self.touched = False
        self.keeping = Keeping(migration.vm, shape, self.engine)
        self.vacating = Vacating(migration, shape, self.keeping)
        self._migration = migration
        migration.figures.stats = self.engine.stats

    @classmethod
    def restored(cls, migration: Migration, shape: Shape, about: schema.Departure) -> Guest:
        """A guest that the previous daemon granted, from its VMM as it is now and its record.
        Raises PostcopydError if the VMM has other RAM than the record."""
        regions = [(r.name, r.pages, r.page_size) for r in shape.regions]
        if regions != [tuple(region) for region in about["regions"]]:
            raise PostcopydError(
                f"the VMM of {migration.vm.name} here has other RAM than the one that was migrated"
            )
        # A rollback puts the guest back into the state that it had before it was stopped.
        before: State = "running" if about["run"] else "paused"
        guest = cls(migration, replace(shape, state=before))
        guest.touched = True
        return guest

    def note(self) -> None:
        """Notes for the next record what a restarted daemon needs of the guest."""
        self._migration.note(self.shape)

    async def still_as_offered(self, meanwhile: str) -> None:
        """Checks, after something that took time, that the VMM still is as it was offered. Only
        whether the guest runs may have changed. Raises PostcopydError."""
        vm = self._migration.vm
        was, now = self.shape, await vm.attached().inspect("source")
        now.close()
        if news := alike.changes(was, now):
            raise PostcopydError(
                f"the VMM of {vm.name} has changed while it {meanwhile}: {'; '.join(news)}; "
                f"migrate again",
                "Refused",
            )
        self.shape = replace(was, state=now.state, outline=now.outline)

    async def outline_is_as_offered(self) -> bool:
        """Whether nothing was plugged, or put behind a disk, since the last look at the VMM. Takes
        a millisecond, so the blackout may ask it too."""
        return await self._migration.vm.attached().outline() == self.shape.outline

    async def untrack(self) -> None:
        """Ends the tracking: the guest's writes cost nothing any more. Idempotent."""
        tracking, self.tracking = self.tracking, None
        if tracking is not None:
            try:
                await tracking.aclose()
            except Exception:  # a bug: cleaning up goes on, and tracking ends with the daemon
                self._migration.log.exception("bug in the end of tracking")
            self._migration.figures.tracked = tracking.json()

    async def aclose(self) -> None:
        """Ends the tracking, the engine and a VMM that was made for nothing. Idempotent."""
        await self.vacating.aclose()
        await self.untrack()
        self._migration.figures.stats = NO_STATS
        await self.engine.aclose()
