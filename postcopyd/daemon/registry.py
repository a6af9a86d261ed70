# SPDX-License-Identifier: Apache-2.0
"""The VMs of this daemon: attaches and detaches them, shows them, starts their migrations.

Owns the registry, and each VM in it with its driver and the lock on its VMM's process, from
`attach` or `reach` until `detach` or the VMM's end. Owns the tasks of VMs, which all start here
(`spawn`), in the daemon's nursery: one waits for a VMM's end, one writes a record later, one runs a
migration. Whatever works on a VM has claimed it: a session, or the daemon itself as `DAEMON`
(sessions/vm.py). What happens within a migration is the sessions' business.
"""

from __future__ import annotations

import gc
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, closing, suppress
from functools import partial
from typing import Any

import structlog
import trio

from postcopyd import vmm
from postcopyd.dest.session import DestinationSession
from postcopyd.errors import PostcopydError
from postcopyd.model import Checked, Found, MigrateRequest, Status
from postcopyd.records import locks
from postcopyd.sessions import hugepages, losses
from postcopyd.sessions.found import found
from postcopyd.sessions.shared import Shared
from postcopyd.sessions.vm import DAEMON, Vm
from postcopyd.source.drain import UNWRITTEN
from postcopyd.source.restart import finish_drained
from postcopyd.source.session import SourceSession
from postcopyd.tasks import guard
from postcopyd.vmm.libvirt.driver import LibvirtVmm
from postcopyd.vmm.process.driver import ProcessVmm
from postcopyd.vmm.qemu.driver import QemuVmm

DRIVERS: dict[str, type[vmm.Vmm]] = {
    "qemu": QemuVmm,
    "libvirt": LibvirtVmm,
    "process": ProcessVmm,
}

LOOK_S = 5.0
"""How often a process that cannot be waited for is looked at."""

AGAIN_S, SELDOM_S = 1.0, 30.0
"""How long until something is tried again that time may mend: the first time, and at most."""

log = structlog.get_logger()


