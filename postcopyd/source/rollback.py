# SPDX-License-Identifier: Apache-2.0
"""Undoes a migration that failed before the grant, or was declined or taken back after it.

Undoes only what is known to be our own doing, and never runs a guest that others may have moved.
Then tells the destination, and then people. No cancel reaches it. Ends the data connections, but
neither the control channel nor the engine: the session does that afterwards.
"""

from __future__ import annotations

from typing import Literal

import structlog
import trio

from postcopyd.errors import PostcopydError
from postcopyd.handover import Happened, Source
from postcopyd.sessions.vm import Vm
from postcopyd.source.guest import Guest
from postcopyd.source.keeping import let_go
from postcopyd.source.migration import Migration
from postcopyd.vmm import VmmGone

ROLLBACK_S = 30.0
"""How long a VMM may take to run its guest again before the operator is told that it did not."""


class Rollback:
    """Made before any step. `guest` is None until there may be something to undo. After a rollback
    that failed, `trouble` is why the guest is not here as it was."""

    def __init__(self, migration: Migration) -> None:
        self._migration, self._vm = migration, migration.vm
        self.guest: Guest | None = None
        self.trouble: PostcopydError | None = None

    async def run(self, error: PostcopydError) -> None:
        """Undoes it and tells everybody; `error` is why the guest was not moved."""
        self._migration.ending = True
        self._migration.stop_sending()
        with trio.CancelScope(shield=True):
            sentence = await self._undone(error)
            await self._told(error, sentence)

    async def _undone(self, error: PostcopydError) -> str:
        """Makes the guest this host's again; returns the sentence about that."""
        machine, vm = self._migration.machine, self._vm
        if machine.state not in (Source.DECLINED, Source.ROLLED_BACK, Source.TAKEN_BACK):
            machine.happened(Happened.FAILED)
        if self.guest is not None:
            await self.guest.engine.disconnect()
        if machine.state is Source.DECLINED:
            try:
                own_again(vm)
            except PostcopydError as trouble:  # a restarted daemon asks, and is told the same
                self._migration.log.error("record not written", error=str(trouble))
                vm.epoch += 1
        sentence = untouched(vm.name, str(error))
        if self.guest is not None and self.guest.touched:
            sentence, here = await undone(vm, str(error))
            if not here:
                self.trouble = PostcopydError(sentence, "VmmFailed")
            await let_go(vm)
        if self.guest is not None:
            await self.guest.untrack()
        return sentence

    async def _told(self, error: PostcopydError, sentence: str) -> None:
        """Tells the destination and people, after the guest runs again: a peer that takes nothing
        would hold it up."""
        migration, vm = self._migration, self._vm
        ended: Literal["cancelled", "failed"]
        ended = "cancelled" if error.name == "Cancelled" else "failed"
        if migration.machine.state is Source.ROLLED_BACK:
            await migration.peer.tell_end(error)
        vm.conclude(
            phase="failed",
            counted_as=ended,
            remaining=0,
            message=sentence,
            result=migration.result(ended, sentence),
        )
        vm.home()
        vm.record_soon("held")
        if ended == "cancelled":
            migration.log.info("migration cancelled", error=str(error))
        else:
            migration.log.warning("migration failed", error=str(error))
        await migration.hooks("failed", message=str(error))


def own_again(vm: Vm) -> None:
    """Records, before the guest runs here again, that it may: a daemon that is restarted then runs
    it. What the destination may still say is of the old epoch. Raises PostcopydError."""
    vm.record("intent", vm.epoch + 1)


async def tell_driver(vm: Vm) -> None:
    """Tells the driver, from the record, what the previous daemon has done to the guest. Raises
    PostcopydError."""
    driver, about = vm.attached(), vm.about
    driver.before = "running" if about["run"] else "paused"
    if not about.get("marked", False):
        await driver.mark()


async def undone(vm: Vm, why: str) -> tuple[str, bool]:
    """Has the driver put the guest back; `why` it was not moved. Returns the sentence about that,
    and whether it went well: the guest is here as it was, or as others have left it."""
    moved = f"{vm.name} was not moved"
    try:
        if vm.driver is None:
            raise VmmGone("see why in its own log")
        with trio.fail_after(ROLLBACK_S):
            left = await vm.driver.rollback()
    except VmmGone as gone:
        vm.log.error("rollback failed", error=str(gone))
        return (
            f"{moved} ({why}) and its VMM here has ended, by a failure or because the guest was "
            f"shut down: {gone}",
            False,
        )
    except Exception as trouble:  # also a driver's bug: cleaning up goes on
        said = str(trouble) or f"no answer within {ROLLBACK_S:.0f} s"
        if not isinstance(trouble, PostcopydError | trio.TooSlowError):
            structlog.get_logger().exception("bug in a driver", vm=vm.name)
        vm.log.error("rollback failed", error=said)
        return (
            f"{moved} ({why}) and its VMM here did not run it again: {said}; it is this host's, as "
            f"far as this move is concerned: look at its VMM before you run it",
            False,
        )
    return undone_as(vm.name, why, left), True


def undone_as(name: str, why: str, left: str) -> str:
    """The sentence for a guest that was put back; `left` is what `Vmm.rollback` has returned."""
    if left:
        return f"{name} was not moved ({why}) and was left here as it was found: {left}"
    return f"{name} was not moved and is at this host as it was: {why}"


def untouched(name: str, why: str) -> str:
    """The sentence for a guest to which nothing was done."""
    return f"{name} was not moved, and nothing was done to it here: {why}"
