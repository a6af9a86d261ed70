# SPDX-License-Identifier: Apache-2.0
"""The fourth phase of an arrival, the end of the blackout: from `grant` to `ran`.

The guest is this host's from the grant on: nothing here ends its VMM, save when it has refused to
run and so no vCPU has. Each step is one function; recovery takes the same ones.
"""

from __future__ import annotations

from postcopyd import protocol as p
from postcopyd._native import lib
from postcopyd.dest.memory import Memory
from postcopyd.dest.migration import Migration
from postcopyd.records.store import StateNotWritten
from postcopyd.sessions.patience import END_S, within
from postcopyd.tasks.nursery import open_nursery
from postcopyd.vmm import Declined


async def run(m: Migration, memory: Memory) -> None:
    """The guest runs here, or is paused as it was, and the source is told. Raises PostcopydError,
    after which no vCPU has run where it is Declined or StateNotWritten."""
    try:
        await cont(m, memory)
    except (Declined, StateNotWritten) as refused:
        await _decline(m, str(refused))
        raise
    await say_ran(m, memory)
    m.log.info("guest handed over")


async def cont(m: Migration, memory: Memory) -> None:
    """Runs the guest, unless it was paused; recorded first, also where the connection was lost
    between the grant and its record. The VMM may wait for a page in this, and the source may go
    meanwhile, or the page not come: then it is not known whether it ran, and it is told to again
    later."""
    m.own()
    if m.run:
        async with open_nursery() as nursery:
            nursery.start_soon(m.listen)
            nursery.start_soon(memory.engine.watch)
            nursery.start_soon(memory.watch_answers, m)
            await m.vm.attached().run()
            nursery.cancel_scope.cancel()


async def say_ran(m: Migration, memory: Memory) -> None:
    """Raises ConnectionLost; the guest runs all the same, which is noted."""
    m.ran = True
    m.ran_ns = m.ran_ns or lib.pc_monotonic_ns()
    try:
        await m.channel.send(p.Ran())
    finally:
        memory.engine.settle()
        m.note()
        m.vm.record_soon(None)
    m.vm.show(
        phase="postcopy",
        message=f"{m.vm.name} runs here, its memory follows",
        remaining=None,
    )
    if not m.told:
        m.told = True
        await m.hooks("running")


async def _decline(m: Migration, reason: str) -> None:
    """No vCPU has run: the VMM ends first, then the source may have its guest back."""
    with within(END_S, f"ending the VMM of {m.vm.name} here"):
        await m.vm.attached().end()
    declined = p.Declined(p.sentence(reason))
    m.note(declined)
    m.vm.record_soon("declined")
    await m.channel.send(declined)
