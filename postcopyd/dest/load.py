# SPDX-License-Identifier: Apache-2.0
"""The third phase of an arrival, in the blackout, from `handover` to `grant`: loads the device
state into the VMM.

While the VMM loads it touches guest RAM. The engine answers these faults from the end of the device
state on: only then has the source named every page whose copy here is old. Owns the device state on
its way, and the tasks that receive it and load it, which end with `until_granted`.
"""

from __future__ import annotations

from contextlib import aclosing

import trio

from postcopyd import protocol as p
from postcopyd.dest.arrival import COUNT_S
from postcopyd.dest.device_state import DeviceState
from postcopyd.dest.memory import Memory
from postcopyd.dest.migration import Migration, Stage
from postcopyd.errors import PostcopydError
from postcopyd.net.channel import ConnectionLost
from postcopyd.protocol import RemoteProtocolError
from postcopyd.tasks.nursery import open_nursery


class Load:
    """`whole`: the guest may run only with all of its memory."""

    def __init__(self, m: Migration, memory: Memory, whole: bool) -> None:
        self._m = m
        self._engine = memory.engine
        self._memory = memory
        self._whole = whole
        self._state = DeviceState(m.vm.name)

    async def until_granted(self) -> None:
        """Returns when the guest was granted to this host. Raises PostcopydError."""
        m = self._m
        m.vm.show(
            phase="handover",
            mode="precopy" if self._whole else m.vm.status.mode,
            message=f"{m.vm.name} is being handed over from {m.peer}",
        )
        async with open_nursery() as nursery:
            nursery.start_soon(self._engine.watch)
            nursery.start_soon(m.watch_vmm)
            nursery.start_soon(self._load)
            await self._receive_state()
            nursery.start_soon(self._memory.watch_answers, m)
            grant = await m.receive()
            nursery.cancel_scope.cancel()
        assert isinstance(grant, p.Grant)  # handover.py's table allows no other message
        if grant.epoch != m.offer.epoch:
            raise RemoteProtocolError(
                f"{m.peer} granted epoch {grant.epoch} of {m.vm.name}, it had offered "
                f"{m.offer.epoch}"
            )

    async def _receive_state(self) -> None:
        m, size = self._m, 0
        with self._state as state:
            while not isinstance(message := await m.receive(), p.DeviceEnd):
                if isinstance(message, p.Stale):
                    self._stale(message)
                    continue
                assert isinstance(message, p.Device)
                size += len(message.data)
                state.put(message.data)
            m.run = message.run
            m.vm.attached().before = "running" if message.run else "paused"
            self._engine.seal()  # pages that came in passes and were not named are right
            if self._whole:
                await m.channel.send(p.Serving())
        if message.size != size:
            raise RemoteProtocolError(
                f"{m.peer} sent {size} bytes of device state and says {message.size}"
            )

    def _stale(self, message: p.Stale) -> None:
        if not self._m.offer.staged:
            raise RemoteProtocolError(
                f"{self._m.peer} names written pages of {self._m.vm.name}, but made no passes"
            )
        self._engine.stale(message.region, message.first, message.count, message.bits)

    async def _load(self) -> None:
        m = self._m
        await self._memory.as_compared(m)
        m.note()
        m.vm.record("loading")  # the guest at the source is about to stop
        m.stage = Stage.LOADING
        async with aclosing(self._state.taken()) as pieces:
            await m.vm.attached().load(pieces)
        if self._whole:
            await self._all_here()
        self._engine.check()  # a guest whose pages cannot come must not be granted
        await m.channel.send(p.Loaded())

    async def _all_here(self) -> None:
        """Returns when every page is here. Raises PostcopydError instead of waiting for memory that
        this host lacks, or for a source that sends nothing: the guest stands still meanwhile."""
        m, stats, present, since = self._m, self._engine.stats, -1, trio.current_time()
        while not self._engine.whole:
            if stats.present_pages != present:
                present, since = stats.present_pages, trio.current_time()
            if stats.stalls:
                raise PostcopydError(
                    f"this host has no memory left for the last {stats.total_pages - present} "
                    f"pages of {m.vm.name}: free some",
                    "NoMemory",
                )
            if trio.current_time() - since > p.DEAD_S:
                raise ConnectionLost(
                    f"{m.peer} has sent none of the last {stats.total_pages - present} pages of "
                    f"{m.vm.name} for {p.DEAD_S:.0f} s"
                )
            await trio.sleep(COUNT_S)
