# SPDX-License-Identifier: Apache-2.0
"""The pause of a migration that fails after the grant, by a lost connection or anything else, until
it goes on or ends.

The guest does not run here meanwhile. The source dials again and asks, until the whole guest is at
the destination (drain.py), was declined there (rollback.py), has ended there, or a person has
decided (resolve.py). retry.py says when it asks again. The engine stays: it has the guest's RAM,
and the guest may wait for any page of it. `Peer` closes each connection before it makes the next.
One task does all of this; a person only wakes it (`Person`).
"""

from __future__ import annotations

import trio

from postcopyd import counts
from postcopyd import protocol as p
from postcopyd.errors import PostcopydError
from postcopyd.handover import Happened, Source
from postcopyd.net.channel import Channel
from postcopyd.protocol import RemoteProtocolError
from postcopyd.source.decision import Person
from postcopyd.source.drain import Drain, finish_vmm
from postcopyd.source.figures import Figures
from postcopyd.source.guest import Guest
from postcopyd.source.migration import Migration
from postcopyd.source.resolve import kill, refuse_decision, take_back
from postcopyd.source.retry import AGAIN_S, GONE, PATIENCE_S, Retry
from postcopyd.source.rollback import Rollback
from postcopyd.source.vacating import definition, put_back
from postcopyd.tasks.nursery import open_nursery


def pause(migration: Migration, error: PostcopydError) -> None:
    """Shows and records what has stopped a migration whose guest was granted."""
    vm, to = migration.vm, migration.peer.to
    migration.stop_sending()
    if migration.completed is not None:
        migration.log.warning("after its end", error=str(error))
        if vm.status.result is None:
            vm.show(
                result=migration.completed,
                message=f"{vm.status.message}; the VMM here was not ended: {error}",
            )
            vm.record_soon("granted")
        return
    migration.machine.happened(Happened.LOST)
    ran = migration.machine.state is Source.RAN_LOST
    message = (
        f"{vm.name} {'runs at' if ran else 'was granted to'} {to} and part of its memory is still "
        f"here: {error}; it is tried again"
    ) + ("" if definition(vm) else ", keep this VMM as it is")
    if error.name == GONE:
        message = f"{vm.name} {'runs at' if ran else 'was granted to'} {to}: {error}"
    if error.name in (p.LOST, p.POISONED):
        message = f"{to} needs the memory of {vm.name} no more: {error}"
    if (vm.status.message, vm.status.phase) != (message, "paused"):
        vm.show(phase="paused", message=message)
        vm.record_soon(None)
        migration.log.warning("migration paused", error=str(error))


