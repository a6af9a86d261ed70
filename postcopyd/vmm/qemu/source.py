# SPDX-License-Identifier: Apache-2.0
"""The half of the driver at the source: stops the guest, saves its device state, undoes that.

Owns what it has changed in QEMU (settings, the guard), until `rollback` or `finish`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio

from postcopyd.errors import PostcopydError
from postcopyd.vmm import (
    VmmError,
    VmmTimeout,
    looked_at,
)
from postcopyd.vmm.qemu import settings, stream, userfaultfd
from postcopyd.vmm.qemu.answers import Migration
from postcopyd.vmm.qemu.common import Qemu
from postcopyd.vmm.qemu.qmp import Events, QmpClosed, QmpRefused
from postcopyd.vmm.qemu.settings import BANDWIDTH, IGNORE, MOVED, STOPPED
from postcopyd.vmm.qemu.state import PAUSED, Now

FAIL_SECONDS = 2.0  # for a migration whose stream has lost its other end
FINISH_SECONDS = 10.0  # for one that may have disks to flush
STOP_SECONDS = 30.0  # for a guest's disks to be drained
CONT_SECONDS = 10.0  # for a guest that we stopped and whose disks may still be draining
DISK_LOCK_SECONDS = 5.0  # how long a destination that was just killed may still hold a disk
POLL_SECONDS = 0.005


class Leaving(Qemu):
    """A QEMU whose guest is to leave, or has left."""

    async def prepare(self) -> None:
        """Note what the guest does, and the settings that `save` changes; nothing is changed."""
        await self._look()
        await self._settings.note(settings.SOURCE)

    async def track(self) -> int:
        """As the interface says: some thread of QEMU makes it, between two of its instructions."""
        with looked_at(self.name, self.pid):
            if (await self._now()).migration.over:  # or they may be QEMU's own
                await userfaultfd.close_all(self.pid)
            return await userfaultfd.borrow(self._qmp, self.pid)

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """Between QMP `stop`, which is answered when the disks are drained, and `cont`."""
        before = self.before
        if await self._look() != "running":
            self.before = before
            yield
            return
        with self._qmp.events("RESUME") as events:
            try:
                await self._hold()
                yield
            finally:
                resumed = await self._move_again(events)
                self.before = before
        if resumed:
            raise VmmError(
                f"The guest {self.name} was resumed by someone else while its written pages were "
                f"looked at: leave it alone and migrate again."
            )

    async def _hold(self) -> None:
        """The guard first: a guest that is stopped under it was stopped by us."""
        _, stopped, migration = await self._qmp.execute_all(
            [
                settings.parameters(tls_creds=STOPPED),
                ("stop", None),
                ("query-migrate", None),
            ],
            patience=STOP_SECONDS,
        )
        if isinstance(stopped, QmpRefused):
            raise stopped
        if not self._qmp.as_kind(Migration, migration, "`query-migrate`").over:
            raise VmmError(
                f"Somebody else began to move or save the guest {self.name} just now: wait for "
                f"the end of that and migrate again."
            )

    async def _move_again(self, events: Events) -> bool:
        """Run the guest after a stop of our own, also in a task that is cancelled. Returns whether
        somebody else had run it.

        QEMU takes commands in their order: a `stop` that nobody waits for any more comes before.
        """
        try:
            with trio.fail_after(CONT_SECONDS, shield=True):
                now = await self._quiet(STOPPED)
                # The answers come behind the event of whoever ran the guest before us.
                resumed = now.running or events.take() is not None
                if now.held(STOPPED):
                    await self._run_again()
                elif not now.running:
                    raise VmmError(
                        f"The guest {self.name} was stopped for a moment and was not run again, as "
                        f"somebody else has changed its state meanwhile: {now.words}."
                    )
                await self._settings.unguard()
                return resumed
        except (trio.TooSlowError, VmmTimeout):
            raise VmmTimeout(
                f"The guest {self.name} was stopped for a moment, and QEMU has not run it again "
                f"within {CONT_SECONDS:g} s: see what its disks wait for, then send QMP `cont` to "
                f"{self.socket}, if nobody has moved it meanwhile."
            ) from None

    async def save(
        self, send: Callable[[bytes], Awaitable[None]], stopped: Callable[[], None]
    ) -> None:
        """Stop the guest and stream its device state; returns with QEMU in postmigrate.

        `stopped` is called once: at STOP, or at the start for a guest that did not run. RAM is
        final when this returns and not at STOP, after which QEMU waits for its disks. After a
        failure or cancellation `rollback` has to be called. Raises VmmError, VmmGone, and
        whatever `send` raises.
        """
        with self._qmp.events("STOP", "RESUME", "MIGRATION") as events:
            known = await self._settings.note(settings.SOURCE)
            if await self._look() == "paused":
                stopped()
            self._watch()
            async with (
                stream.opened(self._qmp) as ours,
                stream.crew() as crew,  # until the relay has seen the end of the stream
            ):
                crew.start_soon(stream.relay, ours, send)
                await self._begin(known)
                await self._saved(events, stopped if self.before == "running" else None)
            while (event := events.take()) is not None:
                self._must_not_resume(event)

    async def _begin(self, known: dict[str, bool]) -> None:
        """Our own migration, in one piece with what has to be so for its time. While it goes on
        QEMU takes no other, and afterwards the guard is there."""
        with trio.CancelScope(shield=True):  # or nobody would know whose migration goes on
            # What comes after `migrate` may be answered only when the device state was read: QEMU
            # holds its main loop up while it writes that.
            _, ignoring, begun = await self._qmp.execute_all(
                [
                    *settings.ours(known),
                    ("migrate", {"uri": stream.URI}),
                ],
                unheard=[settings.parameters(tls_creds=MOVED)],
            )
            if not isinstance(begun, QmpRefused):
                self._moved = True
            else:
                # In this order: without the guard nobody's save may leave guest RAM out.
                put_back, _ = await self._qmp.execute_all(
                    [
                        settings.capabilities({IGNORE: self._settings.found_ignoring}),
                        settings.parameters(tls_creds=""),
                    ]
                )
                refused = isinstance(put_back, QmpRefused) and not isinstance(ignoring, QmpRefused)
                if refused and not (await self._now()).migration.over:
                    # Somebody else's began between two of our commands and leaves guest RAM out:
                    # what cannot be right has to fail.
                    await self._qmp.execute("migrate_cancel")
        for refusal in (begun, ignoring):
            if isinstance(refusal, QmpRefused):
                raise VmmError(
                    f"QEMU would not save the device state of {self.name}: {refusal.reason}."
                )

    async def _saved(self, events: Events, stopped: Callable[[], None] | None) -> None:
        while True:
            event = await events.next()
            self._must_not_resume(event)
            status = event["data"].get("status")
            if event["event"] == "STOP" and stopped is not None:
                stopped()
                stopped = None
            elif status == "completed":
                # At once, and nobody waits for it: what others save from now on is to be whole.
                await self._qmp.tell(
                    *settings.capabilities({IGNORE: self._settings.found_ignoring})
                )
                if stopped is not None:
                    raise VmmError(f"QEMU saved the guest of {self.name} without stopping it.")
                return
            elif status in ("failed", "cancelled"):
                raise VmmError(
                    f"QEMU gave up saving the device state of {self.name}: "
                    f"{await self._why(status)}."
                )

    def _must_not_resume(self, event: dict[str, Any]) -> None:
        if event["event"] == "RESUME":
            raise VmmError(
                f"The guest {self.name} was resumed by someone else while it was being handed "
                f"over: leave it alone and migrate again."
            )

    def check_saved(self) -> None:
        if self._resumes is not None and self._resumes.queue:
            raise VmmError(
                f"The guest {self.name} was resumed by someone else after its state was saved: "
                f"leave it alone and migrate again."
            )

    def _watch(self, *, on: bool = True) -> None:
        """For who runs the guest from now on, or no more."""
        if self._resumes is not None:
            self._qmp.unsubscribe(self._resumes)
        self._resumes = self._qmp.subscribe("RESUME") if on else None

    async def rollback(self) -> str:
        """The guest as it was before we stopped it, from whatever state QEMU is in. Idempotent.

        A guest that was paused and whose state was saved whole stays in QEMU's run state
        postmigrate (nothing leads from there to paused but running): `cont` runs it as ever, but it
        must run before it can be migrated again. Raises VmmError when it cannot be run again.
        """
        self._watch(on=False)
        before = self.before or self._seen
        now = await self._quiet(STOPPED, MOVED)
        moved = self._moved = self._moved or now.guard == MOVED
        if before == "running" and (now.held(STOPPED) or now.held(MOVED)):
            await self._run_again()
            now = await self._now()
        await self._settings.restore()
        if moved and now.running:
            await self._announce()
        self._seen, self.before = before, None
        if now.migration.over:  # or they may be QEMU's own
            with suppress(PostcopydError, OSError):  # of no use, and no harm
                await userfaultfd.close_all(self.pid)
        stands = PAUSED | ({"postmigrate"} if moved else set())
        if not now.migration.over or before is None:
            return "" if now.migration.over else now.words
        as_it_was = now.running if before == "running" else now.run_state in stands
        if not as_it_was and now.running:
            return "it was paused, and somebody else has run it meanwhile"
        return "" if as_it_was else now.words

    async def mark(self) -> None:
        """As the interface says: the guard. Its migration is known by the bandwidth that it has
        set, and goes on or is over; a pause has no such sign, but to end one makes no second guest.
        """
        now = await self._now()
        guard = None
        if now.run_state in {"finish-migrate", "postmigrate"}:
            ours = (await self._settings.read()).max_bandwidth == BANDWIDTH
            guard = MOVED if ours else None
        elif now.run_state == "paused" and now.migration.over:
            guard = STOPPED
        if guard is not None and now.guard is None:
            await self._settings.guard(guard)

    async def _announce(self) -> None:
        """Switches may have learnt the destination's port from its announcement."""
        found = await self._settings.read()
        await self._qmp.execute(
            "announce-self",
            {
                "initial": found.announce_initial,
                "max": found.announce_max,
                "rounds": found.announce_rounds,
                "step": found.announce_step,
            },
        )

    async def _quiet(self, *guards: str) -> Now:
        """What QEMU is at once no migration goes on that has begun under one of these guards, or
        that a stop of ours was put upon. Others are left alone, and their end is not waited for.

        Our end of our own migration's stream is closed, so it fails by itself in milliseconds,
        unless it has been written whole, and then it completes. QEMU takes its disks back after
        either. After `migrate_cancel` past the stop, 7.2 runs the guest with its disks inactive and
        aborts at their next use: that is for a migration that neither writes nor stops, and for a
        pause that somebody else asked for.
        """
        deadline = trio.current_time() + FAIL_SECONDS
        while True:
            now = await self._now()
            status, stopping = now.migration.status, now.run_state == "finish-migrate"
            if now.guard not in guards or (now.migration.over and not stopping):
                return now
            if now.guard == MOVED:
                stuck = not stopping and trio.current_time() > deadline
                if status == "pre-switchover" or (stuck and not now.migration.over):
                    await self._qmp.execute("migrate_cancel")
                if status == "cancelling":  # 7.2 may have missed it on its way into the pause
                    with suppress(QmpRefused):
                        await self._qmp.execute("migrate-continue", {"state": "cancelling"})
            await trio.sleep(POLL_SECONDS)

    async def _run_again(self) -> None:
        """`cont`, for a guest of which it was just seen that we hold it."""
        deadline = trio.current_time() + DISK_LOCK_SECONDS
        while True:
            try:
                await self._qmp.execute("cont", patience=math.inf)
                return
            except QmpRefused as refusal:
                if "lock" not in refusal.reason or trio.current_time() > deadline:
                    raise VmmError(
                        f"The guest {self.name} stays stopped at the source, as QEMU would not run "
                        f"it again ({refusal.reason}): see who holds its disks, which may be this "
                        f"same guest, running elsewhere; if it does not, release them and send QMP "
                        f"`cont` to {self.socket}."
                    ) from None
            await trio.sleep(POLL_SECONDS * 10)

    async def finish(self, keep: bool) -> None:
        """The guest runs elsewhere: end this QEMU, or leave it stopped. Fine if it has ended."""
        self._watch(on=False)
        if not keep:
            await self._end(FINISH_SECONDS)
        else:
            with suppress(QmpClosed):
                await self._settings.restore()
