# SPDX-License-Identifier: Apache-2.0
"""Metrics for Prometheus, and the small HTTP server that serves them.

Owns the names of metrics: docs/MONITORING.md explains them, examples/grafana-dashboard.json shows
them. Their values are made at each request, from counts.py and the state of the daemon. Loaded only
where metrics are on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Protocol, get_args

import h11
import prometheus_client
import trio
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from postcopyd import __version__, counts
from postcopyd.config.options import MODES, parse_address
from postcopyd.daemon import journal
from postcopyd.errors import PostcopydError
from postcopyd.net import socket_file
from postcopyd.sessions.shared import Shared
from postcopyd.sessions.vm import Vm
from postcopyd.tasks import guard

CLIENTS = 8
"""Connections at a time; a further one is closed at once. Prometheus needs one, a person another.
"""

CLIENT_S = 10.0
"""How long a client may take from connecting to having read its answer: Prometheus's own default.
"""

REQUEST = 8192
"""Longest head of a request, in bytes."""

HANDOVER_S = 1.0
"""How long an answer waits while a guest is being handed over: making the answer blocks the whole
daemon for a millisecond or two."""

PHASES = {"idle": "preparing", "precopy": "precopy", "handover": "handover",
          "postcopy": "postcopy", "paused": "paused"}  # fmt: skip
"""The `phase` of a migration that is under way, by the phase in its status."""

BUCKETS = range(3, 25)
"""Upper bounds of fault latency: 2^n us, 8 us to 17 s. A fault that waits longer is in a pause."""


class Daemon(Protocol):
    """What the metrics are read from."""

    vms: dict[str, Vm]

    shared: Shared


class Metrics(Collector):
    """The metrics of one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._clients = trio.CapacityLimiter(CLIENTS)
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(self)
        prometheus_client.ProcessCollector(registry=self._registry)

    # --- what is told ----------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        """All families, with their values of this moment."""
        yield from self._migrations()
        yield from self._pages()
        yield from self._health()

    def _migrations(self) -> Iterator[Metric]:
        over = CounterMetricFamily(
            "postcopyd_migrations",
            "Migrations that are over, by how they ended",
            labels=("role", "mode", "result"),
        )
        every = product(counts.engines, MODES, get_args(counts.Result))
        for labels in sorted({*every, *counts.ended}):  # rate() needs a series to begin at 0
            over.add_metric(labels, counts.ended[labels])
        yield over
        # A name of its own: newer formats call the counter `postcopyd_migrations`.
        now = GaugeMetricFamily(
            "postcopyd_migrations_active", "Migrations under way", labels=("role", "phase")
        )
        left = GaugeMetricFamily(
            "postcopyd_remaining_bytes", "Guest RAM that is not there yet", labels=("role",)
        )
        for role in ("source", "destination"):
            under_way = [vm.status for vm in self._daemon.vms.values() if _under_way(vm, role)]
            for phase, name in PHASES.items():
                now.add_metric((role, name), sum(one.phase == phase for one in under_way))
            left.add_metric((role,), sum(one.remaining or 0 for one in under_way))
        yield now
        yield left
        recovered = CounterMetricFamily(
            "postcopyd_recoveries", "Migrations that went on after a pause", labels=("role",)
        )
        for role in counts.engines:
            recovered.add_metric((role,), counts.recoveries[role])
        yield recovered
        downtimes = counts.downtimes
        yield _histogram(
            "postcopyd_downtime_seconds",
            "How long guests that left this host were stopped for the handover",
            [str(bound) for bound in downtimes.bounds],
            downtimes.counts,
            downtimes.sum,
        )

    def _pages(self) -> Iterator[Metric]:
        arriving = counts.engines["destination"]
        yield _counter(
            "postcopyd_faults", "Accesses of guests to missing pages", arriving.total("faults")
        )
        fine = arriving.latency()
        edges = [0, *(8 * n for n in BUCKETS), len(fine)]
        each = [sum(fine[a:b]) for a, b in pairwise(edges)]
        yield _histogram(
            "postcopyd_fault_latency_seconds",
            "From a fault to its page in place; the sum is good to a sixteenth",
            [str(2**n / 1e6) for n in BUCKETS],
            each,
            sum(count * _middle_s(bucket) for bucket, count in enumerate(fine) if count),
        )
        moved = CounterMetricFamily(
            "postcopyd_transferred_bytes",
            "Bytes on data connections, their headers counted",
            labels=("role",),
        )
        for role, engines in counts.engines.items():
            moved.add_metric((role,), engines.total("transferred_bytes"))
        yield moved

    def _health(self) -> Iterator[Metric]:
        arriving = counts.engines["destination"]
        yield _counter(
            "postcopyd_stalls",
            "Times that placing a page had to wait for memory of this host",
            arriving.total("stalls"),
        )
        waiting = sum(max(stats.unanswered, 0) for stats in arriving.living)
        yield GaugeMetricFamily(
            "postcopyd_unanswered_requests", "Pages asked for that have not come", waiting
        )
        failures = CounterMetricFamily(
            "postcopyd_engine_failures",
            "Engines that stopped working on their migration, by why",
            labels=("role", "kind"),
        )
        for labels, count in counts.failures.items():
            failures.add_metric(labels, count)
        yield failures
        attached = sum(vm.driver is not None for vm in self._daemon.vms.values())
        yield GaugeMetricFamily("postcopyd_vms_attached", "VMs with a VMM here", attached)
        yield GaugeMetricFamily(
            "postcopyd_peer_connections",
            "Connections from other daemons",
            len(self._daemon.shared.limits.peers),
        )
        yield GaugeMetricFamily(
            "postcopyd_arrivals_waiting",
            "Guests that wait for their turn to come here",
            self._daemon.shared.limits.arrivals.waiting,
        )
        if (tls := self._daemon.shared.tls) is not None:
            yield GaugeMetricFamily(
                "postcopyd_certificate_end_timestamp_seconds",
                "When the first of this host's certificates is not valid any more",
                tls.ends,
            )
        yield _counter(
            "postcopyd_log_entries_dropped",
            "Log entries that nobody took in time",
            journal.dropped,
        )
        build = GaugeMetricFamily("postcopyd_build_info", "Always 1", labels=("version",))
        build.add_metric((__version__,), 1)
        yield build

    # --- how it is asked for ---------------------------------------------------------------------

    async def serve(
        self, address: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Answers GET /metrics at HOST:PORT, or at the absolute path of a unix socket, until
        cancelled. Raises PostcopydError when it cannot listen."""
        listeners = await _listen(address)
        task_status.started()
        await trio.serve_listeners(guard.each(self._serve), listeners)

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            self._clients.acquire_on_behalf_of_nowait(stream)
        except trio.WouldBlock:
            await trio.aclose_forcefully(stream)
            return
        try:
            with trio.move_on_after(CLIENT_S):
                await self._answer(stream)
        except trio.BrokenResourceError:
            pass  # the client has gone
        finally:
            self._clients.release_on_behalf_of(stream)
            await trio.aclose_forcefully(stream)

    async def _answer(self, stream: trio.SocketStream) -> None:
        """Answers one request, then closes: no client asks often enough for more."""
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST)
        headers = {"Content-Type": "text/plain; charset=utf-8", "Connection": "close"}
        status, body, head_only = 200, b"", False
        try:
            while (request := http.next_event()) is h11.NEED_DATA:
                http.receive_data(await stream.receive_some())
            if not isinstance(request, h11.Request):
                return  # the client has gone
            head_only = request.method == b"HEAD"
            if request.target.partition(b"?")[0] != b"/metrics":
                status, body = 404, b"only /metrics is here\n"
            elif request.method not in (b"GET", b"HEAD"):
                status, body = 405, b"only GET is allowed\n"
                headers["Allow"] = "GET, HEAD"
            else:
                await self._handed_over()
                body = prometheus_client.generate_latest(self._registry)
                headers["Content-Type"] = prometheus_client.CONTENT_TYPE_LATEST
        except h11.RemoteProtocolError as error:
            status, body = error.error_status_hint, b"no HTTP request that is understood here\n"
        headers["Content-Length"] = str(len(body))
        answer = http.send(h11.Response(status_code=status, headers=[*headers.items()]))
        if not head_only:
            answer += http.send(h11.Data(body))
        await stream.send_all(answer + http.send(h11.EndOfMessage()))
        with trio.move_on_after(1):  # unread data at the close resets the connection: answer lost
            await stream.send_eof()
            while await stream.receive_some():
                pass

    async def _handed_over(self) -> None:
        with trio.move_on_after(HANDOVER_S):
            while any(vm.status.phase == "handover" for vm in self._daemon.vms.values()):
                await trio.sleep(0.01)


def _under_way(vm: Vm, role: str) -> bool:
    phase = vm.status.phase
    if vm.status.role != role or phase not in PHASES:
        return False
    return phase != "idle" or vm.claimed_by is not None


def _middle_s(bucket: int) -> float:
    """The middle of one bucket of latencies, as native.h divides them; in seconds."""
    if bucket < 8:
        return (bucket + 0.5) / 1e6
    return float(2 ** (bucket // 8) * (1 + (bucket % 8 + 0.5) / 8) / 1e6)


def _counter(name: str, text: str, value: int) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value)


def _histogram(
    name: str, text: str, bounds: list[str], each: list[int], total: float
) -> HistogramMetricFamily:
    """`each` has the counts by bucket, the last for values above all bounds."""
    so_far, buckets = 0, []
    for bound, count in zip([*bounds, "+Inf"], each, strict=True):
        so_far += count
        buckets.append((bound, so_far))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=total)


async def _listen(address: str) -> list[trio.SocketListener]:
    if os.path.isabs(address):
        opened = await socket_file.listen(address, what="socket for metrics", option="--metrics")
        opened.setblocking(False)
        return [trio.SocketListener(trio.socket.from_stdlib_socket(opened))]
    host, port = parse_address(address, listening=True)
    try:
        return await trio.open_tcp_listeners(port, host=host or None)
    except OSError as error:
        raise PostcopydError(
            f"listening for who asks for metrics on {address}: {error.strerror or error}; say "
            f"another address with --metrics, or leave it out"
        ) from None
