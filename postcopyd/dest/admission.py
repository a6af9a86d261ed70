# SPDX-License-Identifier: Apache-2.0
"""The first phase of an arrival, from `offer` until guest RAM is to be emptied: decides whether
this host takes the guest.

Compares the VMM that waits here with the one that is offered, and this host's memory with what will
come. If many guests arrive, this one waits for its turn, and is compared again. Changes nothing but
the VM's status. Owns the descriptors of guest RAM while it looks; the session owns those of a guest
that was admitted.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack, ExitStack

import trio

from postcopyd import protocol as p
from postcopyd.dest.migration import Migration, Stage
from postcopyd.errors import PostcopydError
from postcopyd.sessions import alike, headroom
from postcopyd.sessions.limits import in_line
from postcopyd.tasks import threads
from postcopyd.vmm import Shape


async def check(m: Migration) -> None:
    """Answers an offer that only asks whether it would be taken."""
    try:
        async with m.channel.alive():
            shape = await _look(m)
        try:
            problems = _unfit(m, shape) + await _lacks(m, shape)
        finally:
            shape.close()
    except PostcopydError as error:
        problems = [str(error)]
    await m.channel.send(p.Checked([p.sentence(problem) for problem in problems][:256]))


async def admit(m: Migration, held: AsyncExitStack) -> Shape:
    """Takes the guest; returns the VMM here as it was compared. The memory that it lacks is set
    aside until `held` is closed. Raises PostcopydError, Refused above all."""
    shape = await _look(m)
    with ExitStack() as looked:
        looked.callback(shape.close)
        problems = _unfit(m, shape)
        if not problems and not _has_place(m, shape):
            looked.close()  # a guest that waits holds no descriptors here
            await _wait_for_turn(m)
            shape = await _look(m)
            looked.callback(shape.close)
            problems = _unfit(m, shape)
        problems += await _lacks(m, shape)
        if problems:
            raise PostcopydError("; ".join(problems), "Refused")
        held.callback(looked.pop_all().close)
    _accept(m, f"preparing for {m.vm.name} from {m.peer}")
    m.log.info("migration started", mode=m.vm.status.mode)
    promise(m, shape, held)
    return shape


def promise(m: Migration, shape: Shape, held: AsyncExitStack) -> None:
    """Sets aside the memory that this arrival lacks, until `held` is closed."""
    m.shared.arriving[m.vm.name] = _arrival(m, shape)
    held.callback(no_longer_promised, m, shape)


def no_longer_promised(m: Migration, shape: Shape) -> None:
    """Takes back what `promise` set aside: the memory is allocated by now, or not wanted."""
    promised = m.shared.arriving.get(m.vm.name)
    if promised is not None and promised.regions is shape.regions:
        del m.shared.arriving[m.vm.name]


async def _look(m: Migration) -> Shape:
    return await m.vm.attached().inspect("destination")


def _accept(m: Migration, message: str) -> None:
    """Has the VM's status tell of the arrival, once it is certain that the source means this VM."""
    m.stage = Stage.ACCEPTED
    m.vm.conclude(
        role="destination",
        phase="idle",
        migration=m.offer.migration,
        peer=m.peer,
        mode="hybrid" if m.offer.staged else "postcopy",
        result=None,
        message=message,
    )


def _has_place(m: Migration, shape: Shape) -> bool:
    """Joins the arrivals, until the daemon has it leave. Returns whether the limits on guests and
    memory let this one in at once; if not, it is in line."""
    arrivals, size = m.shared.limits.arrivals, sum(region.size for region in shape.regions)
    arrivals.join(m.offer.migration, size)
    return arrivals.ahead(m.offer.migration) is None


async def _wait_for_turn(m: Migration) -> None:
    limits, told = m.shared.limits, -1
    arrivals, who = limits.arrivals, m.offer.migration
    m.log.info("arrival waits for its turn", ahead=arrivals.ahead(who))
    with limits.peers.aside():
        while (ahead := arrivals.ahead(who)) is not None:
            changed = arrivals.changed
            if ahead != told:
                _accept(
                    m,
                    f"{m.vm.name} waits for its turn to come here from {m.peer}: {in_line(ahead)}",
                )
                if p.QUEUE in m.channel.features:
                    await m.channel.send(p.Queued(ahead))
                told = ahead
            await changed.wait()


def _unfit(m: Migration, shape: Shape) -> list[str]:
    """Why this VMM, or this host, cannot take what is offered, however long it waits."""
    size = sum(region.size for region in shape.regions)
    too_large = m.shared.limits.arrivals.too_large(size)
    return [*shape.problems, *_differences(m, shape), *too_large]


def _differences(m: Migration, shape: Shape) -> list[str]:
    """What differs between the VMM that offers and the one that waits here."""
    if shape.state != "incoming":
        return [
            f"the VMM of {m.vm.name} here does not wait for a migration (it is "
            f"{shape.state}): start it as a destination"
        ]
    return alike.differences(shape, m.vm.attached().kind, m.offer)


def _arrival(m: Migration, shape: Shape) -> headroom.Arrival:
    return headroom.Arrival(shape.pid, shape.regions, os.getpid() if m.offer.staged else None)


async def _lacks(m: Migration, shape: Shape) -> list[str]:
    """What memory this host lacks. After the handover the kernel would kill the VMM for that."""
    arrival = _arrival(m, shape)
    seen = await trio.to_thread.run_sync(headroom.maps, arrival, limiter=threads.WALKS)
    return headroom.problems(arrival, seen, [*m.shared.arriving.values()])
