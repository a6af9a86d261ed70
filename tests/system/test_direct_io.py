# SPDX-License-Identifier: Apache-2.0
"""Tracking a guest whose disk is read by direct I/O: what `Vmm.still` is for.

The test copies guest RAM in passes as the engine does, from what PAGEMAP_SCAN finds written.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from guests import qemu as q
from needs import missing
from qemus import EACH_QEMU, QEMUS
from slow_disk import SlowDisk, slow_disk

from postcopyd.vmm import Region
from postcopyd.vmm.qemu.driver import QemuVmm

MIB, PAGE = 1 << 20, 4096
READ_SECONDS = 0.1

UFFDIO_API, UFFDIO_REGISTER, PAGEMAP_SCAN = 0xC018AA3F, 0xC020AA00, 0xC0606610
FEATURES = 1 << 0 | 1 << 12 | 1 << 13 | 1 << 15  # WP, in shmem too, unpopulated too, async
REGISTER_WP, WRITTEN, ARM = 2, 2, 3
RANGES = 4096


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not pytest's own: the name of a socket has to be short."""
    with tempfile.TemporaryDirectory(prefix="pcd") as name:
        yield Path(name)


@pytest.fixture
def disk(folder: Path) -> Iterator[SlowDisk]:
    image = folder / "disk"
    q.write_known_disk(image, 4 * MIB)
    with slow_disk(image) as slow:
        yield slow


@asynccontextmanager
async def reading(
    qemu: q.QemuBinary, folder: Path, boot: tuple[Path, Path], disk: SlowDisk
) -> AsyncIterator[tuple[q.Guest, QemuVmm]]:
    """A guest that reads all the time, four reads at once, and its driver."""
    work = q.Workload(test_mb=32, rate=2000, readers=4, read_mb=8)
    kernel, initramfs = boot
    config = q.GuestConfig(
        qemu=qemu, kernel=kernel, initramfs=initramfs, memory=256 * MIB, disk=disk.path,
        workload=work,
    )  # fmt: skip
    async with q.Guest.open(folder) as guest:
        machine = await guest.launch(config)
        await guest.ready()
        disk.delay = READ_SECONDS
        driver = await QemuVmm.connect("web1", str(machine.qmp_path))
        try:
            yield guest, driver
        finally:
            disk.delay = 0.0
            await driver.aclose()


def written(pid: int, region: Region, *, arm: bool) -> list[tuple[int, int]]:
    """Ranges of the region (offset, bytes) that were written since they were armed."""
    ranges = (ctypes.c_uint64 * (3 * RANGES))()
    at, end = region.address, region.address + region.size
    found = []
    with open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        while at < end:
            where = (at, end, 0, ctypes.addressof(ranges), RANGES, 0)
            request = bytearray(
                struct.pack("=12Q", 96, ARM if arm else 0, *where, 0, WRITTEN, 0, WRITTEN)
            )
            count = fcntl.ioctl(pagemap, PAGEMAP_SCAN, request)
            at = struct.unpack_from("=Q", request, 32)[0]  # walk_end
            for i in range(count):
                start, stop = ranges[3 * i], ranges[3 * i + 1]
                found.append((start - region.address, stop - start))
    return found


def copy(region: Region, to: bytearray, ranges: list[tuple[int, int]]) -> None:
    assert region.fd is not None
    for offset, size in ranges:
        to[offset : offset + size] = os.pread(region.fd, size, region.offset + offset)


def wrong(region: Region, copied: bytearray) -> list[int]:
    """Pages of the copy that are not as they are in guest RAM."""
    assert region.fd is not None
    pages = []
    for offset in range(0, region.size, MIB):
        now, then = os.pread(region.fd, MIB, region.offset + offset), copied[offset : offset + MIB]
        if now != then:
            pages += [
                (offset + at) // PAGE
                for at in range(0, MIB, PAGE)
                if now[at : at + PAGE] != then[at : at + PAGE]
            ]
    return pages


async def copy_in_passes(driver: QemuVmm, *, drained: bool) -> list[int]:
    """Copies while the guest runs, and the rest when it has stopped: the pages that are wrong."""
    shape = await driver.inspect("source")
    (region,) = shape.regions
    uffd = await driver.track()
    try:
        try:
            fcntl.ioctl(uffd, UFFDIO_API, bytearray(struct.pack("QQQ", 0xAA, FEATURES, 0)))
        except OSError:
            missing("tracking of written pages: Linux 6.7")
        what = struct.pack("QQQQ", region.address, region.size, REGISTER_WP, 0)
        fcntl.ioctl(uffd, UFFDIO_REGISTER, bytearray(what))
        copied = bytearray(region.size)
        for _ in range(10):
            if drained:
                async with driver.still():
                    ranges = written(driver.pid, region, arm=True)
            else:
                ranges = written(driver.pid, region, arm=True)
            copy(region, copied, ranges)
            await trio.sleep(READ_SECONDS / 2)
        async with driver.still():
            copy(region, copied, written(driver.pid, region, arm=False))
            return wrong(region, copied)
    finally:
        os.close(uffd)
        shape.close()


@EACH_QEMU
async def test_a_guest_is_still_with_no_read_under_way(
    folder: Path, boot: tuple[Path, Path], disk: SlowDisk, qemu: q.QemuBinary
) -> None:
    """However slow its disk is, no read is left that could write to guest RAM."""
    async with reading(qemu, folder, boot, disk) as (guest, driver):
        shape = await driver.inspect("source")
        shape.close()
        assert shape.direct_io is not None
        assert str(disk.path) in shape.direct_io
        met = 0
        for _ in range(10):
            met += disk.pending > 0
            async with driver.still():
                reads = disk.reads
                assert disk.pending == 0
                await trio.sleep(READ_SECONDS / 4)
                assert disk.reads == reads
            await trio.sleep(READ_SECONDS / 2)
        assert met > 0
        sweep, report = await guest.sweep(), await guest.report()
        assert (sweep.bad, report.bad, report.disk_bad) == (0, 0, 0)


@EACH_QEMU
async def test_pages_armed_while_still_are_all_seen(
    folder: Path, boot: tuple[Path, Path], disk: SlowDisk, qemu: q.QemuBinary
) -> None:
    """A copy in passes is the guest's memory to the last page."""
    async with reading(qemu, folder, boot, disk) as (_, driver):
        assert await copy_in_passes(driver, drained=True) == []


async def test_pages_armed_under_a_read_are_missed(
    folder: Path, boot: tuple[Path, Path], disk: SlowDisk
) -> None:
    """Why it has to be still: once Linux sees these too, `Shape.direct_io` has no use any more."""
    async with reading(QEMUS[-1], folder, boot, disk) as (_, driver):
        assert len(await copy_in_passes(driver, drained=False)) > 16
