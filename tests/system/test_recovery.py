# SPDX-License-Identifier: Apache-2.0
"""After the grant: connections that break and daemons that are killed; the guest arrives whole."""

from __future__ import annotations

import signal

import pytest
import trio
from pair import (
    MIB,
    Host,
    Pair,
    arrived,
    cli,
    ended,
    following,
    state,
    status_until,
    verified,
    worked,
)
from test_cut_connections import wire

from postcopyd.errors import PostcopydError

RATE = 16 * MIB


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("which", ["source", "destination", "both"])
async def test_daemon_ends_while_memory_follows(new_pair: Pair, which: str, number: int) -> None:
    """The guest at most waits; the daemons that are started again bring the rest by themselves."""
    a, b = new_pair
    name, here, there = await following(new_pair, RATE)
    ends: list[Host] = {"source": [a], "destination": [b], "both": [a, b]}[which]
    for host in ends:
        host.end(number)
    for host in ends:
        await host.start()
    await arrived(new_pair, name, here, there)
    result = (await a.status(name))["result"]
    assert result["event"] == "completed"
    assert result["recoveries"] >= 1
    assert result["downtimeMs"] > 0
    assert 0 <= result["brownoutMs"] < 60_000


async def test_connections_break_again_and_again(pair: Pair) -> None:
    """Every recovery begins with what the destination confirms, and the last one ends it."""
    a, b = pair
    async with wire(b) as one:
        name, here, there = await following(pair, RATE, one.address)
        for _ in range(5):
            one.cut()
            await status_until(a, name, lambda status: status["phase"] == "paused")
            await status_until(a, name, lambda status: status["phase"] == "postcopy")
        await arrived(pair, name, here, there)
        result = (await a.status(name))["result"]
        assert result["recoveries"] == 5
        # What was confirmed did not cross again: the cuts cost what was under way.
        assert result["transferredBytes"] < 64 * MIB * 1.5


async def test_resolve_when_the_source_is_gone_for_good(new_pair: Pair) -> None:
    """Missing pages become memory errors, and never zeros; the source's half can only be ended."""
    a, b = new_pair
    name, here, there = await following(new_pair, RATE)
    a.end(signal.SIGKILL)
    await status_until(b, name, lambda status: status["phase"] == "paused")
    await b.call("Resolve", name=name, decision="wait")
    with pytest.raises(PostcopydError, match="for the host it left"):
        await b.call("Resolve", name=name, decision="take_back")
    # This guest has no handler and ends at the first one, so it is held until that was looked at.
    there.process.send_signal(signal.SIGSTOP)
    await b.call("Resolve", name=name, decision="poison")
    assert "memory error" in (await b.status(name))["message"]
    there.process.send_signal(signal.SIGCONT)
    await ended(there)
    assert there.process.returncode == -signal.SIGBUS
    await a.start()
    await status_until(a, name, lambda status: status["phase"] == "paused")
    with pytest.raises(PostcopydError, match="not missing here"):
        await a.call("Resolve", name=name, decision="poison")
    await a.call("Resolve", name=name, decision="kill")
    await ended(here)
    assert (await a.status(name))["phase"] == "failed"


@pytest.mark.parametrize("by_itself", [False, True])
async def test_given_up_at_the_destination(new_pair: Pair, by_itself: bool) -> None:
    """The source is told so, asks no more, and runs nothing until a person says so there too."""
    a, b = new_pair
    name, here, there = await following(new_pair, RATE)
    a.end(signal.SIGKILL)
    await status_until(b, name, lambda status: status["phase"] == "paused")
    if by_itself:
        there.kill()
        await status_until(b, name, lambda status: "has ended" in status["message"])
    await b.call("Resolve", name=name, decision="kill")
    assert await state(there) == "ended"
    for restarted in (a, b, a):
        await trio.to_thread.run_sync(restarted.end)
        await restarted.start()
    status = await status_until(a, name, lambda status: "given" in status["message"])
    assert (status["phase"], status["result"]["event"]) == ("paused", "paused")
    assert await state(here) == "paused"
    async with trio.open_nursery() as nursery:  # nobody dials: somebody else may have the port
        await trio.to_thread.run_sync(b.end)
        dialled = trio.Event()

        async def peer(stream: trio.SocketStream) -> None:
            dialled.set()

        port = int(b.address.rpartition(":")[2])
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, peer, listeners)
        with trio.move_on_after(6):
            await dialled.wait()
        assert not dialled.is_set()
        await a.call("Recover", name=name)
        with trio.fail_after(5):
            await dialled.wait()
        nursery.cancel_scope.cancel()
    await b.start()
    await status_until(a, name, lambda status: "given" in status["message"])
    assert await state(here) == "paused"
    await a.call("Resolve", name=name, decision="take_back")
    await worked(here, 100)
    await verified(here)


async def test_resolve_when_the_destination_is_dead_for_certain(new_pair: Pair) -> None:
    """A person says so: the guest runs here again, from the moment it was stopped."""
    a, b = new_pair
    name, here, there = await following(new_pair, RATE)
    b.end(signal.SIGKILL)
    there.kill()
    await status_until(a, name, lambda status: status["phase"] == "paused")
    assert await state(here) == "paused"
    await a.call("Resolve", name=name, decision="take_back")
    await worked(here, 100)
    await verified(here)
    status = await a.status(name)
    assert (status["phase"], status["result"]["event"]) == ("failed", "failed")
    await b.start()
    await status_until(b, name, lambda status: "has ended" in status["message"])


async def test_a_source_that_has_rebooted_asks_and_starts_nothing(new_pair: Pair) -> None:
    """All that outlives a host is the intent: the daemon says where the guest may be."""
    a, b = new_pair
    name, here, there = await following(new_pair, RATE)
    a.end(signal.SIGKILL)
    here.kill()
    for record in a.state.glob("*.json"):  # tmpfs
        record.unlink()
    await a.start()
    status = await status_until(a, name, lambda status: "says:" in status["message"])
    assert status["phase"] == "paused"
    assert f"{b.address} says: {name} runs here" in status["message"]
    with pytest.raises(PostcopydError, match="cannot go on from here"):
        await a.call("Resolve", name=name, decision="take_back")
    code, _, error = await cli("may-run", name, "--control", a.control)
    assert code == 1 and b.address in error
    there.kill()


async def test_a_destination_that_could_not_go_on_is_started_again(new_pair: Pair) -> None:
    """What it lacked is there again: the source goes on without being told."""
    a, b = new_pair
    name, here, there = await following(new_pair, RATE)
    b.end(signal.SIGKILL)
    pages = b.state / f"{name}.pages"
    pages.rename(away := b.state / "away")
    await b.start()
    await status_until(a, name, lambda status: "at the destination" in status["message"])
    b.end(signal.SIGKILL)
    away.rename(pages)
    await b.start()
    await arrived(new_pair, name, here, there)
