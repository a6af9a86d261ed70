# SPDX-License-Identifier: Apache-2.0
"""The fourth phase of an arrival, the end of the blackout, from `grant` to `ran`: runs the guest.

The guest is this host's from the grant on: nothing here ends its VMM, unless the VMM has refused to
run it, so that no vCPU has run. Each step is one function; a recovery takes the same ones.
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
    """Runs the guest, or leaves it paused as it was, and tells the source. Raises PostcopydError;
    after Declined and StateNotWritten no vCPU has run."""
    try:
        await cont(m, memory)
    except (Declined, StateNotWritten) as refused:
        await _decline(m, str(refused))
        raise
    await say_ran(m, memory)
    m.log.info("guest handed over")


async def cont(m: Migration, memory: Memory) -> None:
    """Records that the guest is this host's, then runs it unless it is to stay paused. A recovery
    calls this too, as the connection may be lost between the grant and its record. While the VMM
    begins to run it may wait for a page. If the source goes then, or the page does not come, nobody
    knows whether the guest ran, and the VMM is told to run it later. Raises PostcopydError."""
    m.own()
    if m.run:
        async with open_nursery() as nursery:
            nursery.start_soon(m.listen)
            nursery.start_soon(memory.engine.watch)
            nursery.start_soon(memory.watch_answers, m)
            await m.vm.attached().run()
            nursery.cancel_scope.cancel()


async def say_ran(m: Migration, memory: Memory) -> None:
    """Notes that the guest runs, and tells the source. Raises ConnectionLost if that is not told;
    the guest runs all the same."""
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
        remaining=memory.remaining,
    )
    if not m.told:
        m.told = True
        m.begin_hooks("running")


async def _decline(m: Migration, reason: str) -> None:
    """Gives back a guest of which no vCPU has run: first ends the VMM, then tells the source."""
    with within(END_S, f"ending the VMM of {m.vm.name} here"):
        await m.vm.attached().end()
    declined = p.Declined(p.sentence(reason))
    m.note(declined)
    m.vm.record_soon("declined")
    await m.channel.send(declined)
