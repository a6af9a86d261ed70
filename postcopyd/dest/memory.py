# SPDX-License-Identifier: Apache-2.0
"""Guest RAM that pages arrive in, with the native engine that takes its faults.

Owns nothing itself. The engine, our duplicates of the userfaultfds (the VMM keeps its own) and the
page record are on a stack of the session, `held`, which closes them in reverse order: the engine
first, as it borrows the others. Until then a `Memory` is whole: code that has one need not ask
whether there is an engine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import trio

from postcopyd import protocol as p
from postcopyd.dest.engine import DestinationEngine
from postcopyd.dest.migration import Migration
from postcopyd.dest.unplugged import unplugged
from postcopyd.errors import PostcopydError
from postcopyd.net.channel import ConnectionLost
from postcopyd.tasks import threads
from postcopyd.vmm import Shape


class Memory:
    """`shape` is the VMM as it was compared; its descriptors are the session's. Made by
    `arrival.adopt`, and by `restart.adopted_again` for a guest of the previous daemon."""

    def __init__(self, shape: Shape, engine: DestinationEngine) -> None:
        self.shape = shape
        self.engine = engine

    @classmethod
    def served(
        cls, m: Migration, shape: Shape, uffds: Sequence[int], record: int, held: AsyncExitStack
    ) -> Memory:
        """Gives guest RAM a new engine; `held` closes `record`. Raises PostcopydError."""
        held.callback(os.close, record)
        engine = DestinationEngine(shape.regions, uffds, record, staged=m.offer.staged)
        held.push_async_callback(engine.aclose)
        return cls(shape, engine)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(region.size for region in self.shape.regions)

    @property
    def remaining(self) -> int:
        """Bytes that are not here yet; an estimate if regions have pages of several sizes."""
        stats = self.engine.stats
        return int(self.size * (stats.total_pages - stats.confirmed_pages) // stats.total_pages)

    async def as_compared(self, m: Migration) -> None:
        """Raises PostcopydError if the VMM here has changed since it was compared with the
        source's."""
        if await m.vm.attached().outline() != self.shape.outline:
            raise PostcopydError(
                f"somebody changed devices or disks of the VMM that waits for {m.vm.name} here: "
                f"migrate again",
                "Refused",
            )

    async def watch_answers(self, m: Migration) -> None:
        """Raises ConnectionLost if the connection is up and brings none of the requested pages for
        DEAD_S. Use it from `deviceEnd` on, when the source answers."""
        stats, answers, since = self.engine.stats, -1, trio.current_time()
        while True:
            if stats.unanswered <= 0 or stats.requests - stats.unanswered != answers:
                answers, since = stats.requests - stats.unanswered, trio.current_time()
            if trio.current_time() - since > p.DEAD_S:
                raise ConnectionLost(
                    f"{m.peer} has sent none of {stats.unanswered} pages for {p.DEAD_S:.0f} s that "
                    f"the guest waits for"
                )
            await trio.sleep(p.KEEPALIVE_S)

    async def give_up_unplugged(self, log: Any) -> None:
        """Gives up the pages of guest RAM that was unplugged meanwhile. Only without
        connections."""
        shape = self.shape
        try:
            for number in unplugged(shape.pid, shape.regions):
                await trio.to_thread.run_sync(self.engine.gone, number, limiter=threads.ENGINE)
                log.warning("guest RAM was unplugged", region=shape.regions[number].name)
        except (OSError, PostcopydError) as error:  # then its pages still count as missing
            log.error("unplugged guest RAM not looked for", error=str(error))


def owned(descriptors: list[int], held: AsyncExitStack) -> list[int]:
    """Has `held` close userfaultfds that a driver has just given us, and returns them."""
    for fd in descriptors:
        held.callback(os.close, fd)
    return descriptors
