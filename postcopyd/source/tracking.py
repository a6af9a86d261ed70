# SPDX-License-Identifier: Apache-2.0
"""Writes of a running guest, seen from outside its VMM: what they are and what they cost it.

Owns the userfaultfd that tracks them. The VMM has no copy of it, so tracking ends with this
descriptor, also when the daemon is killed. The engine (dirty.c) does the looking.

A page that is pinned for direct I/O is written by the device when it pleases, unseen once it is
armed again. So with direct I/O in a VMM pages are armed only while it is stopped with all I/O
drained, which costs the guest milliseconds for each pass. That it has to be run again is recorded
before: a daemon that is started again then does so (`roll_back`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Self

import trio

from postcopyd import procfs
from postcopyd._native import lib
from postcopyd.errors import PostcopydError
from postcopyd.source.engine import Look, SourceEngine
from postcopyd.vm import Vm
from postcopyd.vmm import Shape


class Tracking:
    """One guest's writes, from `of` to `aclose`. `stopped_s`: how long it was held still for it."""

    def __init__(
        self, vm: Vm, shape: Shape, engine: SourceEngine, keep: Callable[[str], None], uffd: int
    ) -> None:
        self._vm, self._pid, self._engine, self._keep, self._uffd = (
            vm,
            shape.pid,
            engine,
            keep,
            uffd,
        )
        self._quiet = bool(shape.direct_io) and shape.state == "running"
        self._usage = procfs.usage(self._pid)
        self._fault_ns = lib.pc_track_cost_ns()
        self._looked_s = self.stopped_s = 0.0
        self._cost: dict[str, float] = {}

    @classmethod
    async def of(
        cls, vm: Vm, shape: Shape, engine: SourceEngine, keep: Callable[[str], None]
    ) -> Self:
        """Begins; `keep` records an ownership. Raises PostcopydError when writes cannot be seen."""
        if shape.untracked:
            raise PostcopydError(shape.untracked, "NotTracked")
        uffd = await vm.attached().track()
        try:
            engine.track(uffd)
        except BaseException as error:
            os.close(uffd)
            if isinstance(error, PostcopydError):
                await engine.disconnect()  # forgets it: postcopy needs no tracking
            raise
        return cls(vm, shape, engine, keep, uffd)

    async def arm(self) -> int:
        """What is written from here on is found by the next `look`; what was until now is to be
        sent: the number of pages. Raises PostcopydError; the guest runs then, or the sentence says
        that it does not."""
        if not self._quiet:
            return await self.look(Look.ARM)
        self._keep("intent")
        began = time.monotonic()
        async with self._vm.attached().still():
            pages = await self.look(Look.ARM)
        self.stopped_s += time.monotonic() - began
        self._keep("held")
        return pages

    async def look(self, how: Look = Look.ONLY) -> int:
        """How many pages are to be sent (again)."""
        began = time.monotonic()
        pages = await self._engine.look(how)
        self._looked_s += time.monotonic() - began
        return pages

    async def aclose(self) -> None:
        """The guest's writes cost nothing any more."""
        with trio.CancelScope(shield=True):
            self._cost = self._measured()
            try:
                await self._engine.untrack()
            finally:
                os.close(self._uffd)

    def json(self) -> dict[str, float]:
        """What it has cost, for results: `slowdown` is the share of the VMM's CPU time that went to
        faults of writes, reckoned from what one costs on this host."""
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
