# SPDX-License-Identifier: Apache-2.0
"""`postcopyd serve`: the daemon as a process of its host.

Owns what a process has once: its two doors (the control socket and the migration port), signals,
limits, and what the service manager is told. Where its log goes is journal.py's.
"""

from __future__ import annotations

import gc
import math
import resource
import signal
import socket
import time
from collections.abc import Sequence
from ipaddress import ip_address

import structlog
import trio

from postcopyd.config.options import Address, ServeOptions
from postcopyd.control import methods
from postcopyd.daemon.daemon import Daemon
from postcopyd.daemon.journal import configure_logging
from postcopyd.daemon.sd import Manager
from postcopyd.errors import PostcopydError
from postcopyd.model import Status
from postcopyd.native.engine import longest_still_s
from postcopyd.net import socket_file
from postcopyd.net.tls import Tls
from postcopyd.records import identity, locks
from postcopyd.records.store import Store
from postcopyd.sessions.limits import Limits
from postcopyd.sessions.shared import Shared
from postcopyd.tasks import guard
from postcopyd.units import size

FEW_DESCRIPTORS = 1024
"""Descriptors. A migration takes some 20 for each guest; `max_peers` and the clients of the control
socket may take more than 300 together."""

TELL_S = 1.0
"""How often the service manager is told what the daemon does."""

STOP_S = 300.0
"""How long a daemon that is ending asks the service manager to wait; after that the manager may
kill it. Guests that are not granted yet go back first, each within source.rollback.ROLLBACK_S,
several VMMs' disks at once."""

SHOWN_VMS = 4
"""VMs that are named in the line which `systemctl status` shows."""

log = structlog.get_logger()


async def serve(options: ServeOptions) -> None:
    """Runs the daemon until SIGTERM or SIGINT. Raises PostcopydError when it cannot start."""
    configure_logging()
    manager = Manager()
    try:
        await _serve(options, manager)
    except PostcopydError as error:
        manager.tell(f"STATUS={error}")
        raise


async def _serve(options: ServeOptions, manager: Manager) -> None:
    store = Store(options.state_dir, options.durable)
    state, durable = (store.directory, "--state-dir"), (store.durable, "--durable-dir")
    async with locks.folders(state, durable):
        await _serve_alone(options, manager, store)


async def _serve_alone(options: ServeOptions, manager: Manager, store: Store) -> None:
    """Serves, with folders of records that no other daemon has."""
    tls = None
    if options.tls != "off":
        # A certificate that cannot be used does not stop it while guests wait for this daemon.
        tls = Tls.load(options.tls_dir, options.peers, must=not store.under_way())
    # Modules are never garbage: no collection within a blackout has to look at them.
    gc.collect()
    gc.freeze()
    raise_limit()
    shared = Shared(
        store,
        options.hooks_dir,
        options.bandwidth or 0,
        options.connections,
        tls=tls,
        peers=options.peers,
        limits=Limits(options),
        daemon=identity.here(store),
        libvirt=options.libvirt_uri,
    )
    control_listener, listeners = await _doors(options, manager.sockets)
    if tls is None:
        warn_of_plaintext(listeners, options)
    async with trio.open_nursery() as process:
        async with trio.open_nursery() as nursery, trio.open_nursery() as migrations:
            daemon = Daemon(shared, migrations)
            methods.interface()  # while there are descriptors left to read the file with
            daemon.restore()
            ending = trio.Event()
            await nursery.start(_signals, manager, shared, ending, nursery, migrations)
            control_at = control_listener.getsockname()
            await nursery.start(methods.serve, daemon, control_listener)
            await nursery.start(trio.serve_listeners, guard.each(daemon.serve_peer), listeners)
            if options.metrics:
                await _metered(daemon, options.metrics, nursery)
            at = [str(Address(*listener.socket.getsockname()[:2])) for listener in listeners]
            log.info("serving", control=control_at, listen=at)
            manager.tell("READY=1", f"STATUS={summary(daemon.list())}")
            process.start_soon(guard.always, _tell, manager, daemon, ending)
            await trio.sleep_forever()
        process.cancel_scope.cancel()


async def _metered(daemon: Daemon, address: str, nursery: trio.Nursery) -> None:
    """Serves metrics if it can. Otherwise it only logs: guests may be waiting for this daemon, and
    nobody waits for metrics."""
    from postcopyd.daemon.metrics import Metrics  # this import takes a third of the start

    try:
        await nursery.start(Metrics(daemon).serve, address)
    except PostcopydError as error:
        log.error("no metrics until this is mended and the daemon restarted", error=str(error))


