# SPDX-License-Identifier: Apache-2.0
"""Third phase: stop the guest here, send its device state, look for the last written pages, grant
the guest to the destination, and wait until it runs there.

The guest stands still meanwhile. So everything slow is done before the stop (`prepare`), and `run`
awaits no more than the protocol needs. A failure before the grant leaves the guest here
(rollback.py). The grant is recorded before it is sent (`_commit`); after that only the destination
may run the guest. Borrows the channel and the guest; its own task, `_save`, ends with it.
"""

from __future__ import annotations

import time

import trio

from postcopyd import protocol as p
from postcopyd.errors import PostcopydError
from postcopyd.net.channel import Channel
from postcopyd.protocol import RemoteProtocolError
from postcopyd.source.engine import Look
from postcopyd.source.guest import Guest
from postcopyd.source.migration import Migration
from postcopyd.tasks import threads
from postcopyd.tasks.nursery import open_nursery

STALE_PAGES = 8 * p.DEVICE_CHUNK
"""Pages that one Stale message covers, one bit each. A Stale that names no page is not sent."""


class Blackout:
    """Call `prepare`, then `run`. `_as_offered` is set once the stopped guest is known to be as it
    was offered."""

    def __init__(self, migration: Migration, guest: Guest, channel: Channel) -> None:
        self._migration, self._figures, self._vm = migration, migration.figures, migration.vm
        self._guest, self._engine, self._channel = guest, guest.engine, channel
        self._as_offered = trio.Event()

    async def prepare(self) -> None:
        """Does all that can be done while the guest still runs. Raises PostcopydError."""
        async with open_nursery() as nursery:  # no message is due, but the destination may fail
            nursery.start_soon(self._engine.watch)
            nursery.start_soon(self._channel.receive)
            await self._engine.scan()
            self._guest.touched = True
            await self._vm.attached().prepare()
            await self._migration.hooks("handover")
            # Each pass has looked already. Another look gives the guest time to write pages again.
            if not self._figures.passes:
                await self._guest.still_as_offered("was prepared")
            nursery.cancel_scope.cancel()
        self._engine.check()
        await self._intend()

    async def _intend(self) -> None:
        """Writes the intent to disk before the stop: after a reboot this host then asks the
        destination before it starts this guest."""
        driver, peer = self._vm.attached(), self._migration.peer
        intent = {
            "migration": self._migration.name,
            "peer": peer.to,
            "epoch": self._vm.epoch + 1,
            "driver": driver.kind,
            "socket": driver.socket,
            "identity": peer.identity,
            "granted": peer.granted.recorded(),
        }
        if driver.makes:
            intent["definition"] = self._migration.definition
        self._vm.leaving()
        save = self._migration.shared.store.save_intent
        await trio.to_thread.run_sync(save, self._vm.name, intent, limiter=threads.DISK)
        self._guest.note()
        self._vm.record("intent")

    async def run(self) -> None:
        """Returns when the guest runs at the destination. Raises PostcopydError; the machine says
        whether the guest was granted by then."""
        vm, channel = self._vm, self._channel
        vm.show(phase="handover", message=f"handing {vm.name} over to {self._migration.peer.to}")
        async with open_nursery() as nursery:
            nursery.start_soon(self._engine.watch)
            nursery.start_soon(self._save)
            await self._loaded()
            if not self._as_offered.is_set():
                async with open_nursery() as waiting:  # no message is due, but it may fail there
                    waiting.start_soon(channel.receive)
                    await self._as_offered.wait()
                    waiting.cancel_scope.cancel()
            self._commit()
            await channel.send(p.Grant(vm.epoch))
            nursery.cancel_scope.cancel()
        answer = await channel.receive()
        if isinstance(answer, p.Declined):
            raise PostcopydError(
                f"the destination could not run {vm.name}: {answer.reason}", "Declined"
            )
        self._figures.ran()
        parts = {f"{name}_ms": ms for name, ms in self._figures.downtime_parts.items()}
        self._migration.log.info(
            "guest handed over", downtime_ms=self._figures.downtime_ms, **parts
        )

    async def _save(self) -> None:
        driver = self._vm.attached()
        if not await self._guest.outline_is_as_offered():
            await self._guest.still_as_offered("was prepared")
        await self._channel.send(p.Handover(whole=self._migration.request.mode == "precopy"))
        size = 0

        async def send(data: bytes) -> None:
            nonlocal size
            for at in range(0, len(data), p.DEVICE_CHUNK):
                await self._channel.send(p.Device(bytes(data[at : at + p.DEVICE_CHUNK])))
            size += len(data)
            self._guest.vacating.saved(data)

        def stopped() -> None:
            self._figures.stopped_at = time.monotonic()

        await driver.save(send, stopped)
        self._figures.saved_at = time.monotonic()
        # Guest RAM is final only here: disk reads that were under way at the stop have ended.
        # What the destination has requested meanwhile waits in the urgent socket.
        if self._guest.tracking is not None:
            await self._guest.tracking.look(Look.STOPPED)
            await self._name_stale()
        self._engine.serve()
        await self._channel.send(p.DeviceEnd(size, run=driver.before != "paused"))
        # Checked while the destination loads the device state, so that this adds no downtime.
        if not await self._guest.outline_is_as_offered():
            raise PostcopydError(
                f"somebody changed devices or disks of {self._vm.name} as it was handed over: "
                f"migrate again",
                "Refused",
            )
        self._as_offered.set()

    async def _name_stale(self) -> None:
        """Names the pages that the destination lacks or has an old copy of. RAM must be final."""
        for index, region in enumerate(self._guest.shape.regions):
            for first in range(0, region.pages, STALE_PAGES):
                count = min(STALE_PAGES, region.pages - first)
                if bits := self._engine.stale(index, first, count):
                    await self._channel.send(p.Stale(index, first, count, bits))

    async def _loaded(self) -> None:
        """Waits until the destination could run the guest; with precopy it then has all pages."""
        while not isinstance(answer := await self._channel.receive(), p.Loaded):  # else: Serving
            if self._migration.request.mode != "precopy":
                raise RemoteProtocolError(
                    f"{self._migration.peer.to} sent {type(answer).__name__} where Loaded was due"
                )
            self._engine.push(self._migration.rate(self._engine))
        self._figures.loaded_at = time.monotonic()

    def _commit(self) -> None:
        """The point of no return: records the grant, with no await between checks and record."""
        vm = self._vm
        if self._migration.cancelling.cancel_called:
            raise PostcopydError("cancelled by request", "Cancelled")
        self._engine.check()
        vm.attached().check_saved()
        vm.record("granted", vm.epoch + 1)
        self._migration.committed = True
