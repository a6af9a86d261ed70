# SPDX-License-Identifier: Apache-2.0
"""QEMU's events, queued for whoever has subscribed to them. No I/O: `Qmp` puts them in, and reads
on when somebody waits for the next one."""

from __future__ import annotations

import collections
from collections.abc import Awaitable, Callable
from typing import Any

Json = dict[str, Any]
Until = Callable[[Callable[[], Json | None], str], Awaitable[Json]]
"""Reads messages until the first argument returns something; the second says what for."""

# Limits of what a subscriber has not taken. A migration makes a few dozen events of 100 bytes.
MAX_QUEUED_EVENTS = 1024
MAX_QUEUED_BYTES = 256 << 10


class Events:
    """The events of some kinds since the subscription, oldest first."""

    def __init__(self, until: Until, kinds: tuple[str, ...]) -> None:
        self._until = until
        self.kinds = kinds
        self.queue: collections.deque[Json] = collections.deque()
        self._bytes = 0  # of what was queued since the queue was empty

    def put(self, event: Json, size: int) -> bool:
        """Returns whether there was room. Without an event a driver cannot follow QEMU any more."""
        self._bytes = self._bytes + size if self.queue else size
        if len(self.queue) >= MAX_QUEUED_EVENTS or self._bytes > MAX_QUEUED_BYTES:
            return False
        self.queue.append(event)
        return True

    def take(self) -> Json | None:
        """The next event that has been read already, or None."""
        return self.queue.popleft() if self.queue else None

    async def next(self) -> Json:
        """The next event as QEMU says it, with its `timestamp`; `data` is an object.

        Raises QmpClosed when none can come.
        """
        return await self._until(self.take, "waiting for an event")


class Last(Events):
    """Keeps only the last event of some kinds, however many come."""

    def put(self, event: Json, size: int) -> bool:
        self.queue.clear()
        self.queue.append(event)
        return True
