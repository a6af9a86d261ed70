# SPDX-License-Identifier: Apache-2.0
"""Looks up names of hosts: one look-up of a name at a time, however many tasks wait for it.

glibc may wait for name servers for half a minute and cannot be interrupted. So a task may stop
waiting at any time, and the look-up goes on, in a thread pool of its own, for the next that asks:
a name that no server answers for takes one thread, not one for each try of a migration.
"""

from __future__ import annotations

import socket
from typing import Any

import trio

from postcopyd.tasks import threads


class Resolver(trio.abc.HostnameResolver):
    """For one run of trio at a time: call `use` in it before names are looked up."""

    def __init__(self) -> None:
        self._under_way: dict[tuple[Any, ...], _LookUp] = {}

    def use(self) -> None:
        """Has trio look up names here from now on. Idempotent."""
        trio.socket.set_custom_hostname_resolver(self)

    async def getaddrinfo(self, *what: Any) -> Any:
        """Like `socket.getaddrinfo`, which it calls in a thread."""
        look_up = self._under_way.get(what)
        if look_up is None:
            look_up = self._under_way[what] = _LookUp()
            trio.lowlevel.spawn_system_task(self._look_up, what, look_up)
        await look_up.done.wait()
        if (error := look_up.error) is not None:
            raise type(error)(*error.args)  # a copy for each task that waits
        return look_up.found

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        """Not needed here."""
        raise NotImplementedError

    async def _look_up(self, what: tuple[Any, ...], look_up: _LookUp) -> None:
        """Runs whether or not anybody still waits; the end of the run leaves its thread alone."""
        try:
            look_up.found = await trio.to_thread.run_sync(
                socket.getaddrinfo, *what, limiter=threads.NAMES, abandon_on_cancel=True
            )
        except (OSError, UnicodeError) as error:
            look_up.error = error
        finally:
            del self._under_way[what]
            look_up.done.set()


class _LookUp:
    """Has `found` or `error`, once it is `done`."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.found: Any = None
        self.error: OSError | UnicodeError | None = None


RESOLVER = Resolver()
