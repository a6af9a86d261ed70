# SPDX-License-Identifier: Apache-2.0
"""Ends an arrival that fails: it is called off before the grant, or its VMM has ended after it.

An arrival that is called off leaves this host as it was, or with its VMM ended, and is recorded as
*declined*. After the grant nothing here ends the VMM. Owns nothing: the session owns what must be
closed, and closes it.
"""

from __future__ import annotations

from contextlib import suppress

from postcopyd import counts
from postcopyd import protocol as p
from postcopyd.dest.memory import Memory
from postcopyd.dest.migration import Migration, Stage
from postcopyd.errors import PostcopydError
from postcopyd.handover import Destination, Happened
from postcopyd.net.channel import ConnectionLost, PeerError
from postcopyd.sessions.patience import END_S, RELEASE_S, within
from postcopyd.vmm import Shape, VmmTimeout


class CallingOff:
    """Leaves this host as it was: nothing registered, no descriptor left, the VMM waiting again, or
    ended if it had begun to load (QEMU takes one migrate-incoming only). Call `undo` first, and
    `leave` once the session has closed what it holds."""

    def __init__(self, m: Migration, error: PostcopydError) -> None:
        self._m = m
        self._error = error
        self._driver = m.vm.driver
        self._loading = m.stage is Stage.LOADING
        self._clean = True

    async def undo(self, shape: Shape | None, memory: Memory | None) -> None:
        """Undoes the arrival and records that. `shape` and `memory` are None if not made yet."""
        m, vm, driver = self._m, self._m.vm, self._driver
        await self._tell()
        message = f"{vm.name} did not come here: {self._error}"
        try:
            if self._loading and driver is not None:
                with within(END_S, f"ending the VMM of {vm.name} here"):
                    await driver.end()  # before its RAM is let go, or it would go on with zeros
                message += "; its VMM here has ended, start it anew for another attempt"
            if memory is not None:
                memory.engine.unregister(called_off=True)
            if m.stage is Stage.ADOPTED and driver is not None:
                with within(RELEASE_S, f"letting go of guest RAM of {vm.name}"):
                    await driver.release()
                    if m.offer.staged and shape is not None and not driver.makes:
                        await driver.discard(shape)
        except Exception as trouble:  # also a driver's bug: cleaning up goes on
            self._clean = False
            later = "the source asks again" if self._loading else "a guest arrives here again"
            message += f"; cleaning up here, which is tried again when {later}: {trouble}"
            m.log.error("cleaning up failed", error=str(trouble))
        if m.stage >= Stage.ACCEPTED:  # else it may be a guest of this host, named by mistake
            how: counts.Result = "cancelled" if self._cancelled else "failed"
            vm.conclude(counted_as=how, phase="failed", remaining=0, message=message)
            self._record(message)
        if self._cancelled:
            m.log.info("migration cancelled", error=str(self._error))
        else:
            m.log.warning("migration failed", error=str(self._error))

    async def leave(self) -> None:
        """Lets go of a VMM that was ended, and has the operator's hooks run."""
        if self._loading and self._driver is not None and self._clean:  # else it may live
            with suppress(VmmTimeout), within(RELEASE_S, "closing its socket"):
                await self._m.vm.leave()
        self._m.begin_hooks("failed", message=str(self._error))

    @property
    def _cancelled(self) -> bool:
        return self._error.name == "Cancelled"

    async def _tell(self) -> None:
        machine = self._m.machine
        if machine.state not in (Destination.CALLED_OFF, Destination.DECLINED):
            if not isinstance(self._error, ConnectionLost | PeerError):
                await self._m.channel.tell_error(self._error)
            machine.happened(Happened.FAILED)

    def _record(self, message: str) -> None:
        """Records the end. A source that has granted is told *declined* only if the VMM here has
        certainly ended, or had not begun to load."""
        declined = self._clean or not self._loading
        with suppress(PostcopydError):  # an earlier arrival's answer could not be moved, and stays
            self._m.note(p.Declined(p.sentence(message)) if declined else None)
        self._m.vm.record_soon("declined" if declined else None)


def vmm_ended(m: Migration, farewell: str | None) -> None:
    """The VMM of a guest that was this host's has ended, so the guest can go on nowhere. If that
    was meant (`farewell`), the migration is over, and a source that asks is told so. Else a person
    decides, as the guest may have changed its disks."""
    vm = m.vm
    if vm.status.phase == "failed":
        return  # a person was faster
    if m.stage is Stage.HERE:  # its move was over but for lost pages, and the answer stands
        vm.show(
            message=f"{vm.name} was here, with all of its memory but some lost pages, and its VMM "
            f"has ended since; it may be started again"
        )
        vm.record_soon("held")
    elif vm.ownership == "loading":  # no record allowed it to run, so no vCPU has
        message = f"{vm.name} did not come here: its VMM has ended before it was run"
        m.note(p.Declined(p.sentence(message)))
        vm.conclude(phase="failed", remaining=0, message=message)
        vm.record_soon("declined")
        m.log.warning("migration failed", error=message)
        m.begin_hooks("failed", message=message)
    elif farewell is None:
        vm.show(
            phase="paused",
            message=f"the VMM of {vm.name} here has ended in the middle of its move from {m.peer}, "
            f"where part of its memory still is: the guest is lost",
        )
        vm.record_soon(None)
        m.log.error("migration paused", error="the VMM here has ended")
    else:
        _ended_by_itself(m, farewell)


def _ended_by_itself(m: Migration, farewell: str) -> None:
    vm = m.vm
    said = f"{vm.name} has ended there before all of its memory had come: {farewell}"
    m.note(p.Error(name=p.ENDED, message=p.sentence(said)))
    vm.conclude(
        counted_as="ended",
        phase="failed",
        remaining=0,
        message=f"{vm.name} has ended here before all of its memory had come from {m.peer}: "
        f"{farewell}; it may be started again",
    )
    vm.home()
    vm.record_soon("held")
    m.log.warning("guest ended while its memory followed", why=farewell)
    m.begin_hooks("ended", message=farewell)
