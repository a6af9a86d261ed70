# SPDX-License-Identifier: Apache-2.0
"""Real guests of QEMU that are ended at their destination while their memory follows."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from guests import qemu as q
from pair import status_until
from qemu_pair import MIB, VM, QemuPair, own_monitor, qemu_pair
from qemus import EACH_QEMU, QEMUS

from postcopyd.vmm.qemu.qmp import Qmp, QmpClosed

End = Callable[[Qmp, q.QemuProcess], Awaitable[None]]


async def power_off(qmp: Qmp, qemu: q.QemuProcess) -> None:
    """What a guest does last in `poweroff`, by ACPI: S5 to PM1a_CNT of q35."""
    await qmp.execute("human-monitor-command", {"command-line": "o/h 0x604 0x2000"})


async def reset(qmp: Qmp, qemu: q.QemuProcess) -> None:
    """A QEMU with -no-reboot ends by it."""
    await qmp.execute("system_reset")


async def quit_it(qmp: Qmp, qemu: q.QemuProcess) -> None:
    await qmp.execute("quit")


async def terminate(qmp: Qmp, qemu: q.QemuProcess) -> None:
    qemu.process.send_signal(signal.SIGTERM)


@asynccontextmanager
async def following(
    folder: Path, boot: tuple[Path, Path], qemu: q.QemuBinary
) -> AsyncIterator[tuple[QemuPair, q.QemuProcess, q.QemuProcess, Qmp, str]]:
    """A guest that runs at its destination, with seconds to go until its memory is there."""
    monitor = folder / "own.qmp"
    async with qemu_pair(folder, boot, qemu=qemu, memory=256 * MIB) as it:
        here = await it.boot()
        there = await it.wait_for_it(second_qmp=monitor)
        migration = await it.begin("postcopy", 8 * MIB)
        async with own_monitor(monitor) as qmp:
            yield it, here, there, qmp, migration


ENDS = [(qemu, end) for qemu in QEMUS for end in (terminate, power_off)]
ENDS += [(QEMUS[-1], end) for end in (reset, quit_it)]


@pytest.mark.parametrize(
    ("qemu", "end"),
    [
        pytest.param(qemu, end, id=f"{qemu}-{end.__name__}", marks=[pytest.mark.long] * (n > 0))
        for n, (qemu, end) in enumerate(ENDS)
    ],
)
async def test_guest_is_ended(
    folder: Path, boot: tuple[Path, Path], qemu: q.QemuBinary, end: End
) -> None:
    """Both hosts settle by themselves, and each may start the guest again."""
    async with following(folder, boot, qemu) as (it, here, there, qmp, migration):
        with suppress(QmpClosed):
            await end(qmp, there)
        with trio.fail_after(30):
            result = await it.here.result(VM, migration)
            assert result["event"] == "ended", it.there.log.read_text()[:9000]
            await here.wait()
            await there.wait()
            await status_until(it.there, VM, lambda status: status["phase"] == "failed")
        for host in (it.here, it.there):
            assert not list(host.state.glob("*.intent"))
            status = await host.status(VM)
            assert "was ended there" in status["message"] or "has ended here" in status["message"]
        # And so it is, at once.
        again = await it.guest.launch(dataclasses.replace(it.config, name="qemu9"))
        await it.here.attach(VM, "qemu", again.qmp_path)


@EACH_QEMU
@pytest.mark.long
async def test_guest_that_stays(folder: Path, boot: tuple[Path, Path], qemu: q.QemuBinary) -> None:
    """With -no-shutdown, as libvirt has it, a guest that has shut down is there still, and may be
    reset: all of its memory comes."""
    stays = dataclasses.replace(qemu, options=(*qemu.options, "-no-shutdown"))
    async with following(folder, boot, stays) as (it, here, _, qmp, migration):
        await power_off(qmp, here)
        with trio.fail_after(120):
            result = await it.here.result(VM, migration)
        assert result["event"] == "completed", result
        assert (await qmp.execute("query-status"))["status"] == "shutdown"
        assert (await it.there.status(VM))["phase"] == "drained"
