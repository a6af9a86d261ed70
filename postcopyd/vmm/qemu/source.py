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
FINISH_SECONDS = 10.0  # for a QEMU that may have disks to flush
STOP_SECONDS = 30.0  # for a guest's disks to be drained
CONT_SECONDS = 10.0  # for a guest that was stopped, and whose disks may still be draining
DISK_LOCK_SECONDS = 5.0  # how long a destination that was just killed may still hold a disk
POLL_SECONDS = 0.005


class Leaving(Qemu):
    """A QEMU whose guest is to leave, or has left."""

    async def prepare(self) -> None:
        """Notes what the guest does, and the settings that `save` changes; changes nothing."""
        await self._look()
        await self._settings.note(settings.SOURCE)

    async def track(self) -> int:
        """As the interface says. Some thread of QEMU makes it, between two of its instructions."""
        with looked_at(self.name, self.pid):
            if (await self._now()).migration.over:  # otherwise they may be QEMU's own
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
        """Sets the guard, then stops the guest: so a stop under the guard is this driver's."""
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
        """Runs the guest after a stop by this driver, even in a cancelled task. Returns whether
        somebody else had run it. Raises VmmError and VmmTimeout.

        QEMU takes commands in order, so a `stop` that nobody waits for any more comes before.
        """
        try:
            with trio.fail_after(CONT_SECONDS, shield=True):
                now = await self._quiet(STOPPED)
                # Had somebody else run the guest, the event would have come before the answers.
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
        """Stops the guest and streams its device state; returns with QEMU in postmigrate.

        `stopped` is called once: at STOP, or at the start if the guest did not run. RAM is final
        when this returns and not at STOP, after which QEMU waits for its disks. After a failure or
        cancellation the caller must call `rollback`. Raises VmmError, VmmGone, and whatever `send`
        raises.
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
        """Starts the driver's migration, in one piece with the settings it needs. QEMU takes no
        other while it goes on, and afterwards the guard is there."""
        with trio.CancelScope(shield=True):  # or nobody would know whose migration goes on
            # A command behind `migrate` may be answered only after the device state was read, as
            # QEMU's main loop stands still while it writes that.
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
                    # Somebody else's migration began between two commands, and leaves guest RAM
                    # out. It cannot be right, so it has to fail.
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
                # At once, and without waiting: what others save from here on must be whole.
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
        """Starts to watch for anybody running the guest, or with `on` False stops to."""
        if self._resumes is not None:
            self._qmp.unsubscribe(self._resumes)
        self._resumes = self._qmp.subscribe("RESUME") if on else None

    async def rollback(self) -> str:
        """Leaves the guest as it was before the driver stopped it, whatever state QEMU is in.
        Idempotent. Raises VmmError when it cannot be run again.

        A guest that was paused, and whose state was saved whole, stays in QEMU's run state
        postmigrate, as QEMU has no way back to paused but through running. `cont` runs it as ever,
        but it must run before it can be migrated again."""
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
        if now.migration.over:  # otherwise they may be QEMU's own
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
        """As the interface says: sets the guard. The driver's migration, over or not, is known by
        the bandwidth that it has set. A pause has no such sign, but ending one makes no second
        guest."""
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
        """Announces the guest here: switches may have learnt the destination's port from it."""
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
        """Waits for the end of a migration that began under one of these guards, or that a stop by
        this driver came upon; returns what QEMU is at then. Other migrations are left alone, and
        their end is not waited for.

        The driver's end of its migration's stream is closed. So it fails by itself in milliseconds,
        or completes if it has been written whole; after either, QEMU takes its disks back.
        `migrate_cancel` is only for a migration that neither writes nor stops, and for a pause that
        somebody else asked for: past the stop it has 7.2 run the guest with its disks inactive, and
        abort at their next use."""
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
        """`cont`, for a guest that was just seen to be stopped by this driver."""
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
        """The guest runs elsewhere: ends this QEMU, or leaves it stopped. It may have ended."""
        self._watch(on=False)
        if not keep:
            await self._end(FINISH_SECONDS)
        else:
            with suppress(QmpClosed):
                await self._settings.restore()
