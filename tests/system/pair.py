# SPDX-License-Identifier: Apache-2.0
"""A pair of daemons with process guests, for tests: who is where, and what must be true of them."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio
from guests.process import ProcessGuest

from postcopyd import protocol as p
from postcopyd.demo.hosts import PACKAGE, Host, certified
from postcopyd.net.codec import pack

SMALL = ("--memory", "16M", "--rate", "20000")
# So much, and so slowly used, that it is not all there before a test has looked.
LARGE = ("--memory", "64M", "--threads", "4", "--rate", "16000")
MIB = 1 << 20

# Each phase of each VM may have a script of its own, NAME.ROLE.PHASE beside this one.
HOOK = """#!/bin/sh
echo "$1 $2 $3" >> "${0%/*}/log"
script="${0%/*}/scripts/$1.$2.$3"
if [ -e "$script" ]; then . "$script"; fi
"""

# What a connection to a daemon begins with.
HELLO = pack(p.Hello(version=p.VERSION, software="a test", host="test"))
KIND = {kind: bytes([0xA0 | len(kind)]) + kind.encode() for kind in (p.CONTROL, p.DATA)}


class PostcopyHost(Host):
    """Migrates in the mode in which most can go wrong after the handover, unless told otherwise."""

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        if method == "Migrate":
            parameters.setdefault("mode", "postcopy")
        return await super().call(method, **parameters)


class Pair:
    """Two daemons (or more) and the guests that were started beside them."""

    def __init__(self, folder: Path, hosts: int, options: tuple[str, ...], tls: bool) -> None:
        self.folder = folder
        self.hooks = folder / "hooks"
        (self.hooks / "scripts").mkdir(parents=True)
        hook = self.hooks / "hook"
        hook.write_text(HOOK)
        hook.chmod(hook.stat().st_mode | stat.S_IXUSR)
        options = ("--hooks-dir", str(self.hooks), *options)
        self.hosts: list[Host] = [
            PostcopyHost(folder, name, options, certified(folder, name) if tls else None)
            for name in (f"host{i}" for i in range(hosts))
        ]
        self.guests: list[ProcessGuest] = []
        self._names = 0

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def name(self) -> str:
        """A VM's name that was not used yet."""
        self._names += 1
        return f"vm{self._names}"

    def hook(self, vm: str, role: str, phase: str, script: str) -> None:
        (self.hooks / "scripts" / f"{vm}.{role}.{phase}").write_text(script)

    def unhook(self, vm: str) -> None:
        for script in (self.hooks / "scripts").glob(f"{vm}.*"):
            script.unlink()

    def hooks_run(self, vm: str) -> list[str]:
        """ROLE PHASE of each hook that ran for a VM, in order."""
        log = self.hooks / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.removeprefix(f"{vm} ") for line in lines if line.startswith(f"{vm} ")]

    def guest(self, *options: str, program: Path | None = None) -> ProcessGuest:
        path = self.folder / f"guest{len(self.guests)}"
        self.guests.append(ProcessGuest(path, *options, program=program))
        return self.guests[-1]

    async def attach(self, host: Host, name: str, guest: ProcessGuest) -> ProcessGuest:
        await host.attach(name, "process", guest.path)
        return guest

    async def place(
        self,
        *options: str,
        there: tuple[str, ...] = (),
        here: tuple[str, ...] = (),
        name: str = "",
    ) -> tuple[str, ProcessGuest, ProcessGuest]:
        """A guest at the first host that has done something, and a VMM that waits at the second."""
        name, options = name or self.name(), options or SMALL
        a, b, *_ = self.hosts
        source = await self.attach(a, name, self.guest(*options, *here))
        destination = await self.attach(b, name, self.guest(*options, *there, "--incoming"))
        await worked(source)
        return name, source, destination

    def end_guests(self) -> None:
        for guest in self.guests:
            guest.kill()

    def end(self) -> None:
        self.end_guests()
        for host in self.hosts:
            host.end()
        for host in self.hosts:
            log = host.log.read_text()
            assert "Traceback" not in log, log[-8000:]


