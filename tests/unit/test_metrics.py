# SPDX-License-Identifier: Apache-2.0
"""What Prometheus is told, and how it is answered."""

from __future__ import annotations

import fcntl
import gc
import json
import math
import os
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h11
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from session_faults import cut, made_clock, migrated
from session_world import World

from postcopyd import counts
from postcopyd.config.options import Address, ServeOptions
from postcopyd.daemon import journal, metrics, service
from postcopyd.daemon.metrics import Metrics
from postcopyd.daemon.sd import Manager
from postcopyd.net import socket_file
from postcopyd.records.schema import RecordedStatus
from postcopyd.records.store import Store
from postcopyd.sessions.limits import Limits
from postcopyd.sessions.vm import Vm
from postcopyd.varlink import client

EXAMPLES = Path(__file__).parents[2] / "examples"
DOCS = Path(__file__).parents[2] / "docs"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Daemon:
    shared: Any = SimpleNamespace(limits=Limits(), tls=SimpleNamespace(ends=2e9))

    def __init__(self, *vms: Vm) -> None:
        self.vms = {vm.name: vm for vm in vms}


class Stats:
    """struct pc_stats, as far as it is read."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(dict.fromkeys(counts.SUMMED, 0) | {"unanswered": 0} | fields)
        self.latency = [0] * 256


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts as a process has them that has just started."""
    for name in ("ended", "recoveries", "failures"):
        monkeypatch.setattr(counts, name, Counter())
    monkeypatch.setattr(counts, "downtimes", counts.Histogram(*counts.downtimes.bounds))
    engines = {role: counts.Engines() for role in counts.engines}
    monkeypatch.setattr(counts, "engines", engines)
    monkeypatch.setattr(journal, "dropped", 0)


@asynccontextmanager
async def served(daemon: Any, address: str) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(Metrics(daemon).serve, address)
        yield
        nursery.cancel_scope.cancel()


async def ask(path: str, data: bytes, method: str = "GET") -> tuple[h11.Response, bytes]:
    """The answer to these bytes, to the end of the connection."""
    http = h11.Connection(h11.CLIENT)
    http.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    with trio.fail_after(10):
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(data)
            while part := await stream.receive_some():
                http.receive_data(part)
            http.receive_data(b"")
    response, body = http.next_event(), b""
    assert isinstance(response, h11.Response)
    while isinstance(event := http.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    return response, body


async def scraped(path: str) -> Samples:
    response, body = await ask(path, b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert response.status_code == 200
    return read(body.decode())


def read(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


async def test_a_scrape_before_anything(tmp_path: Path) -> None:
    """Each answer is whole and says what there is; series that may be alerted on are there at 0."""
    path = str(tmp_path / "metrics")
    daemon = Daemon()
    visiting = daemon.shared.limits.peers.visit("192.0.2.1")
    async with served(daemon, path):
        with visiting:
            samples = await scraped(path)
        assert of(samples, "postcopyd_migrations_active", role="source", phase="paused") == 0
        for result in ("completed", "failed", "cancelled", "ended"):
            labels = {"role": "source", "mode": "hybrid", "result": result}
            assert of(samples, "postcopyd_migrations_total", **labels) == 0
        assert of(samples, "postcopyd_peer_connections") == 1
        assert of(samples, "postcopyd_certificate_end_timestamp_seconds") == 2e9
        assert samples.keys() == (await scraped(path)).keys()


@pytest.mark.parametrize(
    ("request_", "status", "says"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404, b"/metrics"),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 405, b"GET"),
        (b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 200, b""),
        (b"nonsense\r\n\r\n", 400, b"no HTTP"),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400, b"no HTTP"),  # no Host
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20000, 431, b"no HTTP"),
    ],
)
async def test_requests(tmp_path: Path, request_: bytes, status: int, says: bytes) -> None:
    """What is no GET of /metrics is answered with what is wrong, and ends that connection only."""
    path = str(tmp_path / "metrics")
    async with served(Daemon(), path):
        response, body = await ask(path, request_, "HEAD" if b"HEAD" in request_ else "GET")
        assert response.status_code == status
        assert says in body
        assert bool(body) == (b"HEAD" not in request_)
        assert await scraped(path)


