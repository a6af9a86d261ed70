# SPDX-License-Identifier: Apache-2.0
"""Keeps the kernel from making huge pages of a QEMU's memory while pages of its guest are missing.

For kernels that put zeros where pages lack when they make a huge page (`kernel.fills_holes`). By
prctl(PR_SET_THP_DISABLE), run in QEMU: it holds for the whole process, whatever the guest's RAM is
mounted with, and /proc tells whether it is set, so nothing has to be remembered. A daemon that is
killed leaves it set, which costs the guest huge pages and nothing else, until the next `allow`.
"""

from __future__ import annotations

from postcopyd.host import kernel, procfs
from postcopyd.native import adoption

PR_SET_THP_DISABLE = 41  # linux/prctl.h


def forbidden(pid: int) -> bool:
    """Whether the process gets no huge pages (proc(5), since Linux 5.0)."""
    return procfs.status(pid).get("THP_enabled") == "0"


async def forbid(pid: int) -> bool:
    """Whether this has done it: not where it is needless, nor where somebody else has. Raises
    AdoptionError."""
    if not kernel.fills_holes() or forbidden(pid):
        return False
    await adoption.prctl(pid, PR_SET_THP_DISABLE, 1)
    return True


async def allow(pid: int, *, known: bool) -> None:
    """Undoes `forbid`, `known` to be this daemon's; else it is taken for one of a daemon before it
    where the kernel gives reason to. Raises AdoptionError."""
    if (known or kernel.fills_holes()) and forbidden(pid):
        await adoption.prctl(pid, PR_SET_THP_DISABLE, 0)
