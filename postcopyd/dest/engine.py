# SPDX-License-Identifier: Apache-2.0
"""The destination's native engine (uffd_native.c): takes faults, receives and places pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

from postcopyd._native import ffi, lib
from postcopyd.errors import PostcopydError
from postcopyd.native.engine import Engine, native_regions
from postcopyd.tasks import threads
from postcopyd.vmm import Region


class DestinationEngine(Engine):
    """Serves the guest's faults; borrows the userfaultfds and the record file until `aclose`."""

    role = "destination"
    _free = lib.pc_dest_free

    def __init__(
        self, regions: Sequence[Region], uffds: Sequence[int], record: int, *, staged: bool
    ) -> None:
        native = native_regions(regions, 0, uffds)
        super().__init__(
            lambda wake, error: lib.pc_dest_new(native, len(regions), record, wake, staged, error),
            lib.pc_dest_stats,
        )

    def still_s(self) -> float:
        return 0.0 if self.handle is None else lib.pc_dest_still_ns(self.handle) / 1e9

    def register(self, again: bool = False) -> None:
        """From here on every access to a missing page waits for this engine.

        `again`: a previous engine has registered the same userfaultfds and is gone; threads that
        wait for it wait for this one. Raises PostcopydError.
        """
        self.must(
            lib.pc_dest_register(self.handle, again), "registering guest RAM with userfaultfd"
        )

    def connect(self, fd: int, *, urgent: bool, tls: Any = None) -> None:
        """Takes over a connected socket and its `struct pc_tls *`, also if it raises."""
        self.must(
            lib.pc_dest_connect(self.handle, fd, tls or ffi.NULL, urgent),
            "taking a data connection",
        )

    async def disconnect(self) -> None:
        """Ends all connections. The engine still takes faults, which wait for new connections."""
        await trio.to_thread.run_sync(lib.pc_dest_disconnect, self.handle, limiter=threads.ENGINE)

    def have(self, region: int, first: int, count: int) -> bytes:
        """Which of `count` pages from `first` on are here (DONE or HERE): bit i % 8 of byte i / 8.

        Raises PostcopydError outside the region.
        """
        bits = bytearray((count + 7) // 8)
        self.must(
            lib.pc_dest_have(self.handle, region, first, count, ffi.from_buffer(bits)),
            f"listing pages {first} to {first + count} of region {region}",
        )
        return bytes(bits)

    def stale(self, region: int, first: int, count: int, bits: bytes) -> None:
        """Notes that the copies of these pages here are old: bits as `have` gives them. Call it
        before `seal`. The numbers are a peer's: raises PostcopydError if they do not fit."""
        fits = 0 <= region < 1 << 16 and 0 <= first < 1 << 63 and 0 <= count < 1 << 63
        if not fits or len(bits) != (count + 7) // 8:
            raise PostcopydError("the source names written pages which this guest has not")
        self.must(
            lib.pc_dest_stale(self.handle, region, first, count, ffi.from_buffer(bits)),
            f"noting pages {first} to {first + count} of region {region}",
        )

    def seal(self) -> None:
        """Ends the passes: pages that came in them and were not named `stale` are right, and faults
        are answered from here on. Raises PostcopydError."""
        self.must(lib.pc_dest_seal(self.handle), "ending the passes")

    def settle(self) -> None:
        """Begins to place what came in passes, also where no fault asks for it. Idempotent."""
        self.must(lib.pc_dest_settle(self.handle), "placing what came in passes")

    def poison(self) -> int:
        """Gives up the missing pages: to touch one is a memory error from now on. Returns how many.

        Only without connections. The engine is `complete` afterwards and serves for as long as the
        guest lives: `unregister` is refused, because the errors would become zeros. Raises
        PostcopydError, after which `disconnect` makes the engine usable again.
        """
        poisoned: int = lib.pc_dest_poison(self.handle)
        self.must(poisoned, "giving up the pages that lack")
        return poisoned

    def gone(self, region: int) -> None:
        """Counts the pages of a region as here, as the VMM certainly maps it no more. Only without
        connections. Waits for pages that are being placed, so call it in a thread."""
        self.must(lib.pc_dest_gone(self.handle, region), f"giving up region {region}")

    @property
    def whole(self) -> bool:
        """Whether every page of a staged guest is here, placed or not."""
        return bool(self.stats.present_pages == self.stats.total_pages)

    @property
    def complete(self) -> bool:
        return bool(self.stats.confirmed_pages == self.stats.total_pages)

    @property
    def lost(self) -> int:
        """How many pages are memory errors: given up by a person, or unreadable at the source."""
        return int(self.stats.lost_pages)

    @property
    def foreign(self) -> bool:
        """Whether the kernel has put pages into guest memory. Then nothing is ever placed again."""
        return bool(self.stats.failure == lib.PC_FOREIGN)

    def unregister(self, *, called_off: bool = False) -> None:
        """Gives guest RAM back to the kernel. From then on missing pages read as zeros, and lost
        ones may. So all must be here and none lost, or the guest shall never run here
        (`called_off`); else raises PostcopydError."""
        self.must(lib.pc_dest_unregister(self.handle, called_off), "unregistering guest RAM")
