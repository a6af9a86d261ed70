# SPDX-License-Identifier: Apache-2.0
"""The early end of a VMM whose guest runs elsewhere, where others than the daemon could run it here
(`Vmm.makes`: a domain of libvirt); and a new one for a guest that is taken back.

In this order: the destination says that the guest runs there; the keeper is on record; the device
state is in a file; the definition is on record; the VMM is ended; that is on record. Until the
definition is on record the VMM stays as it is, stopped: until the guest is drained, if there is no
keeper, or if that could end with the VMM, or if the daemon is killed. From then on the next daemon
does the rest, the VMM may have ended, and a guest that is taken back gets a new one, which is
defined only once the guest is this host's by the record.

Owns that one (`remade`) until it is the VM's. One task runs `run`; the task of the recovery calls
the rest.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from functools import partial

import trio

from postcopyd.errors import PostcopydError
from postcopyd.handover import Source
from postcopyd.host import procfs
from postcopyd.native import keeper
from postcopyd.records import locks
from postcopyd.sessions.patience import END_S, within
from postcopyd.sessions.vm import Vm
from postcopyd.source.copying import copy
from postcopyd.source.keeping import Keeping, kept
from postcopyd.source.migration import Migration
from postcopyd.tasks import threads
from postcopyd.vmm import Region, Shape, Vmm, VmmError, VmmGone, kill

AGAIN_S = 2.0
"""How long until the VMM is looked at again, or its end is tried again."""

MOST_STATE = 64 << 20
"""Bytes of device state that are kept; with a display it has some MiB."""

RUNS_THERE = frozenset({Source.RAN, Source.RAN_LOST, Source.RAN_ASKS})
"""The destination has said so, so it never declines any more."""


class Vacating:
    """What the session of one guest does about its VMM here."""

    def __init__(self, migration: Migration, shape: Shape, keeping: Keeping) -> None:
        self._migration, self._vm, self._shape = migration, migration.vm, shape
        self._keeping = keeping
        kind = migration.vm.kind
        self._wanted = kind is not None and kind.makes and not migration.request.keep_source
        self._device: list[bytes] = []
        self._size = 0
        self._scope, self._idle = trio.CancelScope(), trio.Event()
        self._idle.set()
        self._why = ""
        self.remade: Vmm | None = None
        self.lost = 0  # pages that `remade` lacks
        self.taken = False

    def saved(self, data: bytes) -> None:
        """Notes a piece of the device state, on its way in the blackout."""
        self._size += len(data)
        if self._wanted and self._size <= MOST_STATE:
            self._device.append(data)

    @property
    def begun(self) -> bool:
        """Whether the VMM may have been ended."""
        return "definition" in self._vm.about.get("keeper", {})

    # --- its end

    async def run(self) -> None:
        """Makes the keeper, and ends the VMM. Raises nothing, and returns when it is cancelled or
        stopped; at once if another task runs it."""
        if not self._idle.is_set():
            return
        self._idle = trio.Event()
        try:
            with trio.CancelScope() as self._scope:
                await self._keeping.begin()
                await self._end_stray()
                while self._wanted or self.begun:
                    if self.remade is not None and self._migration.person.decision is None:
                        await self.drop()  # it was decided otherwise
                    elif self._wanted and self._migration.machine.state in RUNS_THERE:
                        await self._tried()
                    await trio.sleep(AGAIN_S)
        except Exception:  # the migration goes on without it
            self._migration.log.exception("bug in the early end of a VMM")
        finally:
            self._idle.set()

    async def stop(self) -> None:
        """Returns when `run` has."""
        self._scope.cancel()
        await self._idle.wait()

    async def _tried(self) -> None:
        about = self._vm.about.get("keeper", {})
        if not about or about.get("vacated") or kept(self._vm) is None:
            return
        try:
            if self.begun or await self._begin():
                await self._vacate()
        except (PostcopydError, OSError) as error:
            self._tell("VMM not ended yet, though its guest runs elsewhere", str(error))

    def _tell(self, what: str, why: str) -> None:
        if self._why != why:
            self._migration.log.warning(what, why=why)
        self._why = why

    async def _begin(self) -> bool:
        """Puts on record what the VMM can be made anew from. Returns whether it may be ended then.
        Raises PostcopydError if that could not be recorded."""
        vm = self._vm
        if why := self._why_not():
            self._wanted = False
            self._tell("VMM stays, stopped, until its guest is drained", why)
            return False
        state = b"".join(self._device)
        await trio.to_thread.run_sync(vm.keep_device, state, limiter=threads.DISK)
        # From here to the record nothing waits: a person may take the guest back.
        if self._migration.machine.state not in RUNS_THERE or kept(vm) is None:
            return False
        before, after = vm.about, {**vm.about["keeper"], "definition": self._migration.definition}
        vm.about = {**before, "keeper": after}
        try:
            vm.record()
        except BaseException:
            vm.about = before
            raise
        self._device = []
        return True

    def _why_not(self) -> str:
        found = kept(self._vm)
        if found is None or not keeper.outlives_group(found):  # it may have ended just now
            return "what keeps its memory is in the control group of the VMM, and could end with it"
        if self._size > MOST_STATE:
            return f"its device state has more than {MOST_STATE >> 20} MiB"
        if not self._device or not self._migration.definition:
            return "the daemon was started again before its device state was on record"
        return ""

    async def _vacate(self) -> None:
        """Idempotent. Raises PostcopydError."""
        vm, known = self._vm, self._vm.attachment
        assert vm.kind is not None
        assert known is not None
        undefine = self._migration.request.undefines
        await vm.kind.vacate(vm.name, known.socket, known.pid, undefine=undefine)
        if not known.ended():
            raise VmmError(f"ending the VMM of {vm.name} here: process {known.pid} lives on")
        if "keeper" in vm.about:
            vm.about = {**vm.about, "keeper": {**vm.about["keeper"], "vacated": True}}
            vm.record_soon(None)
            self._migration.log.info("VMM ended, as its guest runs elsewhere")

    # --- a new one

    async def remake(self) -> None:
        """Makes the VMM anew, with the guest as it was when it stopped here. It waits, paused,
        until `take` or `drop`. Raises PostcopydError; then nothing is left of it."""
        vm, known = self._vm, self._vm.attachment
        found = kept(vm)
        if found is None:
            raise VmmGone(
                f"{vm.name} cannot run here again: its VMM here has ended, and what kept its memory"
            )
        assert vm.kind is not None
        assert known is not None
        if not vm.about["keeper"].get("vacated"):
            await self._vacate()
        vm.show(message=f"{vm.name} is taken back: a VMM is made for it, and gets its memory")
        device = await trio.to_thread.run_sync(vm.device, limiter=threads.DISK)
        was = replace(
            self._shape, state="running" if vm.about["run"] else "paused", pid=found.pid, disks=()
        )
        definition = vm.about["keeper"]["definition"]
        made = await vm.kind.remake(
            vm.name, known.socket, definition, was, partial(self._fill, was), device
        )
        self.remade = made
        self._note(remade=(made.pid, procfs.started(made.pid)))

    async def _fill(self, was: Shape, to: Shape) -> list[Region]:
        lost = await copy(was, to)
        self.lost = len(lost)
        if lost:
            self._migration.log.error("memory lost", pages=self.lost)
        return lost

    def _note(self, **changes: object) -> None:
        about = {k: v for k, v in self._vm.about["keeper"].items() if k != "remade"}
        self._vm.about = {**self._vm.about, "keeper": {**about, **changes}}
        self._vm.record_soon(None)

    async def take(self) -> None:
        """Gives the VM the new VMM, which it records next. Nothing waits before it is taken.
        Raises PostcopydError; then nothing is left of it."""
        vm = self._vm
        made, self.remade = self.remade, None
        assert made is not None
        try:
            lock = await locks.vmm(made.pid, vm.name)
        except BaseException:
            await self._end(made)
            raise
        await vm.leave()
        vm.have(made, lock)
        if self.lost and vm.attachment is not None:
            lacking = (self.lost, vm.attachment.pid, vm.attachment.started)
            vm.about = {**vm.about, "lost": lacking}
        vm.follow(made)
        self.taken = True

    async def define(self, text: str) -> PostcopydError | None:
        """Has the new VMM outlast the guest, by the definition of the one before. Only once the
        guest is this host's by the record, and runs: what is defined may be started by others.
        Returns why it could not, which is logged."""
        if not self.taken:
            return None
        name = self._vm.name
        try:
            with within(END_S, f"defining {name} here again"):
                await self._vm.attached().keep(text)
        except Exception as error:  # the guest is here, whatever becomes of its definition
            self._migration.log.error("definition not put back", error=str(error))
            return PostcopydError(
                f"{name} was taken back, but it ends with its VMM, as it is not defined here any "
                f"more: {error}; define it by hand",
                "VmmFailed",
            )
        return None

    async def drop(self) -> None:
        """Ends a new VMM that is not needed. Idempotent."""
        made, self.remade = self.remade, None
        if made is not None:
            await self._end(made)
            if "keeper" in self._vm.about:
                self._note()

    async def _end(self, made: Vmm) -> None:
        with trio.CancelScope(shield=True):
            try:
                with within(END_S, f"ending the VMM of {self._vm.name} here"):
                    await made.end()
            except PostcopydError as error:
                self._migration.log.error("VMM not ended", error=str(error))
            with suppress(PostcopydError):
                await made.aclose()

    async def _end_stray(self) -> None:
        """Ends a new VMM of a daemon that was killed while a person took the guest back."""
        pid, started = self._vm.about.get("keeper", {}).get("remade", (0, 0))
        if not pid or self.remade is not None or self.taken:
            return
        with suppress(PostcopydError, OSError):
            pidfd = os.pidfd_open(pid)
            try:
                if procfs.started(pid) == started:
                    kill(pidfd, self._vm.name, pid)
            finally:
                os.close(pidfd)
        self._note()

    async def aclose(self) -> None:
        await self.drop()


def definition(vm: Vm) -> str:
    """Of a VMM that may have been ended; empty if it was not."""
    found: str = vm.about.get("keeper", {}).get("definition", "")
    return found


def has_vacated(vm: Vm) -> bool:
    """Whether its VMM was ended early, for certain."""
    with suppress(OSError):
        done = vm.about.get("keeper", {}).get("vacated", False)
        return bool(done) and vm.attachment is not None and vm.attachment.ended()
    return False


async def put_back(vm: Vm, text: str) -> str:
    """Has libvirt, say, know a VMM again by its definition, as its guest may be started from its
    disks. Returns a clause for people."""
    if not text or vm.kind is None or vm.attachment is None:
        return ""
    try:
        with within(END_S, f"defining {vm.name} here again"):
            if not await vm.kind.define(vm.name, vm.attachment.socket, text):
                return ""
    except PostcopydError as error:
        vm.log.error("definition not put back", error=str(error))
        return f"; it is not defined here any more: {error}"
    return "; it is defined here again as it was, without autostart"