async def test_clients_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    """Who asks nothing is not waited for, and does not keep others out for long."""
    path = str(tmp_path / "metrics")
    monkeypatch.setattr(metrics, "CLIENTS", 2)
    async with served(Daemon(), path):
        silent = [await trio.open_unix_socket(path) for _ in range(2)]
        await trio.testing.wait_all_tasks_blocked()
        async with await trio.open_unix_socket(path) as third:
            assert await third.receive_some() == b""
        began = trio.current_time()
        for stream in silent:
            assert await stream.receive_some() == b""
            await stream.aclose()
        assert trio.current_time() - began == pytest.approx(metrics.CLIENT_S, abs=1)


async def test_an_answer_waits_for_a_handover(tmp_path: Path, autojump_clock: Any) -> None:
    """Nothing is made for a scrape while a guest stands still; and a stuck one is no reason."""
    path, vm = str(tmp_path / "metrics"), Vm("web1", Store(tmp_path / "state"), None)
    vm.show(role="source", phase="handover", migration="m1")
    async with served(Daemon(vm), path):
        began = trio.current_time()
        samples = await scraped(path)
    assert trio.current_time() - began >= metrics.HANDOVER_S
    assert of(samples, "postcopyd_migrations_active", role="source", phase="handover") == 1


async def test_an_address_that_is_taken(tmp_path: Path) -> None:
    """A daemon whose metrics cannot be served says so in a sentence, and where."""
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with listener:
        port = listener.socket.getsockname()[1]
        with pytest.raises(Exception, match=r"metrics on 127\.0\.0\.1.* in use; say another"):
            await Metrics(Daemon()).serve(f"127.0.0.1:{port}")


async def test_guests_do_not_wait_for_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that has to wait for its socket for metrics opens its other doors first."""
    monkeypatch.setattr(socket_file, "_LOCK_SECONDS", math.inf)
    monkeypatch.setattr(service, "raise_limit", lambda: None)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    (tmp_path / "locked").mkdir()
    options = ServeOptions(
        control=str(tmp_path / "control"),
        listen=Address("127.0.0.1", 0),
        tls="off",
        metrics=str(tmp_path / "locked/metrics"),
    )
    folder = os.open(tmp_path / "locked", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)

    def asked() -> Any:
        with client.Client(options.control) as one:
            return one.call("io.postcopyd.List")

    store = Store(tmp_path / "state")
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service._serve_alone, options, Manager({}), store)
            with trio.fail_after(10):
                while not os.path.exists(options.control):
                    await trio.sleep(0.01)
                assert await trio.to_thread.run_sync(asked, abandon_on_cancel=True) == {"vms": []}
            assert not os.path.exists(options.metrics or "")
            nursery.cancel_scope.cancel()
    finally:
        os.close(folder)


# What is told.


async def test_a_migration_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real migration that pauses once, on both hosts: counted once each, nothing left over."""
    made_clock(monkeypatch)
    made = await migrated(tmp_path, {"<- progress": cut}, mode="postcopy")
    samples = collected(made)
    for role in ("source", "destination"):
        labels = {"role": role, "mode": "postcopy", "result": "completed"}
        assert of(samples, "postcopyd_migrations_total", **labels) == 1
        assert of(samples, "postcopyd_recoveries_total", role=role) == 1
        assert of(samples, "postcopyd_transferred_bytes_total", role=role) > 4096
        assert of(samples, "postcopyd_migrations_active", role=role, phase="paused") == 0
    assert of(samples, "postcopyd_downtime_seconds_count") == 1
    assert sum(counts.ended.values()) == 2
    assert not [one for engines in counts.engines.values() for one in engines.living]


def collected(made: World) -> Samples:
    registry = Metrics(made.source.daemon)._registry
    return read(metrics.prometheus_client.generate_latest(registry).decode())


