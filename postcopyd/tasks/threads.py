# SPDX-License-Identifier: Apache-2.0
"""Threads for slow calls: a pool for each kind of call, so that no kind waits for another.

trio has one pool of 40 threads for all calls. Name servers that do not answer can use that up, and
a stopped guest would wait behind them. So each call names the pool of its kind (`limiter=`). A pool
only limits the number of threads at a time: a call beyond it waits for its own kind. trio's own
pool is left for starting hooks.
"""

from __future__ import annotations

import math

from trio import CapacityLimiter

ENGINE = CapacityLimiter(math.inf)
"""Calls of native engines. Each session makes one at a time, so there are never more than guests on
their way; and what a stopped guest waits for never waits for a thread."""

VMM = CapacityLimiter(math.inf)
"""System calls in a VMM (adoption.py): milliseconds each, and one at a time for each guest."""

WALKS = CapacityLimiter(16)
"""Walks through /proc and guest RAM, before a guest is stopped. They hold Python's lock, so more at
a time would bring nothing; a process that the kernel holds keeps one of them."""

DISK = CapacityLimiter(16)
"""Writes that return once they are on disk."""

STORAGE = CapacityLimiter(16)
"""Looks at the files of disks. Storage that does not answer keeps a thread until it does."""

NAMES = CapacityLimiter(64)
"""Names of hosts (resolver.py). A name that no server answers for keeps its thread for half a
minute."""

HUGE_PAGES = CapacityLimiter(2)
"""Making huge pages of memory that has arrived: nobody waits for it."""

DEMO = CapacityLimiter(16)
"""Calls of `postcopyd demo` and of tests, beside their trio."""
