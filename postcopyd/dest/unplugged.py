# SPDX-License-Identifier: Apache-2.0
"""Guest RAM that a VMM has given up while its pages came: a DIMM that was unplugged.

The kernel only says that nothing is registered at an address any more. That alone is no reason to
need a page no more: memory that is mapped still, and not registered, would have the guest read
zeros. So it is looked at whether the memory is mapped at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from postcopyd.host import procfs
from postcopyd.vmm import Region


def unplugged(pid: int, regions: Sequence[Region]) -> list[int]:
    """The numbers of those that the VMM maps no more, not even in part. None of a VMM that has
    ended or is ending, as then it maps nothing. Raises OSError."""
    mappings = list(procfs.mappings(pid))
    if not mappings:
        return []
    gone = []
    for number, region in enumerate(regions):
        end = region.address + region.size
        there = [m for m in mappings if m.start < end and region.address < m.end]
        if region.fd is not None:  # its place may be another's by now
            file = procfs.file_id(region.fd)
            there = [m for m in there if m.file == file]
        if not there:
            gone.append(number)
    return gone
