# SPDX-License-Identifier: Apache-2.0
"""What a daemon that was started again does at the destination, besides the session's part: ends an
arrival that was not granted, and finds guest RAM again for one that was."""

from __future__ import annotations

import os
from typing import Any

from msgspec import to_builtins

from postcopyd import protocol as p
from postcopyd.errors import PostcopydError, shortage
from postcopyd.host import procfs
from postcopyd.sessions.patience import END_S, RELEASE_S, within
from postcopyd.sessions.vm import Vm
from postcopyd.vmm import Region, Vmm

WHOLE = bytes(state for state in range(256) if state & 12 == 4)
"""States of a page that is here and not lost, in the page record: DONE without LOST, as
record.h has them."""


async def call_off(vm: Vm) -> None:
    """Ends an arrival that was not granted when the daemon ended: no vCPU has run here."""
    driver, loading = vm.driver, vm.ownership == "loading"
    message = f"{vm.name} did not come here: the daemon ended before it was granted"
    if driver is not None and not loading:
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
                await driver.end()  # before its RAM is let go: it must not go on with zeros
        message += "; its VMM here has ended, start it anew for another attempt"
    vm.settle(phase="failed", remaining=0, message=message)
    vm.about["answer"] = to_builtins(p.Declined(p.sentence(message)))
    vm.record_settled("declined")
    vm.log.warning("migration failed", error=message)


async def finish_unwritten(vm: Vm) -> bool:
    """Settles a guest that has all of its memory, where only the record does not say so: it could
    not be written. Returns whether it is such a guest.

    By then its VMM has no userfaultfd any more, and the page record says that every page is here,
    or is gone: the daemon takes both away together, and only then. Userfaultfds that are gone alone
    prove nothing, nor does the page record.
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
    vm.settle(phase="drained", remaining=0, message=f"{vm.name} is here, with all of its memory")
    about["answer"] = to_builtins(drained)
    vm.home()
    vm.record_settled("held")
    vm.log.info("migration completed", pages=pages)
    return True


async def _discard(driver: Vmm) -> None:
    shape = await driver.inspect("destination")
    try:
        await driver.discard(shape)
    finally:
        shape.close()


def regions_again(
    pid: int, ram: list[dict[str, Any]], *, files: bool
) -> tuple[tuple[Region, ...], list[int]]:
    """The regions of a record; with the files behind them, where they are needed, found by address
    as the VMM may not be able to answer. And the numbers of those that were unplugged meanwhile:
    the VMM has mappings, and none of them is there.

    Raises PostcopydError, above all when a file is not found: an engine without it would take what
    the file has, which may be old, for what belongs there.
    """
    regions: list[Region] = []
    gone: list[int] = []
    try:
        mappings = list(procfs.mappings(pid))
        for recorded in ram:
            about, fd = dict(recorded), None
            # Its device and inode; older records only say whether there is one.
            file, start = about.pop("file", True), about["address"]
            end = start + about["pages"] * about["page_size"]
            there = [m for m in mappings if m.start < end and start < m.end]
            if isinstance(file, list):  # its place may be another's by now
                there = [m for m in there if list(m.file) == file]
            if mappings and not there:
                gone.append(len(regions))
            elif file and files:
                at = [m for m in there if m.start <= start < m.end and m.shared]
                if not at:
                    raise PostcopydError(
                        f"process {pid} does not map the file of guest RAM {about['name']} at "
                        f"{about['address']:#x} any more: its guest cannot go on, end it"
                    )
                fd = procfs.open_file(pid, at[0].file)
            regions.append(Region(**about, fd=fd))
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
