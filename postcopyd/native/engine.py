# SPDX-License-Identifier: Apache-2.0
"""What both native engines have in common for Python: their life, statistics and failures.

Owns the engine's `wake` eventfd and the engine itself; knows nothing of sessions or messages. The
engine's threads never call Python: they write the eventfd, and `Engine.wait` reads what happened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any
from weakref import WeakSet

import trio

from postcopyd import counts
from postcopyd._native import ffi, lib
from postcopyd.errors import PostcopydError
from postcopyd.protocol import Faults
from postcopyd.tasks import threads
from postcopyd.vmm import Region

EXPLAIN_S = 1.0
"""How long a peer's reason may come after the end of its data connections."""


class Failure(IntEnum):
    """enum pc_failure of native.h."""

    NONE = lib.PC_OK
    CONNECTION = lib.PC_CONNECTION
    BAD_FRAME = lib.PC_BAD_FRAME
    VMM_GONE = lib.PC_VMM_GONE
    MEMORY = lib.PC_MEMORY
    FOREIGN = lib.PC_FOREIGN


class EngineError(PostcopydError):
    """The engine has stopped working on the migration; `failure` is the kind of its failure."""

    name = "EngineFailed"

    def __init__(self, failure: Failure, sentence: str) -> None:
        super().__init__(sentence)
        self.failure = failure


ALIVE: WeakSet[Engine] = WeakSet()
"""All engines of this process that are not closed."""


def longest_still_s() -> float:
    """How many seconds ago the slowest thread of all engines last went round, among those that
    always must; 0.0 if there are none."""
    return max((engine.still_s() for engine in ALIVE), default=0.0)


class Engine:
    """One native engine. One task of its session calls its functions, one at a time."""

    role: str
    _free: Any

    def __init__(self, make: Any, stats: Any) -> None:
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        error = ffi.new("char[200]")
        try:
            self.handle = make(self.wake, error)
            if self.handle == ffi.NULL:
                raise PostcopydError(f"starting the engine: {ffi.string(error).decode()}")
        except BaseException:
            os.close(self.wake)
            raise
        self.stats = stats(self.handle)
        ALIVE.add(self)
        self._failed = False
        counts.engines[self.role].began(self.stats)

    def still_s(self) -> float:
        """For how long a thread has not gone round that must. Threads of connections do not count:
        they wait for the peer, and that cannot be told from being stuck."""
        return 0.0

    async def aclose(self) -> None:
        """Stops and joins all threads, closes all connections; takes milliseconds, and cannot be
        cancelled."""
        if self.handle is not None:
            handle, self.handle = self.handle, None
            ALIVE.discard(self)
            counts.engines[self.role].ended(self.stats)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._free, handle, limiter=threads.ENGINE)
            trio.lowlevel.notify_closing(self.wake)
            os.close(self.wake)

    async def wait(self) -> None:
        """Returns when something has happened since the last call. Raises EngineError."""
        self.check()
        await trio.lowlevel.wait_readable(self.wake)
        os.eventfd_read(self.wake)
        self.check()

    async def watch(self, until: Callable[[], bool] = lambda: False) -> None:
        """Returns when `until` holds. Raises EngineError once the engine has failed.

        A peer that ends a migration closes its data connections too. Its reason on the control
        connection says more, so it gets time to arrive.
        """
        try:
            while not until():
                await self.wait()
        except EngineError as error:
            if error.failure is Failure.CONNECTION:
                await trio.sleep(EXPLAIN_S)
            raise

    def check(self) -> None:
        """Raises EngineError when the engine has failed."""
        failure = self.stats.failure
        news, self._failed = failure > 0 and not self._failed, failure > 0
        if news:
            counts.failures[self.role, Failure(failure).name.lower()] += 1
        if failure > 0:
            raise EngineError(Failure(failure), self.sentence)

    @property
    def sentence(self) -> str:
        """What failed first, if anything has."""
        return str(ffi.string(self.stats.sentence).decode())

    def must(self, result: int, doing: str) -> None:
        """Raises EngineError or PostcopydError for a negative result of a native function."""
        if result < 0:
            self.check()
            raise PostcopydError(f"{doing}: {os.strerror(-result)}")


def native_regions(regions: Sequence[Region], pid: int, uffds: Sequence[int] | None) -> Any:
    """The array of struct pc_region; region i is served by userfaultfd i modulo their number."""
    native = ffi.new("struct pc_region[]", len(regions))
    for i, region in enumerate(regions):
        native[i].address = region.address
        native[i].pages = region.pages
        native[i].page_size = region.page_size
        native[i].offset = region.offset
        native[i].fd = -1 if region.fd is None else region.fd
        native[i].pid = pid
        native[i].uffd = uffds[i % len(uffds)] if uffds else -1
    return native


def faults(stats: Any) -> Faults:
    """The latency statistics, in microseconds.

    The engine has eight buckets for each power of two (engine.c), so a percentile is good to an
    eighth of its value; the middle of its bucket is given.
    """
    counts = ffi.unpack(stats.latency, len(stats.latency))
    total = sum(counts)

    def bounds(bucket: int) -> tuple[float, float]:
        if bucket < 8:
            return bucket, bucket + 1
        low = 2 ** (bucket // 8) * (1 + bucket % 8 / 8)
        return low, low + 2 ** (bucket // 8) / 8

    def percentile(share: float) -> float:
        seen = 0
        for bucket, count in enumerate(counts):
            seen += count
            if count and seen >= share * total:
                return round(sum(bounds(bucket)) / 2, 1)
        return 0.0

    histogram: dict[str, int] = {}
    for bucket, count in enumerate(counts):
        if count:
            low = str(1 << max(int(bounds(bucket)[0]), 1).bit_length() - 1)
            histogram[low] = histogram.get(low, 0) + count
    return Faults(
        count=stats.faults,
        p50_us=percentile(0.5),
        p99_us=percentile(0.99),
        max_us=round(stats.latency_max_ns / 1e3, 1),
        histogram=histogram,
    )
