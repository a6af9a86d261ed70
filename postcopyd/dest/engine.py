# SPDX-License-Identifier: Apache-2.0
"""The destination's native engine (uffd_native.c): takes faults, receives and places pages."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from postcopyd._native import lib
from postcopyd.native import Engine, native_regions
from postcopyd.vmm import Region


class DestinationEngine(Engine):
    """Serves the guest's faults; borrows the userfaultfds and the record file until `close`."""

    _free = lib.pc_dest_free

    def __init__(self, regions: Sequence[Region], uffds: Sequence[int], record: int) -> None:
        native = native_regions(regions, 0, uffds)
        super().__init__(
            lambda wake, error: lib.pc_dest_new(native, len(regions), record, wake, error),
            lib.pc_dest_stats,
        )

    def register(self) -> None:
        """From here on every access to a page that is not there waits for this engine."""
        self.must(lib.pc_dest_register(self.handle), "registering guest RAM with userfaultfd")

    def connect(self, fd: int, *, urgent: bool) -> None:
        """Takes over a connected socket, whatever happens."""
        self.must(lib.pc_dest_connect(self.handle, fd, urgent), "taking a data connection")

    async def disconnect(self) -> None:
        """Ends all connections; faults go on being taken and wait for new ones."""
        await trio.to_thread.run_sync(lib.pc_dest_disconnect, self.handle)

    @property
    def complete(self) -> bool:
        return bool(self.stats.confirmed_pages == self.stats.total_pages)

    def unregister(self, *, called_off: bool = False) -> None:
        """Gives guest RAM back to the kernel. Missing pages read as zeros from then on: only when
        all are there, or when the guest here shall never run (`called_off`)."""
        self.must(lib.pc_dest_unregister(self.handle, called_off), "unregistering guest RAM")
