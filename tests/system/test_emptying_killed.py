# SPDX-License-Identifier: Apache-2.0
"""Private guest RAM is emptied by calls within QEMU: whoever has them made may be killed then."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import trio
from guests import qemu as q
from pair import MIB, status_until, until
from qemu_pair import VM, own_monitor, qemu_pair
from qemus import EACH_QEMU
from test_adopt import Programs, built, programs

from postcopyd.host import procfs
from postcopyd.vmm.qemu.qmp import Qmp

__all__ = ["built", "programs"]  # fixtures
pytestmark = [pytest.mark.trio, pytest.mark.long]

SYS_MADVISE, MADV_DONTNEED = 28, 4
RAM, PAGES = 256 * MIB, 256 * MIB // 4096
PLAIN = {"memory": RAM, "ram_kind": "plain", "vcpus": 1}


async def guest_ram(qmp: Qmp) -> int:
    """Where it is in QEMU."""
    words = {"command-line": f"gpa2hva {MIB:#x}"}
    said = str(await qmp.execute("human-monitor-command", words))
    return int(said.rsplit(maxsplit=1)[-1], 16) - MIB


def here(pid: int, start: int) -> int:
    """Pages of guest RAM that are there."""
    with open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        pagemap.seek(start // 4096 * 8)
        entries = memoryview(pagemap.read(PAGES * 8)).cast("Q")
    return sum(entry >> 63 for entry in entries)


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def fill(pid: int, start: int) -> None:
    """As prealloc=on has it. Nobody may wait for its pages."""
    memory, piece = os.open(f"/proc/{pid}/mem", os.O_WRONLY), bytes(16 * MIB)
    try:
        for at in range(0, RAM, len(piece)):
            assert os.pwrite(memory, piece, start + at) == len(piece)
    finally:
        os.close(memory)


@EACH_QEMU
async def test_a_tracer_killed_within_the_call(
    qemu: q.QemuBinary, programs: Programs, folder: Path, boot: tuple[Path, Path]
) -> None:
    """QEMU goes on as it was, untraced, and the next call empties all."""
    monitor, times = folder / "own", random.Random(1)
    kernel, initramfs = boot
    config = q.GuestConfig(
        kernel=kernel, initramfs=initramfs, qemu=qemu, name="waits", incoming=True,
        second_qmp=monitor, **PLAIN,
    )  # fmt: skip
    async with q.Guest.open(folder) as guest:
        pid = (await guest.launch(config)).pid
        begun = killed = 0
        async with own_monitor(monitor) as qmp:
            start = await guest_ram(qmp)
            words = ("--allow-seccomp", "--timeout", 5000, pid, "call")
            words += (SYS_MADVISE, start, RAM, MADV_DONTNEED)
            for turn in range(14):
                await trio.to_thread.run_sync(fill, pid, start)
                full = resident(pid)
                tracer = programs.start(programs.folder / "adopt_test", *map(str, words))
                while turn % 2 and tracer.poll() is None and resident(pid) > full - PAGES // 4:
                    await trio.sleep(0)  # until it is within the call
                if not turn % 2:
                    await trio.sleep(times.uniform(0, 0.02))
                tracer.kill()
                killed += tracer.wait() == -signal.SIGKILL
                await until(lambda: procfs.status(pid)["TracerPid"] == "0", "an untraced QEMU")
                begun += here(pid, start) < PAGES
                assert (await qmp.execute("query-status"))["status"] == "inmigrate"
            assert killed and begun >= 7
            assert programs.call(*words)["result"] == 0
            assert here(pid, start) == 0
            assert (await qmp.execute("query-status"))["status"] == "inmigrate"


@EACH_QEMU
async def test_a_daemon_killed_while_it_adopts(
    qemu: q.QemuBinary, folder: Path, boot: tuple[Path, Path]
) -> None:
    """The guest runs on at the source, and the next daemon takes it with the same QEMU."""
    times = random.Random(2)
    async with qemu_pair(folder, boot, qemu=qemu, **PLAIN) as it:
        await it.boot()
        there = await it.wait_for_it(second_qmp=folder / "own")
        async with own_monitor(folder / "own") as qmp:
            start = await guest_ram(qmp)
        record = it.there.state / f"{VM}.json"
        found = []
        for turn in range(6):
            await trio.to_thread.run_sync(fill, there.pid, start)
            before, full = await it.guest.report(), resident(there.pid)
            started = await it.here.call("Migrate", name=VM, to=it.there.address)
            with trio.fail_after(30):
                while b'"arriving"' not in record.read_bytes():
                    await trio.sleep(0)
                while turn % 2 and resident(there.pid) > full - PAGES // 4:
                    await trio.sleep(0)  # until it is within the call
            if not turn % 2:
                await trio.sleep(times.uniform(0, 0.3))
            it.there.end(signal.SIGKILL)
            result = await it.here.result(VM, started["migration"])
            assert result["event"] == "failed", result
            found.append(here(there.pid, start))
            await it.there.start()
            await status_until(it.there, VM, lambda status: status["phase"] == "failed")
            assert (await it.guest.report(before)).qemu == "qemu0"
        print("pages left", found)
        assert min(found) < PAGES
        await it.move(mode="hybrid")
        assert it.guest.bad == []