@contextmanager
def open_pair(*options: str, hosts: int = 2, tls: bool = False) -> Iterator[Pair]:
    """Not an asynchronous one, so that a module's tests can share it."""
    with tempfile.TemporaryDirectory(prefix="pcm") as name:
        pair = Pair(Path(name), hosts, options, tls)
        try:

            async def start() -> None:
                async with trio.open_nursery() as nursery:
                    for host in pair.hosts:
                        nursery.start_soon(host.start)

            trio.run(start)
            yield pair
        finally:
            pair.end()


@contextmanager
def one_at_a_time(setting: str) -> Iterator[None]:
    """For tests that change a setting of the whole machine, or fail where another test has."""
    with open(f"/run/lock/postcopyd-tests.{setting}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


async def until(condition: Callable[[], Any], what: str, seconds: float = 30) -> None:
    """Waits for what others do."""
    with trio.move_on_after(seconds):
        while not await trio.to_thread.run_sync(condition):
            await trio.sleep(0.01)
        return
    raise AssertionError(f"{what}: not within {seconds} s")


async def status_until(
    host: Host, name: str, condition: Callable[[dict[str, Any]], Any], seconds: float = 30
) -> dict[str, Any]:
    """Asks for the status until it is as wanted."""
    status: dict[str, Any] = {}
    with trio.move_on_after(seconds):
        while not condition(status := await host.status(name)):
            await trio.sleep(0.01)
        return status
    raise AssertionError(f"{name} did not get there within {seconds} s: {status}")


async def worked(guest: ProcessGuest, ops: int = 1000) -> None:
    """Returns when the guest has written `ops` more pages than it had."""
    report = await trio.to_thread.run_sync(guest.report)
    before = report["ops"]
    deadline = time.monotonic() + 20
    while report["ops"] < before + ops:
        assert time.monotonic() < deadline and report["state"] != "paused", report
        report = await trio.to_thread.run_sync(guest.report)


async def filled(guest: ProcessGuest) -> None:
    """Returns when the guest has written all of its memory: no page of it is zeros."""
    await until(lambda: guest.report()["sweeps"] > 0, "a guest without zero pages", 60)


async def verified(guest: ProcessGuest, pages: int | None = None) -> None:
    """The guest has checked all of its memory, and found it right."""
    with trio.fail_after(60):
        checked, bad = await trio.to_thread.run_sync(guest.verify, abandon_on_cancel=True)
    assert bad == 0
    assert checked == (pages or checked) > 0


def command(guest: ProcessGuest, verb: str) -> str:
    """The answer to a verb of the VMM's protocol; no daemon may drive the VMM."""
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(guest.path))
        with s.makefile("rw") as lines:
            for line in ("hello postcopyd 1", verb):
                lines.write(line + "\n")
                lines.flush()
                answer = lines.readline().strip()
    return answer


async def ended(guest: ProcessGuest) -> None:
    """The VMM's process ends by itself."""
    await until(lambda: guest.process.poll() is not None, "ending the VMM", 10)


def completed(
    result: dict[str, Any], memory: int | None = None, page: int = 4096, mode: str = "postcopy"
) -> None:
    """The result object of a migration that went well: every field, and sums that can be."""
    assert result["event"] == "completed", result.get("error")
    assert result["mode"] == mode
    assert result["recoveries"] == 0
    counts = result["memory"]
    total, pages = counts["totalBytes"], counts["pages"]
    assert total == (memory or total) == pages * page
    assert counts["pageSize"] == page
    sent = counts["pushedPages"] + counts["urgentPages"]
    before = counts["precopyPages"] + counts["dirtyPages"]
    if mode == "postcopy":
        assert (before, pages) == (0, counts["zeroPages"] + sent)
    else:
        assert pages <= counts["zeroPages"] + sent + counts["precopyPages"]
        assert counts["precopyPages"] * page <= result["transferredBytes"]
    twice = counts["duplicatePages"]  # an urgent page that was on its way already
    assert twice <= counts["urgentPages"] + counts["pushedPages"]
    # A page is pushed once at most, and sent once more at most when a fault has asked for it.
    most = (sent + before + twice + result["faults"]["count"]) * page + pages * 24 + 100_000
    assert sent * page <= result["transferredBytes"] < most
    assert result["bytesPerSecond"] > 0
    assert 0 < result["downtimeMs"] < result["totalMs"]
    assert 0 <= result["brownoutMs"] < result["totalMs"]
    faults = result["faults"]
    assert 0 <= faults["p50Us"] <= faults["p99Us"] <= faults["maxUs"] * 1.125 + 1
    assert all(int(bucket) & (int(bucket) - 1) == 0 for bucket in faults["histogramUs"])
    assert counts["urgentPages"] <= faults["count"] + 16


