# SPDX-License-Identifier: Apache-2.0
"""`postcopyd serve`: the daemon as a process of its host.

Owns what is there once for a process: its two doors (the control socket and the migration port),
signals and limits. Where its log goes is journal.py's.
"""

from __future__ import annotations

import gc
import resource
import signal

import structlog
import trio

from postcopyd import control
from postcopyd.config import ServeOptions
from postcopyd.daemon import Daemon
from postcopyd.errors import PostcopydError
from postcopyd.journal import configure_logging
from postcopyd.settings import Settings
from postcopyd.store import Store

FEW_DESCRIPTORS = 1024
"""A migration takes some 20 for each guest; MAX_PEERS and the clients of the control socket may
take more than 300 together."""

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
    )
    control_listener = control.listen(options.control)
    listeners = await _listen(options)
    async with trio.open_nursery() as nursery, trio.open_nursery() as migrations:
        daemon = Daemon(settings, migrations)
        await daemon.restore()
        await nursery.start(_signals, nursery, migrations)
        await nursery.start(control.serve, daemon, control_listener)
        await nursery.start(trio.serve_listeners, daemon.serve_peer, listeners)
        if options.metrics:
            from postcopyd.metrics import Metrics  # takes a third of the time to start

            await nursery.start(Metrics(daemon).serve, options.metrics)
        at = [listener.socket.getsockname()[:2] for listener in listeners]
        log.info("serving", control=options.control, listen=[f"{h}:{port}" for h, port in at])
        await trio.sleep_forever()


def raise_limit() -> None:
    """Descriptors up to the hard limit: the soft one is 1024 for the sake of select(2)."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < FEW_DESCRIPTORS:
        log.warning("few descriptors: migrations may have to wait for some", limit=hard)


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
