# SPDX-License-Identifier: Apache-2.0
"""Daemons of the version before this one: upgraded while guests move, and with a peer that is of
this version already."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from before import OLD, needed, upgraded
from guests import qemu as q
from pair import (
    LARGE,
    MIB,
    Host,
    Pair,
    ProcessGuest,
    arrived,
    cli,
    completed,
    filled,
    open_pair,
    status_until,
    verified,
    worked,
)
from qemu_pair import VM, QemuPair, qemu_pair
from qemus import QEMUS
from test_hybrid_process import tracked

from postcopyd.vmm.qemu.qmp import Qmp

pytestmark = pytest.mark.long

RATE = 16 * MIB
MODES = ["postcopy", "hybrid", "precopy"]


@pytest.fixture(autouse=True)
def hosts_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a test upgrades them."""
    needed()
    monkeypatch.setattr(Host, "site", OLD)


@pytest.fixture
def old_pair(hosts_are_old: None) -> Iterator[Pair]:
    """With certificates."""
    with open_pair(tls=True) as pair:
        yield pair


def chosen(pair: Any, which: str) -> list[Host]:
    a, b = pair.hosts
    return {"source": [a], "destination": [b], "both": [a, b]}[which]


async def moving(
    pair: Pair, phase: str, mode: str = "postcopy", backing: str = "memfd", **options: Any
) -> tuple[str, ProcessGuest, ProcessGuest, str]:
    """A guest on its way, with seconds to go in that phase; and its migration."""
    name, here, there = await pair.place(*LARGE, "--backing", backing)
    a, b = pair
    await filled(here)
    # By hybrid nothing is left to come when the bandwidth takes all that the guest writes.
    rate = RATE if phase == "postcopy" else RATE // 2
    options |= {"mode": mode, "bandwidth": rate}
    started = await a.call("Migrate", name=name, to=b.address, **options)
    await status_until(
        a, name, lambda s: s["phase"] == phase and s.get("transferredBytes", 0) > 4 * MIB
    )
    return name, here, there, started["migration"]


def fields(result: dict[str, Any]) -> set[str]:
    """Those of a result, and of what is in it."""
    inside = [(key, value) for key, value in result.items() if isinstance(value, dict)]
    return {*result, *(f"{key}.{name}" for key, value in inside for name in value)}


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("which", ["source", "destination", "both"])
async def test_while_memory_follows(old_pair: Pair, which: str, by: int) -> None:
    """The guest at most waits: the rest of its memory comes, to and from daemons that are new."""
    name, here, there, _ = await moving(old_pair, "postcopy")
    await upgraded(*chosen(old_pair, which), by=by)
    await arrived(old_pair, name, here, there)
    result = (await old_pair.hosts[0].status(name))["result"]
    assert result["event"] == "completed"
    assert result["recoveries"] >= 1


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
@pytest.mark.parametrize("which", ["source", "destination", "both"])
async def test_while_memory_follows_that_was_copied_before(
    old_pair: Pair, which: str, backing: str
) -> None:
    """What the old daemon had of pages from before the handover, the new one finds, or asks for."""
    name, here, there, _ = await moving(old_pair, "postcopy", "hybrid", backing)
    await upgraded(*chosen(old_pair, which), by=signal.SIGKILL)
    await arrived(old_pair, name, here, there)
    result = (await old_pair.hosts[0].status(name))["result"]
    assert (result["event"], result["mode"]) == ("completed", "hybrid")
    assert result["passes"]


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("which", ["source", "destination", "both"])
async def test_in_a_pass(old_pair: Pair, which: str, by: int) -> None:
    """Nothing was handed over: the guest never notices, and the next attempt goes well, also where
    one of the two is old still."""
    name, here, there, _ = await moving(old_pair, "precopy", "hybrid")
    a, b = old_pair
    await upgraded(*chosen(old_pair, which), by=by)
    await status_until(a, name, lambda status: status["phase"] in ("idle", "failed"))
    await status_until(b, name, lambda status: status["phase"] == "failed")
    assert tracked(here.process.pid) == []
    await worked(here, 100)
    assert (await a.migrate(name, b, mode="hybrid"))["event"] == "completed"
    await arrived(old_pair, name, here, there)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["source", "destination"])
async def test_with_a_peer_of_the_version_before(old_pair: Pair, which: str, mode: str) -> None:
    """There and back: hosts are upgraded one after the other."""
    a, b = old_pair
    await upgraded(*chosen(old_pair, which))
    name, here, there = await old_pair.place()
    result = await a.migrate(name, b, mode=mode)
    completed(result, mode=mode)
    await arrived(old_pair, name, here, there)
    back = await old_pair.attach(a, name, old_pair.guest("--memory", "16M", "--incoming"))
    results = [result, await b.migrate(name, a, mode=mode)]
    completed(results[1], mode=mode)
    await verified(back)
    new, old = results if which == "source" else reversed(results)
    assert fields(old) <= fields(new)


async def test_what_is_over_is_shown_as_before(old_pair: Pair) -> None:
    """Attached, waiting, moved away and here, kept, cancelled: each VM says what it said, and may
    be moved."""
    a, b = old_pair
    idle, here, there = await old_pair.place()
    for options in ({}, {"keepSource": True}):
        moved, _, _ = await old_pair.place()
        completed(await a.migrate(moved, b, **options))
    cancelled, _, _, migration = await moving(old_pair, "precopy", "hybrid")
    await a.call("Cancel", name=cancelled)
    assert (await a.result(cancelled, migration))["event"] == "cancelled"
    await status_until(b, cancelled, lambda status: status["phase"] == "failed")
    for host in old_pair:
        before = (await host.call("List"))["vms"]
        assert len(before) == 4
        await upgraded(host)
        assert (await host.call("List"))["vms"] == before
    assert (await a.migrate(cancelled, b))["event"] == "completed"
    assert (await a.migrate(idle, b))["event"] == "completed"
    await arrived(old_pair, idle, here, there)


