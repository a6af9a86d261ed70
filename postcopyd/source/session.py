# SPDX-License-Identifier: Apache-2.0
"""The departure of one guest: from the offer until it is drained, or runs here again.

`_migrate` is the whole of it, in the order of the protocol. Each phase is a file of its own:
offer.py, precopy.py, blackout.py, drain.py. What fails before the grant ends in rollback.py, what
fails after it in recovery.py. handover.py decides order and ownership.

Owns what the phases borrow, and closes it when all has been said (`_close`): the descriptors of the
guest's RAM, the engine and the tracking (`Guest`), the control channel (`Peer`). A task of the
daemon runs the session. Other tasks may only `cancel` it before the grant, and tell it what a
person wants (`recover`, `resolve`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, closing
from typing import Any

import msgspec
import trio

from postcopyd.errors import PostcopydError
from postcopyd.handover import Machine, Source
from postcopyd.model import Checked, MigrateRequest
from postcopyd.sessions import hugepages
from postcopyd.sessions.found import found
from postcopyd.sessions.shared import Shared
from postcopyd.sessions.vm import Vm
from postcopyd.source import keeping, offer, precopy, recovery, vacating
from postcopyd.source.blackout import Blackout
from postcopyd.source.decision import Choice, still_there
from postcopyd.source.drain import Drain
from postcopyd.source.guest import Guest
from postcopyd.source.migration import Migration
from postcopyd.source.precopy import Precopy
from postcopyd.source.recovery import Recovery
from postcopyd.source.rollback import Rollback, tell_driver
from postcopyd.vmm import Shape


class SourceSession:
    """Made and run by the daemon: by `begin` and `run`, or `check`, or, made by `restored`, by
    `resume`."""

    def __init__(
        self,
        vm: Vm,
        request: MigrateRequest,
        shared: Shared,
        name: str,
        state: Source = Source.GREETING,
    ) -> None:
        self.migration = Migration(vm, request, shared, name, Machine(state))
        self._held = AsyncExitStack()
        self._rollback = Rollback(self.migration)
        self._recovery: Recovery | None = None  # until there is a guest that could be granted

    @property
    def machine(self) -> Machine:
        return self.migration.machine

    @property
    def huge(self) -> hugepages.Ram | None:
        """The RAM whose huge pages tracking has split, once that is over."""
        guest = self._rollback.guest
        if guest is None or not self.migration.figures.tracked or guest.vacating.taken:
            return None
        return hugepages.Ram.of(guest.shape.pid, guest.shape.regions)

    def begin(self) -> None:
        """Shows that this is the VM's migration from here on."""
        migration, vm, asked = self.migration, self.migration.vm, self.migration.request
        vm.conclude(
            role="source",
            phase="idle",
            migration=migration.name,
            peer=asked.to,
            mode=asked.mode,
            result=None,
            message=f"preparing to move {vm.name} to {asked.to}",
        )

    async def run(self) -> None:
        """Runs the whole migration, after `begin`. Failures are shown in the VM's status, and not
        raised."""
        migration, asked = self.migration, self.migration.request
        migration.log.info("migration started", mode=asked.mode, bandwidth=migration.bandwidth)
        if (asked.bandwidth or 0) > migration.bandwidth:
            migration.figures.warnings.append(
                f"sent {migration.bandwidth} bytes a second at most, as the configuration of the "
                f"source has it, and not {asked.bandwidth} as asked for"
            )
        await self._whole(self._migrate)

    async def _migrate(self) -> None:
        migration = self.migration
        shape = await self._inspected()
        offer.refuse(migration.vm, shape)
        await migration.hooks("prepare")
        channel = await offer.greeted(migration, shape)
        async with channel.alive():
            guest = self._leaving(Guest(migration, shape))
            if migration.request.mode != "postcopy":
                await precopy.track(migration, guest)
            await offer.accepted(migration, guest, channel)
            if guest.tracking is not None:
                await Precopy(migration, guest, guest.tracking, channel).run()
            blackout = Blackout(migration, guest, channel)
            await blackout.prepare()
            await blackout.run()
            await Drain(migration, guest, channel).run()

    async def _inspected(self) -> Shape:
        return self._looked_at(await self.migration.vm.attached().inspect("source"))

    def _looked_at(self, shape: Shape) -> Shape:
        self._held.enter_context(closing(shape))
        self.migration.figures.inspected(shape)
        return shape

    def _leaving(self, guest: Guest) -> Guest:
        self._held.push_async_callback(guest.aclose)
        self._rollback.guest = guest
        self._recovery = Recovery(self.migration, guest, self._rollback)
        return guest

    async def check(self) -> Checked:
        """What would prevent the migration, on both hosts, what would make it another one than was
        asked for, and what is to be moved. Touches nothing. Raises PostcopydError, also when it was
        cancelled."""
        migration = self.migration
        with migration.cancelling:
            try:
                shape = await self._inspected()
                here = found(migration.vm.attached(), shape)
                problems = await offer.problems(migration, shape)
                return Checked(problems, migration.figures.warnings, here)
            finally:
                with trio.CancelScope(shield=True):
                    await self._close()
        name = migration.vm.name
        raise PostcopydError(f"the check of {name} was cancelled by request", "Cancelled")

    @classmethod
    async def restored(cls, vm: Vm, about: Any, shared: Shared) -> SourceSession:
        """The session of a guest that the previous daemon granted, for `resume`.

        Raises PostcopydError when the VMM cannot be asked for its RAM, and has left no keeper.
        """
        request = msgspec.convert(about["request"], MigrateRequest)
        # A VMM is ended here only when the destination has said that it runs the guest.
        state = Source.RAN_LOST if vacating.definition(vm) else Source.GRANTED_LOST
        session = cls(vm, request, shared, about["migration"], state)
        session.migration.know_again(about)
        try:
            if vm.driver is None:  # it has ended, and its memory may be kept
                shape = session._looked_at(keeping.shape(vm))
            else:
                await tell_driver(vm)
                shape = await session._inspected()
            session._leaving(Guest.restored(session.migration, shape, about))
        except BaseException:
            await session._held.aclose()
            raise
        return session

    async def resume(self) -> None:
        """Runs the rest of a migration whose guest the previous daemon granted."""
        await self._whole(self._recover)

    # --- what others may do meanwhile ------------------------------------------------------------

    def cancel(self) -> None:
        """Takes the guest back, or ends a check. Raises PostcopydError after the grant, and when
        there is nothing left to cancel."""
        name, to = self.migration.vm.name, self.migration.peer.to
        if self.migration.ending:
            raise PostcopydError(
                f"cancelling the migration of {name}: it has failed already and is at its "
                f"last steps, see `postcopyd status {name}`",
                "NotMigrating",
            )
        if self.migration.committed:
            raise PostcopydError(
                f"{name} was granted to {to} already: it can only go on there", "AfterGrant"
            )
        self.migration.cancelling.cancel()

    def recover(self, to: str | None) -> None:
        """Has the destination asked again at once, at the address `to` if that is not None."""
        if to is not None and self._recovery is not None:
            self._recovery.redirect(to)
        self.migration.person.wants_it_asked()

    async def resolve(self, choice: Choice) -> None:
        """Has a person's decision about a paused migration carried out; returns once that is done.
        Raises PostcopydError if it was not, and says why."""
        migration, vm = self.migration, self.migration.vm
        if migration.machine.state is Source.DRAINED:
            said = "it says that it has all of the guest"
            raise still_there(vm.name, migration.peer.to, choice, said)
        if migration.person.decision is not None or migration.ending:
            raise PostcopydError(
                f"{vm.name}: it was decided about just now; see `postcopyd status {vm.name}`",
                "Busy",
            )
        decision = migration.person.decides(choice)
        try:
            await decision.outcome()
        finally:
            if migration.ending:  # a caller that has its answer finds the VM free
                await vm.free.wait()

    # --- how it ends -----------------------------------------------------------------------------

    async def _whole(self, steps: Callable[[], Awaitable[None]]) -> None:
        migration = self.migration
        try:
            try:
                with migration.cancelling:
                    await steps()
                if migration.cancelling.cancelled_caught:
                    await self._end_early(PostcopydError("cancelled by request", "Cancelled"))
            except Exception as error:
                await self._end_early(migration.ours(error))
                if migration.machine.gave_away and migration.completed is None:
                    await self._recover()
        except trio.Cancelled:  # the daemon is going down
            await self._end_early(PostcopydError("the daemon was stopped", "DaemonStopped"))
            raise
        finally:
            migration.ending = True
            if (decision := migration.person.decision) is not None:
                ended = f"{migration.vm.name}: its migration has ended: "
                ended += migration.vm.status.message
                decision.done(PostcopydError(ended, "NotMigrating"))
            with trio.CancelScope(shield=True):
                await self._close()

    async def _end_early(self, error: PostcopydError) -> None:
        """Pauses the migration if the guest was granted; else rolls it back."""
        if self.migration.machine.gave_away:
            recovery.pause(self.migration, error)
        else:
            await self._rollback.run(error)

    async def _recover(self) -> None:
        if self._recovery is not None:
            await self._recovery.run()

    async def _close(self) -> None:
        """The channel first: a peer that sees data connections end is told why."""
        self.migration.stop_sending()
        await self.migration.peer.aclose()
        await self._held.aclose()