class Registry:
    """`nursery`, the daemon's, holds the tasks of VMs."""

    def __init__(self, shared: Shared, nursery: trio.Nursery) -> None:
        self.shared = shared
        self.vms: dict[str, Vm] = {}
        self._nursery = nursery
        self._owing: set[Vm] = set()

    # --- VMs -----------------------------------------------------------------------------------

    async def attach(self, name: str, driver: str, socket: str) -> tuple[Status, Found | None]:
        """A VM whose VMM has ended may be attached again. What was found is None for a VMM that
        could not be looked at. Raises PostcopydError for a VM whose VMM is attached: it has to be
        detached first."""
        if (known := self.vms.get(name)) is not None:
            await known.ended()
        self.attachable(name, socket)
        connected = await DRIVERS[driver].connect(name, socket)
        vm = await self.take(name, socket, connected)
        vm.show(**({"message": "attached, no migration"} if vm.status.phase == "idle" else {}))
        log.info("attached", vm=name, driver=driver, socket=socket)
        seen = await self._say_whether_fit(vm, connected)
        return vm.status, seen

    async def take(self, name: str, socket: str, connected: vmm.Vmm) -> Vm:
        """The VM whose VMM a driver was connected to; closes that if it raises PostcopydError."""
        lock = -1
        try:
            lock = await self._lock(name, connected.pid, f"attaching {name} at {socket}")
            # Another call may have attached or detached the VM since.
            vm = self.attachable(name, socket) or self.known(name)
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
            vm.attachment = before  # as the record still says, which a later start goes by
            with trio.CancelScope(shield=True):
                await vm.leave()
            raise
        self.vms[name] = vm
        self.spawn(vm, self._follow, vm, connected)
        return vm

    def attachable(self, name: str, socket: str) -> Vm | None:
        """The VM of this name, if it is known here and may be attached. Raises PostcopydError."""
        known = self.vms.get(name)
        if known is None:
            self.shared.limits.one_more_vm(name, [*self.vms])
        elif known.status.phase == "paused":
            raise PostcopydError(
                f"attaching {name} at {socket}: {name} is here already, in a migration that is not "
                f"at its end: {known.status.message}; `postcopyd resolve {name} --kill` ends "
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

    async def _say_whether_fit(self, vm: Vm, driver: vmm.Vmm) -> Found | None:
        """Warns of what stands in the way of a migration of a VM that was just attached, and
        returns what was found. That is no error: it may change before the migration."""
        try:
            with closing(await driver.inspect("source")) as shape:
                seen = found(driver, shape)
            if shape.state == "incoming":
                shape = await driver.inspect("destination")
                shape.close()
        except PostcopydError as error:
            log.warning("not looked at", vm=vm.name, error=str(error))
            return None
        if shape.problems:
            why = "; ".join(shape.problems)
            log.warning("not fit to be migrated", vm=vm.name, why=why)
            if vm.status.phase == "idle" and vm.claimed_by is None:
                vm.show(message=f"attached, and cannot be migrated as it is now: {why}")
        return seen

    async def detach(self, name: str) -> None:
        vm = self.vm(name)
        await vm.ended()
        if vm.claimed_by is not None:
            raise PostcopydError(
                f"{name} is in migration {vm.status.migration}: wait for it, or cancel it",
                "Busy",
            )
        self._must_be_whole(vm)
        if vm.status.phase == "paused":
            raise PostcopydError(
                f"{name} cannot be let go of in the middle of a migration: {vm.status.message}; "
                f"`postcopyd resolve {name} --kill` ends its VMM here when you know that you must",
                "Busy",
            )
        vm.keep_answer()
        self.shared.store.remove(name)
        # Before the first await: another call may attach the VM anew.
        del self.vms[name]
        vm.end_watches()
        vm.following.cancel()
        await vm.leave()
        log.info("detached", vm=name)

    def vm(self, name: str) -> Vm:
        try:
            return self.vms[name]
        except KeyError:
            raise PostcopydError(
                f"no VM {name} is attached to this daemon: `postcopyd attach {name} ...`",
                "NoSuchVm",
            ) from None

    def status(self, name: str) -> Status:
        return self.vm(name).status

    def watch(self, name: str) -> AbstractAsyncContextManager[AsyncIterator[Status]]:
        return self.vm(name).watch()

    # --- their VMMs ------------------------------------------------------------------------------

    async def _lock(self, name: str, pid: int, doing: str) -> int:
        """Locks a VMM's process: one VMM has one name and one daemon. Raises PostcopydError."""
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

    async def reach(self, vm: Vm, *, must: bool) -> None:
        """Connects to the VMM of a known VM, if it is still the same process. A VMM that has ended
        is an error only if it `must` be there. Raises PostcopydError and OSError."""
        known = vm.attachment
        if known is None or vm.driver is not None:
            return
        if known.ended():
            if not must:
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
        self.spawn(vm, self._follow, vm, driver)

    async def _follow(self, vm: Vm, driver: vmm.Vmm) -> None:
        """Lets go of a VMM that has ended, once no session uses it: a session notices by itself."""
        with trio.CancelScope() as vm.following:
            await self._gone(vm, driver)
            await vm.free.wait()
            if vm.driver is driver:
                await vm.leave()
                vm.log.warning("VMM ended")
                waiting, vm.waiting = vm.waiting, None
                if waiting is not None:
                    await waiting.vmm_ended(driver.farewell)
                if vm.status.phase == "idle":
                    vm.show(
                        message=f"the VMM of {vm.name} here has ended; attach it again once it runs"
                    )
                elif vm.status.phase == "paused":
                    vm.show(
                        message=f"the VMM of {vm.name} here has ended in the middle of its move, "
                        f"and what its guest did here is lost; `postcopyd resolve {vm.name} "
                        f"--kill` here, then decide at {vm.status.peer}"
                    )

    async def _gone(self, vm: Vm, driver: vmm.Vmm) -> None:
        """Returns when the VMM has ended or was let go of, even if its driver fails."""
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

    # --- leaving -------------------------------------------------------------------------------

    async def check(self, name: str, to: str, unsafe: bool = False, xml: str = "") -> Checked:
        vm = self.vm(name)
        await vm.ended()
        self._must_be_whole(vm)
        request = MigrateRequest(to, unsafe=unsafe, xml=xml)
        _must_have(vm, request)
        session = SourceSession(vm, request, self.shared, secrets.token_hex(8))
        with vm.claim(session):
            return await session.check()

    async def migrate(self, name: str, request: MigrateRequest) -> str:
        vm = self.vm(name)
        await vm.ended()
        _must_have(vm, request)
        self._must_be_whole(vm)
        if vm.claimed_by is None and vm.status.phase == "paused":
            raise PostcopydError(
                f"{name} is in a migration that is not at its end: {vm.status.message}", "Busy"
            )
        if vm.claimed_by is None and vm.ownership == "granted":
            raise PostcopydError(
                f"the guest of {name} was given to {vm.status.peer} and the VMM here is a stale "
                f"copy of it: end that VMM and `postcopyd detach {name}`",
                "Refused",
            )
        migration = secrets.token_hex(8)
        session = SourceSession(vm, request, self.shared, migration)
        claimed = vm.claim(session)  # here, so that this call raises Busy

        async def run() -> None:
            with claimed:
                try:
                    await session.run()
                except Exception:  # a bug in one migration must not end the others
                    log.exception("bug in a session", vm=name, migration=migration)
            self.give_back(vm, session)
            tidy()

        session.begin()
        self.spawn(vm, run)
        return migration

    def _must_be_whole(self, vm: Vm) -> None:
        """Raises PostcopydError for a guest that has lost pages in its last move."""
        lost, *process = vm.about.get("lost", (0,))
        known = vm.attachment
        if isinstance(vm.waiting, DestinationSession) and vm.waiting.over:
            lost = vm.waiting.lost
        elif known is None or [known.pid, known.started] != process or known.ended():
            return
        raise PostcopydError(losses.immovable(vm.name, lost), "Refused")

    async def cancel(self, name: str) -> None:
        vm = self.vm(name)
        if isinstance(vm.claimed_by, SourceSession):
            vm.claimed_by.cancel()
        elif vm.claimed_by is not None:
            raise PostcopydError(
                f"{name} is arriving here: cancel it at its source, {vm.status.peer}",
                "NotMigrating",
            )
        else:
            raise PostcopydError(f"{name} is in no migration", "NotMigrating")

    # --- tasks ---------------------------------------------------------------------------------

    def spawn(self, vm: Vm, task: Callable[..., Awaitable[None]], *args: Any) -> bool:
        """Starts a task for one VM. An error that the task does not expect affects that VM only.

        In a daemon that ends, nothing begins: sessions of arrivals may outlive this nursery, and
        what they could not record is for the next daemon to find out. Returns whether the task
        begins."""
        try:
            self._nursery.start_soon(guard.outlived, partial(self._failed, vm), task, *args)
        except RuntimeError:  # trio's word for a nursery that is closed
            return False
        return True

    def _failed(self, vm: Vm, error: Exception) -> None:
        going_on = vm.status.phase in ("precopy", "handover", "postcopy")
        if vm.claimed_by is None and going_on:  # no session is left to conclude it
            vm.show(phase="paused", message=f"{vm.name} met an internal error: {error!r}")

    def known(self, name: str) -> Vm:
        """A VM of this daemon, in its registry or about to be."""
        vm = Vm(name, self.shared.store, None)
        vm.kinds = DRIVERS
        vm.follow = partial(self._follows, vm)
        vm.owing = partial(self._owes, vm)
        vm.spawn = partial(self.spawn, vm)
        return vm

    def _follows(self, vm: Vm, driver: vmm.Vmm) -> None:
        self.spawn(vm, self._follow, vm, driver)

    def _owes(self, vm: Vm) -> None:
        if vm not in self._owing:
            self._owing.add(vm)
            self.spawn(vm, self._write_later, vm)

    async def _write_later(self, vm: Vm) -> None:
        """Retries what could not be written or removed; then lets go of what a record needed."""
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
        if vm.claimed_by is None:
            with vm.claim(DAEMON):
                await _written(vm)

    def give_back(self, vm: Vm, session: DestinationSession | SourceSession) -> None:
        """Has a guest that stays here its huge pages again. Called when a session has given the VM
        back."""
        ending = self._nursery.cancel_scope.cancel_called
        if session.huge is not None and not ending:
            self.spawn(vm, hugepages.give_back, vm, session.huge)

    # Last, because inside the class it hides the builtin from annotations.
    def list(self) -> list[Status]:
        return [self.vms[name].status for name in sorted(self.vms)]


def _must_have(vm: Vm, request: MigrateRequest) -> None:
    """Raises PostcopydError if the VM has no VMM here, or not one for what is asked."""
    if not vm.attached().makes and request.for_a_domain:
        raise PostcopydError(
            f"{vm.name} is not moved as a domain of libvirt, and only for one are there "
            f"--persistent, --undefinesource and --xml: leave them out",
            "Refused",
        )


async def _written(vm: Vm) -> None:
    """Lets go of what had to stay with the record from before."""
    drained = vm.status.phase == "drained"
    if vm.ownership in ("held", "declined"):
        vm.remove_pages()
        if drained and vm.driver is not None:
            await vm.driver.release()
    elif vm.ownership == "granted" and drained and vm.driver is not None:
        await finish_drained(vm)
        vm.show(message=vm.status.message.removesuffix(UNWRITTEN))
        vm.record_soon("granted")


def patience() -> Iterator[float]:
    """How long to wait before each further attempt at something that time may mend."""
    pause = AGAIN_S
    while True:
        yield pause
        pause = min(2 * pause, SELDOM_S)


def certainly_ended(vm: Vm) -> bool:
    """Whether the VMM that the VM had has ended; False if that cannot be known."""
    with suppress(OSError):
        return vm.attachment is not None and vm.attachment.ended()
    return False


def same_socket(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def tidy() -> None:
    """Collects the reference cycles that a session leaves (exceptions and their frames). It takes a
    millisecond, as all else is frozen. Without it they would stay for hundreds of migrations, or be
    collected within a blackout."""
    gc.collect()
