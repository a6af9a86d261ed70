# SPDX-License-Identifier: Apache-2.0
"""Names of hosts become addresses: one look-up of a name at a time, however many wait for it.

glibc waits for name servers for half a minute and cannot be interrupted. So who waits does it for
as long as it likes, and the look-up goes on, in a thread of a pool of its own, for whoever asks
next: a host whose name nobody answers for takes one thread, not one for each try of a migration.
"""

from __future__ import annotations

import socket
from typing import Any

import trio

from postcopyd.tasks import threads


class Resolver(trio.abc.HostnameResolver):
    """For one run of trio at a time: `use` in it, before names are looked up."""

    def __init__(self) -> None:
        self._under_way: dict[tuple[Any, ...], _LookUp] = {}

    def use(self) -> None:
        """trio looks up names so from now on. Idempotent."""
        trio.socket.set_custom_hostname_resolver(self)

    async def getaddrinfo(self, *what: Any) -> Any:
        """As `socket.getaddrinfo`, which it does in a thread."""
        look_up = self._under_way.get(what)
        if look_up is None:
            look_up = self._under_way[what] = _LookUp()
            trio.lowlevel.spawn_system_task(self._look_up, what, look_up)
        await look_up.done.wait()
        if (error := look_up.error) is not None:
            raise type(error)(*error.args)  # each who waits has its own
        return look_up.found

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        """Nothing here asks for it."""
        raise NotImplementedError

    async def _look_up(self, what: tuple[Any, ...], look_up: _LookUp) -> None:
        """Nobody who waits owns it; the end of the run leaves its thread alone."""
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
    """`found` or `error`, once it is `done`."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.found: Any = None
        self.error: OSError | UnicodeError | None = None


RESOLVER = Resolver()
