# SPDX-License-Identifier: Apache-2.0
"""Tracks what a running guest writes to its RAM, from outside its VMM, and what that costs it.

Owns the userfaultfd that tracks the writes. The VMM has no copy of it, so tracking ends with this
descriptor, also when the daemon is killed. The engine (dirty.c) does the looking.

A device may write at any time to a page that is pinned for direct I/O; after the page was armed
again, that is not seen. So if a VMM does direct I/O, pages are armed only while it is stopped with
all I/O drained (`arm_still`), which costs the guest milliseconds for each pass.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Self

import trio

from postcopyd._native import lib
from postcopyd.errors import PostcopydError
from postcopyd.host import kernel, procfs
from postcopyd.sessions.vm import Vm
from postcopyd.source.engine import Look, SourceEngine
from postcopyd.vmm import Shape

Usage = tuple[int, float] | None


class Tracking:
    """One guest's writes, from `of` to `aclose`. `stopped_s`: how long the guest was held still."""

    def __init__(self, pid: int, engine: SourceEngine, uffd: int, usage: Usage) -> None:
        self._pid, self._engine, self._uffd, self._usage = pid, engine, uffd, usage
        self._fault_ns = max(lib.pc_track_cost_ns(), 0)
        self._looked_s = self.stopped_s = 0.0
        self._cost: dict[str, float] = {}

    @classmethod
    async def of(cls, vm: Vm, shape: Shape, engine: SourceEngine) -> Self:
        """Begins. Raises PostcopydError if writes cannot be seen; then no trace is left of it."""
        if why := shape.untracked or kernel.why_no_passes():
            raise PostcopydError(why, "NotTracked")
        uffd = await vm.attached().track()
        try:
            engine.track(uffd)
            return cls(shape.pid, engine, uffd, procfs.usage(shape.pid))
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await engine.untrack()
                os.close(uffd)
                if isinstance(error, PostcopydError):
                    await engine.disconnect()  # clears the failure: postcopy needs no tracking
            raise

    async def arm(self) -> int:
        """Arms the pages: the next `look` finds what is written from here on. Returns how many
        pages are to be sent, as they were written until now."""
        return await self.look(Look.ARM)

    async def arm_still(self, vm: Vm) -> int:
        """The same, with the guest held still for it. Raises PostcopydError; then the guest runs
        again, or the sentence says that it does not, and `rollback` must be tried."""
        began = time.monotonic()
        async with vm.attached().still():
            pages = await self.look(Look.ARM)
        self.stopped_s += time.monotonic() - began
        return pages

    async def look(self, how: Look = Look.ONLY) -> int:
        """How many pages are to be sent (again)."""
        began = time.monotonic()
        pages = await self._engine.look(how)
        self._looked_s += time.monotonic() - began
        return pages

    async def aclose(self) -> None:
        """Ends the tracking: the guest's writes cost nothing any more."""
        with trio.CancelScope(shield=True):
            try:
                with suppress(OSError):
                    self._cost = self._measured()
                await self._engine.untrack()
            finally:
                os.close(self._uffd)

    def json(self) -> dict[str, float]:
        """What tracking has cost, for results. `slowdown` is the share of the VMM's CPU time that
        went to write faults, estimated from what one fault costs on this host."""
        return {
            "lookedMs": round(self._looked_s * 1e3, 2),
            "stoppedMs": round(self.stopped_s * 1e3, 2),
            **self._cost,
        }

    def _measured(self) -> dict[str, float]:
        now = procfs.usage(self._pid)
        if now is None or self._usage is None:
            return {}
        faults, cpu_s = (after - before for after, before in zip(now, self._usage, strict=True))
        spent_s = faults * self._fault_ns / 1e9
        return {"faults": faults, "slowdown": round(min(spent_s / cpu_s, 1), 3) if cpu_s else 0.0}
