# SPDX-License-Identifier: Apache-2.0
"""`postcopyd serve`: the daemon as a process of its host.

Owns what is there once for a process: its two doors (the control socket and the migration port),
signals, limits, and where its log goes.
"""

from __future__ import annotations

import gc
import logging
import resource
import signal
import sys
import time

import structlog
import trio

from postcopyd import control
from postcopyd.config import ServeOptions
from postcopyd.daemon import Daemon
from postcopyd.errors import PostcopydError, shortage
from postcopyd.limits import Limits
from postcopyd.settings import Settings
from postcopyd.store import Store

FEW_DESCRIPTORS = 1024
"""A migration takes some 20 for each guest; `max_peers` and the clients of the control socket may
take more than 300 together."""

SHORTAGE_S = 10.0
"""How often it is said that connections have to wait."""

log = structlog.get_logger()


async def serve(options: ServeOptions) -> None:
    """Runs the daemon until SIGTERM or SIGINT. Raises PostcopydError when it cannot start."""
    configure_logging()
    if options.tls != "off":
        raise PostcopydError(
            "this version has no TLS yet: say `--tls off` where the network between the hosts is "
            "trusted"
        )
    # What has been imported is never garbage: no collection looks at it within a blackout.
    gc.collect()
    gc.freeze()
    raise_limit()
    settings = Settings(
        Store(options.state_dir, options.durable),
        options.hooks_dir,
        options.bandwidth or 0,
        options.connections,
        limits=Limits(options),
    )
    control_listener = control.listen(options.control)
    listeners = await _listen(options)
    async with trio.open_nursery() as nursery, trio.open_nursery() as migrations:
        daemon = Daemon(settings, migrations)
        await daemon.restore()
        await nursery.start(_signals, nursery, migrations)
        await nursery.start(control.serve, daemon, control_listener)
        await nursery.start(trio.serve_listeners, daemon.serve_peer, listeners)
        at = [listener.socket.getsockname()[:2] for listener in listeners]
        log.info("serving", control=options.control, listen=[f"{h}:{port}" for h, port in at])
        await trio.sleep_forever()


def raise_limit() -> None:
    """Descriptors up to the hard limit: the soft one is 1024 for the sake of select(2)."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < FEW_DESCRIPTORS:
        log.warning("few descriptors: migrations may have to wait for some", limit=hard)


class Shortage(logging.Handler):
    """What trio says of a listener that can take no connection, ten times a second with a
    traceback: a sentence each ten seconds instead."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + SHORTAGE_S
            error = record.exc_info[1] if record.exc_info else None
            why = shortage(error) if isinstance(error, OSError) else None
            log.error("no connection taken, those that come wait", error=str(why or error))


async def _listen(options: ServeOptions) -> list[trio.SocketListener]:
    host, port = options.listen
    try:
        return await trio.open_tcp_listeners(port, host=host or None)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PostcopydError(
            f"listening for other daemons on {options.listen}: {reason}; "
            f"say another address with --listen"
        ) from None


async def _signals(
    *nurseries: trio.Nursery, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """SIGTERM and SIGINT end the daemon: guests before the grant go back, others wait."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("ending", signal=signal.Signals(number).name)
            for nursery in nurseries:
                nursery.cancel_scope.cancel()
            return


def configure_logging() -> None:
    """To stderr: readable on a terminal, one key=value line otherwise."""
    listeners = logging.getLogger("trio.serve_listeners")
    listeners.handlers, listeners.propagate = [Shortage()], False
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer()
            if sys.stderr.isatty()
            else structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
