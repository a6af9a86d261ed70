# SPDX-License-Identifier: Apache-2.0
"""Daemons, connections and VMMs that are lost in the middle: the guest is in one place only.

Before the grant it runs on at the source; after it it waits at the destination and sees no wrong
page. And peers that are no postcopyd harm nobody but themselves.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import pytest
import trio
import trio.testing
from pair import (
    HELLO,
    KIND,
    LARGE,
    MIB,
    SMALL,
    Pair,
    again,
    cli,
    completed,
    connected,
    ended,
    filled,
    following,
    hung,
    state,
    status_until,
    unmoved,
    verified,
    worked,
)

from postcopyd import protocol as p
from postcopyd.errors import PostcopydError
from postcopyd.net.codec import pack
from postcopyd.vmm.process.driver import ProcessVmm

# --- daemons that end


async def test_destination_daemon_is_killed_before_the_grant(new_pair: Pair) -> None:
    """The guest is back within seconds when the destination's daemon dies during load."""
    name, here, _, migration = await hung(new_pair, "destination", "load")
    a, b = new_pair
    b.end(signal.SIGKILL)
    began = time.monotonic()
    await unmoved(a, name, here, await a.result(name, migration), "closed|reset")
    assert time.monotonic() - began < 5
    await b.start()
    name, here, there = await new_pair.place()
    await again(new_pair, name, there)


async def test_daemon_is_stopped_before_the_grant(new_pair: Pair) -> None:
    """SIGTERM to either daemon before the grant gives the guest back first."""
    for side in (0, 1):
        _, here, there, _ = await hung(new_pair, "destination", "load")
        host = new_pair.hosts[side]
        await trio.to_thread.run_sync(host.end)
        await worked(here)
        await verified(here)
        await ended(there)
        await host.start()
        here.kill()


async def test_source_daemon_is_killed_after_the_grant(new_pair: Pair) -> None:
    """The guest waits at the destination and never sees a page of zeros; nothing runs it twice."""
    name, here, there = await following(new_pair)
    a, b = new_pair
    a.end(signal.SIGKILL)
    status = await status_until(b, name, lambda status: status["phase"] == "paused", 5)
    assert "waits for pages" in status["message"] and status["remaining"] > 0
    await trio.sleep(1)
    report = await trio.to_thread.run_sync(there.report)
    assert (report["state"], report["bad"]) == ("running", 0)
    assert report["gapUs"] > 500_000
    assert (await trio.to_thread.run_sync(here.report))["state"] == "paused"
    for refused in ("Detach", "Cancel"):
        with pytest.raises(PostcopydError):
            await b.call(refused, name=name)
    with pytest.raises(PostcopydError, match="not at its end"):
        await b.call("Migrate", name=name, to=b.address)
    assert (await trio.to_thread.run_sync(there.report))["bad"] == 0
    there.kill()
    await status_until(b, name, lambda status: "has ended" in status["message"])


async def test_connections_are_cut_after_the_grant(new_pair: Pair) -> None:
    """When the destination's daemon dies the source keeps its copy, stopped, and says so."""
    name, here, there = await following(new_pair)
    a, b = new_pair
    b.end(signal.SIGKILL)
    status = await status_until(a, name, lambda status: status["phase"] == "paused", 5)
    assert "keep this VMM as it is" in status["message"]
    # Who waits for the migration is told once that is not over in a moment.
    status = await status_until(a, name, lambda status: status.get("result"))
    assert status["result"]["event"] == "paused"
    assert (await trio.to_thread.run_sync(here.report))["state"] == "paused"
    assert (await cli("migrate", name, "--to", b.address, "--control", a.control))[0] == 1
    with pytest.raises(PostcopydError):
        await a.call("Detach", name=name)
    report = await trio.to_thread.run_sync(there.report)
    assert (report["state"], report["bad"]) == ("running", 0)


async def test_exit_status_of_a_paused_migration(new_pair: Pair) -> None:
    """`migrate` ends with 3 when the guest is at the destination and waits."""
    name, here, _ = await new_pair.place(*LARGE)
    a, b = new_pair
    await filled(here)
    ends: list[tuple[int, list[str], str]] = []

    async def migrate() -> None:
        words = (
            "migrate",
            name,
            "--to",
            b.address,
            "--bandwidth",
            "1M",
            "--json",
            "--mode",
            "postcopy",
        )
        ends.append(await cli(*words, "--control", a.control))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(migrate)
        await status_until(b, name, lambda status: status["phase"] == "postcopy")
        await trio.sleep(0.3)
        b.end(signal.SIGKILL)
    status, _, error = ends[0]
    assert status == 3 and "recover" in error


# --- peers that are none


async def said(stream: trio.SocketStream) -> bytes:
    """All that the daemon says until it closes the connection."""
    answer = b""
    with trio.fail_after(15):
        try:
            while more := await stream.receive_some():
                answer += more
        except trio.BrokenResourceError:
            pass
    return answer


