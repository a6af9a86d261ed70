# SPDX-License-Identifier: Apache-2.0
"""The half of the driver at the destination: adopts guest RAM, loads the device state, runs it.

Owns the userfaultfds that it has QEMU make, until `release`; their duplicates are the caller's.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterable
from contextlib import suppress
from typing import Any

import trio

from postcopyd.errors import PostcopydError
from postcopyd.tasks import threads
from postcopyd.tasks.nursery import open_nursery
from postcopyd.vmm import (
    Declined,
    Shape,
    VmmError,
    looked_at,
)
from postcopyd.vmm.qemu import disks as qemu_disks
from postcopyd.vmm.qemu import hugepages, ram, settings, stream, userfaultfd
from postcopyd.vmm.qemu.answers import Status
from postcopyd.vmm.qemu.common import Qemu, close_each
from postcopyd.vmm.qemu.events import Events
from postcopyd.vmm.qemu.qmp import QmpClosed, QmpRefused
from postcopyd.vmm.qemu.settings import ARRIVING, LATE

# One thread reads the faults of one userfaultfd: several serve several vCPUs better, but each
# costs a thread. Region i belongs to descriptor i % number.
MAX_DESCRIPTORS = 4


class Arriving(Qemu):
    """A QEMU that waits for a guest, or has received one."""

    async def adopt(self, shape: Shape) -> list[int]:
        """Empties the RAM and makes the userfaultfds in QEMU: min(4, number of regions) of them.

        Region i of the shape belongs to descriptor i % number. They are sorted by their number in
        QEMU, so that `adopted` can return them in the same order.
        Raises PostcopydError; then nothing is left in QEMU, and the RAM is as good as empty.
        """
        await self._waits()
        regions = list(shape.regions)
        sharers = await trio.to_thread.run_sync(
            ram.sharers, regions, self.pid, limiter=threads.WALKS
        )
        if sharers:
            raise VmmError(sharers[0])
        await userfaultfd.close_all(self.pid)
        await self._make_ready()
        descriptors: dict[int, int] = {}
        try:
            if not self._forbade_huge:  # before the RAM is emptied: after that there are none
                self._forbade_huge = await hugepages.forbid(self.pid)
            await self.discard(shape)
            for _ in range(min(len(regions), MAX_DESCRIPTORS)):
                ours, number = await self._new_userfaultfd()
                descriptors[number] = ours
            self._made = sorted(descriptors)
        except BaseException:
            close_each(descriptors.values())
            with trio.CancelScope(shield=True), suppress(PostcopydError, OSError):
                await self.release()
            raise
        return [descriptors[number] for number in sorted(descriptors)]

    async def _waits(self) -> None:
        """Raises VmmError unless QEMU waits for a guest."""
        state = (await self._qmp.ask(Status, "query-status")).status
        if state != "inmigrate":
            raise VmmError(
                f"The QEMU of {self.name} does not wait for a guest (run state {state}), so its "
                f"RAM was not touched: start it anew with -incoming defer."
            )

    async def _make_ready(self) -> None:
        await self._settings.apply()
        # Whatever QEMU's options are, the guest must not run before it is told to.
        await self._qmp.execute("stop")

    async def _new_userfaultfd(self) -> tuple[int, int]:
        return await userfaultfd.create(self._qmp, self.pid)

    async def discard(self, shape: Shape) -> None:
        """Empties the RAM. Raises VmmError when not all of it could be emptied."""
        await ram.empty(list(shape.regions), self.pid)

    async def adopted(self) -> list[int]:
        """Duplicates of the userfaultfds in QEMU, in the order that `adopt` returned them."""
        with looked_at(self.name, self.pid):
            return userfaultfd.duplicates(self.pid)

    async def load(self, receive: AsyncIterable[bytes]) -> None:
        """Feeds the device state; returns with the guest paused and the stream at its end.

        After any failure this QEMU is useless: `end` it. Raises VmmError, VmmGone, and whatever
        `receive` raises.
        """
        arguments: dict[str, Any] = {"uri": stream.URI}
        if self._qmp.version >= (9, 1):
            arguments["exit-on-error"] = False
        with self._qmp.events("RESUME", "MIGRATION") as events:
            async with stream.opened(self._qmp) as ours, open_nursery() as crew:
                await self._qmp.execute("migrate-incoming", arguments)
                crew.start_soon(
                    stream.feed,
                    ours,
                    receive,
                    self._begun,
                    lambda: self._takes_disks,
                    self._nearly_loaded,
                )
                await self._loaded(events)
        await self._must_have_disks()

    async def _must_have_disks(self) -> None:
        """Raises VmmError if a guest that is to stay paused lacks a disk."""
        if self._takes_disks and (disks := await qemu_disks.untaken(self._qmp)):
            raise VmmError(
                f"QEMU could not take the disk{'s' if disks[1:] else ''} {', '.join(disks)} of "
                f"{self.name}, which is to stay paused: see who holds the images (its own log "
                f"says more), and start this QEMU anew."
            )

    @property
    def _takes_disks(self) -> bool:
        """Whether QEMU is to take the disks at the end of the load, not at `cont`. QEMU before 10
        aborts when it gives away disks that it has not taken, and a paused guest gets no `cont`."""
        return self.before == "paused" and self._qmp.version < (10, 0)

    async def _begun(self) -> None:
        """QEMU has begun to load, so the guard is not for this stream any more: until the guest
        runs, nobody else's save or move of it may begin."""
        await self._tell(settings.parameters(tls_creds=ARRIVING))

    async def _nearly_loaded(self) -> None:
        """QEMU waits for the last byte, and is to take the disks with it."""
        await self._tell(settings.capabilities({LATE: False}))

    async def _tell(self, command: settings.Command) -> None:
        with suppress(QmpClosed):  # `_loaded` hears of it too, and says so
            await self._qmp.execute(*command, patience=math.inf)

    async def _loaded(self, events: Events) -> None:
        ran = False
        while True:
            event = await events.next()
            ran |= event["event"] == "RESUME"
            status = event["data"].get("status")
            if status == "failed":
                raise VmmError(
                    f"QEMU could not load the device state of {self.name}: "
                    f"{await self._why(status)}; see that both QEMUs have the same devices, and "
                    f"start this one anew."
                )
            if status == "completed":
                if ran:
                    raise VmmError(f"QEMU ran {self.name} before it was told to: end it.")
                return

    async def run(self) -> None:
        """Runs the guest. Raises Declined when it certainly did not run, another PostcopydError
        when that cannot be known. Waits while QEMU waits for a page."""
        with self._qmp.events("RESUME") as events:
            try:
                await self._qmp.execute("cont", patience=math.inf)
            except QmpClosed as closed:
                if closed.unsent:
                    raise Declined(f"The guest {self.name} was not run: {closed}") from None
                raise
            except QmpRefused as refusal:
                if not await self._runs():
                    raise Declined(
                        f"QEMU would not run the guest {self.name} ({refusal.reason}): see that "
                        f"its disks are not in use elsewhere."
                    ) from None
                return
            resumed = events.take() is not None
        # QEMU answers `cont` after RESUME. In some states it accepts `cont` and ignores it.
        if not resumed and not await self._runs():
            raise VmmError(
                f"QEMU accepted to run {self.name} but does not: look at QMP query-status."
            )
        with suppress(PostcopydError):  # lets others move and save it again; it runs in any case
            await self._qmp.tell(*settings.parameters(tls_creds=""))

    async def release(self) -> None:
        """Closes the userfaultfds in QEMU and puts its settings back.

        Only after the guest is drained, or before `load`."""
        if self._made is None:  # a previous daemon may have made some
            await userfaultfd.close_all(self.pid)
        else:
            await userfaultfd.close(self.pid, self._made)
        self._made = None
        if self._forbade_huge is not False:
            await hugepages.allow(self.pid, known=bool(self._forbade_huge))
            self._forbade_huge = None
        await self._restore_settings()

    async def _restore_settings(self) -> None:
        await self._settings.restore()
