# SPDX-License-Identifier: Apache-2.0
"""A guest in QEMU that proves its memory, and the two daemons that move it."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from guests import qemu as q
from pair import MIB, status_until

from postcopyd.demo.hosts import Host, open_hosts
from postcopyd.vmm.qemu.qmp import Qmp

__all__ = ["MIB", "VM", "QemuPair", "own_monitor", "qemu_pair"]

VM = "guest"


class QemuPair:
    """Two daemons and one guest; the guest's QEMUs are named by where they run."""

    def __init__(self, hosts: list[Host], guest: q.Guest, config: q.GuestConfig) -> None:
        self.hosts = hosts
        self.guest = guest
        self.config = config
        self.moves = 0

    @property
    def here(self) -> Host:
        return self.hosts[self.moves % 2]

    @property
    def there(self) -> Host:
        return self.hosts[(self.moves + 1) % 2]

    async def boot(self) -> q.QemuProcess:
        """The guest at the first host, attached and at work."""
        qemu = await self.guest.launch(dataclasses.replace(self.config, name="qemu0"))
        await self.here.attach(VM, "qemu", qemu.qmp_path)
        await self.guest.ready()
        return qemu

    async def wait_for_it(self, **changes: Any) -> q.QemuProcess:
        """A QEMU at the other host that waits for the guest."""
        config = dataclasses.replace(
            self.config, name=f"qemu{self.moves + 1}", incoming=True, **changes
        )
        qemu = await self.guest.launch(config)
        await self.there.attach(VM, "qemu", qemu.qmp_path)
        return qemu

    async def move(self, **options: Any) -> dict[str, Any]:
        """Moves the guest and has it check all of its memory. Returns the result."""
        before = await self.guest.report()
        result = await self.here.migrate(VM, self.there, **{"mode": "postcopy", **options})
        assert result["event"] == "completed", result
        self.moves += 1
        after = await self.guest.report()
        while after.operations <= before.operations:
            after = await self.guest.report(after)
        await self.check()
        return result

    async def begin(self, phase: str, bandwidth: int) -> str:
        """Begins a migration with little bandwidth and comes to where memory crosses: before the
        handover in phase precopy, after it in phase postcopy. Returns the migration."""
        mode = "hybrid" if phase == "precopy" else phase
        started = await self.here.call(
            "Migrate", name=VM, to=self.there.address, mode=mode, bandwidth=bandwidth
        )
        for host in self.hosts if phase == "postcopy" else [self.here]:
            await status_until(host, VM, lambda status: status["phase"] == phase, 60)
        return str(started["migration"])

    async def check(self) -> None:
        """Every page of the guest is right, and was all the time."""
        sweep = await self.guest.sweep()
        report = await self.guest.report()
        wrong = (sweep.bad, report.bad, report.disk_bad, report.net_bad)
        assert wrong == (0, 0, 0, 0), self.guest.bad


@asynccontextmanager
async def qemu_pair(
    folder: Path, boot: tuple[Path, Path], **config: Any
) -> AsyncIterator[QemuPair]:
    kernel, initramfs = boot
    made = q.GuestConfig(kernel=kernel, initramfs=initramfs, **config)
    async with open_hosts(folder) as hosts, q.Guest.open(folder) as guest:
        yield QemuPair(hosts, guest, made)


@asynccontextmanager
async def own_monitor(path: Path) -> AsyncIterator[Qmp]:
    qmp = Qmp(str(path))
    await qmp.open()
    try:
        yield qmp
    finally:
        qmp.close()
