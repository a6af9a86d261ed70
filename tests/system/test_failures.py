# SPDX-License-Identifier: Apache-2.0
"""Migrations that fail: before the grant the guest runs on at the source, after it it waits."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from pair import (
    MIB,
    SMALL,
    Host,
    Pair,
    ProcessGuest,
    cli,
    command,
    completed,
    ended,
    open_pair,
    status_until,
    unmoved,
    until,
    verified,
    worked,
)

from postcopyd import hooks
from postcopyd import protocol as p
from postcopyd.errors import PostcopydError


@pytest.fixture(scope="module")
def daemons() -> Iterator[Pair]:
    """Two for most tests here: what a failure leaves behind, others meet."""
    with open_pair() as pair:
        yield pair


@pytest.fixture
def pair(daemons: Pair) -> Iterator[Pair]:
    yield daemons
    daemons.end_guests()


@pytest.fixture
def new_pair() -> Iterator[Pair]:
    """For tests that kill daemons."""
    with open_pair() as pair:
        yield pair


async def again(pair: Pair, name: str, there: ProcessGuest | None = None) -> None:
    """A second attempt goes well: with the VMM that waits at the destination, or a new one."""
    a, b = pair
    if there is None:
        there = pair.guest(*SMALL, "--incoming")
        await pair.attach(b, name, there)
    completed(await a.migrate(name, b))
    await verified(there)
    await worked(there, 100)


# --- what the daemons refuse


@pytest.mark.parametrize(
    ("there", "why"),
    [
        (("--memory", "32M", "--incoming"), "guest RAM differs"),
        (("--memory", "16M", "--regions", "2", "--incoming"), "guest RAM differs"),
        (("--memory", "16M", "--threads", "3", "--incoming"), "cpu differs"),
        (("--memory", "16M"), "has a guest already"),
        (None, "no VM"),
    ],
)
async def test_refused(pair: Pair, there: tuple[str, ...] | None, why: str) -> None:
    """A destination that does not fit is refused, by `check` and by `migrate`, and left alone."""
    name, (a, b) = pair.name(), pair
    here = await pair.attach(a, name, pair.guest(*SMALL))
    other = await pair.attach(b, name, pair.guest(*there)) if there is not None else None
    problems = (await a.call("Check", name=name, to=b.address))["problems"]
    assert any(why in problem for problem in problems), problems
    assert (await a.status(name))["phase"] == "idle"
    before = await b.status(name) if other else None
    await unmoved(a, name, here, await a.migrate(name, b), why)
    if other:
        assert await b.status(name) == before
        if "--incoming" not in (there or ()):
            await worked(other)
            await verified(other)
        await b.call("Detach", name=name)
    await again(pair, name)


async def test_check_touches_nothing(pair: Pair) -> None:
    """A migration that would go is not begun by `check`, and what stands in its way is told."""
    name, here, there = await pair.place()
    a, b = pair
    for _ in range(3):
        assert (await a.call("Check", name=name, to=b.address))["problems"] == []
    assert [(await host.status(name))["phase"] for host in pair] == ["idle", "idle"]
    problems = (await b.call("Check", name=name, to=a.address))["problems"]
    assert any("has no guest" in problem for problem in problems)
    problems = (await a.call("Check", name=name, to="127.0.0.1:1"))["problems"]
    assert any("port 1" in problem for problem in problems)
    assert pair.hooks_run(name) == []
    await worked(here)
    await again(pair, name, there)


async def test_nobody_listens(pair: Pair) -> None:
    """A destination that cannot be reached is named, with what to do."""
    name, here, there = await pair.place()
    a, b = pair
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        to = f"127.0.0.1:{silent.getsockname()[1]}"
        started = await a.call("Migrate", name=name, to=to)
        result = await a.result(name, started["migration"])
        await unmoved(a, name, here, result, "is `postcopyd serve` running there")
    await again(pair, name, there)


async def test_attach_and_detach(pair: Pair) -> None:
    """A VM is attached once, is not let go of during a migration, and again when its VMM ended."""
    name, here, there = await pair.place()
    a, b = pair
    with pytest.raises(PostcopydError, match="attached already"):
        await a.attach(name, "process", here.path)
    with pytest.raises(PostcopydError, match="start the VMM"):
        await a.attach(pair.name(), "process", pair.folder / "nobody")
    pair.hook(name, "source", "handover", "sleep 60")
    started = await a.call("Migrate", name=name, to=b.address)
    await until(lambda: "source handover" in pair.hooks_run(name), "the hook")
    for host in pair:
        with pytest.raises(PostcopydError, match="is in migration"):
            await host.call("Detach", name=name)
        with pytest.raises(PostcopydError, match="already"):
            await host.attach(name, "process", here.path)
    with pytest.raises(PostcopydError, match="already"):
        await a.call("Migrate", name=name, to=b.address)
    with pytest.raises(PostcopydError, match="cancel it at its source"):
        await b.call("Cancel", name=name)
    await a.call("Cancel", name=name)
    await a.result(name, started["migration"])
    pair.unhook(name)
    there.kill()
    await status_until(b, name, lambda status: "has ended" in status["message"])
    await again(pair, name)


# --- VMMs that fail


@pytest.mark.parametrize(
    ("side", "fault", "why"),
    [
        ("source", "refuse:regions", "refuse regions"),
        ("source", "refuse:stop", "refuse stop"),
        ("source", "refuse:save", "refuse save"),
        ("destination", "refuse:facts", "refuse facts"),
        ("destination", "refuse:discard", "refuse discard"),
        ("destination", "refuse:userfaultfd", "refuse userfaultfd"),
        ("destination", "exit:discard", "ended"),
        ("destination", "exit:userfaultfd", "ended"),
        ("destination", "refuse:load", "refuse load"),
        ("destination", "exit:load", "ended"),
        ("destination", "refuse:run", "refuse run"),
    ],
)
async def test_vmm_fails(pair: Pair, side: str, fault: str, why: str) -> None:
    """A VMM that refuses or ends before the guest runs there leaves it running at the source."""
    options = {"here" if side == "source" else "there": ("--misbehave", fault)}
    name, here, there = await pair.place(*SMALL, **options)
    a, b = pair
    result = await a.migrate(name, b)
    await unmoved(a, name, here, result, why)
    if side == "destination" and (
        fault.startswith("exit") or fault.split(":")[1] in ("load", "run")
    ):
        await ended(there)
        await again(pair, name)
    else:
        await again(pair, name, there)


async def test_destination_vmm_is_killed_while_it_waits(pair: Pair) -> None:
    """A VMM that is gone before the migration began is told of, on both hosts."""
    name, here, there = await pair.place()
    a, b = pair
    there.kill()
    await unmoved(a, name, here, await a.migrate(name, b), "gone")
    await again(pair, name)


async def hung(pair: Pair, side: str, verb: str) -> tuple[str, ProcessGuest, ProcessGuest, str]:
    """A migration that has come to where a VMM does not answer."""
    options = {"here" if side == "source" else "there": ("--misbehave", f"hang:{verb}")}
    name, here, there = await pair.place(*SMALL, **options)
    a, b = pair
    started = await a.call("Migrate", name=name, to=b.address)
    if verb in ("load", "save"):
        await status_until(a, name, lambda status: status["phase"] == "handover")
        await until(lambda: here.report()["state"] == "paused", "the guest's stop")
    else:
        await trio.sleep(0.2)
    return name, here, there, started["migration"]


@pytest.mark.parametrize(
    ("side", "verb"),
    [
        ("source", "stop"),
        ("source", "save"),
        ("destination", "facts"),
        ("destination", "userfaultfd"),
        ("destination", "load"),
    ],
)
async def test_cancel(pair: Pair, side: str, verb: str) -> None:
    """Until the grant a migration can be called off, wherever it is, and leaves nothing behind."""
    name, here, there, migration = await hung(pair, side, verb)
    a, b = pair
    await a.call("Cancel", name=name)
    began = time.monotonic()
    await unmoved(a, name, here, await a.result(name, migration), "cancelled by request")
    assert time.monotonic() - began < 5
    if verb in ("load", "save"):
        status = await status_until(b, name, lambda status: status["phase"] == "failed")
        assert "cancelled by request" in status["message"]
    if verb == "load" or there.process.poll() is not None:
        await ended(there)
        await again(pair, name)
    elif verb == "save":  # it had begun to load what was to come
        await ended(there)
        await again(pair, name)
    else:
        await again(pair, name, there)


async def test_cancel_in_hooks(pair: Pair) -> None:
    """A hook that takes long is ended by a cancel."""
    for role, phase in (("source", "prepare"), ("source", "handover"), ("destination", "prepare")):
        name, here, there = await pair.place()
        a, b = pair
        pair.hook(name, role, phase, "exec sleep 60")
        started = await a.call("Migrate", name=name, to=b.address)
        await until(lambda name=name, of=f"{role} {phase}": of in pair.hooks_run(name), "a hook")
        await a.call("Cancel", name=name)
        await unmoved(
            a, name, here, await a.result(name, started["migration"]), "cancelled by request"
        )
        pair.unhook(name)
        await again(pair, name, there)


async def test_cancel_after_the_grant(pair: Pair) -> None:
    """A guest that was granted cannot be taken back, and the migration goes on."""
    name, here, there = await pair.place("--memory", "32M", "--rate", "2000")
    a, b = pair
    started = await a.call("Migrate", name=name, to=b.address, bandwidth=8 * MIB)
    await status_until(a, name, lambda status: status["phase"] == "postcopy")
    with pytest.raises(PostcopydError, match="granted") as refused:
        await a.call("Cancel", name=name)
    assert refused.value.name == "AfterGrant"
    completed(await a.result(name, started["migration"]))
    await verified(there)
    await ended(here)


async def test_vmm_is_killed_during_load(pair: Pair) -> None:
    """A destination VMM that is killed with half of the device state gives the guest back."""
    name, here, there, migration = await hung(pair, "destination", "load")
    a, _ = pair
    there.kill()
    await unmoved(a, name, here, await a.result(name, migration), "ended")
    await again(pair, name)


# --- hooks


@pytest.mark.parametrize(
    ("role", "phase"),
    [("source", "prepare"), ("source", "handover"), ("destination", "prepare")],
)
async def test_hook_veto(pair: Pair, role: str, phase: str) -> None:
    """A hook that fails before the stop keeps the guest where it is, with the hook's words."""
    name, here, there = await pair.place()
    a, b = pair
    pair.hook(name, role, phase, "echo the network says no >&2; exit 3")
    await unmoved(a, name, here, await a.migrate(name, b), "the network says no")
    assert pair.hooks_run(name)[-1].endswith("failed") or role == "destination"
    pair.unhook(name)
    await again(pair, name, there)
    await until(lambda: pair.hooks_run(name).count("source drained"), "the last hooks")
    phases = pair.hooks_run(name)[-6:]
    assert [run for run in phases if run.startswith("source")][-3:] == [
        "source prepare",
        "source handover",
        "source drained",
    ]


