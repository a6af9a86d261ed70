# SPDX-License-Identifier: Apache-2.0
"""VMs that nobody attaches, as this host's libvirt has them: found when they are asked for, and
made when they arrive.

Owns a VMM that was made for an arrival, until its guest is this host's: it is ended with an arrival
that is called off. What is said to libvirt is the driver's business (vmm/libvirt).
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress

import structlog
import trio

from postcopyd import protocol as p
from postcopyd.daemon.registry import DRIVERS, Registry, certainly_ended
from postcopyd.errors import PostcopydError
from postcopyd.model import Status
from postcopyd.net.channel import Channel, PeerError
from postcopyd.sessions import alike, headroom
from postcopyd.sessions.patience import END_S, within
from postcopyd.sessions.vm import DAEMON, Vm
from postcopyd.tasks.nursery import open_nursery
from postcopyd.vmm import Disk, DiskFile, Region, Shape, Vmm, VmmTimeout
from postcopyd.vmm.libvirt import calls

SILENT_S = 30.0
"""After libvirt has not answered, a list of VMs is for so long shown without waiting for it."""

log = structlog.get_logger()


class Domains:
    """Those of the libvirt at `Shared.libvirt`."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._uri = registry.shared.libvirt
        self._said = ""  # why it could not be asked for a list: logged once
        self._silent_until = -math.inf

    def _socket(self, name: str) -> str:
        return f"{self._uri}#{name}"

    def socket(self, name: str) -> str:
        """How a domain of this name would be reached. Raises PostcopydError if none can be."""
        if why := calls.lacks(self._uri):
            raise PostcopydError(f"attaching {name}: {why}", "Refused")
        return self._socket(name)

    async def find(self, name: str) -> None:
        """Attaches the domain of this name, if it runs here and the daemon does not have it. Raises
        PostcopydError, also if nobody else can know the name and libvirt does not answer."""
        known = self._registry.vms.get(name)
        if known is not None:
            await known.ended()
        free = known is None or (
            known.driver is None
            and known.claimed_by is None
            and known.status.phase != "paused"
            and certainly_ended(known)
        )
        try:
            found = free and name in await self._running()
        except PostcopydError:
            if known is None:
                raise
            found = False
        if found:
            await self._registry.attach(name, "libvirt", self._socket(name))
        elif known is None and calls.here(self._uri) and (why := calls.lacks(self._uri)):
            raise PostcopydError(
                f"no VM {name} is attached to this daemon, and libvirt is not asked for a domain "
                f"of that name: {why}",
                "NoSuchVm",
            )

    async def shown(self) -> list[Status]:
        """Domains that run here and were never moved by this daemon, nor attached."""
        if trio.current_time() < self._silent_until:
            return []
        try:
            running, said = await self._running(connect=0), ""
        except PostcopydError as error:
            running, said = [], str(error)
            if isinstance(error, VmmTimeout):
                self._silent_until = trio.current_time() + SILENT_S
            if said != self._said:
                log.warning("domains of libvirt not listed", uri=self._uri, error=said)
        self._said = said
        return [
            Status(vm=name, role="", phase="idle", migration="", peer="", remaining=0,
                   message="a domain of libvirt, no migration")
            for name in sorted(running) if name not in self._registry.vms
        ]  # fmt: skip

    async def _running(self, **how: float) -> list[str]:
        if calls.lacks(self._uri):
            return []
        doing = "looking for domains"
        names: list[str] = await calls.ask(self._uri, doing, "running", calls.LOOK_S, **how)
        return names

    # --- arrivals

    def to_be_made(self, offer: p.Offer) -> bool:
        """Whether nobody can have attached a VMM for it."""
        known = self._registry.vms.get(offer.vm)
        return bool(offer.definition) and (known is None or known.driver is None)

    async def unfit(self, offer: p.Offer) -> list[str]:
        """Why it could not be made here: sentences."""
        kind, socket = self._kind(offer), self._socket(offer.vm)
        made = await kind.foreseen(offer.vm, socket, offer.definition, like(offer))
        return [*made.problems, *alike.differences(made, offer.driver, offer)]

    def lacks(self, offer: p.Offer) -> list[str]:
        """What memory this host would lack for it, as far as is known of a QEMU that is not there:
        whatever its RAM is in, it needs room on the host, or huge pages. An arrival looks again
        when its turn comes."""
        shared, regions = self._registry.shared, like(offer).regions
        too_large = shared.limits.arrivals.too_large(sum(region.size for region in regions))
        others = [*shared.arriving.values()]
        return [*too_large, *headroom.problems(headroom.Arrival(0, regions), [], others)]

    def _kind(self, offer: p.Offer) -> type[Vmm]:
        kind = DRIVERS.get(offer.driver)
        why = calls.lacks(self._uri)
        if kind is None or not kind.makes or why:
            raise PostcopydError(
                f"{offer.vm} is a domain of {offer.driver} at the source, and cannot be made at "
                f"the destination: {why or 'it knows none such'}",
                "Refused",
            )
        return kind

    @asynccontextmanager
    async def expected(self, channel: Channel, offer: p.Offer) -> AsyncIterator[Vm]:
        """A VM whose VMM was made for this offer, and waits. Raises PostcopydError, also when the
        source takes its offer back meanwhile."""
        registry, name, socket = self._registry, offer.vm, self._socket(offer.vm)
        registry.attachable(name, socket)
        if problems := await self.unfit(offer):
            raise PostcopydError("; ".join(problems), "Refused")
        made: Vmm | None = None
        vm: Vm | None = None
        try:
            async with channel.alive(), open_nursery() as nursery:
                nursery.start_soon(_hear_end, channel)
                made = await self._kind(offer).expect(name, socket, offer.definition, like(offer))
                nursery.cancel_scope.cancel()
            vm = await registry.take(name, socket, made)
            yield vm
        finally:
            if made is not None and (vm is None or not _granted(vm, offer.migration)):
                with trio.CancelScope(shield=True):
                    await self._end(made, vm)

    async def _end(self, made: Vmm, vm: Vm | None) -> None:
        if vm is not None and vm.driver is not made:
            return  # ended with its arrival
        with vm.claim(DAEMON) if vm is not None else nullcontext():
            try:
                with within(END_S, f"ending the domain {made.name} here"):
                    await made.end()
            except PostcopydError as error:
                log.error("domain not ended", vm=made.name, error=str(error))
            with suppress(PostcopydError):
                await (made.aclose() if vm is None else vm.leave())


def _granted(vm: Vm, migration: str) -> bool:
    """Whether the guest of this arrival is this host's, or may be."""
    drained = (vm.status.migration, vm.status.phase) == (migration, "drained")
    return vm.ownership == "owned" or drained or vm.waiting is not None


def like(offer: p.Offer) -> Shape:
    """The guest as its source describes it, as if seen there."""
    return Shape(
        state="running",
        pid=0,
        regions=tuple(Region(r.name, r.pages, r.page_size, 0, None, 0) for r in offer.regions),
        facts=offer.facts,
        problems=(),
        disks=tuple(
            Disk(
                disk.name,
                disk.chain,
                tuple(DiskFile(f.path, f.where, f.shared, f.writable, f.ids) for f in disk.files),
            )
            for disk in offer.disks or ()
        ),
        places=offer.places,
    )


async def _hear_end(channel: Channel) -> None:
    """Raises when the source takes its offer back or is gone; no other message is due."""
    await channel.receive()
    raise PeerError(f"{channel.peer} took its offer back", "Cancelled")
