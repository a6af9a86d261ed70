# SPDX-License-Identifier: Apache-2.0
"""The second phase of an arrival, from its admission to `handover`: empties guest RAM and gives it
an engine (`adopt`), says `ready` and gets the data connections (invitation.py), and in the modes
hybrid and precopy takes pages in passes while the guest runs on at the source (`passes`).

The session's stack owns what `adopt` opens. The tasks that count passes end with `passes`.
"""

from __future__ import annotations

from contextlib import AsyncExitStack

import trio

from postcopyd import protocol as p
from postcopyd.dest.memory import Memory, owned
from postcopyd.dest.migration import Migration, Stage
from postcopyd.protocol import RemoteProtocolError
from postcopyd.tasks.nursery import open_nursery
from postcopyd.vmm import Shape

COUNT_S = 0.001
"""How long until it is checked again whether all of a pass has arrived."""


async def adopt(m: Migration, shape: Shape, held: AsyncExitStack) -> Memory:
    """Empties guest RAM, which is not registered yet when this returns. Raises PostcopydError; then
    the VMM may have to `release` it."""
    m.lay(shape)
    m.note()
    m.vm.record("arriving")
    m.stage = Stage.ADOPTED
    uffds = owned(await m.vm.attached().adopt(shape), held)
    m.userfaultfds = len(uffds)
    record = m.shared.store.open_pages(m.vm.name)
    held.callback(m.forget_pages)
    return Memory.served(m, shape, uffds, record, held)


async def passes(m: Migration, memory: Memory) -> p.Handover:
    """Takes pages and answers each pass, until the guest is handed over. Raises PostcopydError."""
    async with open_nursery() as nursery:
        nursery.start_soon(m.watch_vmm)
        nursery.start_soon(memory.engine.watch)
        await m.channel.send(p.Serving())
        while isinstance(message := await m.receive(), p.Pass):
            nursery.start_soon(_count, m, memory, message.pages)
        nursery.cancel_scope.cancel()
    assert isinstance(message, p.Handover)  # handover.py's table allows no other message
    return message


async def _count(m: Migration, memory: Memory, pages: int) -> None:
    """Answers a pass once `pages` pages have arrived in all passes so far."""
    m.vm.show(phase="precopy", message=f"{m.vm.name} is copied from {m.peer}")
    stats = memory.engine.stats
    while stats.passed_pages < pages:
        await trio.sleep(COUNT_S)
    if stats.passed_pages != pages:
        raise RemoteProtocolError(
            f"{m.peer} sent {stats.passed_pages} pages in passes and says {pages}"
        )
    await memory.as_compared(m)
    await m.channel.send(p.Passed())