async def test_hook_makes_the_destination(pair: Pair) -> None:
    """The hook `prepare` at the destination may start the VMM and attach it."""
    name, (a, b) = pair.name(), pair
    here = await pair.attach(a, name, pair.guest(*SMALL))
    python, (demo, control, vmm) = Path("/proc/self/exe").resolve(), _of_hook(pair, b, name)
    words = f"{demo} --socket {vmm} {' '.join(SMALL)} --incoming --misbehave exit:release"
    pair.hook(
        name,
        "destination",
        "prepare",
        f"cd {Path(hooks.__file__).parent.parent}\n{words} >/dev/null & sleep 0.5\n"
        f"{python} -m postcopyd attach {name} --process {vmm} --control {control} >&2",
    )
    completed(await a.migrate(name, b))
    await ended(here)
    assert pair.hooks_run(name).count("destination prepare") == 1


def _of_hook(pair: Pair, host: Host, name: str) -> tuple[Path, str, Path]:
    from postcopyd.demo.hosts import executable

    return executable(), host.control, pair.folder / f"{name}.vmm"


async def test_hook_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that does not end is killed, which is a veto where there is one."""
    monkeypatch.setattr(hooks, "HOOK_S", 0.3)
    hook = tmp_path / "hook"
    hook.write_text("#!/bin/sh\nexec sleep 60\n")
    hook.chmod(0o755)
    with pytest.raises(hooks.HookVeto, match="did not end within"):
        await hooks.run_hooks(tmp_path, "vm", "source", "prepare")
    await hooks.run_hooks(tmp_path, "vm", "source", "drained")


# --- daemons that end


async def test_destination_daemon_is_killed_before_the_grant(new_pair: Pair) -> None:
    """The guest is back within seconds when the destination's daemon dies during load."""
    name, here, _, migration = await hung(new_pair, "destination", "load")
    a, b = new_pair
    b.end(signal.SIGKILL)
    began = time.monotonic()
    await unmoved(a, name, here, await a.result(name, migration), "closed the connection")
    assert time.monotonic() - began < 5
    await b.start()
    name, here, there = await new_pair.place()
    await again(new_pair, name, there)


