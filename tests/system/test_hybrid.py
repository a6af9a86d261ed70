# SPDX-License-Identifier: Apache-2.0
"""Real QEMU guests that are copied while they run: whatever they write, no old page is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from guests import qemu as q
from pair import until
from qemu_pair import MIB, VM, QemuPair, qemu_pair
from qemus import EACH_QEMU, QEMUS
from slow_disk import slow_disk

from postcopyd.host import procfs

# Write rates, operations a second on 4 KiB pages at random: from idle to beyond what the bandwidth
# carries, and then as fast as the guest can.
RATES = (0, 500, 4000, 20_000, -1)
BANDWIDTH = 96 * MIB  # 24,576 pages a second


def tracked(pid: int) -> list[str]:
    """What is left of tracking in a process: descriptors, and mappings with the flag of it."""
    left = [link for link in procfs.descriptors(pid).values() if "userfaultfd" in link]
    flags = Path(f"/proc/{pid}/smaps").read_text().split("VmFlags:")[1:]
    return left + [line for line in flags if " uw" in line.splitlines()[0]]


async def move(it: QemuPair, **options: Any) -> dict[str, Any]:
    """Moves the guest, which proves all of its memory then."""
    result = await it.here.migrate(VM, it.there, **options)
    assert result["event"] == "completed", result
    assert "warning" not in result
    it.moves += 1
    await it.check()
    return result


@pytest.mark.long
@pytest.mark.parametrize("vcpus", [1, 2])
async def test_ten_moves_at_every_write_rate(
    folder: Path, boot: tuple[Path, Path], vcpus: int, record_property: Any
) -> None:
    """Idle, and writing less, as much and far more than the link carries: never a bad page."""
    work = q.Workload(test_mb=96, rate=0)
    options = {"qemu": QEMUS[-1], "memory": 224 * MIB, "vcpus": vcpus, "workload": work}
    downtimes = []
    async with qemu_pair(folder, boot, **options) as it:
        await it.boot()
        for turn in range(10):
            await it.guest.rate(rate := RATES[turn % len(RATES)])
            await it.wait_for_it()
            result = await move(it, mode="hybrid", bandwidth=BANDWIDTH)
            downtimes.append((rate, result["downtimeMs"]))
            assert result["passes"]
            assert result["handedOver"]
            memory = result["memory"]
            # Each page was carried at least once, before the handover or after it, or is zeros.
            crossed = memory["precopyPages"] + memory["pushedPages"] + memory["urgentPages"]
            assert crossed + memory["zeroPages"] >= memory["pages"]
            if rate == 0:
                assert memory["urgentPages"] < 100
    print("rate, downtime ms:", downtimes)
    record_property("downtimes ms", downtimes)


@EACH_QEMU
async def test_a_slow_disk_read_by_direct_io(
    folder: Path, boot: tuple[Path, Path], qemu: q.QemuBinary
) -> None:
    """Data that lands long after its pages were marked as written is not missed."""
    image = folder / "known"
    q.write_known_disk(image, 4 * MIB)
    work = q.Workload(test_mb=64, rate=2000, readers=4, read_mb=8)
    with slow_disk(image) as disk:
        options = {"qemu": qemu, "memory": 256 * MIB, "disk": disk.path, "workload": work}
        async with qemu_pair(folder, boot, **options) as it:
            await it.boot()
            for _ in range(2):
                await it.wait_for_it()
                disk.delay = 0.03
                result = await move(it, mode="hybrid")
                assert result["passes"]
                assert result["tracking"]["stoppedMs"] > 0
                disk.delay = 0


async def test_precopy_of_a_quiet_guest(folder: Path, boot: tuple[Path, Path]) -> None:
    """All of its memory is there before it is."""
    work = q.Workload(test_mb=96, rate=200)
    async with qemu_pair(folder, boot, qemu=QEMUS[-1], memory=224 * MIB, workload=work) as it:
        await it.boot()
        await it.wait_for_it()
        result = await move(it, mode="precopy")
        assert result["memory"]["urgentPages"] == 0


async def test_precopy_of_a_busy_guest_is_given_up(folder: Path, boot: tuple[Path, Path]) -> None:
    """A guest that writes more than the link carries stays, nothing is left in either QEMU, and the
    same QEMU at the destination takes it by another mode."""
    work = q.Workload(test_mb=96, rate=-1)
    async with qemu_pair(folder, boot, qemu=QEMUS[-1], memory=224 * MIB, workload=work) as it:
        here = await it.boot()
        there = await it.wait_for_it()
        result = await it.here.migrate(
            VM, it.there, mode="precopy", bandwidth=BANDWIDTH, maxDowntimeMs=1.0, precopyPasses=2
        )
        assert result["event"] == "failed"
        assert "does not converge" in result["error"]
        assert (await it.here.status(VM))["phase"] == "failed"
        assert tracked(here.pid) == []
        # The destination hears of it last.
        await until(lambda: tracked(there.pid) == [], "the destination's userfaultfd is closed")
        await it.check()
        await move(it, mode="hybrid")


async def test_cancelled_in_a_pass(folder: Path, boot: tuple[Path, Path]) -> None:
    """Cancelled in the middle of a pass: the guest runs on, and nothing is left of it."""
    work = q.Workload(test_mb=96, rate=4000)
    async with qemu_pair(folder, boot, qemu=QEMUS[-1], memory=224 * MIB, workload=work) as it:
        here = await it.boot()
        there = await it.wait_for_it()
        started = await it.here.call("Migrate", name=VM, to=it.there.address, mode="hybrid",
                                     bandwidth=32 * MIB)  # fmt: skip
        status: dict[str, Any] = {}
        while status.get("phase") != "precopy" or not status.get("transferredBytes"):
            status = await it.here.status(VM)
        await it.here.call("Cancel", name=VM)
        result = await it.here.result(VM, started["migration"])
        assert result["event"] == "cancelled"
        assert tracked(here.pid) == []
        # The destination hears of it last.
        await until(lambda: tracked(there.pid) == [], "the destination's userfaultfd is closed")
        await it.check()
        await move(it, mode="hybrid")
