# SPDX-License-Identifier: Apache-2.0
"""Many guests at once, on a host that is slow because of them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import trio
import trio.testing

from postcopyd.vmm import VmmTimeout
from postcopyd.vmm.qemu.driver import QemuVmm
from postcopyd.vmm.qemu.qmp import Qmp


async def test_forty_looks_at_once(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A look costs a second of this host's one core, which forty guests share: each waits for its
    turn for as long as it takes, and none is taken for stuck."""
    core = trio.CapacityLimiter(1)

    async def look(vmm: QemuVmm, role: str) -> str:
        for _ in range(10):
            async with core:
                await trio.sleep(0.1)
        return vmm.name

    monkeypatch.setattr(QemuVmm, "_inspect", look)
    seen: list[Any] = []
    async with trio.open_nursery() as nursery:
        for n in range(40):
            vmm = QemuVmm(f"web{n}", "/run/q", Qmp("/run/q"), os.getpid(), -1)

            async def inspect(vmm: QemuVmm = vmm) -> None:
                seen.append(await vmm.inspect("source"))

            nursery.start_soon(inspect)
    assert len(seen) == 40
    assert trio.current_time() >= 39


async def test_a_stuck_one_keeps_the_others_waiting_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A QEMU that answers nothing is given up, and the turn is another's."""

    async def look(vmm: QemuVmm, role: str) -> str:
        await trio.sleep_forever()
        return vmm.name

    monkeypatch.setattr(QemuVmm, "_inspect", look)

    async def inspect(n: int) -> None:
        vmm = QemuVmm(f"web{n}", "/run/q", Qmp("/run/q"), os.getpid(), -1)
        with pytest.raises(VmmTimeout, match=f"The QEMU of web{n} did not answer for"):
            await vmm.inspect("source")

    async with trio.open_nursery() as nursery:
        for n in range(8):
            nursery.start_soon(inspect, n)
