# SPDX-License-Identifier: Apache-2.0
"""The pause of an arrival after the grant, and how it goes on: the guest is this host's, waits for
its missing pages, and nothing here ends it.

A pause has no task. The engine goes on taking faults, and the session waits (`vm.waiting`) until
the source asks again, a person gives the missing pages up, or the VMM ends. Each is one function.
"""

from __future__ import annotations

import trio

from postcopyd import protocol as p
from postcopyd.dest.invitation import Invitation
from postcopyd.dest.memory import Memory
from postcopyd.dest.migration import Migration
from postcopyd.errors import PostcopydError
from postcopyd.native.engine import EngineError, Failure
from postcopyd.sessions import losses
from postcopyd.tasks import threads
from postcopyd.vmm import Vmm

ENDS_S = 5.0
"""How long a VMM may take to end after its memory has gone."""
HAVE_PAGES = 8 * p.DEVICE_CHUNK
"""Pages that one Have message covers, one bit each."""


async def vmm_has_ended(m: Migration, driver: Vmm, error: PostcopydError) -> bool:
    """Whether `error` means that the VMM has ended, so that this is no pause."""
    # The end of a VMM shows in several kinds of error, and its farewell comes a moment later.
    ends = error.name == "VmmGone" or _failure(error) is Failure.VMM_GONE
    with trio.move_on_after(ENDS_S if ends or m.vmm_ended() else 0):
        await driver.gone()
    return m.vmm_ended()


async def stand_still(m: Migration, memory: Memory, error: PostcopydError) -> str | None:
    """Ends everything but the taking of faults. If the kernel has put pages into guest memory,
    returns why the guest cannot be trusted any more, and notes that for the record, so that no
    later engine takes the guest for whole."""
    engine = memory.engine
    await engine.disconnect()
    if _failure(error) is Failure.MEMORY:
        await memory.give_up_unplugged(m.log)
    if not engine.foreign:
        return None
    distrust = losses.foreign(m.vm.name, m.peer, engine.sentence)
    m.vm.about["foreign"] = distrust
    return distrust


def show(m: Migration, error: PostcopydError, distrust: str | None) -> None:
    """Shows and records the pause."""
    message = (
        f"{m.vm.name} {'runs here' if m.ran else 'was granted to this host'} and waits for pages "
        f"that are still at {m.peer}: {error}; that host connects again by itself"
    )
    if distrust is not None:
        message = distrust
    m.vm.show(phase="paused", message=message)
    m.vm.record_soon(None)
    m.log.warning("migration paused", error=str(error))


async def tell_what_is_here(m: Migration, memory: Memory, invitation: Invitation) -> None:
    """Waits for the data connections, then tells the source which pages are here, so that it pushes
    only the rest. Raises PostcopydError."""
    async with m.heard():
        await invitation.taken_up()
        for index, region in enumerate(memory.shape.regions):
            for first in range(0, region.pages, HAVE_PAGES):
                count = min(HAVE_PAGES, region.pages - first)
                bits = memory.engine.have(index, first, count)
                await m.channel.send(p.Have(index, first, count, bits))
        await m.channel.send(p.Serving())


async def poison(m: Migration, memory: Memory) -> None:
    """Makes each missing page a memory error, so that the guest goes on without them: a person says
    that the source is gone for good.

    The engine stays as long as the VMM: if the RAM were not registered any more, the kernel could
    make zeros of lost pages (MADV_COLLAPSE does). Raises PostcopydError.
    """
    vm, engine = m.vm, memory.engine
    if not m.ran:
        m.own()  # before the step that cannot be undone
    engine.settle()
    try:
        pages = await trio.to_thread.run_sync(engine.poison, limiter=threads.ENGINE)
    except PostcopydError:
        await engine.disconnect()
        if vm.driver is None or m.vmm_ended():
            raise PostcopydError(
                f"the VMM of {vm.name} could not bear a memory error and has ended: the guest is "
                f"gone, start it from its disks",
                "VmmGone",
            ) from None
        raise
    m.given_up = True
    if m.run and not m.ran:
        await vm.attached().run()
    m.ran = True
    m.note()
    vm.show(
        remaining=0,
        message=f"{vm.name} runs here without {pages} pages that were lost with {m.peer}: it gets "
        f"a memory error where it touches one; shut it down when you can, it cannot be moved",
    )
    vm.record_soon(None)
    m.log.warning("ownership changed by a person", decision="poison", pages=pages)


def _failure(error: PostcopydError) -> Failure | None:
    """The kind of failure, if the error is the engine's."""
    return error.failure if isinstance(error, EngineError) else None
