# SPDX-License-Identifier: Apache-2.0
"""The source's native engine (source_native.c): answers requests, pushes pages."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from postcopyd._native import ffi, lib
from postcopyd.errors import PostcopydError
from postcopyd.native import Engine, native_regions
from postcopyd.vmm import Region


class SourceEngine(Engine):
    """Reads the guest's regions; borrows their descriptors until `close`."""

    _free = lib.pc_source_free

    def __init__(self, regions: Sequence[Region], pid: int) -> None:
        native = native_regions(regions, pid, None)
        super().__init__(
            lambda wake, error: lib.pc_source_new(native, len(regions), wake, error),
            lib.pc_source_stats,
        )

    async def scan(self) -> None:
        """Finds data and holes. May be called while the guest runs: the push looks again."""
        await trio.to_thread.run_sync(lib.pc_source_scan, self.handle)

    def connect(self, fd: int, *, urgent: bool) -> None:
        """Takes over a connected socket, whatever happens."""
        self.must(lib.pc_source_connect(self.handle, fd, urgent), "taking a data connection")

    def have(self, region: int, first: int, count: int, bits: bytes) -> None:
        """These pages are not pushed, the destination has them: bit i % 8 of byte i / 8.

        After `connect` and before `push`; `disconnect` forgets it. Raises PostcopydError for what
        does not fit the guest, as these are a peer's numbers.
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

    async def disconnect(self) -> None:
        """Ends all connections and joins their threads."""
        await trio.to_thread.run_sync(lib.pc_source_disconnect, self.handle)
