# SPDX-License-Identifier: Apache-2.0
"""One arrival as all of its phases know it: the VM, what was offered, the connection of now, how
far it has come, and what of that is on record.

Owns nothing that has to be closed: the connection is the session's, which puts a new one here when
the source asks again. Decides nothing: the phases do, by what they find here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import IntEnum
from typing import Any

from msgspec import structs, to_builtins

from postcopyd import protocol as p
from postcopyd.errors import PostcopydError
from postcopyd.handover import Machine
from postcopyd.host import procfs
from postcopyd.net.channel import Channel, PeerError
from postcopyd.protocol import RemoteProtocolError
from postcopyd.records.schema import Arrival, RecordedRegion
from postcopyd.sessions import hugepages
from postcopyd.sessions.hooks import run_hooks
from postcopyd.sessions.shared import Shared
from postcopyd.sessions.vm import Vm
from postcopyd.tasks.nursery import open_nursery
from postcopyd.vmm import Shape


class Stage(IntEnum):
    """How far this host has gone, and so what it has to undo when the arrival is called off."""

    OFFERED = 0
    """It has only looked. The VM may be another guest's, named by mistake."""
    ACCEPTED = 1
    """The VM's status tells of the arrival."""
    ADOPTED = 2
    """Guest RAM is, or may be, empty and registered: the VMM is told to let go of it."""
    LOADING = 3
    """The VMM has, or may have, begun to load: it is of no other use any more, and is ended."""
    HERE = 4
    """Every page is here or lost, and that is recorded. Nothing is undone."""


class Migration:
    """Made with its session, shared by its phases. `run`: whether the guest is to run here; `ran`:
    whether it does, or is paused as it was, as far as is known; `ran_ns`: since when, by the
    monotonic clock of this boot. `told`: the operator's programs, that it runs here. `given_up`: by
    a person, what was missing. `ram` and `userfaultfds` are as the record has them, for a daemon
    that is started later. `huge` is set once the guest is here: what may be in huge pages."""

    def __init__(self, vm: Vm, offer: p.Offer, channel: Channel, shared: Shared) -> None:
        self.vm = vm
        self.offer = offer
        self.channel = channel
        self.machine: Machine = channel.machine
        self.shared = shared
        self.identity = channel.names
        self.stage = Stage.OFFERED
        self.run = True
        self.ran = self.told = self.given_up = False
        self.ran_ns = 0
        self.ram: list[RecordedRegion] = []
        self.userfaultfds = 0
        self.huge: hugepages.Ram | None = None

    @property
    def log(self) -> Any:
        return self.vm.log.bind(
            migration=self.offer.migration, peer=self.channel.peer, role="destination"
        )

    @property
    def peer(self) -> str:
        return self.channel.peer

    # --- the source and the VMM ----------------------------------------------------------------

    async def receive(self) -> p.Message:
        """The next message. Raises PeerError once the source has taken its guest back."""
        message = await self.channel.receive()
        if isinstance(message, p.Cancel):
            raise PeerError(f"{self.peer} took it back: {message.reason}", "Cancelled")
        return message

    async def listen(self) -> None:
        """Nothing is due from the source now; but it may fail, be gone, or take its guest back."""
        message = await self.receive()
        raise RemoteProtocolError(f"{self.peer} sent {type(message).__name__} too late")

    async def watch_vmm(self) -> None:
        await self.vm.attached().gone()
        raise PostcopydError(f"the VMM of {self.vm.name} here has ended by itself", "VmmGone")

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Its body ends with an error when the VMM here ends."""
        async with open_nursery() as nursery:
            nursery.start_soon(self.watch_vmm)
            yield
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def heard(self) -> AsyncIterator[None]:
        """The same, and also when the source takes its guest back, fails, or is gone. The body
        receives nothing."""
        async with open_nursery() as nursery:
            nursery.start_soon(self.watch_vmm)
            nursery.start_soon(self.listen)
            yield
            nursery.cancel_scope.cancel()

    def vmm_ended(self) -> bool:
        """Certainly: one that cannot be looked at may live."""
        with suppress(OSError):
            return not procfs.started(self.vm.attached().pid)
        return False

    async def hooks(self, phase: str, **about: Any) -> None:
        await run_hooks(
            self.shared.hooks,
            self.vm.name,
            "destination",
            phase,
            migration=self.offer.migration,
            peer=self.peer,
            **about,
        )

    # --- what is on record -----------------------------------------------------------------------

    def lay(self, shape: Shape) -> None:
        """Notes where guest RAM is."""
        self.ram = [
            {
                "name": region.name,
                "pages": region.pages,
                "page_size": region.page_size,
                "address": region.address,
                "offset": region.offset,
                "file": region.fd is not None and [*procfs.file_id(region.fd)],
            }
            for region in shape.regions
        ]

    def note(self, answer: p.Message | None = None) -> None:
        """What `remember` needs, or what a source is told that asks later, for the next record."""
        about: Arrival = {
            "migration": self.offer.migration,
            "offer": to_builtins(structs.replace(self.offer, facts={}, places={})),
            "ram": self.ram,
            "userfaultfds": self.userfaultfds,
            "run": self.run,
            "ran": self.ran,
            "told": self.told,
            "ran_ns": self.ran_ns,
            "given_up": self.given_up,
            "identity": [*self.identity],
        }
        if answer is not None:
            about["answer"] = to_builtins(answer)
        self.vm.note({**about})

    def remember(self, about: Arrival) -> None:
        """The guest was granted to this host before the daemon was started."""
        self.stage = Stage.LOADING
        self.run, self.ran, self.told = about["run"], about["ran"], about["told"]
        self.ran_ns = about["ran_ns"]
        self.given_up = about.get("given_up", False)
        self.identity = tuple(about.get("identity", ()))
        self.ram, self.userfaultfds = about["ram"], about["userfaultfds"]

    def own(self) -> None:
        """On record before any vCPU runs here, whoever says that it may: without it a daemon that
        is started ends the VMM. With it is whether the guest shall run, which came after the record
        before. Raises PostcopydError: then nothing runs."""
        self.note()
        self.vm.record("owned", self.offer.epoch)

    def forget_pages(self) -> None:
        """The page record goes, unless only it shows that the guest is whole."""
        if not (self.stage is Stage.HERE and self.vm.unwritten):
            self.vm.remove_pages()
