# SPDX-License-Identifier: Apache-2.0
"""What all phases of one arrival share: the VM, the offer, the present connection, how far the
arrival has come, and what of that is on record.

Owns nothing that has to be closed: the session owns the connection, and puts a new one here when
the source asks again. Decides nothing: the phases do, by what they find here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import IntEnum
from typing import Any

import trio
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
    """How far this host has gone, and so what it must undo if the arrival is called off."""

    OFFERED = 0
    """This host has only looked. The VM may be another guest's, named by mistake."""
    ACCEPTED = 1
    """The VM's status tells of the arrival."""
    ADOPTED = 2
    """Guest RAM is, or may be, empty and registered: the VMM must be told to let go of it."""
    LOADING = 3
    """The VMM has, or may have, begun to load: it can do nothing else any more, and is ended."""
    HERE = 4
    """Every page is here or lost, and that is recorded. Nothing is undone."""


class Migration:
    """Made with its session, shared by its phases. `run`: the guest is to run here, not to stay
    paused. `ran`: as far as is known it runs here, or is paused as it was; `ran_ns`: since when, by
    the monotonic clock of this boot. `told`: the hooks were told that it runs here. `given_up`: a
    person has given up the missing pages. `ram` and `userfaultfds` are as in the record, for a
    later daemon. `huge` is set once the guest is here: the RAM that may be in huge pages."""

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
        self._hooks_over = trio.Event()  # those that `begin_hooks` has begun
        self._hooks_over.set()

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
        """Waits while no message is due. Always ends by PostcopydError: the source has failed, is
        gone, has taken its guest back, or has sent what was not due."""
        message = await self.receive()
        raise RemoteProtocolError(f"{self.peer} sent {type(message).__name__} too late")

    async def watch_vmm(self) -> None:
        await self.vm.attached().gone()
        raise PostcopydError(f"the VMM of {self.vm.name} here has ended by itself", "VmmGone")

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Ends its body by PostcopydError if the VMM here ends."""
        async with open_nursery() as nursery:
            nursery.start_soon(self.watch_vmm)
            yield
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def heard(self) -> AsyncIterator[None]:
        """The same, and also if the source takes its guest back, fails, or is gone. The body must
        not receive from the channel."""
        async with open_nursery() as nursery:
            nursery.start_soon(self.watch_vmm)
            nursery.start_soon(self.listen)
            yield
            nursery.cancel_scope.cancel()

    def vmm_ended(self) -> bool:
        """Whether the VMM has certainly ended. One that cannot be looked at may live."""
        with suppress(OSError):
            return not procfs.started(self.vm.attached().pid)
        return False

    def begin_hooks(self, phase: str, **about: Any) -> None:
        """Runs the hooks of a phase in a task of the daemon, once those of the phase before have
        ended: they may take minutes. Neither the guest, which may lack pages, nor a pause, nor a
        source that asks waits for them."""
        before, over = self._hooks_over, trio.Event()
        if self.vm.spawn(self._run_begun, phase, about, before, over):
            self._hooks_over = over

    async def _run_begun(
        self, phase: str, about: dict[str, Any], before: trio.Event, over: trio.Event
    ) -> None:
        """A daemon that ends waits for the last hooks, and ends those that only tell of progress,
        as the next daemon goes on with that migration."""
        try:
            with trio.CancelScope(shield=phase != "running"):
                await before.wait()
                await self._run_hooks(phase, **about)
        finally:
            over.set()

    async def hooks(self, phase: str, **about: Any) -> None:
        """Runs the hooks of a phase, once those of the phase before have ended."""
        await self._hooks_over.wait()
        await self._run_hooks(phase, **about)

    async def _run_hooks(self, phase: str, **about: Any) -> None:
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
        """Notes where guest RAM is, for the record."""
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
        """Notes for the next record what `remember` needs, and the `answer`, if any, to a source
        that asks later. Raises PostcopydError."""
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
        """Restores what `note` recorded of a guest that was granted to the previous daemon."""
        self.stage = Stage.LOADING
        self.run, self.ran, self.told = about["run"], about["ran"], about["told"]
        self.ran_ns = about["ran_ns"]
        self.given_up = about.get("given_up", False)
        self.identity = tuple(about.get("identity", ()))
        self.ram, self.userfaultfds = about["ram"], about["userfaultfds"]

    def own(self) -> None:
        """Records that the guest is this host's, before any vCPU runs here, whoever allowed that: a
        restarted daemon that does not find this record ends the VMM. Records with it whether the
        guest is to run, which came after the previous record. Raises PostcopydError; then nothing
        may run."""
        self.note()
        self.vm.record("owned", self.offer.epoch)

    def forget_pages(self) -> None:
        """Removes the page record, unless only it shows that the guest is whole."""
        if not (self.stage is Stage.HERE and self.vm.unwritten):
            self.vm.remove_pages()
