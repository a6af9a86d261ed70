# SPDX-License-Identifier: Apache-2.0
"""Keeps the kernel from making huge pages of a QEMU's memory while pages of its guest are missing.

For kernels that put zeros in place of missing pages when they make a huge page
(`kernel.fills_holes`). Runs prctl(PR_SET_THP_DISABLE) in QEMU: that covers the whole process,
however the guest's RAM is mounted, and /proc tells whether it is set, so nothing has to be
remembered. A daemon that is killed leaves it set until the next `allow`; that costs the guest its
huge pages and nothing else.
"""

from __future__ import annotations

from postcopyd.host import kernel, procfs
from postcopyd.native import adoption

PR_SET_THP_DISABLE = 41  # linux/prctl.h


def forbidden(pid: int) -> bool:
    """Whether the process gets no huge pages (proc(5), since Linux 5.0)."""
    return procfs.status(pid).get("THP_enabled") == "0"


async def forbid(pid: int) -> bool:
    """Forbids huge pages if needed; returns whether it did: not if they were forbidden before.
    Raises AdoptionError."""
    if not kernel.fills_holes() or forbidden(pid):
        return False
    await adoption.prctl(pid, PR_SET_THP_DISABLE, 1)
    return True


async def allow(pid: int, *, known: bool) -> None:
    """Undoes `forbid`. Unless this daemon is `known` to have done it, the previous daemon is taken
    to have, if this kernel gives a reason for it. Raises AdoptionError."""
    if (known or kernel.fills_holes()) and forbidden(pid):
        await adoption.prctl(pid, PR_SET_THP_DISABLE, 0)