async def _tell(manager: Manager, daemon: Daemon, ending: trio.Event) -> None:
    """Tells the service manager what the daemon does, and feeds its watchdog.

    That this task runs shows that trio's loop turns; the fault threads are asked. It cannot tell a
    connection's thread that is stuck from one that waits for its peer, nor a migration that makes
    no progress from one on a slow network.
    """
    shown = ""
    fed = -math.inf
    until = math.inf
    while True:
        now = trio.current_time()
        if ending.is_set():
            until = min(until, now + STOP_S)
            text = f"ending; {summary(daemon.list())}"
            if now < until:
                manager.tell(f"EXTEND_TIMEOUT_USEC={int(10e6 * TELL_S)}")
        else:
            text = summary(daemon.list())
        if text != shown:
            manager.tell(f"STATUS={text}")
            shown = text
        patience = manager.watchdog_s
        if patience and now - fed >= patience / 4 and longest_still_s() < patience / 2:
            manager.tell("WATCHDOG=1")
            fed = now
        await trio.sleep(min(TELL_S, (patience or 4 * TELL_S) / 4))


def summary(vms: Sequence[Status]) -> str:
    """One line on what goes on, for status objects: `2 VMs; web1 leaving to host2: postcopy,
    312.0 MiB remaining`."""
    moving = [vm for vm in vms if vm.phase in ("precopy", "handover", "postcopy", "paused")]
    moving.sort(key=lambda vm: vm.phase != "paused")  # first those that may need a person
    parts = [f"{len(vms)} VM{'' if len(vms) == 1 else 's'}"]
    for vm in moving[:SHOWN_VMS]:
        way = "leaving to" if vm.role == "source" else "arriving from"
        left = f", {size(vm.remaining)} remaining" if vm.remaining else ""
        parts.append(f"{vm.vm} {way} {vm.peer}: {vm.phase}{left}")
    if len(moving) > SHOWN_VMS:
        parts.append(f"and {len(moving) - SHOWN_VMS} more")
    return "; ".join(parts)


def warn_of_plaintext(listeners: list[trio.SocketListener], options: ServeOptions) -> None:
    """Warns of what `--tls off` means, if other hosts can connect."""
    hosts = [listener.socket.getsockname()[0] for listener in listeners]
    beyond = [host for host in hosts if not ip_address(host.partition("%")[0]).is_loopback]
    if beyond:
        log.warning(
            "no TLS: guests cross the network in the clear, and whoever reaches this port can send "
            "and take them",
            listen=beyond,
        )
    if options.peers:
        log.warning("no TLS: what [peers] may do is not held to, nobody shows who it is")


def raise_limit() -> None:
    """Allows descriptors up to the hard limit: the soft one is 1024 for the sake of select(2)."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < FEW_DESCRIPTORS:
        log.warning("few descriptors: migrations may have to wait for some", limit=hard)


async def _doors(
    options: ServeOptions, given: Sequence[socket.socket]
) -> tuple[socket.socket, list[trio.SocketListener]]:
    """The control socket, and the listeners for other daemons. Those that the service manager has
    opened are told apart by family; the missing ones are opened by the options. Raises
    PostcopydError."""
    doors = [one for one in given if one.family == socket.AF_UNIX]
    ports = [one for one in given if one.family in (socket.AF_INET, socket.AF_INET6)]
    if len(doors) > 1 or len(doors) + len(ports) < len(given):
        raise PostcopydError(
            f"the service manager gives {len(given)} sockets, and this takes one of the family "
            f"unix, for control, and some of TCP, for other daemons: mend postcopyd.socket"
        )
    if ports and options.listen != ServeOptions().listen:
        log.warning(
            "the sockets are the service manager's: `listen` is not used, change ListenStream= in "
            "postcopyd.socket",
            listen=str(options.listen),
        )
    for port in ports:
        port.setblocking(False)
    return (
        doors[0] if doors else await socket_file.listen(options.control),
        [trio.SocketListener(trio.socket.from_stdlib_socket(port)) for port in ports]
        or await _listen(options),
    )


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
    manager: Manager,
    shared: Shared,
    ending: trio.Event,
    *nurseries: trio.Nursery,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """SIGTERM and SIGINT end the daemon: guests that are not granted go back, others wait. SIGHUP
    makes it read its certificates again."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            if number == signal.SIGHUP:
                _reload(manager, shared)
                continue
            log.info("ending", signal=signal.Signals(number).name)
            manager.tell("STOPPING=1")
            ending.set()
            for nursery in nurseries:
                nursery.cancel_scope.cancel()
            return


def _reload(manager: Manager, shared: Shared) -> None:
    """Reads the certificates again. If they cannot be used, the old ones stay: guests are on their
    way."""
    # CLOCK_MONOTONIC, which sd_notify(3) requires with RELOADING=1.
    manager.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        if shared.tls is not None:
            shared.tls.reload()
        log.info("certificates reloaded")
    except PostcopydError as error:
        log.error("certificates not reloaded, those before stay in use", error=str(error))
    except Exception:
        log.exception("bug in reloading certificates, those before stay in use")
    manager.tell("READY=1")
