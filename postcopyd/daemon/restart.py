# SPDX-License-Identifier: Apache-2.0
"""What a restarted daemon does about the VMs of the previous daemon.

The table `FOUND` says what is done about each VM, by what its record says. Owns a task for each VM.
The task has claimed its VM from `begin` on, and tries until it is done; between two attempts the VM
is free. After that the registry owns the VM's connections and tasks, and the VM owns a session that
goes on, as if the daemon had never ended.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import structlog
import trio

from postcopyd.daemon.inquiries import Inquiries
from postcopyd.daemon.registry import Registry, certainly_ended, patience, tidy
from postcopyd.dest.restart import call_off, finish_unwritten
from postcopyd.dest.session import DestinationSession
from postcopyd.errors import PostcopydError, shortage
from postcopyd.handover import Destination, Machine
from postcopyd.model import Status
from postcopyd.net.channel import Channel, Nobody
from postcopyd.records.schema import Ownership
from postcopyd.sessions.vm import DAEMON, Claim, Vm
from postcopyd.source.keeping import kept
from postcopyd.source.restart import finish_drained, roll_back
from postcopyd.source.rollback import untouched
from postcopyd.source.session import SourceSession

log = structlog.get_logger()


# --- what is done about one VM: it is claimed, and its VMM reached if it lives -------------------


async def show_again(registry: Registry, vm: Vm, told: Status) -> None:
    """Nothing was under way. Shows `told` again if an earlier attempt has shown its failure."""
    if vm.status.message != told.message:
        vm.show(message=told.message)


async def run_again(registry: Registry, vm: Vm, told: Status) -> None:
    """The guest was not granted, and may have been stopped."""
    await roll_back(vm, registry.shared)


async def dial_again(registry: Registry, vm: Vm, told: Status) -> None:
    """The guest was granted: asks its destination, and sends the rest of its memory."""
    session = await SourceSession.restored(vm, vm.about, registry.shared)
    vm.claimed_by = session
    await session.resume()


async def end_vmm(registry: Registry, vm: Vm, told: Status) -> None:
    """The guest has gone, with all of its memory."""
    await finish_drained(vm)


async def decline(registry: Registry, vm: Vm, told: Status) -> None:
    """The guest was not granted to this host, and has not run here."""
    await call_off(vm)


async def take_faults(registry: Registry, vm: Vm, told: Status) -> None:
    """The guest is this host's: takes its faults again at once. The rest of the memory comes when
    the source asks to go on."""
    if await finish_unwritten(vm):
        return
    channel = Channel(Nobody(), Machine(Destination.RUNNING_LOST), vm.status.peer)
    session = await DestinationSession.restored(vm, vm.about, channel, registry.shared)
    if session.complete and session.ran and not session.over:
        await session.finish()
        registry.give_back(vm, session)
    else:
        vm.waiting = session
        if session.poisoned or session.over:
            return
        vm.show(
            phase="paused",
            message=f"{vm.name} is this host's and waits for pages that are still at "
            f"{channel.peer}; it goes on when that host asks for it",
        )


class Found(NamedTuple):
    """`drained`: whether the migration is over, with all memory where the guest is; None for
    either. `needs_vmm`: it cannot be done once the VMM has ended. `calm`: if it fails, nobody has
    to wait, so the failure is shown without a pause."""

    ownership: Ownership
    drained: bool | None
    do: Callable[[Registry, Vm, Status], Awaitable[None]]
    needs_vmm: bool
    calm: bool


FOUND = (
    # ownership   drained  what is done   needs its VMM  calm
    Found("held",     None,  show_again,  False, True),
    Found("declined", None,  show_again,  False, True),
    Found("intent",   None,  run_again,   True,  False),
    Found("granted",  False, dial_again,  True,  False),
    Found("granted",  True,  end_vmm,     False, True),
    Found("arriving", None,  decline,     False, False),
    Found("loading",  None,  decline,     False, False),
    Found("owned",    False, take_faults, True,  False),
    Found("owned",    True,  take_faults, True,  True),
)  # fmt: skip
"""The source's rows, then the destination's. ARCHITECTURE.md, "What is recorded, and when", has the
same in words."""


def found(ownership: Ownership, drained: bool) -> Found:
    """The row that applies to a VM."""
    return next(
        row for row in FOUND if row.ownership == ownership and row.drained in (None, drained)
    )


# --- the tasks that do it ------------------------------------------------------------------------


class Restart:
    """The restart of one daemon."""

    def __init__(self, registry: Registry, inquiries: Inquiries) -> None:
        self._registry = registry
        self._inquiries = inquiries
        self._between: dict[Vm, trio.Event] = {}

    def again(self, vm: Vm) -> trio.Event | None:
        """The event that starts a VM's next attempt at once; None if the VM waits for none."""
        return self._between.get(vm)

    def begin(self) -> None:
        """Takes over the VMs of the previous daemon. What each had under way goes on in a task of
        its own, which has claimed its VM when this returns."""
        store, vms = self._registry.shared.store, self._registry.vms
        records, unread = store.load_each()
        intents, torn = store.intents_each()
        for name, record in records.items():
            vm = vms[name] = self._registry.known(name)
            vm.remember(record)
            if vm.ownership == "held" and vm.under_way:
                vm.conclude(
                    phase="failed",
                    message=untouched(name, "the daemon ended while it was copied"),
                )
                vm.record_soon("held")
            self._registry.spawn(vm, self._until_done, vm, vm.claim(DAEMON))
            if name in intents and came_back(vm, intents[name]):
                vm.home()
        for name, intent in intents.items():
            if name not in records and name not in unread:
                unread[name] = (
                    f"{name} was handed over, or about to be, to {intent['peer']}, and this host "
                    f"has restarted since: it may run there, see `postcopyd status {name}` there; "
                    f"when you know, `postcopyd resolve {name} --kill` and `postcopyd detach "
                    f"{name}` here"
                )
        for name, sentence in (torn | unread).items():
            if name in records:  # a record says more than an intent
                log.error("intent not read", vm=name, why=sentence)
                continue
            vm = vms.setdefault(name, self._registry.known(name))
            vm.show(role="source", phase="paused", message=sentence)
            log.error("VM not known any more", vm=name, why=sentence)
            if name in intents:
                self._inquiries.ask(vm, intents[name], sentence)

    async def _until_done(self, vm: Vm, claimed: Claim) -> None:
        """Tries until it is done, the VMM has ended, a person has decided, or the VM was attached
        anew. Gives back the claim."""
        told = vm.status
        for pause in patience():
            with claimed:
                done = await self._attempt(vm, told)
            tidy()
            if done:
                return
            if certainly_ended(vm) and not granted_and_kept(vm):
                if vm.ownership == "granted":
                    self._inquiries.ask(vm, intent_of(vm), vm.status.message)
                return
            before = (vm.ownership, vm.driver)
            again = self._between[vm] = trio.Event()
            with trio.move_on_after(pause):
                await again.wait()
            del self._between[vm]
            same = self._registry.vms.get(vm.name) is vm and (vm.ownership, vm.driver) == before
            if not same or vm.claimed_by is not None:
                return
            claimed = vm.claim(DAEMON)

    async def _attempt(self, vm: Vm, told: Status) -> bool:
        """Returns whether it is done. `told` is the status that people saw before this start."""
        row = found(vm.ownership, told.phase == "drained")
        try:
            await self._registry.reach(vm, must=row.needs_vmm and not granted_and_kept(vm))
            await row.do(self._registry, vm, told)
            if vm.ownership != "owned":
                vm.remove_pages()  # of an arrival that is over
        except Exception as raised:  # a bug with one VM must not end the others
            self._not_done(vm, told, raised)
            return False
        return True

    def _not_done(self, vm: Vm, told: Status, raised: Exception) -> None:
        calm = found(vm.ownership, told.phase == "drained").calm  # the attempt may have changed it
        error = shortage(raised) or raised
        if not isinstance(error, PostcopydError):
            log.exception("bug in restoring", vm=vm.name)
            error = PostcopydError(f"internal error: {error!r}", "InternalError")
        message = (
            f"going on with {vm.name} after a restart of the daemon "
            f"(here: {vm.ownership}, with {vm.status.peer or 'nobody'}): {error}"
        )
        if vm.status.message != message:
            vm.show(**({} if calm else {"phase": "paused"}), message=message)
            vm.log.error("VM not restored", ownership=vm.ownership, error=str(error))


def granted_and_kept(vm: Vm) -> bool:
    """Whether the memory of a guest that left is here, although its VMM may have ended."""
    return vm.ownership == "granted" and kept(vm) is not None


def came_back(vm: Vm, intent: Mapping[str, Any]) -> bool:
    """Whether the record is newer than the intent, and the guest is this host's again."""
    if vm.ownership != "held":
        return False
    arrived = vm.status.role == "destination" and vm.status.phase == "drained"
    return vm.void or (arrived and vm.about.get("migration") != intent["migration"])


def intent_of(vm: Vm) -> dict[str, Any]:
    """Which host to ask about a guest that was given away, in the form of its intent."""
    return {
        "migration": vm.about["migration"],
        "peer": vm.status.peer,
        "epoch": vm.epoch,
        "identity": vm.about.get("identity", ()),
        **({"granted": vm.about["granted"]} if "granted" in vm.about else {}),
    }
