# SPDX-License-Identifier: Apache-2.0
"""Threads for calls that take their time: a pool for each kind, so that no kind waits for another.

trio has one pool for all, 40 threads: silent name servers use that up, and a guest that is stopped
would wait behind them. Here a call belongs to a kind, and says which (`limiter=`). A pool is only a
number of threads at a time; who comes beyond it waits for its own kind. trio's own pool is left to
the start of hooks.
"""

from __future__ import annotations

import math

from trio import CapacityLimiter

ENGINE = CapacityLimiter(math.inf)
"""Calls of native engines. Each session makes one at a time, so that there are never more than
guests on their way, and what a stopped guest waits for never waits for a thread."""

VMM = CapacityLimiter(math.inf)
"""System calls in a VMM (adoption.py): milliseconds, and one at a time for each guest too."""

WALKS = CapacityLimiter(16)
"""Walks through /proc and guest RAM, before a guest is stopped. They want the interpreter, so that
more at once would bring nothing; a process that the kernel holds keeps one of them."""

DISK = CapacityLimiter(16)
"""Until something is on disk."""

STORAGE = CapacityLimiter(16)
"""Looks at the files of disks. Storage that does not answer keeps a thread until it does."""

NAMES = CapacityLimiter(64)
"""Names of hosts (resolver.py). One that nobody answers for takes its thread for half a minute."""

HUGE_PAGES = CapacityLimiter(2)
"""Making huge pages of memory that has arrived: nobody waits for it."""

DEMO = CapacityLimiter(16)
"""What `postcopyd demo` and tests do beside their trio."""
