# SPDX-License-Identifier: Apache-2.0
"""Runs tasks that others depend on. An error that one of them meets, through a VMM, a peer, a
record or a client, affects only the VM, connection or client that it was for, and is logged.

Every task of the daemon's own nurseries is started here, and every incoming connection is served
here, or by the Varlink server, which does the same by itself; a test checks that. Sessions have
nurseries of their own, and handle errors there themselves.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import structlog
import trio

AGAIN_S = 1.0
"""How long until a task that must run for as long as the daemon is started again."""

log = structlog.get_logger()


async def outlived(
    failed: Callable[[Exception], None], task: Callable[..., Awaitable[None]], *args: Any
) -> None:
    """Runs a task of one VM. `failed` is called with an error that the task did not expect."""
    try:
        await task(*args)
    except Exception as error:
        log.exception("bug in a task of the daemon", task=_name(task))
        failed(error)


async def always(task: Callable[..., Awaitable[None]], *args: Any) -> None:
    """Runs a task that the whole daemon needs: again if it fails, until it returns."""
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
    """Serves connections for trio.serve_listeners, which the first error would otherwise end."""

    async def serve(stream: trio.SocketStream) -> None:
        try:
            await handler(stream)
        except Exception:
            log.exception("bug in serving a connection", task=_name(handler))

    return serve


def _name(task: Callable[..., Any]) -> str:
    return getattr(task, "__qualname__", repr(task))
