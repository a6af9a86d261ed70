# SPDX-License-Identifier: Apache-2.0
"""The source's native engine (native/source.c): answers requests, pushes pages."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import trio

from postcopyd._native import ffi, lib
from postcopyd.errors import PostcopydError
from postcopyd.native.engine import Engine, native_regions
from postcopyd.tasks import threads
from postcopyd.vmm import Region

AT_ONCE_PAGES = 1 << 20
"""Up to so many pages the look in the blackout takes some milliseconds, and runs in the caller's
task: handing it to a thread would take a millisecond more."""


class Look(Enum):
    """enum pc_look of native.h. ARM also arms the pages, so that the next write to them is seen;
    never use it while direct I/O is in flight. STOPPED is for the blackout."""

    ONLY = lib.PC_LOOK_ONLY
    ARM = lib.PC_LOOK_ARM
    STOPPED = lib.PC_LOOK_STOPPED


class SourceEngine(Engine):
    """Reads the guest's regions; borrows their descriptors until `aclose`."""

    role = "source"
    _free = lib.pc_source_free

    def __init__(self, regions: Sequence[Region], pid: int) -> None:
        native = native_regions(regions, pid, None)
        super().__init__(
            lambda wake, error: lib.pc_source_new(native, len(regions), wake, error),
            lib.pc_source_stats,
        )

    async def scan(self) -> None:
        """Finds data and holes. The guest may run meanwhile, because the push looks again."""
        while await trio.to_thread.run_sync(
            lib.pc_source_scan, self.handle, limiter=threads.ENGINE
        ):
            pass  # this call may be cancelled between two steps

    def tell_losses(self, understood: bool) -> None:
        """Whether the destination understands that pages cannot be read. Before `connect`."""
        lib.pc_source_tell_losses(self.handle, understood)

    def track(self, uffd: int) -> None:
        """Begins to track writes to guest RAM, by a new userfaultfd of the VMM that is borrowed
        until `untrack`. Raises PostcopydError if the kernel cannot."""
        self.must(lib.pc_source_track(self.handle, uffd), "tracking writes to guest RAM")

    async def look(self, how: Look = Look.ONLY) -> int:
        """Finds what is to be sent (again); returns how many pages. Raises PostcopydError."""
        pages: int
        if how is Look.STOPPED and self.stats.total_pages <= AT_ONCE_PAGES:
            await trio.lowlevel.checkpoint()
            pages = lib.pc_source_look(self.handle, how.value)
        else:
            pages = await trio.to_thread.run_sync(
                lib.pc_source_look, self.handle, how.value, limiter=threads.ENGINE
            )
        self.must(pages, "looking for written pages")
        return pages

    def copy(self, bandwidth: int) -> None:
        """Begins one pass, which sends what the last `look` found, at most `bandwidth` bytes a
        second (0: no limit). It is over when `stats.pushing` is 0."""
        self.must(lib.pc_source_copy(self.handle, bandwidth), "starting a pass")

    def stale(self, region: int, first: int, count: int) -> bytes | None:
        """Which of `count` pages from `first` on the destination lacks or has an old copy of: bit
        i % 8 of byte i / 8. None if there are none."""
        bits = bytearray((count + 7) // 8)
        found = lib.pc_source_stale(self.handle, region, first, count, ffi.from_buffer(bits))
        self.must(found, f"listing pages {first} to {first + count} of region {region}")
        return bytes(bits) if found else None

    def kept_by(self, pid: int) -> None:
        """Tells it which process keeps the memory that has no file."""
        lib.pc_source_kept(self.handle, pid)

    async def untrack(self) -> None:
        """Ends the tracking: the guest's writes cost nothing any more. Idempotent."""
        await trio.to_thread.run_sync(lib.pc_source_untrack, self.handle, limiter=threads.ENGINE)

    def connect(self, fd: int, *, urgent: bool, tls: Any = None) -> None:
        """Takes over a connected socket and its `struct pc_tls *`, also if it raises."""
        self.must(
            lib.pc_source_connect(self.handle, fd, tls or ffi.NULL, urgent),
            "taking a data connection",
        )

    def have(self, region: int, first: int, count: int, bits: bytes) -> None:
        """Notes pages that the destination has and that are not pushed: bit i % 8 of byte i / 8.

        Call it after `connect` and before `push`; `disconnect` forgets it. The numbers are a
        peer's: raises PostcopydError if they do not fit the guest.
        """
        fits = 0 <= region < 1 << 16 and 0 <= first < 1 << 63 and 0 <= count < 1 << 63
        if not fits or len(bits) != (count + 7) // 8:
            raise PostcopydError("the destination says that it has pages which this guest has not")
        self.must(
            lib.pc_source_have(self.handle, region, first, count, ffi.from_buffer(bits)),
            f"noting pages {first} to {first + count} of region {region}",
        )

    def serve(self) -> None:
        """Begins to answer requests. Guest RAM must be final."""
        self.must(lib.pc_source_serve(self.handle), "starting to answer requests")

    def push(self, bandwidth: int) -> None:
        """Begins to push, at most `bandwidth` bytes a second (0: no limit)."""
        self.must(lib.pc_source_push(self.handle, bandwidth), "starting to push pages")

    def limit(self, bandwidth: int) -> None:
        """From now on a pass or a push sends at most `bandwidth` bytes a second (0: no limit)."""
        lib.pc_source_limit(self.handle, bandwidth)

    async def disconnect(self) -> None:
        """Ends all connections and joins their threads."""
        await trio.to_thread.run_sync(lib.pc_source_disconnect, self.handle, limiter=threads.ENGINE)
