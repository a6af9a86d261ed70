# SPDX-License-Identifier: Apache-2.0
"""Carries out what a person decides about a paused migration.

Owns nothing that lasts: finds what has claimed the VM, and tells that. A source session that dials
its destination goes on, gives the guest up or takes it back; an arrival that waits takes its
missing pages for lost; a restart tries again; another host is asked. A VM that nothing has claimed
is claimed here until the decision is done.
"""

from __future__ import annotations

import trio
from msgspec import to_builtins
from msgspec.structs import asdict

from postcopyd import protocol as p
from postcopyd.daemon.inquiries import Inquiries
from postcopyd.daemon.registry import Registry, certainly_ended
from postcopyd.daemon.restart import Restart
from postcopyd.dest.session import DestinationSession
from postcopyd.errors import PostcopydError
from postcopyd.model import Decision
from postcopyd.protocol import LOST
from postcopyd.sessions.patience import END_S, within
from postcopyd.sessions.vm import DAEMON, Vm
from postcopyd.source.keeping import let_go
from postcopyd.source.session import SourceSession
from postcopyd.source.vacating import definition, put_back
from postcopyd.tasks import threads

RESTART_S = 10.0
"""How long a decision waits while the daemon asks the VMM after a restart."""


class Decisions:
    """Decisions about the VMs of one daemon."""

    def __init__(self, registry: Registry, restart: Restart, inquiries: Inquiries) -> None:
        self._registry = registry
        self._restart = restart
        self._inquiries = inquiries

    async def recover(self, name: str, to: str | None) -> None:
        """Continues the migration at once; `to` is the new address of its destination, if that has
        changed. Raises PostcopydError."""
        vm = self._recoverable(name)
        if to is not None and vm.status.role == "source":
            # Before all else: if this host restarts, it asks at the address in the intent.
            redirect = self._registry.shared.store.redirect_intent
            await trio.to_thread.run_sync(redirect, name, to, limiter=threads.DISK)
            vm = self._recoverable(name)  # the migration may have gone on during the write
        inquiry, again = self._inquiries.of(vm), self._restart.again(vm)
        if isinstance(vm.claimed_by, SourceSession):
            vm.claimed_by.recover(to)
        elif inquiry is not None:
            intent, sentence = inquiry
            self._inquiries.ask(vm, {**intent, "peer": to or intent["peer"]}, sentence)
        elif again is not None:
            if to is not None and "request" in vm.about:
                vm.about["request"] = {**vm.about["request"], "to": to}
                vm.show(peer=to)
                vm.record_soon(None)
            again.set()

    def _recoverable(self, name: str) -> Vm:
        """A VM whose migration this daemon can continue on request. Raises PostcopydError."""
        vm = self._paused(name)
        going_on = isinstance(vm.claimed_by, SourceSession) or self._inquiries.of(vm) is not None
        if not going_on and self._restart.again(vm) is None:
            _must_have_arrived(vm)
            raise PostcopydError(
                f"continuing the migration of {name}: its source does that, {vm.status.peer}; it "
                f"dials by itself, or at once by `postcopyd recover {name}` there",
                "NotMigrating",
            )
        return vm

    async def resolve(self, name: str, decision: Decision) -> None:
        """Does what only a person may decide; "wait" changes nothing. Raises PostcopydError."""
        vm = self._paused(name)
        if vm.claimed_by is DAEMON:  # the daemon asks the VMM, after a restart
            with trio.move_on_after(RESTART_S):
                await vm.free.wait()
            vm = self._paused(name)
        leaving = vm.claimed_by if isinstance(vm.claimed_by, SourceSession) else None
        if decision == "poison":
            await self._poison(vm)
        elif decision == "take_back" and leaving is None:
            _must_have_arrived(vm)
            raise PostcopydError(
                f"taking {name} back: that is for the host it left, {vm.status.peer}",
                "NotMigrating",
            )
        elif decision == "kill" and leaving is None:
            await self._kill(vm)
        elif decision != "wait" and leaving is not None:
            await leaving.resolve(decision)

    async def _poison(self, vm: Vm) -> None:
        arrived = vm.waiting
        if not isinstance(arrived, DestinationSession):
            raise PostcopydError(
                f"poisoning the missing pages of {vm.name}: they are not missing here; say it "
                f"where the guest waits for them, at {vm.status.peer}",
                "NotMigrating",
            )
        with vm.claim(arrived):
            vm.waiting = None
            try:
                await arrived.poison()
            finally:
                vm.waiting = arrived

    async def _kill(self, vm: Vm) -> None:
        """Ends the VMM of a VM that no source session has. A source that asks is told so."""
        name, text = vm.name, definition(vm)
        with vm.claim(DAEMON):
            ended = "was not connected: end it by hand if it runs; its migration was given up"
            if vm.driver is not None:
                with within(END_S, f"ending the VMM of {name} here"):
                    await vm.driver.end()
                ended = "was ended in the middle of its migration"
            if trouble := await let_go(vm):
                raise trouble
            put = await put_back(vm, text)
            if vm.driver is not None or certainly_ended(vm):
                vm.about["answer"] = to_builtins(_lost_here(name))
            before = vm.status
            vm.conclude(
                phase="failed",
                message=f"the VMM of {name} here {ended} with {before.peer}, by an operator's "
                f"decision; before you start it anywhere ask `postcopyd status {name}` there{put}",
            )
            try:
                vm.record("declined")
            except PostcopydError as error:
                vm.show(**asdict(before))
                raise PostcopydError(
                    f"the VMM of {name} here {ended}, which is not on record: {error}; then say "
                    f"it again",
                    error.name,
                ) from None
        vm.log.warning("ownership changed by a person", decision="kill")

    def _paused(self, name: str) -> Vm:
        vm = self._registry.vm(name)
        if vm.status.phase != "paused":
            raise PostcopydError(
                f"{name} has no paused migration here, so there is nothing to decide: it is "
                f"{vm.status.phase}, {vm.status.message}",
                "NotMigrating",
            )
        return vm


def _must_have_arrived(vm: Vm) -> None:
    """Raises PostcopydError for a VM that is leaving: in its state, this host cannot do what is
    asked for."""
    if vm.status.role == "source":
        raise PostcopydError(
            f"{vm.name} cannot go on from here: {vm.status.message}; see `postcopyd status "
            f"{vm.name}` at {vm.status.peer}",
            "NotMigrating",
        )


def _lost_here(name: str) -> p.Error:
    """What a source is told when a person has ended its guest at the destination. The guest may
    have run there, so this is no Declined: only a person may run it again."""
    sentence = (
        f"its VMM there has ended and a person has given {name} up: it runs nowhere; decide here, "
        f"`postcopyd resolve {name} --kill` and start it from its disks, or `--take-back` as it "
        f"was when it stopped here, if its disks are as they were then"
    )
    return p.Error(name=LOST, message=p.sentence(sentence))