class Recovery:
    """Made as soon as there is a guest, run only if it was granted. `_heard`: the destination has
    answered the last attempt to ask it."""

    def __init__(self, migration: Migration, guest: Guest, rollback: Rollback) -> None:
        self._migration, self._figures, self._vm = migration, migration.figures, migration.vm
        self._guest, self._engine = guest, guest.engine
        self._rollback = rollback
        self._heard = False

    def redirect(self, to: str) -> None:
        """Gives the destination another address, and refuses a decision that is pending: the
        destination must be asked there before anybody calls it dead."""
        self._migration.peer.to = to
        refuse_decision(self._migration, "it is to be asked there first, as was said just now")
        self._guest.note()
        self._vm.show(peer=to)
        self._vm.record_soon(None)

    async def run(self) -> None:
        """Returns when nobody needs this source any more."""
        person, figures = self._migration.person, self._figures
        now = trio.current_time()
        patience = PATIENCE_S if self._vm.status.result is None else 0.0
        retry = Retry(now, now + patience, figures.arrived)
        await self._guest.keeping.begin()
        async with open_nursery() as nursery:
            nursery.start_soon(self._guest.vacating.run)
            await self._until_over(person, figures, retry)
            nursery.cancel_scope.cancel()

    async def _until_over(self, person: Person, figures: Figures, retry: Retry) -> None:
        while True:
            self._guest.keeping.hold()
            decision, recoveries = person.heard(), figures.recoveries
            if decision is not None and decision.choice == "kill":
                if await kill(self._migration, self._guest.vacating, decision):
                    return
                continue
            trouble = await self._asked()
            if trouble is None:
                return
            now = trio.current_time()
            went_on = figures.recoveries > recoveries
            wait = retry.failed(trouble.name, now, figures.arrived, went_on)
            if now >= retry.told:
                self._tell_paused(trouble)
            if decision is not None and await take_back(
                self._migration,
                self._rollback,
                self._guest.vacating,
                decision,
                trouble,
                heard=self._heard,
            ):
                return
            with trio.move_on_after(wait if person.decision is None else AGAIN_S):
                await person.listen()

    async def _asked(self) -> PostcopydError | None:
        """Makes one attempt. None: the migration is over; else the error, which has been shown."""
        try:
            await self._ask()
            return None
        except Exception as error:
            trouble = self._migration.ours(error)
        if trouble.name == p.ENDED:
            await self._guest_ended(str(trouble))
            return None
        if self._migration.machine.gave_away:
            pause(self._migration, trouble)
            return trouble if self._migration.completed is None else None
        await self._rollback.run(trouble)
        decision = self._migration.person.decision
        if decision is not None and decision.choice == "take_back":
            decision.done(self._rollback.trouble)  # the destination declined just then
        return None

    async def _ask(self) -> None:
        """Asks what became of the guest, and sends the rest of its memory if it runs there."""
        migration, vm = self._migration, self._vm
        self._heard = False
        await migration.peer.aclose()
        await self._engine.disconnect()
        channel = await migration.peer.greeted()
        self._heard = True
        async with channel.alive():
            await channel.send(p.Resume(migration.name, vm.name, vm.epoch))
            answer = await migration.peer.told(channel)
            if not isinstance(answer, p.Declined):
                refuse_decision(migration, "it has the guest, and goes on with it")
            if isinstance(answer, p.Ready):
                await migration.peer.connect(channel, self._engine, migration.name, answer.token)
                self._engine.serve()  # the guest may wait for any page
                answer = await channel.receive()
            if isinstance(answer, p.Declined):
                raise PostcopydError(
                    f"the destination did not run {vm.name}: {answer.reason}", "Declined"
                )
            if isinstance(answer, p.Drained):
                await Drain(migration, self._guest, channel).over(answer)
                return
            if not isinstance(answer, p.Ran):
                raise RemoteProtocolError(
                    f"{migration.peer.to} sent {type(answer).__name__} where Ran was due"
                )
            await self._go_on(channel)

    async def _go_on(self, channel: Channel) -> None:
        """Serves the guest again, which runs there."""
        migration, figures = self._migration, self._figures
        migration.peer.granted = migration.peer.answers  # this daemon has the guest for certain
        figures.recoveries += 1
        if not figures.downtime_ms and figures.stopped_at:
            figures.ran()
        counts.recoveries["source"] += 1
        self._vm.show(result=None)
        migration.log.info("migration recovered", recoveries=figures.recoveries)
        await Drain(migration, self._guest, channel).run()

    def _tell_paused(self, trouble: PostcopydError) -> None:
        """Tells clients that wait for the result that this is a long pause."""
        status = self._vm.status
        if status.phase == "paused" and status.result is None:
            self._migration.log.error("migration paused", error=str(trouble))
            result = self._migration.result("paused", str(trouble))
            self._vm.show(result=result)

    async def _guest_ended(self, said: str) -> None:
        """Ends a migration whose guest was ended on purpose at the destination: nobody needs the
        copy here, and the guest may be started again on any host."""
        migration, vm = self._migration, self._vm
        text = definition(vm) or migration.definition
        trouble = await finish_vmm(migration)
        put = await put_back(vm, text) if not migration.request.keep_source else ""
        ended = (
            f"{vm.name} ran at {migration.peer.to} and was ended there before all of its memory "
            f"had come: {said}{put}"
        )
        over = vm.driver is None and not trouble
        if not over:
            ended += f"{trouble}; its VMM here is left: end it before you start {vm.name} again"
        result = migration.completed = migration.result("ended", ended)
        vm.conclude(
            counted_as="ended",
            phase="failed",
            remaining=0,
            message=ended,
            result=result,
        )
        if over:
            vm.home()
        vm.record_soon("held" if over else "granted")
        migration.log.warning("guest ended while its memory followed", why=said)
        await migration.hooks("ended", message=said)
