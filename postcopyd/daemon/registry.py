# SPDX-License-Identifier: Apache-2.0
"""The daemon of one host: its VMs and its migrations in both roles.

Owns the registry of attached VMs, one task for each migration, and the connections that come from
other daemons, each of which says first what it is for (connection.py). What happens within a
migration is the sessions' business; what makes a process of it is service.py's.
"""

from __future__ import annotations

import gc
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from functools import partial
from typing import Any, Literal

import structlog
import trio
from msgspec import to_builtins

from postcopyd import protocol as p
from postcopyd import vmm
from postcopyd.dest.restart import call_off, finish_unwritten
from postcopyd.dest.session import DestinationSession
from postcopyd.errors import PostcopydError, shortage
from postcopyd.handover import Destination, Machine, Source
from postcopyd.model import Decision, MigrateRequest
from postcopyd.net.connection import (
    CONNECT_S,
    Channel,
    Nobody,
    PeerError,
    accepted_kind,
    hang_up,
    open_nursery,
    receive_object,
    tune,
)
from postcopyd.net.peers import Visitor
from postcopyd.net.tls import TlsFailed, handshake, same_peer
from postcopyd.protocol import LOST, POISONED, RemoteProtocolError
from postcopyd.records import locks
from postcopyd.sessions import hugepages, losses
from postcopyd.sessions.hooks import run_hooks
from postcopyd.sessions.patience import END_S, within
from postcopyd.sessions.settings import Settings
from postcopyd.sessions.vm import Vm
from postcopyd.source.back import untouched
from postcopyd.source.restart import let_go, look, roll_back
from postcopyd.source.session import SourceSession
from postcopyd.tasks import guard, threads
from postcopyd.vmm.process.driver import ProcessVmm
from postcopyd.vmm.qemu.driver import QemuVmm

DRIVERS: dict[str, type[vmm.Vmm]] = {"qemu": QemuVmm, "process": ProcessVmm}

ANSWER_S = 10.0
"""How long a source that asks after a migration waits for a session that is at its end."""

LOOK_S = 5.0
"""How long until a host that did not answer is asked again."""

AGAIN_S, SELDOM_S = 1.0, 30.0
"""How long until what time may mend is tried again: the first time, and at most."""

log = structlog.get_logger()

Status = dict[str, Any]