async def test_daemon_is_stopped_before_the_grant(new_pair: Pair) -> None:
    """SIGTERM to either daemon before the grant gives the guest back first."""
    for side in (0, 1):
        name, here, there, _ = await hung(new_pair, "destination", "load")
        host = new_pair.hosts[side]
        await trio.to_thread.run_sync(host.end)
        await worked(here)
        await verified(here)
        await ended(there)
        await host.start()
        here.kill()


async def waiting(pair: Pair) -> tuple[str, ProcessGuest, ProcessGuest]:
    """A guest that runs at the destination, most of its memory still at the source."""
    name, here, there = await pair.place("--memory", "64M", "--threads", "4", "--rate", "2000")
    a, b = pair
    await until(lambda: here.report()["sweeps"] > 0, "a guest without zero pages", 60)
    await a.call("Migrate", name=name, to=b.address, bandwidth=MIB)
    for host in pair:
        await status_until(host, name, lambda status: status["phase"] == "postcopy")
    return name, here, there


async def test_source_daemon_is_killed_after_the_grant(new_pair: Pair) -> None:
    """The guest waits at the destination and never sees a page of zeros; nothing runs it twice."""
    name, here, there = await waiting(new_pair)
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
    name, here, there = await waiting(new_pair)
    a, b = new_pair
    b.end(signal.SIGKILL)
    status = await status_until(a, name, lambda status: status["phase"] == "paused", 5)
    assert "must not run" in status["message"]
    assert status["result"]["event"] == "paused"
    assert (await trio.to_thread.run_sync(here.report))["state"] == "paused"
    assert (await cli("migrate", name, "--to", b.address, "--control", a.control))[0] == 1
    with pytest.raises(PostcopydError):
        await a.call("Detach", name=name)
    report = await trio.to_thread.run_sync(there.report)
    assert (report["state"], report["bad"]) == ("running", 0)


