# SPDX-License-Identifier: Apache-2.0
"""The keeper of a guest that was granted: by it the guest's memory here outlives its VMM, as memory
in a file does by its descriptor.

A guest whose RAM is all in files needs none, unless its VMM ends early (vacating.py). The keeper is
on record, in the VM's `about`: a daemon that was started again reads the memory by it, or ends it.
It is made after the grant, so that nothing is done to a guest that may still run here, and ended by
`let_go` when nobody needs the memory any more. If there is none, because it could not be made,
could not be recorded, or was killed, all goes on as long as the VMM lives.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

import msgspec
import trio

from postcopyd.errors import PostcopydError
from postcopyd.host import procfs
from postcopyd.native import keeper
from postcopyd.native.keeper import Keeper
from postcopyd.records import schema
from postcopyd.sessions.vm import Vm
from postcopyd.source.engine import SourceEngine
from postcopyd.vmm import Region, Shape, VmmGone, looked_at


class Keeping:
    """What the session of one guest does about its keeper."""

    def __init__(self, vm: Vm, shape: Shape, engine: SourceEngine) -> None:
        self._vm, self._shape, self._engine = vm, shape, engine
        self._held_at = -float(keeper.HOLD_S)  # by trio's clock

    async def begin(self) -> None:
        """Makes a keeper, if one is needed and there is none. What prevents that is logged."""
        vm, regions = self._vm, self._shape.regions
        if vm.driver is None or kept(vm) is not None:
            return
        if not vm.driver.makes and all(region.fd is not None for region in regions):
            return
        try:
            made = await keeper.make(vm.driver.pid, allow_seccomp=vm.driver.forbids)
        except PostcopydError as error:
            vm.log.warning("memory is not kept should the VMM end", why=str(error))
            return
        places = [(r.address, None if r.fd is None else r.offset) for r in regions]
        record = schema.Keeper(pid=made.pid, started=made.started, page=made.page, regions=places)
        vm.about = {**vm.about, "keeper": record}
        if not vm.record_soon(None):
            await let_go(vm)  # which logs its own trouble
            return
        self.hold()
        vm.log.info("memory kept", process=made.pid)

    def hold(self) -> None:
        """Has the keeper go on waiting. Call it again and again."""
        now = trio.current_time()
        if now - self._held_at < keeper.HOLD_S or (kept_by := kept(self._vm)) is None:
            return
        if keeper.hold(kept_by):
            self._held_at = now
        self._engine.kept_by(kept_by.pid)


def kept(vm: Vm) -> Keeper | None:
    """The keeper of the VM's memory, if it lives."""
    record = vm.about.get("keeper")
    if record is None:
        return None
    found = Keeper(record["pid"], record["started"], record["page"])
    try:
        return found if found.lives() else None
    except OSError:
        return found


async def let_go(vm: Vm) -> PostcopydError | None:
    """Ends the keeper, as nobody needs the memory any more. Idempotent; the caller records it.
    Returns what prevents it, which is logged: it may still be there, and ends by itself, so only a
    person who wants its end has to know."""
    record = vm.about.get("keeper")
    if record is None:
        return None
    ended = Keeper(record["pid"], record["started"], record["page"])
    try:
        await keeper.end(ended, 0 if vm.attachment is None else vm.attachment.pid)
    except PostcopydError as trouble:
        vm.log.error("keeper not ended", error=str(trouble))
        return trouble
    vm.about = {key: value for key, value in vm.about.items() if key != "keeper"}
    vm.remove_device()
    return None


def shape(vm: Vm) -> Shape:
    """The guest of a VMM that has ended, by its record and its keeper, for a session that goes on.
    Raises PostcopydError and OSError."""
    found = kept(vm)
    if found is None:
        raise VmmGone(f"the VMM of {vm.name} here has ended, and its memory with it")
    about: schema.Departure = msgspec.convert(vm.about, schema.Departure)
    regions = []
    with ExitStack() as opened, looked_at(vm.name, found.pid):
        mappings = list(procfs.mappings(found.pid))
        for (name, pages, page_size), (address, offset) in zip(
            about["regions"], about["keeper"]["regions"], strict=True
        ):
            fd = None
            if offset is not None:
                fd = procfs.open_mapped(
                    found.pid, next(m for m in mappings if m.start <= address < m.end)
                )
                opened.callback(os.close, fd)
            regions.append(Region(name, pages, page_size, address, fd, offset or 0))
        opened.pop_all()
    return Shape("paused", found.pid, tuple(regions), {}, ())
