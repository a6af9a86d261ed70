# SPDX-License-Identifier: Apache-2.0
"""A guest whose memory is swapped out at the source."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from guests import qemu as q
from needs import missing
from pair import MIB
from qemu_pair import VM, own_monitor, qemu_pair
from qemus import QEMUS
from test_any_guest import anonymous, chosen, sampled
from test_emptying_killed import guest_ram

from postcopyd.host import procfs

pytestmark = [pytest.mark.trio, pytest.mark.long]

SYS_PROCESS_MADVISE, MADV_PAGEOUT = 440, 21
RAM = 192 * MIB


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[None]:
    """Room for the guest, in a file on disk."""
    if os.geteuid() or not shutil.which("mkswap"):
        missing("root and mkswap, for a swap file")
    file = tmp_path / "swap"
    with file.open("wb") as zeros:
        for _ in range(2 * RAM // MIB):
            zeros.write(bytes(MIB))
    file.chmod(0o600)
    subprocess.run(["mkswap", "-q", file], check=True)
    if subprocess.run(["swapon", file], check=False).returncode:
        missing("a file system that can be swapped to")
    yield
    subprocess.run(["swapoff", file], check=True)


class Range(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("bytes", ctypes.c_size_t))


def page_out(pid: int, address: int) -> None:
    """All of the guest's RAM."""
    pidfd = os.pidfd_open(pid)
    libc = ctypes.CDLL(None, use_errno=True)
    given = ctypes.byref(Range(address, RAM))
    done = libc.syscall(SYS_PROCESS_MADVISE, pidfd, given, 1, MADV_PAGEOUT, 0)
    os.close(pidfd)
    assert done > 0, os.strerror(ctypes.get_errno())


def swapped(pid: int) -> int:
    return int(procfs.status(pid)["VmSwap"].split()[0]) << 10


@pytest.mark.parametrize("mode", ["hybrid", "postcopy"])
async def test_stays_there(mode: str, swap: None, folder: Path, boot: tuple[Path, Path]) -> None:
    """It crosses, and the host that it leaves has no more memory in use than before."""
    monitor, work = folder / "own", q.Workload(test_mb=96)
    config = chosen(QEMUS[-1], memory=RAM, workload=work, second_qmp=monitor)
    async with qemu_pair(folder, boot, **config) as it:
        pid = (await it.boot()).pid
        await it.guest.rate(0)
        async with own_monitor(monitor) as qmp:
            start = await guest_ram(qmp)
        await it.wait_for_it(second_qmp=folder / "other")
        page_out(pid, start)
        before = swapped(pid)
        assert before > 96 * MIB
        with sampled(lambda: anonymous(pid)) as used:
            result = await it.here.migrate(VM, it.there, mode=mode, keepSource=True)
        assert result["event"] == "completed", result
        it.moves += 1
        print(mode, before, swapped(pid), max(used) - used[0])
        assert max(used) - used[0] < before // 2
        await it.guest.rate(-1)
        await it.check()
