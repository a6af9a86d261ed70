# SPDX-License-Identifier: Apache-2.0
"""What this host takes on at a time: VMs, peers, guests that arrive, bytes that leave.

Owns the list of arrivals that have a place or wait for one, and how the host's bandwidth is
divided. Knows nothing of migrations: any object may ask (`who`), and says when it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from postcopyd.config.options import ServeOptions
from postcopyd.errors import PostcopydError
from postcopyd.net.peers import Peers


class Limits:
    """All limits of a daemon; None is no limit."""

    def __init__(self, options: ServeOptions | None = None) -> None:
        options = options or ServeOptions()
        self.max_vms = options.max_vms
        self.peers = Peers(options.max_peers)
        self.arrivals = Arrivals(options.max_arrivals, options.max_arriving_memory)
        self.uplink = Uplink(options.host_bandwidth)

    def one_more_vm(self, name: str, attached: Sequence[str]) -> None:
        """Raises PostcopydError if there may be no VM of this name besides the attached ones."""
        if self.max_vms is not None and name not in attached and len(attached) >= self.max_vms:
            raise PostcopydError(
                f"attaching {name}: this daemon has {len(attached)} VMs and max-vms in its "
                f"configuration is {self.max_vms}: `postcopyd detach` one that is not needed here, "
                f"or raise it and restart the daemon",
                "Refused",
            )


class Arrivals:
    """Places for guests that arrive: for `most` guests, and for `memory` bytes of them all
    together. Others wait, first come, first served: a small guest does not pass a large one, which
    otherwise might wait for ever.

    A guest that has joined must leave in the end, whether it still waits or not. If all places are
    free the first one fits, as a guest that is `too_large` must not join. So none waits for ever.
    """

    def __init__(self, most: int | None = None, memory: int | None = None) -> None:
        self._most, self._memory = most, memory
        self._here: dict[object, int] = {}
        self._waiting: dict[object, int] = {}  # in order
        self.changed = trio.Event()  # a new one after each change

    def too_large(self, size: int) -> list[str]:
        """A sentence if so many bytes never fit."""
        if self._memory is None or size <= self._memory:
            return []
        return [
            f"the guest has {size >> 20} MiB of RAM, and max-arriving-memory in the configuration "
            f"of the destination is {self._memory >> 20} MiB: raise it there"
        ]

    def join(self, who: object, size: int) -> None:
        self._waiting[who] = size
        self._let_in()

    def take(self, who: object, size: int) -> None:
        """Gives a place at once, above the limits: the guest runs here and waits for its pages."""
        self._here[who] = size

    def leave(self, who: object) -> None:
        """Idempotent."""
        self._here.pop(who, None)
        self._waiting.pop(who, None)
        self._let_in()

    def ahead(self, who: object) -> int | None:
        """How many are let in before this one; None: it has its place."""
        return None if who in self._here else list(self._waiting).index(who)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def _let_in(self) -> None:
        for who, size in list(self._waiting.items()):
            if self._most is not None and len(self._here) >= self._most:
                break
            if self._memory is not None and sum(self._here.values()) + size > self._memory:
                break
            self._here[who] = self._waiting.pop(who)
        self.changed.set()
        self.changed = trio.Event()


def in_line(ahead: int) -> str:
    """The place in line of a guest that waits, in words for people."""
    return "it is next" if ahead == 0 else f"{ahead} other{'s' if ahead > 1 else ''} before it"


class Uplink:
    """The bandwidth of this host, in bytes per second, for all migrations that send. Each has an
    equal share. What one may not use, because of its own limit, goes to the others."""

    def __init__(self, total: int | None = None) -> None:
        self._total = total
        self._sending: dict[object, tuple[int, Callable[[int], None]]] = {}

    def join(self, who: object, limit: int, change: Callable[[int], None]) -> int:
        """Returns the rate for one that begins to send, or goes on; `limit` is its own limit.
        Whenever others begin or end, `change` is called with its new rate. 0 is no limit, in each
        of these."""
        if self._total is None:
            return limit
        self._sending[who] = (limit, change)
        return self._divide(who)

    def leave(self, who: object) -> None:
        """Idempotent."""
        if self._sending.pop(who, None) is not None:
            self._divide(None)

    def _divide(self, asks: object) -> int:
        """Tells all but `asks` their new rates; returns the rate of `asks`."""
        assert self._total is not None
        limits = [limit for limit, _ in self._sending.values()]
        rates = dict(zip(self._sending, shares(self._total, limits), strict=True))
        for who, rate in rates.items():
            if who is not asks:
                self._sending[who][1](rate)
        return rates.get(asks, 0)


def shares(total: int, limits: Sequence[int]) -> list[int]:
    """Divides `total` into equal parts, none above its limit (0: no limit), none less than 1."""
    parts = [0] * len(limits)
    order = sorted(range(len(limits)), key=lambda i: limits[i] or total)
    for rest, i in zip(range(len(limits), 0, -1), order, strict=True):
        parts[i] = max(min(total // rest, limits[i] or total), 1)
        total -= parts[i]
    return parts
