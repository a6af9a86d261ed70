# SPDX-License-Identifier: Apache-2.0
"""What this host's kernel gets wrong with memory that a userfaultfd watches, in sentences.

A feature bit says that an interface exists, not that it works; a version number does not say what a
distribution has mended. So both faults are tried out (probe.c) before the kernel is relied on. The
result holds for the life of this process, as another kernel needs another boot. Owns the results
and their sentences; the caller decides what follows from them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final

from postcopyd._native import lib

# enum pc_probe in native.h
_WRONG: Final = {
    lib.PC_MISSES_WRITTEN: "pages that a guest writes",
    lib.PC_MISSES_ZAPPED: "pages that a guest wrote and that were swapped out since",
    lib.PC_MISSES_TABLES: "pages that a guest wrote in a huge page that was split or swapped out "
    "since",
}
NO_TRACKING: Final = (
    "this host's kernel cannot say which pages a guest writes; Linux 6.7 and later can"
)

_known: dict[Callable[[], int], int] = {}


def _tried(probe: Callable[[], int]) -> int:
    """The result of a probe. It is tried again only if it could not be tried for want of something
    that comes and goes."""
    if probe not in _known:
        found = probe()
        if found < 0 and -found not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return found
        _known[probe] = found
    return _known[probe]


def why_no_passes() -> str | None:
    """Why memory cannot be copied here while its guest runs: the kernel would miss some writes.
    None: it sees them all. Takes milliseconds the first time."""
    found = _tried(lib.pc_probe_written)
    if found == 0:
        return None
    if found in (-errno.EOPNOTSUPP, -errno.EINVAL, -errno.ENOSYS):
        return NO_TRACKING
    if found < 0:
        return (
            f"whether this host's kernel shows which pages a guest writes could not be tried "
            f"({os.strerror(-found)})"
        )
    missed = [words for bit, words in _WRONG.items() if found & bit]
    if not missed:
        return "this host's kernel reports pages as written that are not"
    return f"this host's kernel does not show all that is written: it misses {' and '.join(missed)}"


def why_zeros() -> str | None:
    """Why pages of a guest that have not arrived may read as zeros here, once the kernel
    (khugepaged) makes huge pages of its RAM. None: they stay missing. Takes milliseconds the first
    time."""
    found = _tried(lib.pc_probe_huge_zeros)
    if found == 0:
        return None
    when = "when it makes huge pages of shared memory"
    if found > 0:
        return f"this host's kernel puts zeros where pages are missing, {when}"
    return (
        f"whether this host's kernel puts zeros where pages are missing, {when}, could not be "
        f"tried ({os.strerror(-found)})"
    )


def fills_holes() -> bool:
    """Whether `why_zeros` has a reason: also true if it could not be tried."""
    return why_zeros() is not None