async def test_a_source_that_was_not_told_of_the_end_is_answered(old_pair: Pair) -> None:
    """By the record that the old destination has of an arrival that is over."""
    a, b = old_pair
    name, _, there, _ = await moving(old_pair, "postcopy", keepSource=True)
    record = a.state / f"{name}.json"
    granted = record.read_bytes()
    await status_until(a, name, lambda status: status["phase"] == "drained")
    a.end(signal.SIGKILL)
    record.write_bytes(granted)
    await upgraded(a, b, by=signal.SIGKILL)
    for host in old_pair:
        await status_until(host, name, lambda status: status["phase"] == "drained")
    await verified(there)


async def test_an_intent_is_all_that_is_left(old_pair: Pair) -> None:
    """The host was restarted, with this version: it says where the guest may be, and asks there."""
    a, b = old_pair
    name, here, _, _ = await moving(old_pair, "postcopy")
    a.end(signal.SIGKILL)
    here.kill()
    for record in a.state.glob("*.json"):
        record.unlink()
    await upgraded(a)
    await status_until(a, name, lambda s: f"{b.address} says: {name} runs here" in s["message"])
    code, _, error = await cli("may-run", name, "--control", a.control)
    assert (code, b.address in error) == (1, True)


@asynccontextmanager
async def qemu_at_work(
    folder: Path, boot: tuple[Path, Path], **config: Any
) -> AsyncIterator[QemuPair]:
    """A guest in QEMU that writes to its memory, and a QEMU that waits."""
    work = q.Workload(test_mb=64, rate=2000)
    config |= {"qemu": QEMUS[0], "memory": 256 * MIB, "workload": work}
    async with qemu_pair(folder, boot, **config) as it:
        await it.boot()
        await it.wait_for_it()
        yield it


@pytest.mark.parametrize("which", ["source", "destination", "both"])
async def test_while_memory_of_a_qemu_follows(
    folder: Path, boot: tuple[Path, Path], which: str
) -> None:
    """And nothing of the old daemon is left in a QEMU: the guest goes back. As it has a disk, which
    that version does not compare, not before both are new."""
    image = folder / "disk"
    image.write_bytes(bytes(16 * MIB))
    async with qemu_at_work(folder, boot, disk=image) as it:
        await it.begin("postcopy", RATE)
        await upgraded(*chosen(it, which), by=signal.SIGKILL)
        for host in it.hosts:
            await status_until(host, VM, lambda status: status["phase"] == "drained", 60)
        await it.check()
        it.moves += 1
        await it.wait_for_it()
        if which != "both":
            refused = await it.here.migrate(VM, it.there)
            assert "is too old to" in refused["error"]
            await upgraded(*it.hosts)
        await it.move(mode="hybrid")


@pytest.mark.parametrize("which", ["source", "destination"])
async def test_a_qemu_with_a_peer_of_the_version_before(
    folder: Path, boot: tuple[Path, Path], which: str
) -> None:
    """That version saves the device state in another way: it is refused in words, and both QEMUs
    are as they were."""
    async with qemu_at_work(folder, boot) as it:
        await upgraded(*chosen(it, which))
        refused = await it.here.migrate(VM, it.there)
        assert "device state (one version of postcopyd on both hosts" in refused["error"]
        await upgraded(*(host for host in it.hosts if host not in chosen(it, which)))
        await it.move(mode="hybrid")


async def test_a_qemu_that_the_version_before_has_stopped(
    folder: Path, boot: tuple[Path, Path]
) -> None:
    """That version left nothing in QEMU that says so. Its record does: the guest runs on here."""
    hook = folder / "hook"
    async with qemu_pair(folder, boot, qemu=QEMUS[0], memory=256 * MIB) as it:
        a, b = it.hosts
        assert b.process is not None
        # Nobody answers once the device state has gone.
        hook.write_text(
            f'#!/bin/sh\n[ "$2 $3" != "source handover" ] || kill -STOP {b.process.pid}\n'
        )
        hook.chmod(0o755)
        a.end()
        a.options = ("--hooks-dir", str(folder))
        await a.start()
        it.config = dataclasses.replace(it.config, second_qmp=folder / "own")
        await it.boot()
        await it.wait_for_it(second_qmp=None)
        await a.call("Migrate", name=VM, to=b.address, mode="postcopy")
        monitor = Qmp(str(folder / "own"))
        try:
            while (await monitor.execute("query-status"))["status"] != "postmigrate":
                await trio.sleep(0.01)
            await upgraded(a, by=signal.SIGKILL)
            status = await status_until(a, VM, lambda status: status["phase"] == "failed")
            assert "is at this host as it was" in status["message"]
            assert (await monitor.execute("query-status"))["running"]
            parameters = await monitor.execute("query-migrate-parameters")
            assert parameters["max-bandwidth"] == 128 * MIB
            assert not parameters.get("tls-creds")
        finally:
            monitor.close()
            b.process.send_signal(signal.SIGCONT)
        await it.check()
        await status_until(b, VM, lambda status: status["phase"] == "failed")
        hook.unlink()