class Daemon:
    """`nursery` holds one task for each migration; it is the daemon's."""

    def __init__(self, settings: Settings, nursery: trio.Nursery) -> None:
        self.settings = settings
        self.vms: dict[str, Vm] = {}
        self._nursery = nursery
        self._arrivals: dict[str, DestinationSession] = {}
        self._owing: set[Vm] = set()
        self._restoring: dict[Vm, trio.Event] = {}
        self._asking: dict[Vm, tuple[Mapping[str, Any], str]] = {}
        self._peers = settings.limits.peers

    # --- tasks ---------------------------------------------------------------------------------

    def _spawn(self, vm: Vm, task: Callable[..., Awaitable[None]], *args: Any) -> None:
        """A task for one VM. What nobody expected of it is that VM's trouble, and no other's."""
        self._nursery.start_soon(guard.outlived, partial(self._failed, vm), task, *args)

    def _failed(self, vm: Vm, error: Exception) -> None:
        going_on = vm.status["phase"] in ("precopy", "handover", "postcopy")
        if vm.claimed_by is None and going_on:  # nobody settles it any more
            vm.show(phase="paused", message=f"{vm.name} met an internal error: {error!r}")

    def _known(self, name: str) -> Vm:
        """A VM of this daemon, in its registry or about to be."""
        vm = Vm(name, self.settings.store, None)
        vm.owing = partial(self._owes, vm)
        return vm

    def _owes(self, vm: Vm) -> None:
        if vm not in self._owing:
            self._owing.add(vm)
            self._spawn(vm, self._write_later, vm)

    async def _write_later(self, vm: Vm) -> None:
        """What could not be written, or removed, until it can; and what had to stay with it."""
        try:
            for pause in patience():
                await trio.sleep(pause)
                if self.vms.get(vm.name) is not vm:
                    return
                if vm.unwritten:
                    with suppress(PostcopydError):
                        vm.record()
                if not vm.unwritten and vm.forget() is None:
                    break
        finally:
            self._owing.discard(vm)
        vm.log.info("record written")
        if vm.claimed_by is None and vm.ownership in ("held", "declined"):
            vm.remove_pages()
            if vm.status["phase"] == "drained" and vm.driver is not None:
                with vm.claim(self):
                    await vm.driver.release()

    # --- VMs -----------------------------------------------------------------------------------

    async def attach(self, name: str, driver: Literal["qemu", "process"], socket: str) -> Status:
        """A VM whose VMM has ended may be attached again; one that is there, once detached."""
        if (known := self.vms.get(name)) is not None:
            await known.ended(self)
        self._attachable(name, socket)
        connected, lock = await DRIVERS[driver].connect(name, socket), -1
        try:
            lock = await self._lock(name, connected.pid, f"attaching {name} at {socket}")
            # Others may have been faster, or have detached it.
            vm = self._attachable(name, socket) or self._known(name)
            before = vm.attachment
            vm.have(connected, lock)
        except BaseException:
            if lock >= 0:
                os.close(lock)
            with trio.CancelScope(shield=True):
                await connected.aclose()
            raise
        try:
            vm.record("held")
        except BaseException:
            vm.attachment = before  # what is done by the record is not done to this one
            with trio.CancelScope(shield=True):
                await vm.leave()
            raise
        self.vms[name] = vm
        self._spawn(vm, self._follow, vm, connected)
        vm.show(**({"message": "attached, no migration"} if vm.status["phase"] == "idle" else {}))
        log.info("attached", vm=name, driver=driver, socket=socket)
        await self._look_at(vm, connected)
        return vm.status

    def _attachable(self, name: str, socket: str) -> Vm | None:
        """The VM of this name, if it is known here and may be attached. Raises PostcopydError."""
        known = self.vms.get(name)
        if known is None:
            self.settings.limits.one_more_vm(name, [*self.vms])
        elif known.status["phase"] == "paused":
            raise PostcopydError(
                f"attaching {name} at {socket}: {name} is here already, in a migration that is not "
                f"at its end: {known.status['message']}; `postcopyd resolve {name} --kill` ends "
                f"its VMM here when you know that you must",
                "Busy",
            )
        elif known.driver is not None or known.claimed_by is not None:
            raise PostcopydError(
                f"attaching {name} at {socket}: {name} is attached already, at "
                f"{known.driver.socket if known.driver else 'a VMM that ended in its migration'}; "
                f"if that is the wrong one, `postcopyd detach {name}` lets go of it first",
                "AlreadyAttached",
            )
        for other in self.vms.values():
            if other.driver is not None and same_socket(other.driver.socket, socket):
                raise PostcopydError(
                    f"attaching {name} at {socket}: the VMM there is attached already as "
                    f"{other.name}, and one VMM has one name; `postcopyd detach {other.name}` "
                    f"first, if that is the wrong one",
                    "AlreadyAttached",
                )
        return known

    async def _lock(self, name: str, pid: int, doing: str) -> int:
        """One VMM, one name, one daemon. Raises PostcopydError."""
        for other in self.vms.values():
            if other.driver is not None and other.driver.pid == pid and other.name != name:
                raise PostcopydError(
                    f"{doing}: its VMM, process {pid}, is attached already as {other.name}, and "
                    f"one VMM has one name; `postcopyd detach {other.name}` first, if that is the "
                    f"wrong one",
                    "AlreadyAttached",
                )
        try:
            return await locks.vmm(pid, name)
        except locks.Taken as taken:
            raise PostcopydError(f"{doing}: {taken}", "AlreadyAttached") from None

    async def _look_at(self, vm: Vm, driver: vmm.Vmm) -> None:
        """Says what stands in the way of a migration of a VM that has just been attached. It may
        be attached all the same: it may come into shape."""
        try:
            shape = await driver.inspect("source")
            shape.close()
            if shape.state == "incoming":
                shape = await driver.inspect("destination")
                shape.close()
        except PostcopydError as error:
            log.warning("not looked at", vm=vm.name, error=str(error))
            return
        if shape.problems:
            why = "; ".join(shape.problems)
            log.warning("not fit to be migrated", vm=vm.name, why=why)
            if vm.status["phase"] == "idle" and vm.claimed_by is None:
                vm.show(message=f"attached, and cannot be migrated as it is now: {why}")

    async def _follow(self, vm: Vm, driver: vmm.Vmm) -> None:
        """Lets go of a VMM that has ended, once no session uses it: that notices by itself."""
        with trio.CancelScope() as vm.following:
            await self._gone(vm, driver)
            await vm.free.wait()
            if vm.driver is driver:
                await vm.leave()
                vm.log.warning("VMM ended")
                waiting, vm.waiting = vm.waiting, None
                if waiting is not None:
                    await waiting.vmm_ended(driver.farewell)
                if vm.status["phase"] == "idle":
                    vm.show(
                        message=f"the VMM of {vm.name} here has ended; attach it again once it runs"
                    )
                elif vm.status["phase"] == "paused":
                    vm.show(
                        message=f"the VMM of {vm.name} here has ended in the middle of its move, "
                        f"and what its guest did here is lost; `postcopyd resolve {vm.name} "
                        f"--kill` here, then decide at {vm.status['peer']}"
                    )

    async def _gone(self, vm: Vm, driver: vmm.Vmm) -> None:
        """Returns when the VMM has ended, or was let go of, whatever its driver makes of it."""
        try:
            await driver.gone()
        except Exception:
            if vm.driver is driver:
                vm.log.exception("bug in following a VMM, its process is looked at instead")
            while vm.driver is driver:
                with suppress(OSError):
                    if vm.attachment is None or vm.attachment.ended():
                        return
                await trio.sleep(LOOK_S)

    @property
    def peers(self) -> int:
        """Connections from other daemons."""
        return len(self._peers)

    async def detach(self, name: str) -> None:
        vm = self._vm(name)
        await vm.ended(self)
        if vm.claimed_by is not None:
            raise PostcopydError(
                f"{name} is in migration {vm.status['migration']}: wait for it, or cancel it",
                "Busy",
            )
        self._must_be_whole(vm)
        if vm.status["phase"] == "paused":
            raise PostcopydError(
                f"{name} cannot be let go of in the middle of a migration: {vm.status['message']}; "
                f"`postcopyd resolve {name} --kill` ends its VMM here when you know that you must",
                "Busy",
            )
        vm.keep_answer()
        self.settings.store.remove(name)
        # It is known here no more before anybody else's turn comes, who may attach it anew.
        del self.vms[name]
        vm.let_go()
        vm.following.cancel()
        await vm.leave()
        log.info("detached", vm=name)

    def _vm(self, name: str) -> Vm:
        try:
            return self.vms[name]
        except KeyError:
            raise PostcopydError(
                f"no VM {name} is attached to this daemon: `postcopyd attach {name} ...`",
                "NoSuchVm",
            ) from None

    def status(self, name: str) -> Status:
        return self._vm(name).status

    def watch(self, name: str) -> AbstractAsyncContextManager[AsyncIterator[Status]]:
        return self._vm(name).watch()

    async def restore(self) -> None:
        """The VMs that the daemon before this one had. What it had under way goes on, each in a
        task of its own that has claimed its VM when this returns."""
        store = self.settings.store
        records, unread = store.load_each()
        intents, torn = store.intents_each()
        for name, record in records.items():
            vm = self.vms[name] = self._known(name)
            vm.remember(record)
            if vm.ownership == "held" and vm.under_way:
                vm.settle(
                    phase="failed",
                    message=untouched(name, "the daemon ended while it was copied"),
                )
                vm.record_settled("held")
            claimed = vm.claim(self)
            claimed.__enter__()
            self._spawn(vm, self._restore, vm, claimed)
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
            if name in records:  # which says more than an intent
                log.error("intent not read", vm=name, why=sentence)
                continue
            vm = self.vms.setdefault(name, self._known(name))
            vm.show(role="source", phase="paused", message=sentence)
            log.error("VM not known any more", vm=name, why=sentence)
            if name in intents:
                self._ask_about(vm, intents[name], sentence)

    def _ask_about(self, vm: Vm, intent: Mapping[str, Any], sentence: str) -> None:
        """Has the host that may have the guest asked, in place of one that was asked before."""
        asking = self._asking[vm] = (intent, sentence)
        vm.show(peer=intent["peer"], message=sentence)
        self._spawn(vm, self._look, vm, asking)

    async def _look(self, vm: Vm, asking: tuple[Mapping[str, Any], str]) -> None:
        """Shows what the other host says of a guest that may have gone there; decides nothing."""
        (intent, sentence), why = asking, ""

        def wanted() -> bool:
            here = self.vms.get(vm.name) is vm and vm.status["phase"] == "paused"
            return here and self._asking.get(vm) is asking

        while wanted():
            try:
                said = await look(vm.name, intent, self.settings)
            except PostcopydError as error:
                if why != (why := str(error)):
                    vm.log.warning("destination not asked", error=why)
                await trio.sleep(LOOK_S)
            else:
                if wanted():
                    vm.show(message=f"{sentence}; {intent['peer']} says: {said}")
                return
        if self._asking.get(vm) is asking:
            del self._asking[vm]

    async def _restore(self, vm: Vm, claimed: Any) -> None:
        """What this VM's record says is to be done now. What cannot be done now is tried again, the
        VM free meanwhile, until its VMM has ended, or a person has decided, or attached it anew.
        Gives back the claim."""
        told = vm.status
        for pause in patience():
            with claimed_for(claimed):
                try:
                    await self._restored(vm, told)
                    return
                except Exception as raised:  # one VM's bug is not the others' end
                    self._not_restored(vm, told, raised)
            if certainly_ended(vm):
                if vm.ownership == "granted":
                    self._ask_about(vm, intent_of(vm), vm.status["message"])
                return
            before = (vm.ownership, vm.driver)
            poked = self._restoring[vm] = trio.Event()
            with trio.move_on_after(pause):
                await poked.wait()
            del self._restoring[vm]
            same = self.vms.get(vm.name) is vm and (vm.ownership, vm.driver) == before
            if not same or vm.claimed_by is not None:
                return
            claimed = vm.claim(self)
            claimed.__enter__()

    async def _restored(self, vm: Vm, told: Status) -> None:
        """One attempt. Raises whatever keeps it from being done."""
        owner = vm.ownership
        drained = told["phase"] == "drained"
        await self._reach(vm)
        if owner == "granted" and drained:
            await let_go(vm)
        elif owner == "granted":
            session = await SourceSession.restored(
                vm, vm.about, self.settings, Machine(Source.GRANTED_LOST)
            )
            vm.claimed_by = session
            await session.resume()
        elif owner == "owned":
            await self._restore_arrival(vm)
        elif owner == "intent":
            await roll_back(vm, self.settings)
        elif owner in ("arriving", "loading"):
            await call_off(vm)
        elif vm.status["message"] != told["message"]:  # it was not restored at once
            vm.show(message=told["message"])
        if vm.ownership != "owned":
            vm.remove_pages()  # of an arrival that is over

    def _not_restored(self, vm: Vm, told: Status, raised: Exception) -> None:
        error = shortage(raised) or raised
        if not isinstance(error, PostcopydError):
            log.exception("bug in restoring", vm=vm.name)
            error = PostcopydError(f"internal error: {error!r}", "InternalError")
        owner = vm.ownership
        calm = told["phase"] == "drained" or owner in ("held", "declined")
        message = (
            f"going on with {vm.name} after a restart of the daemon "
            f"(here: {owner}, with {vm.status['peer'] or 'nobody'}): {error}"
        )
        if vm.status["message"] != message:
            vm.show(**({} if calm else {"phase": "paused"}), message=message)
            vm.log.error("VM not restored", ownership=owner, error=str(error))

    async def _reach(self, vm: Vm) -> None:
        """The VMM of a known VM, if it is the same process still."""
        known = vm.attachment
        if known is None or vm.driver is not None:
            return
        if known.ended():
            if vm.ownership in ("held", "declined", "arriving", "loading"):
                return
            if vm.ownership == "granted" and vm.status["phase"] == "drained":
                return
            raise vmm.VmmGone(f"process {known.pid}, its VMM here, has ended")
        if known.driver not in DRIVERS:
            raise PostcopydError(f"this version has no driver {known.driver}")
        lock = await locks.vmm(known.pid, vm.name)
        try:
            driver = await DRIVERS[known.driver].known(vm.name, known.socket, known.pid)
        except BaseException:
            if lock >= 0:
                os.close(lock)
            raise
        vm.have_again(driver, lock)
        self._spawn(vm, self._follow, vm, driver)

    async def _restore_arrival(self, vm: Vm) -> None:
        """Faults are taken again at once; the source asks for the rest to go on."""
        if await finish_unwritten(vm):
            return
        channel = Channel(Nobody(), Machine(Destination.RUNNING_LOST), vm.status["peer"])
        session = await DestinationSession.restored(vm, vm.about, channel, self.settings)
        if session.complete and session.ran and not session.settled:
            await session.finish()
            self._after_arrival(vm, session)
        else:
            vm.waiting = session
            if session.poisoned or session.settled:
                return
            vm.show(
                phase="paused",
                message=f"{vm.name} is this host's and waits for pages that are still at "
                f"{channel.peer}; it goes on when that host asks for it",
            )

    # --- leaving -------------------------------------------------------------------------------

    async def check(self, name: str, to: str, unsafe: bool = False) -> tuple[list[str], list[str]]:
        vm = self._vm(name)
        await vm.ended(self)
        self._must_be_whole(vm)
        request = MigrateRequest(to, unsafe=unsafe)
        session = SourceSession(vm, request, self.settings, secrets.token_hex(8))
        with vm.claim(session):
            return await session.check()

    async def migrate(self, name: str, request: MigrateRequest) -> str:
        vm = self._vm(name)
        await vm.ended(self)
        vm.attached()
        self._must_be_whole(vm)
        if vm.claimed_by is None and vm.status["phase"] == "paused":
            raise PostcopydError(
                f"{name} is in a migration that is not at its end: {vm.status['message']}", "Busy"
            )
        if vm.claimed_by is None and vm.ownership == "granted":
            raise PostcopydError(
                f"the guest of {name} was given to {vm.status['peer']} and the VMM here is a stale "
                f"copy of it: end that VMM and `postcopyd detach {name}`",
                "Refused",
            )
        migration = secrets.token_hex(8)
        session = SourceSession(vm, request, self.settings, migration)
        claimed = vm.claim(session)
        claimed.__enter__()  # here, so that Busy is the answer to this call

        async def run() -> None:
            with claimed_for(claimed):
                try:
                    await session.run()
                except Exception:  # one migration's bug is not the others' end
                    log.exception("bug in a session", vm=name, migration=migration)

        vm.settle(role="source", phase="idle", migration=migration, peer=request.to, result=None)
        self._spawn(vm, run)
        return migration

    def _must_be_whole(self, vm: Vm) -> None:
        """Raises PostcopydError for a guest that has lost pages in its move here."""
        if isinstance(vm.waiting, DestinationSession) and vm.waiting.settled:
            raise PostcopydError(losses.immovable(vm.name, vm.waiting.lost), "Refused")

    async def cancel(self, name: str) -> None:
        vm = self._vm(name)
        if isinstance(vm.claimed_by, SourceSession):
            vm.claimed_by.cancel()
        elif vm.claimed_by is not None:
            raise PostcopydError(
                f"{name} is arriving here: cancel it at its source, {vm.status['peer']}",
                "NotMigrating",
            )
        else:
            raise PostcopydError(f"{name} is in no migration", "NotMigrating")

    async def recover(self, name: str, to: str | None) -> None:
        vm = self._paused(name)
        leaving, restoring = vm.claimed_by, self._restoring.get(vm)
        asking = self._asking.get(vm)
        if not isinstance(leaving, SourceSession) and asking is None:
            if vm.status["role"] == "destination" and restoring is not None:
                restoring.set()
                return
            if restoring is None:
                self._must_have_arrived(vm)
            if vm.status["role"] == "destination":
                raise PostcopydError(
                    f"continuing the migration of {name}: its source does that, "
                    f"{vm.status['peer']}; it dials by itself, or at once by `postcopyd recover "
                    f"{name}` there",
                    "NotMigrating",
                )
        if to is not None:
            # First: a host that is started again asks where a person has said.
            redirect = self.settings.store.redirect_intent
            await trio.to_thread.run_sync(redirect, name, to, limiter=threads.DISK)
        if isinstance(leaving, SourceSession):
            leaving.recover(to)
        elif asking is not None:
            intent, sentence = asking
            self._ask_about(vm, {**intent, "peer": to or intent["peer"]}, sentence)
        elif restoring is not None:
            if to is not None and "request" in vm.about:
                vm.about["request"] = {**vm.about["request"], "to": to}
                vm.show(peer=to)
                vm.record_settled(None)
            restoring.set()

    async def resolve(self, name: str, decision: Decision) -> None:
        """What only a person can decide about a paused migration; to wait changes nothing."""
        vm = self._paused(name)
        if vm.claimed_by is self:  # its VMM is being asked, after a restart
            with trio.move_on_after(ANSWER_S):
                await vm.free.wait()
            vm = self._paused(name)
        arrived = vm.waiting if isinstance(vm.waiting, DestinationSession) else None
        if decision == "poison" and arrived is None:
            raise PostcopydError(
                f"poisoning the missing pages of {name}: they are not missing here; say it where "
                f"the guest waits for them, at {vm.status['peer']}",
                "NotMigrating",
            )
        if decision == "take_back" and not isinstance(vm.claimed_by, SourceSession):
            self._must_have_arrived(vm)
            raise PostcopydError(
                f"taking {name} back: that is for the host it left, {vm.status['peer']}",
                "NotMigrating",
            )
        if decision == "wait":
            return
        if arrived is not None and decision == "poison":
            with vm.claim(arrived):
                vm.waiting = None
                try:
                    await arrived.poison()
                finally:
                    vm.waiting = arrived
        elif isinstance(vm.claimed_by, SourceSession) and decision != "poison":
            await vm.claimed_by.resolve(decision)
        elif decision == "kill":
            with vm.claim(self):
                ended = "was not connected: end it by hand if it runs; its migration was given up"
                if vm.driver is not None:
                    with within(END_S, f"ending the VMM of {name} here"):
                        await vm.driver.end()
                    ended = "was ended in the middle of its migration"
                if vm.driver is not None or certainly_ended(vm):
                    vm.about["answer"] = to_builtins(_lost_here(name))
                before = vm.status
                vm.settle(
                    phase="failed",
                    message=f"the VMM of {name} here {ended} with {before['peer']}, by an "
                    f"operator's decision; before you start it anywhere ask `postcopyd status "
                    f"{name}` there",
                )
                try:
                    vm.record("declined")
                except PostcopydError as error:
                    vm.show(**before)
                    raise PostcopydError(
                        f"the VMM of {name} here {ended}, which is not on record: {error}; then "
                        f"say it again",
                        error.name,
                    ) from None
            vm.log.warning("ownership changed by a person", decision=decision)

    def _must_have_arrived(self, vm: Vm) -> None:
        """Or what is asked for cannot be had from this source as it is."""
        if vm.status["role"] == "source":
            raise PostcopydError(
                f"{vm.name} cannot go on from here: {vm.status['message']}; see `postcopyd status "
                f"{vm.name}` at {vm.status['peer']}",
                "NotMigrating",
            )

    def _paused(self, name: str) -> Vm:
        vm = self._vm(name)
        if vm.status["phase"] != "paused":
            raise PostcopydError(
                f"{name} has no paused migration here, so there is nothing to decide: it is "
                f"{vm.status['phase']}, {vm.status['message']}",
                "NotMigrating",
            )
        return vm

    # --- arriving ------------------------------------------------------------------------------

    async def serve_peer(self, stream: trio.SocketStream) -> None:
        """One connection from another daemon, of either kind. Never raises for what a peer does."""
        try:
            tune(stream.socket)
            # A socket for both families has IPv4's addresses within IPv6's.
            peer = str(stream.socket.getpeername()[0]).removeprefix("::ffff:")
            with self._peers.visit(peer) as visitor, visitor.scope:
                await self._serve(stream, peer, visitor)
            if visitor.scope.cancelled_caught:
                log.debug("connection refused", peer=peer, error="too many at the door")
        except (PostcopydError, trio.BrokenResourceError, trio.TooSlowError, OSError) as error:
            log.warning("connection refused", error=str(error) or type(error).__name__)
        except Exception:  # one peer's bug is not the others' end
            log.exception("bug in serving a peer")
        finally:
            await trio.aclose_forcefully(stream)

    async def _serve(self, stream: trio.SocketStream, peer: str, visitor: Visitor) -> None:
        kind = await accepted_kind(stream)
        if kind.endswith(" tls") != (self.settings.tls is not None):
            await self._refuse(stream, kind, peer)
        elif kind in (p.DATA, p.DATA_TLS):
            await self._take_data(stream)
        else:
            await self._take_control(await self._trusted(stream, peer), visitor)

    async def _refuse(self, stream: trio.SocketStream, kind: str, peer: str) -> None:
        """One side has TLS and the other has not. Raises PostcopydError, once the peer was told."""
        which, other = ("with", "without") if self.settings.tls else ("without", "with")
        sentence = (
            f"the daemon at the destination was started {which} TLS, and the one at the source "
            f"{other}: start both with TLS, or both with `--tls off`"
        )
        if kind in (p.CONTROL, p.CONTROL_TLS):
            await stream.send_all(p.pack(p.Error(name="TlsFailed", message=sentence)))
            await hang_up(stream)
        raise TlsFailed(f"a connection from {peer} was refused: {sentence}")

    async def _trusted(self, stream: trio.SocketStream, peer: str) -> Channel:
        """A control connection whose source has shown who it is, where this daemon asks for it.
        Raises PostcopydError."""
        machine = Machine(Destination.GREETING)
        channel = partial(
            Channel, instance=self.settings.instance, daemon=self.settings.daemon, peer=peer
        )
        if self.settings.tls is None:
            return channel(stream, machine)
        secure = self.settings.tls.server(stream)
        try:
            with trio.fail_after(CONNECT_S):
                names = await handshake(secure, peer)
        except TlsFailed:
            await hang_up(stream)  # with what TLS says of it
            raise
        except trio.TooSlowError:
            raise TlsFailed(f"{peer} did not finish TLS within {CONNECT_S:.0f} s") from None
        return channel(secure, machine, names=names)

    async def _take_data(self, stream: trio.SocketStream) -> None:
        hello: p.DataHello = await receive_object(stream, p.DataHello)
        session = self._arrivals.get(hello.migration)
        if session is None:
            raise RemoteProtocolError(
                f"a data connection named migration {hello.migration}, which is not here"
            )
        await session.take_data(stream, hello)

    async def _take_control(self, channel: Channel, visitor: Visitor) -> None:
        address, tls = channel.peer, self.settings.tls
        try:
            hello = await channel.greet()
            channel.peer = f"{hello.host or address} ({address})"
            offer = await channel.receive(CONNECT_S)
            visitor.let_in(always=isinstance(offer, p.Resume) and offer.vm in self.vms)
            if isinstance(offer, p.Resume):
                await self._resume(channel, offer)
                return
            if not isinstance(offer, p.Offer):
                raise PeerError(f"{channel.peer} took its offer back", "Cancelled")
            if tls is not None and offer.check:
                tls.allow(channel.names, "control", "send")
            elif tls is not None:
                tls.allow(channel.names, "send")
            if not offer.check:
                async with channel.alive(), open_nursery() as nursery:
                    nursery.start_soon(self._hear_end, channel)
                    await run_hooks(
                        self.settings.hooks,
                        offer.vm,
                        "destination",
                        "prepare",
                        migration=offer.migration,
                        peer=channel.peer,
                    )
                    nursery.cancel_scope.cancel()
            vm = self._vm_here(offer.vm)
            await vm.ended(self)
            vm.attached()
            if vm.claimed_by is None and vm.status["phase"] == "paused":
                raise PostcopydError(
                    f"{offer.vm} is known at the destination, in a migration that is not at its "
                    f"end: {vm.status['message']}",
                    "Busy",
                )
            session = DestinationSession(vm, offer, channel, self.settings)
            if offer.check:
                with vm.claim(session):
                    await session.check()
                return
            with self._arriving(vm, session, offer.migration):
                await session.run()
            self._after_arrival(vm, session)
        except PostcopydError as error:
            log.warning("connection refused", peer=channel.peer, error=str(error))
            await channel.tell_error(error)
        finally:
            await channel.aclose()

    async def _resume(self, channel: Channel, asked: p.Resume) -> None:
        """A source asks what became of its guest: it is told, or goes on with the rest."""
        tls, known = self.settings.tls, self.vms.get(asked.vm)
        about = known.about if known else {}
        if about.get("migration") != asked.migration:
            about = self.settings.store.answered(asked.vm, asked.migration)
        identity = about.get("identity", ())
        if tls is not None and asked.look:
            tls.allow(channel.names, "control", "send")
        elif tls is not None and not identity:
            # Who has begun a move may end it, whatever [peers] has become: a guest waits for that.
            tls.allow(channel.names, "send")
        same_peer(identity, channel.names, asked.vm)
        past = about and (known is None or about is not known.about)
        if past and not asked.look and about["offer"]["epoch"] == asked.epoch:
            await self._answer(channel, about)
            return
        vm = self._vm_here(asked.vm)
        if asked.look:
            same = vm.about.get("migration") == asked.migration
            said = vm.status["message"] if same else f"it knows {vm.name}, and not of this move"
            await channel.send(p.Checked([p.sentence(said)]))
            return
        self._same_move(vm, asked)  # or nobody is disturbed for it
        session = self._arrivals.get(asked.migration)
        if session is not None and session.vm is vm:
            await session.drop()
        with trio.move_on_after(ANSWER_S):
            await vm.free.wait()
        self._same_move(vm, asked)
        if isinstance(vm.waiting, DestinationSession) and not vm.waiting.settled:
            if vm.waiting.poisoned:
                raise PostcopydError(
                    f"the missing pages of {vm.name} were given up at the destination by a person, "
                    f"and it goes on there without them: `postcopyd resolve {vm.name} --kill` "
                    f"here ends what is left of it",
                    POISONED,
                )
            session = vm.waiting
            with self._arriving(vm, session, asked.migration):
                vm.waiting = None
                await session.resume(channel, asked)
            self._after_arrival(vm, session)
        elif vm.ownership == "loading" and vm.claimed_by is None and reached(vm):
            with vm.claim(self):  # its VMM did not end when this arrival was called off
                await call_off(vm)
            await self._answer(channel, vm.about)
        elif "answer" in vm.about:
            await self._answer(channel, vm.about)
        else:
            raise PostcopydError(f"at the destination: {vm.status['message']}", "Paused")

    async def _answer(self, channel: Channel, about: dict[str, Any]) -> None:
        """What is on record of how an arrival ended."""
        await channel.send(p.parse_message(about["answer"]))
        with trio.move_on_after(ANSWER_S):  # acknowledged, or closed
            about["acknowledged"] = isinstance(await channel.receive(), p.Acknowledged)

    def _same_move(self, vm: Vm, asked: p.Resume) -> None:
        """Raises PostcopydError when the last arrival of this VM was another one."""
        if not vm.about and vm.status["phase"] == "paused" and vm not in self._asking:
            # Its record cannot be read: it may run here.
            raise PostcopydError(f"at the destination: {vm.status['message']}", "Paused")
        epoch = vm.about.get("offer", {}).get("epoch")
        if (vm.about.get("migration"), epoch) != (asked.migration, asked.epoch):
            raise PostcopydError(
                f"the destination knows nothing of this move of {asked.vm} any more: it has "
                f"restarted, or {asked.vm} was detached there; if it has restarted, the guest that "
                f"ran there is gone: decide with `postcopyd resolve {asked.vm}` here",
                "NotMigrating",
            )

    @contextmanager
    def _arriving(self, vm: Vm, session: DestinationSession, migration: str) -> Iterator[None]:
        """Data connections that name this migration are the session's. Raises PostcopydError."""
        if (other := self._arrivals.get(migration)) is not None:
            raise PostcopydError(
                f"migration {migration} is arriving already, as {other.vm.name}", "Busy"
            )
        with vm.claim(session):
            self._arrivals[migration] = session
            try:
                yield
            finally:
                del self._arrivals[migration]
                self.settings.limits.arrivals.leave(migration)
        tidy()

    def _after_arrival(self, vm: Vm, session: DestinationSession) -> None:
        ending = self._nursery.cancel_scope.cancel_called
        if session.huge is not None and not ending:  # drained, and the VM is free again
            self._spawn(vm, hugepages.give_back, vm, session.huge)

    async def _hear_end(self, channel: Channel) -> None:
        """Raises when the source takes its offer back or is gone; nothing else is due."""
        await channel.receive()
        raise PeerError(f"{channel.peer} took its offer back", "Cancelled")

    def _vm_here(self, name: str) -> Vm:
        if name not in self.vms:
            raise PostcopydError(
                f"no VM {name} is attached at the destination: start its VMM there, waiting for a "
                f"migration, and `postcopyd attach {name}`",
                "NoSuchVm",
            )
        return self.vms[name]

    # Last, because inside the class it hides the builtin from annotations.
    def list(self) -> list[Status]:
        return [self.vms[name].status for name in sorted(self.vms)]


