# SPDX-License-Identifier: Apache-2.0
"""Migrations that fail: before the grant the guest runs on at the source, after it it waits."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from guests.process import ProcessGuest
from pair import (
    MIB,
    SMALL,
    Pair,
    again,
    completed,
    ended,
    hung,
    misbehaving,
    status_until,
    unmoved,
    until,
    verified,
    worked,
)

from postcopyd.demo.hosts import PACKAGE
from postcopyd.errors import PostcopydError
from postcopyd.sessions import hooks

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
    a, _ = pair
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
    await status_until(b, name, lambda status: status["phase"] == "failed")
    await again(pair, name)


# --- VMMs that fail


async def another_attempt(pair: Pair, name: str, there: ProcessGuest, spent: bool) -> None:
    """A second attempt goes well. A VMM that is spent (it had begun to load) has ended first."""
    if spent:
        await ended(there)
    await again(pair, name, None if spent else there)


@pytest.mark.parametrize(
    ("side", "fault", "why"),
    [
        ("source", "refuse:regions", "refuse regions"),
        ("source", "refuse:stop", "refuse stop"),
        ("source", "refuse:save", "refuse save"),
        ("destination", "refuse:facts", "refuse facts"),
        ("destination", "refuse:discard", "refuse discard"),
        ("destination", "refuse:userfaultfd", "refuse userfaultfd"),
        ("destination", "exit:discard", "closed the connection|ended"),
        ("destination", "exit:userfaultfd", "closed the connection|ended"),
        ("destination", "refuse:load", "refuse load"),
        ("destination", "exit:load", "closed the connection|ended"),
        ("destination", "refuse:run", "refuse run"),
    ],
)
async def test_vmm_fails(pair: Pair, side: str, fault: str, why: str) -> None:
    """A VMM that refuses or ends before the guest runs there leaves it running at the source."""
    options = {"here" if side == "source" else "there": misbehaving(side, fault)}
    name, here, there = await pair.place(*SMALL, **options)
    a, b = pair
    result = await a.migrate(name, b)
    await unmoved(a, name, here, result, why)
    how, verb = fault.split(":")
    spent = how == "exit" or verb in ("stop", "save", "load", "run")
    await another_attempt(pair, name, there, spent)


async def test_destination_vmm_is_killed_while_it_waits(pair: Pair) -> None:
    """A VMM that is gone before the migration began is told of, on both hosts."""
    name, here, there = await pair.place()
    a, b = pair
    there.kill()
    await unmoved(a, name, here, await a.migrate(name, b), "gone")
    await again(pair, name)


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
    await another_attempt(pair, name, there, spent=verb in ("stop", "save", "load"))


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


async def test_guest_shuts_down_while_its_memory_follows(pair: Pair) -> None:
    """A VMM that says so ends the migration for both hosts, as a QEMU does: either may start the
    guest again."""
    name, here, there = await pair.place("--memory", "32M", "--rate", "2000")
    a, b = pair
    started = await a.call("Migrate", name=name, to=b.address, mode="postcopy", bandwidth=MIB)
    await status_until(b, name, lambda status: status["phase"] == "postcopy")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(there.path))
        client.sendall(b"shutdown\n")
    result = await a.result(name, started["migration"])
    assert (result["event"], "its guest shut down" in result["error"]) == ("ended", True)
    await ended(here)
    status = await status_until(b, name, lambda status: status["phase"] == "failed")
    assert "its guest shut down; it may be started again" in status["message"]


async def test_vmm_is_killed_during_load(pair: Pair) -> None:
    """A destination VMM that is killed with half of the device state gives the guest back."""
    name, here, there, migration = await hung(pair, "destination", "load")
    a, _ = pair
    there.kill()
    await unmoved(a, name, here, await a.result(name, migration), "ended|closed the connection")
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
    vmm = pair.folder / f"{name}.vmm"
    attach = f"{sys.executable} -m postcopyd attach {name} --process {vmm} --control {b.control}"
    pair.hook(
        name,
        "destination",
        "prepare",
        f"cd {PACKAGE.parent}\n"
        f"{ProcessGuest.program} --socket {vmm} {' '.join(SMALL)} --incoming > /dev/null &\n"
        f"echo $! > {vmm}.pid\n"
        f"until {attach} >&2; do sleep 0.1; done",
    )
    try:
        completed(await a.migrate(name, b))
        await ended(here)
        assert (await b.status(name))["phase"] == "drained"
    finally:
        os.kill(int(Path(f"{vmm}.pid").read_text()), signal.SIGKILL)


async def test_hook_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that does not end is killed, which is a veto where there is one."""
    monkeypatch.setattr(hooks, "HOOK_S", 0.3)
    hook = tmp_path / "hook"
    hook.write_text("#!/bin/sh\nexec sleep 60\n")
    hook.chmod(0o755)
    with pytest.raises(hooks.HookVeto, match="did not end within"):
        await hooks.run_hooks(tmp_path, "vm", "source", "prepare")
    await hooks.run_hooks(tmp_path, "vm", "source", "drained")
