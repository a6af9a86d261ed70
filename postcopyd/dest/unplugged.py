# SPDX-License-Identifier: Apache-2.0
"""Finds guest RAM that a VMM has given up while its pages came: a DIMM that was unplugged.

The kernel only says that nothing is registered at an address any more. That alone does not mean
that the page is not needed: if the memory is still mapped, but not registered, the guest would read
zeros there. So this looks whether the memory is mapped at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from postcopyd.host import procfs
from postcopyd.vmm import Region


def unplugged(pid: int, regions: Sequence[Region]) -> list[int]:
    """The numbers of the regions that the VMM maps no more, not even in part. Empty for a VMM that
    has ended or is ending, as that maps nothing. Raises OSError."""
    mappings = list(procfs.mappings(pid))
    if not mappings:
        return []
    gone = []
    for number, region in enumerate(regions):
        end = region.address + region.size
        there = [m for m in mappings if m.start < end and region.address < m.end]
        if region.fd is not None:  # another mapping may be at its address by now
            file = procfs.file_id(region.fd)
            there = [m for m in there if m.file == file]
        if not there:
            gone.append(number)
    return gone
