# SPDX-License-Identifier: Apache-2.0
"""Makes memory errors of pages that are missing, without an engine: of a guest that nobody runs.

Only in private memory. There the errors stay in the page tables of the process when its
userfaultfd is closed, and the kernel makes no huge page of what has one. In shared memory it does,
once that is not registered any more, and puts zeros there (MADV_COLLAPSE, seen on Linux 6.18).
Numbers are those of uffd.h.
"""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Iterable

UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER = 0xC018AA3F, 0xC020AA00, 0x8010AA01
UFFDIO_POISON = 0xC020AA08
API, POISON, MISSING = 0xAA, 1 << 14, 1


def poison(userfaultfd: int, pages: Iterable[tuple[int, int]]) -> None:
    """`pages` are address and size of each, in the process whose userfaultfd it is, which is new.
    Raises OSError, also where the kernel cannot."""
    fcntl.ioctl(userfaultfd, UFFDIO_API, struct.pack("QQQ", API, POISON, 0))
    for address, size in pages:
        fcntl.ioctl(userfaultfd, UFFDIO_REGISTER, struct.pack("QQQQ", address, size, MISSING, 0))
        fcntl.ioctl(userfaultfd, UFFDIO_POISON, struct.pack("QQQq", address, size, 0, 0))
        fcntl.ioctl(userfaultfd, UFFDIO_UNREGISTER, struct.pack("QQ", address, size))