@pytest.mark.parametrize("result", ["failed", "cancelled", "ended"])
def test_migrations_that_do_not_complete(tmp_path: Path, result: counts.Result) -> None:
    """Each is counted once, and one that an operator has called off is no failure."""
    vm = Vm("web1", Store(tmp_path), None)
    vm.conclude(role="destination", phase="idle", migration="m1", mode="hybrid")
    vm.conclude(phase="failed", counted_as=result)
    vm.show(message="more of it")
    assert counts.ended == {("destination", "hybrid", result): 1}


def test_what_an_earlier_daemon_has_counted(tmp_path: Path) -> None:
    """A daemon that is started again finds migrations that are over, and does not count them."""
    vm = Vm("web1", Store(tmp_path), None)
    status: RecordedStatus = {"role": "source", "phase": "drained", "migration": "m1"}
    vm.remember(
        {"version": 1, "ownership": "granted", "epoch": 1, "driver": "", "socket": "", "pid": 0,
         "started": 0, "status": status, "about": {}}
    )  # fmt: skip
    vm.show(message="it is there")
    assert not counts.ended


def test_sums_never_go_backwards() -> None:
    """An engine that ends leaves what it has counted, as it was read last or more."""
    engines, first, second = counts.engines["destination"], Stats(faults=3), Stats(faults=4)
    first.latency[30] = second.latency[30] = 2
    engines.began(first)
    engines.began(second)
    assert (engines.total("faults"), engines.latency()[30]) == (7, 4)
    first.faults = 5
    engines.ended(first)
    first.faults = 100
    assert (engines.total("faults"), engines.latency()[30]) == (9, 4)
    assert engines.living == [second]


def test_fault_latency(tmp_path: Path) -> None:
    """The engine's buckets become Prometheus's: each cumulative, in seconds, none lost."""
    stats = Stats(faults=7, unanswered=2)
    for us, count in ((3, 1), (8, 1), (15, 1), (100, 2), (20_000_000, 1)):
        log = us.bit_length() - 1
        stats.latency[us if us < 8 else 8 * log + ((us >> (log - 3)) & 7)] += count
    counts.engines["destination"].began(stats)
    text = metrics.prometheus_client.generate_latest(Metrics(Daemon())._registry).decode()
    samples = read(text)
    name = "postcopyd_fault_latency_seconds"
    below = {
        round(float(dict(labels)["le"]) * 1e6): value
        for (sample, labels), value in samples.items()
        if sample == f"{name}_bucket" and dict(labels)["le"] != "+Inf"
    }
    assert [below[us] for us in (8, 16, 64, 128, 1 << 24)] == [1, 3, 3, 5, 5]
    assert of(samples, f"{name}_bucket", le="+Inf") == of(samples, f"{name}_count") == 6
    assert of(samples, f"{name}_sum") == pytest.approx(20.000226, rel=1 / 16)
    assert of(samples, "postcopyd_unanswered_requests") == 2


# What is written from the names.


def names() -> set[str]:
    """All metrics that there are, with the suffixes that a query may name."""
    found = set()
    counts.failures["source", "connection"] += 1
    for family in Metrics(Daemon())._registry.collect():
        found |= {family.name} if family.type != "counter" else set()
        found |= {sample.name for sample in family.samples}
    return found


def test_the_dashboard_shows_what_there_is() -> None:
    """Dashboard, alerts and documents name no metric that does not exist; the page has all."""
    dashboard = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(asked) > 8
    alerts = (EXAMPLES / "prometheus-alerts.yml").read_text()
    page = (DOCS / "MONITORING.md").read_text()
    pattern = r"\b(?:postcopyd|process)_[a-z_]+\b"
    known = names()
    for text in (*asked, alerts, page):
        assert set(re.findall(pattern, text)) - {"process_"} <= known
    ours = {name for name in known if name.startswith("postcopyd_")}
    parts = {name for name in ours if name.endswith(("_bucket", "_count", "_sum"))}
    assert ours - parts <= set(re.findall(pattern, page))


def test_the_dashboard_can_be_imported() -> None:
    """Panels do not lie on one another, and each takes its data source from the one variable."""
    dashboard = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    places = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & places
        assert at["x"] + at["w"] <= 24
        places |= cells
        assert panel["datasource"]["uid"] == "${source}"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
