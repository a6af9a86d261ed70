# SPDX-License-Identifier: Apache-2.0
"""Ways to move a running QEMU guest: by two daemons, by QEMU itself, and with nothing to move but
the devices.

Owns what is specific to each; all give the same `Move`. The guest's second monitor is ours: there
STOP and RESUME are seen, by QEMU's own time stamps, for all ways alike.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import trio
from guests import qemu as q
from qemus import newest

from postcopyd.demo.hosts import Host
from postcopyd.vmm.qemu.qmp import Events, Qmp

MIB = 1 << 20
UNLIMITED = 1 << 40
SECONDS = 120.0


@dataclass
class Move:
    """One migration. Times are seconds of `trio.current_time`."""

    begin: float
    """When it was asked for."""
    stop: float
    """QMP event STOP at the source, by QEMU's time stamp."""
    resume: float
    """QMP event RESUME at the destination."""
    drained: float
    """When the destination had all memory."""
    sent: int
    """Bytes that crossed."""
    pages: int
    """Pages that had to: not zeros. 0 where nobody counts them."""
    about: dict[str, Any] = field(default_factory=dict)
    """Statistics of its own."""


class Mover(Protocol):
    async def __call__(self, leaving: Qemu, arriving: Qemu) -> Move: ...


@dataclass
class Qemu:
    """A QEMU and our own monitor of it."""

    process: q.QemuProcess
    monitor: Qmp


def guest_config(folder: Path, **more: Any) -> q.GuestConfig:
    """The verifying guest, in the newest QEMU of this machine; its initramfs is made in `folder`.

    Raises q.MissingPartError where this machine lacks a part of it.
    """
    kernel, initramfs = q.boot(folder)
    return q.GuestConfig(qemu=newest(), kernel=kernel, initramfs=initramfs, **more)


@asynccontextmanager
async def started(
    guest: q.Guest, config: q.GuestConfig, name: str, **more: Any
) -> AsyncIterator[Qemu]:
    """A QEMU, for the guest or waiting for it, killed in the end."""
    monitor = guest.folder / f"{name}.own"
    monitor.unlink(missing_ok=True)
    made = dataclasses.replace(config, name=name, second_qmp=monitor, **more)
    qemu = Qemu(await guest.launch(made), Qmp(str(monitor)))
    try:
        await qemu.monitor.open()
        yield qemu
    finally:
        qemu.monitor.close()
        qemu.process.kill()
        with trio.CancelScope(shield=True):
            await qemu.process.wait()


async def _at(events: Events) -> float:
    """When the next event was, by QEMU's time stamp, as seconds of `trio.current_time`."""
    with trio.fail_after(SECONDS):
        stamp = (await events.next())["timestamp"]
    then: float = stamp["seconds"] + stamp["microseconds"] / 1e6
    return then - time.time() + trio.current_time()


async def _capabilities(monitor: Qmp, names: tuple[str, ...], state: bool) -> None:
    capabilities = [{"capability": name, "state": state} for name in ("events", *names)]
    await monitor.execute("migrate-set-capabilities", {"capabilities": capabilities})


ABOUT = ("downtimePartsMs", "memory", "faults", "brownoutMs", "passes", "handedOver", "tracking")
"""What is kept of a result of ours."""


class Daemons:
    """By two postcopyd: the daemons stay, each move attaches both QEMUs anew."""

    def __init__(self, hosts: list[Host], name: str = "guest", mode: str = "postcopy") -> None:
        self.source, self.destination = hosts
        self.mode = mode
        self.name = name

    async def __call__(self, leaving: Qemu, arriving: Qemu) -> Move:
        await self.source.attach(self.name, "qemu", leaving.process.qmp_path)
        await self.destination.attach(self.name, "qemu", arriving.process.qmp_path)
        with leaving.monitor.events("STOP") as stops, arriving.monitor.events("RESUME") as resumes:
            begin = trio.current_time()
            result = await self.source.migrate(self.name, self.destination, mode=self.mode)
            drained = trio.current_time()
            if result["event"] != "completed":
                raise SystemExit(f"the migration ended as {result['event']}: {result.get('error')}")
            if "warning" in result:  # it was not moved as it was to be
                raise SystemExit(f"the migration by {self.mode}: {result['warning']}")
            move = Move(
                begin, await _at(stops), await _at(resumes), drained, result["transferredBytes"],
                result["memory"]["pages"] - result["memory"]["zeroPages"],
                {k: result[k] for k in ABOUT if k in result},
            )  # fmt: skip
        for host in (self.source, self.destination):
            await host.call("Detach", name=self.name)
        return move


async def unmoved() -> Move:
    """Not at all: what a guest loses by itself, from a moment that is as good as any."""
    now = trio.current_time()
    return Move(now, now, now, now, 0, 0)


class Own:
    """By QEMU itself over loopback TCP, with these capabilities; `then` is sent `after_s` seconds
    after `migrate`."""

    def __init__(
        self, capabilities: tuple[str, ...], then: str | None, after_s: float = 0.0
    ) -> None:
        self.capabilities = capabilities
        self.then = then
        self.after_s = after_s

    async def __call__(self, leaving: Qemu, arriving: Qemu) -> Move:
        parameters = {"max-bandwidth": UNLIMITED, "max-postcopy-bandwidth": 0}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            uri = f"tcp:127.0.0.1:{probe.getsockname()[1]}"
        out, back = leaving.monitor, arriving.monitor
        for monitor in (out, back):
            await _capabilities(monitor, self.capabilities, True)
            await monitor.execute("migrate-set-parameters", parameters)
        await back.execute("cont")  # while it waits: run as soon as it can, as without -S
        with (
            out.events("STOP") as stops,
            back.events("RESUME") as resumes,
            back.events("MIGRATION") as steps,
        ):
            await back.execute("migrate-incoming", {"uri": uri})
            begin = trio.current_time()
            await out.execute("migrate", {"uri": uri})
            await trio.sleep(self.after_s)
            if self.then:  # of no effect where all was moved before
                await out.execute(self.then)
            seen = ""
            with trio.fail_after(SECONDS):
                while (status := (await steps.next())["data"]["status"]) != "completed":
                    seen = status
                    if status == "failed":
                        raise SystemExit("QEMU's own migration failed")
            drained = trio.current_time()
            stop, resume = await _at(stops), await _at(resumes)
        # The source says so a little later; until then its figures are not the last ones.
        with trio.fail_after(SECONDS):
            while (sent := await out.execute("query-migrate"))["status"] != "completed":
                await trio.sleep(0.01)
        received = await back.execute("query-migrate")
        await _capabilities(back, self.capabilities, False)  # the next move may be by daemons
        ram: Mapping[str, Any] = sent["ram"]
        about = {k: v for k, v in received.items() if k.startswith("postcopy-")}
        about |= {k: ram[k] for k in ("normal", "duplicate", "postcopy-requests") if k in ram}
        about["ended"] = seen  # its state before it was complete: "postcopy-active", "active"
        return Move(begin, stop, resume, drained, ram["transferred"], ram["normal"], about)


def postcopy(after_s: float = 0.0) -> Own:
    """QEMU's postcopy with preempt, switched to after so long a precopy."""
    return Own(("postcopy-ram", "postcopy-preempt"), "migrate-start-postcopy", after_s)


def devices_only() -> Own:
    """For two QEMUs that map one RAM file: all memory is there at once. No move of this guest can
    cost less."""
    return Own(("x-ignore-shared",), None)