def patience() -> Iterator[float]:
    """How long to wait before each further attempt at what time may mend."""
    pause = AGAIN_S
    while True:
        yield pause
        pause = min(2 * pause, SELDOM_S)


def certainly_ended(vm: Vm) -> bool:
    """Whether the VMM that the VM had is no process any more; who cannot look does not know."""
    with suppress(OSError):
        return vm.attachment is not None and vm.attachment.ended()
    return False


def reached(vm: Vm) -> bool:
    """Whether its VMM can be told to end, or has: one that lives and does not answer yet, after a
    restart, may not be called ended."""
    return vm.driver is not None or certainly_ended(vm)


def same_socket(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def came_back(vm: Vm, intent: Mapping[str, Any]) -> bool:
    """Whether an intent is older than what the record says: its guest is this host's again."""
    if vm.ownership != "held":
        return False
    arrived = vm.status["role"] == "destination" and vm.status["phase"] == "drained"
    return vm.void or (arrived and vm.about.get("migration") != intent["migration"])


def intent_of(vm: Vm) -> dict[str, Any]:
    """Of a guest that was given away: whom to ask, as its intent has it."""
    return {
        "migration": vm.about["migration"],
        "peer": vm.status["peer"],
        "epoch": vm.epoch,
        "identity": vm.about.get("identity", ()),
        **({"granted": vm.about["granted"]} if "granted" in vm.about else {}),
    }


def _lost_here(name: str) -> p.Error:
    """What a source is told whose guest a person has ended at the destination. It may have run
    there, so this is no Declined: only a person runs it again."""
    sentence = (
        f"its VMM there has ended and a person has given {name} up: it runs nowhere; decide here, "
        f"`postcopyd resolve {name} --kill` and start it from its disks, or `--take-back` as it "
        f"was when it stopped here, if its disks are as they were then"
    )
    return p.Error(name=LOST, message=p.sentence(sentence))


def tidy() -> None:
    """What a session leaves in cycles (of exceptions and their frames) goes now, in a millisecond:
    all else is frozen. Left to itself it would stay for hundreds of migrations, or go within a
    blackout."""
    gc.collect()


class claimed_for:
    """Gives back in the task what `claim` took in the call that started it."""

    def __init__(self, claimed: Any) -> None:
        self._claimed = claimed

    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None:
        self._claimed.__exit__(None, None, None)
        tidy()
