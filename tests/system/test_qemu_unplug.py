# SPDX-License-Identifier: Apache-2.0
"""A DIMM of a real QEMU that is unplugged at the destination while its pages follow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import trio
from guests import qemu as q
from qemu_pair import MIB, VM, own_monitor, qemu_pair
from qemus import EACH_QEMU

DIMM = (
    *("-m", "slots=2,maxmem=1G"),
    *("-object", "memory-backend-file,id=mem1,size=128M,share=on,mem-path=/dev/shm"),
    *("-device", "pc-dimm,id=dimm1,memdev=mem1"),
)


@EACH_QEMU
async def test_dimm_is_unplugged(folder: Path, boot: tuple[Path, Path], qemu: q.QemuBinary) -> None:
    """The memory that the guest has left comes, and the migration ends."""
    qemu = dataclasses.replace(qemu, options=(*qemu.options, *DIMM))
    monitor = folder / "own.qmp"
    work = q.Workload(test_mb=64)
    async with qemu_pair(folder, boot, qemu=qemu, memory=256 * MIB, workload=work) as it:
        await it.boot()
        await it.wait_for_it(second_qmp=monitor)
        migration = await it.begin("postcopy", 16 * MIB)
        async with own_monitor(monitor) as qmp:

            async def outb(line: str) -> None:
                await qmp.execute("human-monitor-command", {"command-line": line})

            # What a guest does to eject memory, by the registers of ACPI memory hotplug: slot 0.
            await outb("o/w 0xa00 0")
            await outb("o/b 0xa14 8")
            with trio.fail_after(30):
                while await qmp.execute("query-memory-devices"):
                    await outb("o/w 0xa00 0")
                    await outb("o/b 0xa14 8")
                    await trio.sleep(0.05)
            assert (await it.here.status(VM))["phase"] in ("postcopy", "paused")
            await qmp.execute("object-del", {"id": "mem1"})
        with trio.fail_after(120):
            result = await it.here.result(VM, migration)
        assert result["event"] == "completed", result
        assert result["recoveries"] <= 2
        assert (await it.there.status(VM))["phase"] == "drained"
