# SPDX-License-Identifier: Apache-2.0
"""The verifying guest in real QEMUs: that it says what is so, and sees what is wrong.

`$POSTCOPYD_QEMU` names the QEMUs to try and `$POSTCOPYD_KERNEL` the guest's kernel, where the
installed ones will not do.
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from guests import modules
from guests.qemu import (
    Guest,
    GuestConfig,
    GuestError,
    MissingPartError,
    QemuBinary,
    QemuProcess,
    Report,
    Workload,
    write_known_disk,
)
from needs import missing
from qemu_pair import own_monitor
from qemus import QEMUS, each

from postcopyd.demo import initramfs

MIB = 1 << 20
PAGE = 4096
GOLDEN = 0x9E3779B97F4A7C15  # the step between two words of a page
TEST_MB = 64
WORK = Workload(test_mb=TEST_MB, report_ms=20)

# QEMU 7.2 loses pages that an emulated guest writes during precopy (the guest's kernel crashes at
# the other side), so that it may only move this guest without its memory. `make test` has the first
# with itself.
MOVES = [
    pytest.param((a, b, what), marks=[pytest.mark.long] if b in QEMUS[1:] else [])
    for a in QEMUS
    for b in QEMUS
    for what in ("devices", "all")
    if a.version <= b.version and (what == "devices" or a.version >= (10, 0))
]


@pytest.fixture(params=each(QEMUS))
def config(request: pytest.FixtureRequest, boot: tuple[Path, Path], folder: Path) -> GuestConfig:
    kernel, initramfs = boot
    return GuestConfig(
        qemu=request.param,
        kernel=kernel,
        initramfs=initramfs,
        memory=256 * MIB,
        machine="pc-q35-7.2",  # every version tried here knows it
        second_qmp=folder / "own.qmp",
        workload=WORK,
    )


@asynccontextmanager
async def booted(config: GuestConfig, folder: Path) -> AsyncIterator[tuple[Guest, QemuProcess]]:
    """A guest at work."""
    async with Guest.open(folder) as guest:
        qemu = await guest.launch(config)
        await guest.ready()
        yield guest, qemu


@asynccontextmanager
async def paused(qemu: QemuProcess) -> AsyncIterator[None]:
    """The vCPUs stopped, so that the host may write to memory and disk."""
    async with own_monitor(qemu.config.second_qmp) as qmp:
        await qmp.execute("stop")
        yield
        await qmp.execute("cont")


def memory_pages(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """(offset, page number, content) of what looks like a whole page of the guest's test memory."""
    with file.open("rb") as ram:
        for offset in range(0, os.fstat(ram.fileno()).st_size, PAGE):
            content = ram.read(PAGE)
            number, version, second, third = struct.unpack_from("<4Q", content)
            if version and number < TEST_MB * MIB // PAGE and (third - second) % 2**64 == GOLDEN:
                yield offset, number, content


@pytest.mark.parametrize("vcpus", [1, 2])
async def test_reports_what_each_worker_does(config: GuestConfig, folder: Path, vcpus: int) -> None:
    """The guest boots, each vCPU's worker gets on, and a sweep sees every page to be right."""
    async with Guest.open(folder) as guest:
        qemu = await guest.launch(replace(config, vcpus=vcpus))
        pages = await guest.ready()
        first = await guest.report()
        second = await guest.report(after=first)
        swept = await guest.sweep()
        after = await guest.report()
        assert pages == TEST_MB * MIB // PAGE
        assert len(first.ops) == vcpus
        assert all(a < b for a, b in zip(first.ops, after.ops, strict=True))
        assert first.guest_ms < second.guest_ms
        assert (swept.pages, swept.bad, after.bad) == (pages, 0, 0)
        await guest.quit()
        assert await qemu.wait() == 0


