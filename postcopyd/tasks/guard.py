# SPDX-License-Identifier: Apache-2.0
"""Tasks that others depend on. Whatever a VMM, a peer, a record or a client has one of them meet
ends in the log and in the state of the one VM, connection or client that it was for.

Every task of the daemon's own nurseries is started through here, and every connection that comes in
is served through here, or by the Varlink server, which does the same by itself; a test sees to
that. Sessions have nurseries of their own, and see themselves to what goes wrong there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import structlog
import trio

AGAIN_S = 1.0
"""How long until a task that has to run for as long as the daemon is begun anew."""

log = structlog.get_logger()


async def outlived(
    failed: Callable[[Exception], None], task: Callable[..., Awaitable[None]], *args: Any
) -> None:
    """A task of one VM. `failed` is called with what nobody expected of it."""
    try:
        await task(*args)
    except Exception as error:
        log.exception("bug in a task of the daemon", task=_name(task))
        failed(error)


async def always(task: Callable[..., Awaitable[None]], *args: Any) -> None:
    """A task that the whole daemon needs: begun anew when it fails, over when it returns."""
    while True:
        try:
            await task(*args)
            return
        except Exception:
            log.exception("bug in a task of the daemon", task=_name(task))
        await trio.sleep(AGAIN_S)


def each(
    handler: Callable[[trio.SocketStream], Awaitable[None]],
) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """Serves one connection, for trio.serve_listeners, which ends with the first that fails."""

    async def serve(stream: trio.SocketStream) -> None:
        try:
            await handler(stream)
        except Exception:
            log.exception("bug in serving a connection", task=_name(handler))

    return serve


def _name(task: Callable[..., Any]) -> str:
    return getattr(task, "__qualname__", repr(task))
