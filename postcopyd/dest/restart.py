# SPDX-License-Identifier: Apache-2.0
"""What a restarted daemon does at the destination: calls off an arrival that was not granted, and
finds the guest RAM of one that was granted, whose session then goes on as after a pause.

Owns the VMM's RAM files and userfaultfds while it opens them; those of a guest that goes on are on
the session's stack afterwards."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack

from msgspec import to_builtins

from postcopyd import protocol as p
from postcopyd._native import lib
from postcopyd.dest.memory import Memory, owned
from postcopyd.dest.migration import Migration
from postcopyd.errors import PostcopydError, shortage
from postcopyd.host import procfs
from postcopyd.records.schema import RecordedRegion
from postcopyd.sessions import losses
from postcopyd.sessions.patience import END_S, RELEASE_S, within
from postcopyd.sessions.vm import Vm
from postcopyd.vmm import Region, Shape, Vmm

_DONE_OR_LOST = lib.PC_PAGE_DONE | lib.PC_PAGE_LOST

WHOLE = bytes(byte for byte in range(256) if byte & _DONE_OR_LOST == lib.PC_PAGE_DONE)
"""The bytes in the page record of a page that is here and not lost: DONE without LOST, see
record.h."""


async def call_off(vm: Vm) -> None:
    """Calls off an arrival that was not granted when the previous daemon ended: no vCPU has run
    here. Raises PostcopydError."""
    driver, loading = vm.driver, vm.ownership == "loading"
    message = f"{vm.name} did not come here: the daemon ended before it was granted"
    if driver is not None and not loading and not driver.makes:
        with within(RELEASE_S, f"letting go of guest RAM of {vm.name}"):
            await driver.release()
        if vm.about["offer"].get("staged"):
            try:
                await _discard(driver)
            except PostcopydError as error:  # the next arrival empties it anyway
                message += f"; what had come of its memory still takes room here: {error}"
    else:
        if driver is not None:
            with within(END_S, f"ending the VMM of {vm.name} here"):
                await driver.end()  # before its RAM is let go, or it would go on with zeros
        message += "; its VMM here has ended, start it anew for another attempt"
    vm.conclude(phase="failed", remaining=0, message=message)
    vm.about["answer"] = to_builtins(p.Declined(p.sentence(message)))
    vm.record_soon("declined")
    vm.log.warning("migration failed", error=message)


async def finish_unwritten(vm: Vm) -> bool:
    """Finishes a guest that has all of its memory, of which only the record does not say so, as it
    could not be written. Returns whether this is such a guest. Raises PostcopydError.

    The VMM of such a guest has no userfaultfd any more, and its page record is gone or says that
    every page is here: the daemon takes both away together, and only once every page is here. One
    of the two alone proves nothing.
    """
    driver, about = vm.attached(), vm.about
    descriptors = await driver.adopted()
    for fd in descriptors:
        os.close(fd)
    regions = [region["pages"] for region in about["ram"]]
    if descriptors or not about["ran"] or vm.lacks_pages(WHOLE, regions):
        return False
    pages = sum(regions)
    drained = p.Drained(pages, 0, pages, 0, 0, 0, 0, 0.0, p.Faults())
    vm.conclude(phase="drained", remaining=0, message=f"{vm.name} is here, with all of its memory")
    about["answer"] = to_builtins(drained)
    vm.home()
    vm.record_soon("held")
    vm.log.info("migration completed", pages=pages)
    return True


async def _discard(driver: Vmm) -> None:
    shape = await driver.inspect("destination")
    try:
        await driver.discard(shape)
    finally:
        shape.close()


async def adopted_again(m: Migration, held: AsyncExitStack) -> Memory:
    """Finds the RAM of a guest that was granted to this host, by its record. Faults are taken again
    when this returns. Raises PostcopydError; then nothing is closed in the VMM, and its threads go
    on waiting."""
    driver = m.vm.attached()
    regions, gone = regions_again(driver.pid, m.ram, files=m.offer.staged)
    shape = Shape("paused", driver.pid, regions, {}, ())
    held.callback(shape.close)
    uffds = owned(await driver.adopted(), held)
    if len(uffds) != m.userfaultfds:
        raise PostcopydError(
            f"the VMM of {m.vm.name} has {len(uffds)} userfaultfds and not {m.userfaultfds}: pages "
            f"that are missing may read as zeros; stop it, and do not trust its guest",
            "UserfaultfdLost",
        )
    record = m.shared.store.open_pages(m.vm.name, again=True)
    memory = Memory.served(m, shape, uffds, record, held)
    if memory.engine.foreign:  # the previous daemon was killed before it recorded that
        m.vm.about["foreign"] = losses.foreign(m.vm.name, m.peer, memory.engine.sentence)
        raise PostcopydError(m.vm.about["foreign"], "NotTrusted")
    for number in gone:
        memory.engine.gone(number)
    memory.engine.register(again=True)
    memory.engine.settle()
    return memory


def regions_again(
    pid: int, ram: list[RecordedRegion], *, files: bool
) -> tuple[tuple[Region, ...], list[int]]:
    """The regions of a record, and the numbers of those that were unplugged since: the VMM has
    mappings, but none at their addresses. With `files`, the files behind the regions are opened;
    they are found by address, as the VMM may not be able to answer.

    Raises PostcopydError, above all if a file is not found: an engine without it would take the
    content of the file, which may be old, for what belongs there.
    """
    regions: list[Region] = []
    gone: list[int] = []
    try:
        mappings = list(procfs.mappings(pid))
        for recorded in ram:
            fd, start = None, recorded["address"]
            # The file's device and inode; older records only say whether there is a file.
            file = recorded.get("file", True)
            end = start + recorded["pages"] * recorded["page_size"]
            there = [m for m in mappings if m.start < end and start < m.end]
            if isinstance(file, list):  # another mapping may be at its address by now
                there = [m for m in there if list(m.file) == file]
            if mappings and not there:
                gone.append(len(regions))
            elif file and files:
                at = [m for m in there if m.start <= start < m.end and m.shared]
                if not at:
                    raise PostcopydError(
                        f"process {pid} does not map the file of guest RAM {recorded['name']} "
                        f"at {start:#x} any more: its guest cannot go on, end it"
                    )
                fd = procfs.open_mapped(pid, at[0])
            name, pages, size = recorded["name"], recorded["pages"], recorded["page_size"]
            regions.append(Region(name, pages, size, start, fd, recorded["offset"]))
    except (PostcopydError, OSError) as error:
        for region in regions:
            if region.fd is not None:
                os.close(region.fd)
        if isinstance(error, PostcopydError):
            raise
        raise shortage(error) or PostcopydError(
            f"opening guest RAM of process {pid} again: {error}"
        ) from None
    return tuple(regions), gone
