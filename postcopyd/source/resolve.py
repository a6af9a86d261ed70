# SPDX-License-Identifier: Apache-2.0
"""Carries out or refuses a person's decision about a departure that is paused.

The one task of the recovery calls this between two attempts to ask the destination, so that a
destination that answers just then has the last word. The decision itself is in decision.py.
"""

from __future__ import annotations

import trio

from postcopyd.errors import PostcopydError
from postcopyd.handover import Happened
from postcopyd.sessions import losses
from postcopyd.sessions.patience import END_S, within
from postcopyd.source.decision import GIVEN_UP, SILENT, Decision, still_there
from postcopyd.source.keeping import let_go
from postcopyd.source.migration import Migration
from postcopyd.source.rollback import Rollback, own_again, tell_driver
from postcopyd.source.vacating import Vacating, definition, put_back


def refuse_decision(migration: Migration, said: str) -> None:
    """Refuses what a person has decided, if anything: the destination is alive, as `said` tells."""
    person = migration.person
    decision, person.decision = person.decision, None
    if decision is not None:
        to = migration.peer.to
        decision.done(still_there(migration.vm.name, to, decision.choice, said))


async def kill(migration: Migration, vacating: Vacating, decision: Decision) -> bool:
    """Ends the VMM here, as a person has given its copy up. Returns whether it has ended."""
    vm, text = migration.vm, definition(migration.vm)
    await vacating.stop()
    await vacating.drop()
    migration.person.decision = None
    migration.log.warning("ownership changed by a person", decision=decision.choice)
    if vm.driver is not None or "keeper" in vm.about:
        try:
            with within(END_S, f"ending the VMM of {vm.name} here"):
                if vm.driver is not None:
                    await vm.driver.end()
                if trouble := await let_go(vm):
                    raise trouble
        except Exception as trouble:
            refusal = f"{trouble}; the migration of {vm.name} is as it was"
            migration.log.error("decision not carried out", error=refusal)
            decision.done(PostcopydError(refusal, "VmmFailed"))
            return False
    put = await put_back(vm, text)
    by = f"by an operator's decision, in the middle of the move to {migration.peer.to}"
    message = (
        f"the VMM of {vm.name} here was ended {by}{put}; memory that the guest there still lacks "
        f"is lost: if it waits, `postcopyd resolve {vm.name}` there too; `postcopyd detach "
        f"{vm.name}` here once you know where it runs"
    )
    result = migration.result("paused", f"ended {by}")
    vm.conclude(phase="failed", message=message, result=result)
    migration.ending = True
    try:
        vm.record("declined")
    except PostcopydError as error:
        unwritten = f"the VMM of {vm.name} here was ended {by}, which is not on record: {error}"
        vm.conclude(phase="paused", message=unwritten)
        decision.done(PostcopydError(f"{unwritten}; then say it again", error.name))
    decision.done()
    return True


async def take_back(
    migration: Migration,
    rollback: Rollback,
    vacating: Vacating,
    decision: Decision,
    trouble: PostcopydError,
    *,
    heard: bool,
) -> bool:
    """Takes the guest back, as a person says that the destination is dead. `trouble` came of the
    last attempt to ask it, `heard` says whether it answered. The decision is refused if it may be
    alive, and waits until its time is over. If its VMM here was ended, it gets a new one first, and
    the destination is asked once more, as that has taken its time. Returns whether the migration is
    over."""
    peer, vm = migration.peer, migration.vm
    if trouble.name not in GIVEN_UP:
        if heard or trouble.name not in SILENT:
            refuse_decision(migration, str(trouble))
            return False
        if trio.current_time() < decision.until:
            return False
    if not peer.granted.has_told(trouble.name) and (said := await peer.where_granted()):
        refuse_decision(migration, said)
    if migration.person.decision is not decision:
        return False  # refused: just now, or while the destination was asked
    try:
        if vacating.begun and vacating.remade is None and not vacating.taken:
            await vacating.remake()
            return False
        migration.person.decision = None
        if vacating.remade is not None:
            await vacating.take()
            await tell_driver(vm)
        own_again(vm)  # without this record the guest may not run
    except Exception as error:  # also a bug: the guest is at the destination, and asked for again
        migration.person.decision = None
        decision.done(migration.ours(error))
        return False
    migration.log.warning("ownership changed by a person", decision=decision.choice)
    migration.machine.happened(Happened.TAKEN_BACK)
    by = f"by an operator's decision, in the middle of the move to {migration.peer.to}"
    taken = f"taken back {by}, as it was when it stopped here{losses.but(vacating.lost)}"
    text = definition(vm)
    await rollback.run(PostcopydError(taken, "TakenBack"))
    undefined = await vacating.define(text)
    decision.done(rollback.trouble or undefined)
    return True
