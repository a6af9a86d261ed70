# SPDX-License-Identifier: Apache-2.0
"""First phase: offer the guest, wait for its turn, make the data connections.

Also serves `postcopyd check`, which sends the same offer and only asks whether it would be taken.
While the guest waits for its turn it runs here as before, and nobody looks at it. Functions, as no
state stays. Borrows the channel.
"""

from __future__ import annotations

from postcopyd import protocol as p
from postcopyd.errors import PostcopydError
from postcopyd.host import kernel
from postcopyd.net.channel import Channel
from postcopyd.protocol import RemoteProtocolError
from postcopyd.sessions import alike
from postcopyd.sessions.limits import in_line
from postcopyd.sessions.vm import Vm
from postcopyd.source.guest import Guest
from postcopyd.source.migration import Migration
from postcopyd.tasks.nursery import open_nursery
from postcopyd.vmm import Shape, VmmGone


async def problems(migration: Migration, shape: Shape) -> list[str]:
    """What would prevent the migration, on both hosts. Adds to the warnings what would make it
    another migration than was asked for. Touches nothing."""
    found = [*shape.problems]
    if why := shape.untracked or kernel.why_no_passes():
        migration.figures.warnings.append(
            f"it would be moved by postcopy alone, without passes: {why}"
        )
    try:
        if shape.regions or not found:  # without regions there is nothing to offer
            channel = await greeted(migration, shape)
            await channel.send(await _offer(migration, shape, check=True))
            found += (await channel.expect(p.Checked)).problems
    except PostcopydError as error:
        found.append(str(error))
    return found


def refuse(vm: Vm, shape: Shape) -> None:
    """Raises PostcopydError if this host can see by itself that the guest cannot be moved."""
    if shape.problems:
        raise PostcopydError("; ".join(shape.problems), "Refused")
    if shape.state == "incoming":
        raise PostcopydError(
            f"{vm.name} is itself waiting for an incoming migration here", "Refused"
        )


async def greeted(migration: Migration, shape: Shape) -> Channel:
    """The channel to the destination, whose daemon is noted as the one to grant this guest to.
    Raises PostcopydError."""
    peer = migration.peer
    channel = await peer.greeted()
    peer.granted = peer.answers
    if shape.disks and p.DISKS not in channel.features and not migration.request.unsafe:
        raise PostcopydError(
            f"the postcopyd at {peer.to} is too old to see that the disks of "
            f"{migration.vm.name} are the same there: upgrade it, {alike.INSIST}",
            "Refused",
        )
    if migration.vm.attached().makes and p.MAKES not in channel.features:
        raise PostcopydError(
            f"the postcopyd at {peer.to} is too old to make the domain {migration.vm.name} there: "
            f"upgrade it",
            "Refused",
        )
    return channel


async def accepted(migration: Migration, guest: Guest, channel: Channel) -> None:
    """Returns when the destination serves this guest. Raises PostcopydError if it does not."""
    await channel.send(await _offer(migration, guest.shape, staged=guest.tracking is not None))
    token = await _turn(migration, guest, channel)
    await migration.peer.connect(channel, guest.engine, migration.name, token)
    await channel.expect(p.Serving)


async def _offer(
    migration: Migration, shape: Shape, *, check: bool = False, staged: bool = False
) -> p.Offer:
    driver, request = migration.vm.attached(), migration.request
    offered = await driver.definition(request.persists, request.xml)
    migration.definition = await driver.definition() if request.for_a_domain else offered
    return p.Offer(
        migration=migration.name,
        vm=migration.vm.name,
        driver=migration.vm.attached().kind,
        regions=[p.RegionOffer(r.name, r.pages, r.page_size) for r in shape.regions],
        facts={key: p.fact(value) for key, value in shape.facts.items()},
        connections=migration.shared.connections,
        epoch=migration.vm.epoch + 1,
        check=check,
        staged=staged,
        disks=alike.offered(shape.disks),
        unsafe=migration.request.unsafe,
        places={key: p.fact(value) for key, value in shape.places.items()},
        definition=offered,
    )


async def _turn(migration: Migration, guest: Guest, channel: Channel) -> bytes:
    """Waits until the destination takes this guest; returns the token for data connections. The
    guest runs meanwhile, so after a wait its VMM is compared with the offer again."""
    vm, to = migration.vm, migration.peer.to
    queued = False
    async with open_nursery() as nursery:
        nursery.start_soon(_watch_vmm, vm)
        while isinstance(answer := await channel.receive(), p.Queued):
            queued = True
            vm.show(
                message=f"{vm.name} runs on here and waits for its turn at {to}: "
                f"{in_line(answer.ahead)}"
            )
        nursery.cancel_scope.cancel()
    if not isinstance(answer, p.Ready):
        raise RemoteProtocolError(f"{to} sent {type(answer).__name__} where Ready was due")
    if queued:
        await guest.still_as_offered("waited for its turn")
    return answer.token


async def _watch_vmm(vm: Vm) -> None:
    await vm.attached().gone()
    raise VmmGone(f"the VMM of {vm.name} here has ended by itself")