async def unmoved(
    host: Host, name: str, guest: ProcessGuest, result: dict[str, Any], why: str
) -> None:
    """The migration failed before the grant and said why; the guest runs on at the source.

    `why` may have alternatives, with | between, where two notice the same thing.
    """
    said = why.split("|")
    assert result["event"] == ("cancelled" if "cancelled" in why else "failed"), result
    assert any(word in result["error"] for word in said), result["error"]
    assert result["memory"]["pushedPages"] == 0
    status = await host.status(name)
    assert (status["role"], status["phase"]) == ("source", "failed")
    assert any(word in status["message"] for word in said), status["message"]
    await worked(guest, 100)
    await verified(guest)


async def again(pair: Pair, name: str, there: ProcessGuest | None = None) -> None:
    """A second attempt goes well: with the VMM that waits at the destination, or a new one."""
    a, b = pair
    if there is None:
        there = pair.guest(*SMALL, "--incoming")
        await pair.attach(b, name, there)
    completed(await a.migrate(name, b))
    await verified(there)
    await worked(there, 100)


def misbehaving(side: str, fault: str) -> tuple[str, str]:
    """Options of a VMM that does this in its migration: not already where `attach` looks at it,
    once at the source, and in either role at the destination."""
    looked = fault.partition(":")[2] in ("facts", "regions")
    looks = {"source": 1, "destination": 2}[side] if looked else 0
    return "--misbehave", f"{fault}@{looks + 1}"


async def hung(pair: Pair, side: str, verb: str) -> tuple[str, ProcessGuest, ProcessGuest, str]:
    """A migration that has come to where a VMM does not answer."""
    options = {"here" if side == "source" else "there": misbehaving(side, f"hang:{verb}")}
    name, here, there = await pair.place(*SMALL, **options)
    a, b = pair
    started = await a.call("Migrate", name=name, to=b.address)
    broken = here if side == "source" else there
    await until(lambda: broken.ask("misbehaved")["done"] == "1", f"coming to {verb}")
    return name, here, there, started["migration"]


async def following(
    pair: Pair, bandwidth: int = MIB, to: str | None = None
) -> tuple[str, ProcessGuest, ProcessGuest]:
    """A guest that runs at the destination, and whose memory follows at this rate."""
    name, here, there = await pair.place(*LARGE)
    a, b = pair
    await filled(here)
    await a.call("Migrate", name=name, to=to or b.address, bandwidth=bandwidth)
    for host in pair:
        await status_until(host, name, lambda status: status["phase"] == "postcopy")
    return name, here, there


async def arrived(pair: Pair, name: str, here: ProcessGuest, there: ProcessGuest) -> None:
    """Drained on both sides, every page right, the source's VMM ended as ever."""
    for host in pair:
        await status_until(host, name, lambda status: status["phase"] == "drained", 60)
    await worked(there, 100)
    await verified(there)
    await ended(here)


async def state(guest: ProcessGuest) -> str:
    """What the VMM says of itself, or ended."""
    if guest.process.poll() is not None:
        return "ended"
    report: dict[str, Any] = await trio.to_thread.run_sync(guest.report)
    assert report["bad"] == 0
    return str(report["state"])


async def connected(host: Host) -> trio.SocketStream:
    address, port = host.address.rsplit(":", 1)
    return await trio.open_tcp_stream(address, int(port))


async def cli(*words: str, **environment: str) -> tuple[int, list[str], str]:
    """Exit status, lines and errors of the real command line."""
    done = await trio.run_process(
        [sys.executable, "-m", "postcopyd", *words],
        cwd=PACKAGE.parent,
        env=os.environ | environment,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    return done.returncode, done.stdout.decode().splitlines(), done.stderr.decode()


def last_json(lines: list[str]) -> dict[str, Any]:
    objects = [json.loads(line) for line in lines]
    assert objects
    last: dict[str, Any] = objects[-1]
    return last
