# SPDX-License-Identifier: Apache-2.0
"""A daemon that has no descriptors left: what it cannot do now it names, or does later."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from pair import (
    MIB,
    SMALL,
    Host,
    Pair,
    again,
    arrived,
    connected,
    ended,
    following,
    until,
    verified,
    worked,
)

from postcopyd.varlink.client import Client, ErrorReply

FEW = 14
"""Enough to start with and to listen, and not for a guest."""


@contextmanager
def starved(host: Host, spare: int = 0) -> Iterator[None]:
    """The daemon may open so many descriptors more."""
    assert host.process is not None
    pid = host.process.pid
    taken = {int(number) for number in os.listdir(f"/proc/{pid}/fd")}
    limit = 0
    while limit in taken or spare > 0:
        spare -= limit not in taken
        limit += 1
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def cpu_s(host: Host) -> float:
    assert host.process is not None
    fields = Path(f"/proc/{host.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Asking:
    """A client that was there before: who comes later is not taken."""

    def __init__(self, host: Host) -> None:
        self._client = Client(host.control)
        self._client.call("io.postcopyd.List")  # it has been taken

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()

    async def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        def call() -> dict[str, Any]:
            return self._client.call(f"io.postcopyd.{method}", **parameters)

        with trio.fail_after(20):
            return await trio.to_thread.run_sync(call, abandon_on_cancel=True)

    async def phase(self, name: str, *phases: str) -> dict[str, Any]:
        with trio.fail_after(40):
            while True:
                status: dict[str, Any] = (await self("Status", name=name))["status"]
                if status["phase"] in phases:
                    return status
                await trio.sleep(0.01)


async def test_it_raises_its_limit(new_pair: Pair) -> None:
    """The soft limit that a shell or a unit gives is for programs that use select."""
    for host in new_pair:
        assert host.process is not None
        soft, hard = resource.prlimit(host.process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@pytest.mark.parametrize("which", ["source", "destination"])
@pytest.mark.parametrize("spare", range(0, 24, 3))
async def test_descriptors_run_out(new_pair: Pair, which: str, spare: int) -> None:
    """However many are left: the migration goes well, or the guest is at the source with a reason,
    or it is granted and goes on when there are some again. It is in one place in any case."""
    name, here, there = await new_pair.place()
    a, b = new_pair
    with Asking(a) as ask:
        with starved(a if which == "source" else b, spare):
            await ask("Migrate", name=name, to=b.address)
            status = await ask.phase(name, "drained", "failed", "paused")
        if status["phase"] == "paused":
            status = await ask.phase(name, "drained", "failed")
    for host in new_pair:
        assert " bug " not in host.log.read_text(), host.log.read_text()
    if status["phase"] == "drained":
        await ended(here)
        await verified(there)
        return
    if which == "source":
        assert "Too many open files" in status["message"], status
    await worked(here, 100)
    await verified(here)
    if there.process.poll() is None:
        there.kill()
    await until(lambda: there.process.poll() is not None, "its end")
    await again(new_pair, name)


@pytest.mark.parametrize("which", ["source", "destination"])
async def test_descriptors_run_out_after_the_grant(new_pair: Pair, which: str) -> None:
    """A pause, with the reason, that ends by itself; the daemon neither dies nor spins."""
    a, b = new_pair
    name, here, there = await following(new_pair, 16 * MIB)
    poor, other = (a, b) if which == "source" else (b, a)
    with Asking(poor) as ask:
        other.end()
        await ask.phase(name, "paused")
        with starved(poor):
            await other.start()
            waiting = [await connected(poor) for _ in range(20)]
            before = cpu_s(poor)
            await trio.sleep(2)
            assert cpu_s(poor) - before < 0.5
            status = await ask.phase(name, "paused")
            if which == "source":
                assert "Too many open files" in status["message"], status
            assert "nothing left" in poor.log.read_text()
    for stream in waiting:
        await stream.aclose()
    await arrived(new_pair, name, here, there)


async def test_control_clients_wait_for_descriptors(new_pair: Pair) -> None:
    """Whoever asks meanwhile is answered later, and what cannot be opened is named."""
    _, host = new_pair
    guest = new_pair.guest(*SMALL)
    with Asking(host) as ask, starved(host):
        with pytest.raises(ErrorReply) as refused:
            await ask("Attach", name="late", driver="process", socket=str(guest.path))
        assert "nothing left" in refused.value.parameters["message"]
        late = Client(host.control)
    with trio.fail_after(10), late:
        assert await trio.to_thread.run_sync(lambda: late.call("io.postcopyd.List")) == {"vms": []}
    await host.attach("late", "process", guest.path)


async def test_too_few_descriptors_to_start_with(
    new_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that cannot get its guest's userfaultfd serves all the same; the guest waits."""
    _, b = new_pair
    name, here, there = await following(new_pair, 16 * MIB)
    b.end(signal.SIGKILL)
    few = tmp_path / "python"
    few.write_text(f'#!/bin/sh\nulimit -n {FEW}\nexec {sys.executable} "$@"\n')
    few.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr(b, "program", (str(few), "-m", "postcopyd"))
        await b.start()
    await until(lambda: "VM not restored" in b.log.read_text(), "an attempt")
    assert "Too many open files" in b.log.read_text()
    assert (await b.status(name))["phase"] == "paused"
    b.end()
    await b.start()
    await arrived(new_pair, name, here, there)
