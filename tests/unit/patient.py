# SPDX-License-Identifier: Apache-2.0
"""A clock that is not ahead of threads."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import trio.testing

Clock = trio.testing.MockClock


def patient_clock() -> Clock:
    """Time that passes when nothing moves. Engines and file systems work in threads that trio does
    not know: nothing moves when none of them runs, waits for a core or for a disk, and none has
    run since the look before. So a busy machine makes tests slower, and no time pass earlier."""
    clock = Clock(autojump_threshold=QUIET_S)
    jump, before = clock._autojump, dict[str, str]()

    def jump_when_quiet() -> None:
        nonlocal before
        now = other_threads()
        if now == before and not any(moves.startswith(BUSY) for moves in now.values()):
            jump()
        before = now

    clock._autojump = jump_when_quiet
    return clock


QUIET_S = 0.002
"""Longer than threads of engines sleep by themselves; between two looks at them."""

BUSY = ("R", "D")
"""States of threads that go on without anybody's doing, proc_pid_stat(5)."""


def other_threads() -> dict[str, str]:
    """Of this process, each one's state and how often it has run or waited."""
    found = {}
    for thread in os.listdir("/proc/self/task"):
        if int(thread) != threading.get_native_id():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                status = Path("/proc/self/task", thread, "status").read_text()
                state = status.partition("State:\t")[2][:1]
                found[thread] = state + status.partition("voluntary_ctxt_switches:")[2]
    return found