@pytest.mark.long
async def test_obeys_commands(config: GuestConfig, folder: Path) -> None:
    """Stopped and idle workers do nothing, a rate is kept, discarded pages read as zeros."""
    async with Guest.open(folder) as guest:
        await guest.launch(config)
        pages = await guest.ready()
        for stop, go in [(guest.stop, guest.go), (lambda: guest.rate(0), lambda: guest.rate(-1))]:
            await stop()
            stopped = await guest.report()
            still = await guest.report(after=await guest.report())
            await go()
            again = await guest.report(after=await guest.report())
            assert stopped.ops == still.ops
            assert all(a < b for a, b in zip(still.ops, again.ops, strict=True))
        await guest.rate(2000)
        begin = await guest.report()
        end = begin
        while end.guest_ms < begin.guest_ms + 1000:
            end = await guest.report(after=end)
        rate = (end.operations - begin.operations) * 1000 / (end.guest_ms - begin.guest_ms)
        # At most what was asked, and a burst of what 10 ms of delay at either end allow.
        assert 0 < rate <= 2100
        await guest.stop()
        await guest.discard(pages // 2)
        assert (await guest.sweep()).bad == 0
        await guest.go()
        await guest.rate(-1)
        assert (await guest.sweep()).bad == 0
        with pytest.raises(GuestError, match="does not know"):
            await guest._ask("dance")


async def test_sees_wrong_pages(config: GuestConfig, folder: Path) -> None:
    """A page zeroed, put back to an earlier version, exchanged or changed in one byte is found."""
    async with booted(config, folder) as (guest, qemu):
        ram = Path(config.ram_files()[0])
        async with paused(qemu):
            earlier = {offset: page for offset, _, page in memory_pages(ram)}
        # One lap later on average, most pages have been written anew.
        begin = await guest.report()
        while (await guest.report()).operations < begin.operations + len(earlier) * 2:
            pass
        await guest.stop()
        async with paused(qemu):
            now = {offset: (number, page) for offset, number, page in memory_pages(ram)}
            changed = (o for o in now if o in earlier and earlier[o] != now[o][1])
            zeroed, stale, foreign, torn, other = (next(changed) for _ in range(5))
            wrong = {
                zeroed: bytes(PAGE),
                stale: earlier[stale],
                foreign: now[other][1],
                torn: now[torn][1][:-1] + bytes([now[torn][1][-1] ^ 1]),
            }
            with ram.open("r+b") as file:
                for offset, content in wrong.items():
                    file.seek(offset)
                    file.write(content)
        assert (await guest.report()).bad == 0  # nobody has looked yet
        assert (await guest.sweep()).bad == len(wrong)
        assert (await guest.sweep()).bad == 0  # each is counted once
        assert (await guest.report()).bad == len(wrong)
        found = {(one["kind"], int(one["page"])) for one in guest.bad}
        kinds = {"zero": zeroed, "stale": stale, "foreign": foreign, "torn": torn}
        assert found == {(kind, now[offset][0]) for kind, offset in kinds.items()}
        assert {one["offset"] for one in guest.bad if one["kind"] == "torn"} == {str(PAGE - 8)}


async def test_workers_see_wrong_pages(config: GuestConfig, folder: Path) -> None:
    """A wrong page is reported by the worker that comes across it, without being asked."""
    async with booted(config, folder) as (guest, qemu):
        ram = Path(config.ram_files()[0])
        # A page that a worker was just writing when the vCPUs stopped may be mended by its end.
        async with paused(qemu):
            offsets = [offset for offset, _, _ in memory_pages(ram)][:8]
            with ram.open("r+b") as file:
                for offset in offsets:
                    file.seek(offset + PAGE // 2)
                    file.write(bytes(8))
        with trio.fail_after(60):
            while (await guest.report()).bad < len(offsets) - config.vcpus:
                pass


@pytest.mark.long
async def test_works_on_a_part_of_its_memory(config: GuestConfig, folder: Path) -> None:
    """With a hot part only that is written; it can be changed while the guest runs."""
    async with Guest.open(folder) as guest:
        work = replace(WORK, hot_mb=2)
        qemu = await guest.launch(replace(config, workload=work))
        await guest.ready()
        ram = Path(config.ram_files()[0])

        async def written(over: int) -> set[int]:
            """Pages whose version changes while as many operations are done."""
            async with paused(qemu):
                before = {number: page for _, number, page in memory_pages(ram)}
            begin = await guest.report()
            while (await guest.report()).operations < begin.operations + over:
                pass
            async with paused(qemu):
                now = {number: page for _, number, page in memory_pages(ram)}
            return {number for number in now if now[number] != before.get(number)}

        few = await written(4000)
        assert 2 * MIB // PAGE // 2 < len(few) <= 2 * MIB // PAGE + 4 * config.vcpus
        await guest.hot(0)
        assert len(await written(TEST_MB * MIB // PAGE * 2)) > TEST_MB * MIB // PAGE // 2
        assert (await guest.sweep()).bad == 0


async def test_proves_what_it_reads_from_a_disk(
    config: GuestConfig, folder: Path, tmp_path: Path
) -> None:
    """Idle but for its readers it finds the known content right, and every wrong page of the
    memory that was read into, after the read."""
    disk = tmp_path / "disk"
    write_known_disk(disk, 4 * MIB)
    work = replace(WORK, rate=0, readers=2, read_kb=64, read_mb=2)
    async with booted(replace(config, disk=disk, workload=work), folder) as (guest, qemu):
        report = await guest.report()
        while report.disk_ops < 500:
            report = await guest.report(after=report)
        assert (report.disk_bad, report.operations) == (0, 0)
        assert (await guest.sweep()).bad == 0
        ram = Path(config.ram_files()[0])
        async with paused(qemu):
            with ram.open("r+b") as file:
                found = disk_blocks(ram)
                assert len(found) > 2 * MIB // PAGE // 2
                for offset in found[: len(found) // 8]:
                    file.seek(offset + PAGE - 8)
                    file.write(bytes(8))
        await guest.sweep()  # readers that come first count them as well
        bad = (await guest.report()).disk_bad
        assert 0 < bad <= len(found) // 8
        assert {(one["what"], one["kind"]) for one in guest.bad} == {("disk", "torn")}
        await guest.sweep()
        assert (await guest.report()).disk_bad == bad  # each is counted once


def disk_blocks(file: Path) -> list[int]:
    """Offsets of what looks like a block of the known disk in guest RAM."""
    with file.open("rb") as ram:
        return [
            offset
            for offset in range(0, os.fstat(ram.fileno()).st_size, PAGE)
            if struct.unpack_from("<2Q", ram.read(PAGE))[0] >> 40 == 1
        ]


@pytest.mark.long
async def test_uses_disk_and_network(config: GuestConfig, folder: Path, tmp_path: Path) -> None:
    """Sandboxed, as nobody, on two NUMA nodes: disk and network work, and a wrong disk is seen."""
    if os.geteuid() != 0:
        missing("root, to run QEMU as another user")
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(16 * MIB)
    async with Guest.open(folder) as guest:
        echo = await guest.echo()
        config = replace(
            config, backends=2, disk=disk, net_port=echo.port, balloon="", user="nobody"
        )
        qemu = await guest.launch(config)
        await guest.ready()
        status = Path(f"/proc/{qemu.pid}/status").read_text()
        assert "\nSeccomp:\t2\n" in status
        assert "\nUid:\t65534\t65534\t65534\t65534\n" in status
        for ram in config.ram_files():
            assert sum(1 for _ in memory_pages(Path(ram))) > TEST_MB * MIB // PAGE // 4
        report = await guest.report()
        while report.disk_ops < 100 or report.net_received < 100:
            report = await guest.report(after=report)
        assert (report.bad, report.disk_bad, report.net_bad) == (0, 0, 0)
        assert echo.duplicates == 0
        async with paused(qemu):
            written = disk.read_bytes()
            assert any(written)
            with disk.open("r+b") as file:
                file.write(bytes(len(written)))
        with trio.fail_after(60):
            while not (await guest.report()).disk_bad:
                pass
        assert {one["what"] for one in guest.bad} == {"disk"}
        await guest.quit()
        assert await qemu.wait() == 0


@pytest.mark.parametrize("config", QEMUS[:1] or [None], indirect=True, ids=["to"])
@pytest.mark.parametrize("move", MOVES or [None], ids=lambda move: "-".join(map(str, move or ())))
async def test_is_followed_to_another_qemu(
    config: GuestConfig,
    folder: Path,
    tmp_path: Path,
    move: tuple[QemuBinary, QemuBinary, str],
) -> None:
    """Moved by QEMU's own precopy, the guest's reports go on at the other side, nothing wrong."""
    old, new, what = move
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(16 * MIB)
    async with Guest.open(folder) as guest:
        echo = await guest.echo()
        config = replace(config, qemu=old, name="source", disk=disk, net_port=echo.port)
        if what == "devices":  # both on the same RAM, so that there is none to send
            config = replace(config, mem_paths=config.ram_files())
        there = replace(
            config, qemu=new, name="there", incoming=True, second_qmp=folder / "there.qmp"
        )
        try:
            await guest.launch(config)
            await guest.launch(there)
            pages = await guest.ready()
            before = await _all_at_work(guest)
            await _migrate(config, there, f"unix:{folder}/migration", shared=what == "devices")
            moved = await _first_of(guest, "there")
            after = await _all_at_work(guest)
            swept = await guest.sweep()
        finally:
            for file in config.mem_paths:
                Path(file).unlink(missing_ok=True)
        assert before.qemu == "source"
        assert "source" not in {report.qemu for report in guest.reports[moved:]}
        times = [report.guest_ms for report in guest.reports]
        assert times == sorted(times)
        assert (after.bad, after.disk_bad, after.net_bad, echo.duplicates) == (0, 0, 0, 0)
        assert (swept.pages, swept.bad) == (pages, 0)
        assert guest.errors == []


async def _all_at_work(guest: Guest) -> Report:
    """Until vCPUs, disk and network have got on since now."""
    begin = report = await guest.report()
    while (
        report.operations == begin.operations
        or report.disk_ops == begin.disk_ops
        or report.net_received == begin.net_received
    ):
        report = await guest.report(after=report)
    return report


async def _first_of(guest: Guest, name: str) -> int:
    report = await guest.report()
    while report.qemu != name:
        report = await guest.report(after=report)
    return [one.qemu for one in guest.reports].index(name)


async def _migrate(here: GuestConfig, there: GuestConfig, uri: str, shared: bool) -> None:
    names = ["events", "x-ignore-shared"] if shared else ["events"]
    capabilities = [{"capability": name, "state": True} for name in names]
    async with own_monitor(here.second_qmp) as source, own_monitor(there.second_qmp) as target:
        for qmp in (source, target):
            await qmp.execute("migrate-set-capabilities", {"capabilities": capabilities})
        await source.execute("migrate-set-parameters", {"max-bandwidth": 1 << 34})
        with target.events("MIGRATION") as events:
            await target.execute("migrate-incoming", {"uri": uri})
            await source.execute("migrate", {"uri": uri})
            with trio.fail_after(120):
                while (status := (await events.next())["data"]["status"]) != "completed":
                    assert status != "failed"
        await target.execute("cont")


async def test_says_why_it_does_not_start(config: GuestConfig, folder: Path) -> None:
    """A QEMU that ends at once is reported with its own words, its RAM file gone."""
    async with Guest.open(folder) as guest:
        with pytest.raises(GuestError, match="unsupported machine type"):
            await guest.launch(replace(config, machine="nonesuch"))
        assert not Path(config.ram_files()[0]).exists()
        with pytest.raises(GuestError, match="no QEMU"):
            await guest.ready()


async def test_kills_its_qemu_when_cancelled(config: GuestConfig, folder: Path) -> None:
    """However the guest's block is left, its QEMU is dead and its files are gone afterwards."""
    with trio.CancelScope() as scope:
        async with Guest.open(folder) as guest:
            qemu = await guest.launch(config)
            await guest.ready()
            assert Path(config.ram_files()[0]).exists()
            scope.cancel()
            await guest.report()
    assert qemu.process.returncode == -9
    assert not Path(config.ram_files()[0]).exists()
    assert not qemu.qmp_path.exists()


def test_initramfs_is_the_same_each_time(tmp_path: Path) -> None:
    """Both sides of a migration boot the same bytes, so the same input makes the same archive."""
    kernel = modules.folder_of(initramfs.find_kernel().resolve())
    init = tmp_path / "init"
    init.write_bytes(b"not really")
    for name in ("a", "b"):
        initramfs.write(tmp_path / name, init, modules.load_order(kernel, modules.DEVICES))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(MissingPartError, match="no module nonesuch"):
        list(modules.load_order(kernel, ["nonesuch"]))