async def test_exit_status_of_a_paused_migration(new_pair: Pair) -> None:
    """`migrate` ends with 3 when the guest is at the destination and waits."""
    name, here, _ = await new_pair.place("--memory", "64M", "--threads", "4", "--rate", "2000")
    a, b = new_pair
    await until(lambda: here.report()["sweeps"] > 0, "a guest without zero pages", 60)
    ends: list[tuple[int, list[str], str]] = []

    async def migrate() -> None:
        words = ("migrate", name, "--to", b.address, "--bandwidth", "1M", "--json")
        ends.append(await cli(*words, "--control", a.control))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(migrate)
        await status_until(b, name, lambda status: status["phase"] == "postcopy")
        await trio.sleep(0.3)
        b.end(signal.SIGKILL)
    status, _, error = ends[0]
    assert status == 3 and "recover" in error


# --- peers that are none


HELLO = p.pack(p.Hello(version=p.VERSION, software="a test", host="test"))
KIND = {kind: bytes([0xA0 | len(kind)]) + kind.encode() for kind in (p.CONTROL, p.DATA)}


async def connected(host: Host) -> trio.SocketStream:
    address, port = host.address.rsplit(":", 1)
    return await trio.open_tcp_stream(address, int(port))


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
    newer = p.pack(p.Hello(version=p.VERSION + 1, software="a test", host="test"))
    token = p.pack(p.DataHello(migration=started["migration"], token=bytes(32), urgent=True))
    other = p.pack(p.DataHello(migration="none", token=bytes(32), urgent=True))
    peers = {
        b"GET / HTTP/1.1\r\n\r\n": b"",
        bytes(64): b"",
        b"\xff" * 5000: b"",
        KIND[p.CONTROL] + b"\xc1" * 100: b"msgpack",
        KIND[p.CONTROL] + HELLO + b"\xc1": b"msgpack",
        KIND[p.CONTROL]
        + HELLO
        + p.pack(p.Drained(0, 0, 0, 0, 0, 0, 0, 0.0, p.Faults())): b"not possible",
        KIND[p.CONTROL] + HELLO + b"\xdb\xff\xff\xff\xff" + b"x" * 3_000_000: b"",
        KIND[p.CONTROL] + newer: b"upgrade",
        KIND[p.DATA] + token: b"",
        KIND[p.DATA] + other: b"",
        KIND[p.DATA] + b"\x00" * 100: b"",
    }
    for sends, answers in peers.items():
        async with await connected(b) as stream:
            try:
                await stream.send_all(sends)
            except trio.BrokenResourceError:
                pass  # it has heard enough
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
        try:
            await stream.send_all(KIND[p.CONTROL])
        except trio.BrokenResourceError:
            pass
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
                await stream.send_all(p.pack(p.Hello(version=9, software="x", host="new")))
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


Step = Callable[[], Awaitable[Any]]