async def test_peers_that_break_the_rules(pair: Pair) -> None:
    """Garbage, wrong versions and tokens end their own connection; a migration goes on beside."""
    name, _, there = await pair.place("--memory", "32M", "--rate", "2000")
    a, b = pair
    started = await a.call("Migrate", name=name, to=b.address, bandwidth=8 * MIB)
    await status_until(b, name, lambda status: status["phase"] == "postcopy")
    newer = pack(p.Hello(version=p.VERSION + 1, software="a test", host="test"))
    late = pack(p.Drained(0, 0, 0, 0, 0, 0, 0, 0.0, p.Faults()))
    token = pack(p.DataHello(migration=started["migration"], token=bytes(32), urgent=True))
    other = pack(p.DataHello(migration="none", token=bytes(32), urgent=True))
    peers = {
        b"GET / HTTP/1.1\r\n\r\n": b"",
        bytes(64): b"",
        b"\xff" * 5000: b"",
        KIND[p.CONTROL] + b"\xc1" * 100: b"msgpack",
        KIND[p.CONTROL] + HELLO + b"\xc1": b"msgpack",
        KIND[p.CONTROL] + HELLO + late: b"not possible",
        KIND[p.CONTROL] + HELLO + b"\xdb\xff\xff\xff\xff" + b"x" * 3_000_000: b"",
        KIND[p.CONTROL] + newer: b"upgrade",
        KIND[p.DATA] + token: b"",
        KIND[p.DATA] + other: b"",
        KIND[p.DATA] + b"\x00" * 100: b"",
    }
    for sends, answers in peers.items():
        async with await connected(b) as stream:
            with suppress(trio.BrokenResourceError):  # it may have heard enough
                await stream.send_all(sends)
            assert answers in await said(stream)
    completed(await a.result(name, started["migration"]))
    await verified(there)


async def test_flood_of_connections(pair: Pair) -> None:
    """Connections without number harm neither a migration that is under way nor those after it."""
    name, _, there = await pair.place("--memory", "32M", "--rate", "2000")
    a, b = pair
    started = await a.call("Migrate", name=name, to=b.address, bandwidth=8 * MIB)
    await status_until(b, name, lambda status: status["phase"] == "postcopy")
    flood = [await connected(b) for _ in range(400)]
    for stream in flood[::2]:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(KIND[p.CONTROL])
    completed(await a.result(name, started["migration"]))
    await verified(there)
    for stream in flood:
        await stream.aclose()
    name, _, there = await pair.place()
    await again(pair, name, there)


@pytest.mark.parametrize("sends", [b"", b"\xc1", b"SSH-2.0-OpenSSH_9.2\r\n", "newer", "silent"])
async def test_source_of_strange_destinations(pair: Pair, sends: bytes | str) -> None:
    """What answers at the destination's address and is no postcopyd leaves the guest running."""
    name, here, _ = await pair.place()
    a, _ = pair

    async def strange(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(100)
            if sends == "newer":
                await stream.send_all(pack(p.Hello(version=9, software="x", host="new")))
                await stream.receive_some(4000)
            elif sends == "silent":
                await trio.sleep_forever()
            else:
                assert isinstance(sends, bytes)
                await stream.send_all(sends or HELLO)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, strange, listeners)
        to = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        started = await a.call("Migrate", name=name, to=to)
        if sends == "silent":
            await a.call("Cancel", name=name)
        result = await a.result(name, started["migration"])
        nursery.cancel_scope.cancel()
    why = {"newer": "upgrade this host's postcopyd", "silent": "cancelled by request"}
    await unmoved(a, name, here, result, why.get(str(sends), "127.0.0.1"))


# --- VMMs that end


async def test_vmm_ends_when_told_to_run(pair: Pair) -> None:
    """Whether a vCPU ran is not known: the guest is not run again at the source."""
    name, here, there = await pair.place(*SMALL, there=("--misbehave", "exit:run"))
    a, b = pair
    result = await a.migrate(name, b)
    assert result["event"] == "paused"
    assert await state(here) == "paused"
    await ended(there)
    await status_until(b, name, lambda status: "ended" in status["message"])


async def test_destination_vmm_is_killed_after_the_grant(pair: Pair) -> None:
    """A guest that has run at the destination and is killed there does not start anew elsewhere."""
    name, here, there = await following(pair)
    a, b = pair
    there.kill()
    await status_until(a, name, lambda status: status["phase"] == "paused")
    await status_until(b, name, lambda status: "ended" in status["message"])
    assert await state(here) == "paused"


async def test_source_vmm_is_killed_after_the_grant(pair: Pair) -> None:
    """RAM in a shared file outlives the source's VMM: the migration goes on."""
    name, here, there = await pair.place(*LARGE)
    a, b = pair
    started = await a.call("Migrate", name=name, to=b.address, bandwidth=16 * MIB)
    await status_until(a, name, lambda status: status["phase"] == "postcopy")
    here.kill()
    completed(await a.result(name, started["migration"]))
    await verified(there)


async def test_end_of_a_vmm_is_not_anothers(pair: Pair) -> None:
    """Who has stopped waiting for a VMM's end leaves nothing that its end would wake."""
    guest = pair.guest(*SMALL)
    vmm = await ProcessVmm.connect("vm", str(guest.path))
    woken = False

    async def wait(pipe: int) -> None:
        nonlocal woken
        await trio.lowlevel.wait_readable(pipe)
        woken = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(vmm.gone)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    read_end, write_end = os.pipe()  # likely to get the number of the descriptor waited for
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, read_end)
        await trio.testing.wait_all_tasks_blocked()
        guest.kill()
        await vmm.gone()
        await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    assert not woken
    os.close(read_end)
    os.close(write_end)
    await vmm.aclose()


async def test_drained_stays(new_pair: Pair) -> None:
    """Both daemons remember a migration when they are started again, and go on from there."""
    name, _, there = await new_pair.place()
    a, b = new_pair
    result = await a.migrate(name, b)
    completed(result)
    for host in new_pair:
        await trio.to_thread.run_sync(host.end)
        await host.start()
        status = await host.status(name)
        assert (status["phase"], status["migration"]) == ("drained", result["migration"])
    assert (await a.status(name))["result"] == result
    back = await new_pair.attach(a, name, new_pair.guest(*SMALL, "--incoming"))
    completed(await b.migrate(name, a))
    await verified(back)
    await ended(there)
