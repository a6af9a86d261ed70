# SPDX-License-Identifier: Apache-2.0
"""Guests as they were started: RAM of every kind, nothing of ours on the command line but a
monitor."""

from __future__ import annotations

import dataclasses
import os
import statistics
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from guests import qemu as q
from needs import missing
from pair import MIB, one_at_a_time
from qemu_pair import VM, own_monitor, qemu_pair
from qemus import EACH_QEMU, QEMUS, module_folder

from postcopyd.host import procfs
from postcopyd.vmm.qemu.qmp import Qmp

pytestmark = pytest.mark.trio

PARAMETERS: dict[str, dict[str, Any]] = {
    "ram": {"ram_kind": "ram", "backends": 2},
    "memfd": {"ram_kind": "memfd"},
    "shared": {"ram_kind": "ram", "ram_options": ",share=on"},
    "prealloc": {"ram_kind": "ram", "ram_options": ",prealloc=on"},
    # Locked is what QEMU itself has too, most of all a gigabyte for translated code.
    "locked": {"options": ("-overcommit", "mem-lock=on"), "accel": "tcg,thread=multi,tb-size=32"},
    "nodes of a file": {"ram_kind": "file", "backends": 2},
    "hugetlbfs": {
        "ram_kind": "memfd",
        "ram_options": ",hugetlb=on,hugetlbsize=2M,share=off",
        "memory": 128 * MIB,
    },
    "VGA": {"options": ("-device", "VGA")},
    "virtio-vga": {"options": ("-device", "virtio-vga")},
    "i440FX": {"machine": "pc"},
}
FOUND = {
    "memfd": ("memfd", 4096),
    "shared": ("shared", 4096),
    "nodes of a file": ("file", 4096),
    "hugetlbfs": ("private", 2 * MIB),
}
IN_TEST = {"ram", "hugetlbfs"}
KINDS = [
    pytest.param(kind, id=kind, marks=[] if kind in IN_TEST else [pytest.mark.long])
    for kind in PARAMETERS
]


def chosen(qemu: q.QemuBinary, **changes: Any) -> dict[str, Any]:
    """What a guest is started with."""
    options = changes.pop("options", ())
    qemu = dataclasses.replace(qemu, options=(*qemu.options, *options))
    base = {"ram_kind": "plain", "memory": 192 * MIB, "vcpus": 1, "qemu": qemu}
    return {**base, "workload": q.Workload(test_mb=24), **changes}


@EACH_QEMU
@pytest.mark.parametrize("mode", ["postcopy", "hybrid", "precopy"])
async def test_plain(qemu: q.QemuBinary, mode: str, folder: Path, boot: tuple[Path, Path]) -> None:
    """-m and no more: there and back."""
    async with qemu_pair(folder, boot, **chosen(qemu, workload=q.Workload())) as it:
        await it.boot()
        for _ in range(2):
            await it.wait_for_it()
            result = await it.move(mode=mode, maxDowntimeMs=5000)
            print(mode, result["downtimeMs"], result["downtimePartsMs"])


MANY = (
    "VGA", "virtio-gpu-pci", "virtio-net-pci,netdev=n0", "e1000e,netdev=n1", "rtl8139,netdev=n2",
    "virtio-scsi-pci", "lsi53c895a", "megasas", "virtio-serial-pci", "virtio-balloon-pci",
    "virtio-rng-pci", "virtio-keyboard-pci", "virtio-tablet-pci", "qemu-xhci,id=usb",
    "usb-tablet,bus=usb.0,port=1", "usb-kbd,bus=usb.0,port=2", "intel-hda",
    "hda-duplex,audiodev=a0", "AC97,audiodev=a0", "pvpanic", "vmgenid", "vmcoreinfo", "sdhci-pci",
    "edu", "pcie-root-port,id=rp0,slot=1",
)  # fmt: skip


def many_devices() -> tuple[str, ...]:
    backends = ["-audiodev", "none,id=a0"]
    for number in range(3):
        backends += ["-netdev", f"user,id=n{number}"]
    return (*backends, *(word for device in MANY for word in ("-device", device)))


@EACH_QEMU
@pytest.mark.long
@pytest.mark.parametrize("how", ["postcopy", "hybrid", "precopy", "hybrid with 25 devices"])
async def test_ten_times_there_and_back(
    qemu: q.QemuBinary,
    how: str,
    folder: Path,
    boot: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same daemons, and no bad page. Prints the median downtime in ms and what it was made
    of."""
    monkeypatch.setenv("QEMU_MODULE_DIR", module_folder(qemu.path))
    mode, _, many = how.partition(" with ")
    assert len(MANY) == 25
    options = many_devices() if many else ()
    work = q.Workload(test_mb=96, rate=2000)
    config = chosen(qemu, vcpus=2, memory=256 * MIB, options=options, workload=work)
    parts: dict[str, list[float]] = {}
    async with qemu_pair(folder, boot, **config) as it:
        await it.boot()
        for _ in range(20):
            await it.wait_for_it()
            result = await it.move(mode=mode, maxDowntimeMs=5000)
            for name, ms in {"all": result["downtimeMs"], **result["downtimePartsMs"]}.items():
                parts.setdefault(name, []).append(ms)
    print(qemu, how, {name: round(statistics.median(ms), 1) for name, ms in parts.items()})


@EACH_QEMU
@pytest.mark.parametrize("kind", KINDS)
async def test_kinds(
    qemu: q.QemuBinary,
    kind: str,
    folder: Path,
    boot: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each kind of guest RAM and of memory beside it, there and back."""
    monkeypatch.setenv("QEMU_MODULE_DIR", module_folder(qemu.path))
    async with qemu_pair(folder, boot, **chosen(qemu, **PARAMETERS[kind])) as it:
        await it.boot()
        for mode in ("hybrid", "postcopy"):
            await it.wait_for_it()
            found = (await it.here.call("Check", name=VM, to=it.there.address))["found"]
            here = FOUND.get(kind, ("private", 4096))
            if kind == "shared" and qemu.version >= (10, 0):  # which makes a memfd for it
                here = ("memfd", 4096)
            assert {(ram["kind"], ram["pageSize"]) for ram in found["ram"]} == {here}, found
            await it.move(mode=mode)


@EACH_QEMU
@pytest.mark.long
async def test_with_ksm(qemu: q.QemuBinary, folder: Path, boot: tuple[Path, Path]) -> None:
    """Pages that the kernel merges meanwhile, zeros and others, arrive as they are."""
    with ksm():
        async with qemu_pair(folder, boot, **chosen(qemu)) as it:
            await it.boot()
            with trio.fail_after(60):
                while int((KSM / "pages_sharing").read_text()) < 1000:
                    await trio.sleep(0.1)
            for mode in ("hybrid", "precopy", "postcopy"):
                await it.wait_for_it()
                await it.move(mode=mode, maxDowntimeMs=5000)


KSM = Path("/sys/kernel/mm/ksm")


@contextmanager
def ksm() -> Iterator[None]:
    """At full speed, and afterwards as before."""
    if not os.access(KSM / "run", os.W_OK):
        missing("a kernel that merges pages, and root")
    with one_at_a_time("ksm"):
        wanted = {"run": "1", "pages_to_scan": "2000", "sleep_millisecs": "20"}
        before = {name: (KSM / name).read_text() for name in wanted}
        try:
            for name, value in wanted.items():
                (KSM / name).write_text(value)
            yield
        finally:
            for name, value in before.items():
                (KSM / name).write_text(value)


DIMM_AT = 4 << 30  # where q35 has it in the guest


@EACH_QEMU
async def test_a_dimm_that_was_plugged(
    qemu: q.QemuBinary, folder: Path, boot: tuple[Path, Path]
) -> None:
    """While the guest ran; at the destination it is on the command line. Its content crosses."""
    room = ("-m", "slots=2,maxmem=1G")
    dimm = ("-object", f"memory-backend-ram,id=mem1,size={128 * MIB}")
    dimm += ("-device", "pc-dimm,id=dimm1,memdev=mem1")
    monitor = folder / "own"
    config = chosen(qemu, options=room, second_qmp=monitor)
    async with qemu_pair(folder, boot, **config) as it:
        here = await it.boot()
        async with own_monitor(monitor) as qmp:
            backend = {"qom-type": "memory-backend-ram", "id": "mem1", "size": 128 * MIB}
            await qmp.execute("object-add", backend)
            await qmp.execute("device_add", {"driver": "pc-dimm", "id": "dimm1", "memdev": "mem1"})
            write(here.pid, await address(qmp), b"here" * 1024)
        monitor = folder / "other"
        more = dataclasses.replace(it.config.qemu, options=(*it.config.qemu.options, *dimm))
        there = await it.wait_for_it(qemu=more, second_qmp=monitor)
        await it.move()
        async with own_monitor(monitor) as qmp:
            with open(f"/proc/{there.pid}/mem", "rb") as memory:
                memory.seek(await address(qmp))
                assert memory.read(8192) == b"here" * 1024 + bytes(4096)


async def address(qmp: Qmp) -> int:
    """Of the module's first byte in QEMU."""
    line = {"command-line": f"gpa2hva {DIMM_AT:#x}"}
    said = str(await qmp.execute("human-monitor-command", line))
    assert "mem1" in said
    return int(said.rpartition(" ")[2], 16)


def write(pid: int, at: int, data: bytes) -> None:
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(at)
        memory.write(data)


@EACH_QEMU
async def test_a_reset_after_a_move(
    qemu: q.QemuBinary, folder: Path, boot: tuple[Path, Path]
) -> None:
    """The firmware and all that the guest boots from have crossed too: it boots again, and is moved
    again."""
    monitor = folder / "own"
    async with qemu_pair(folder, boot, **chosen(qemu)) as it:
        await it.boot()
        await it.wait_for_it(second_qmp=monitor)
        await it.move()
        it.guest.boots_again()
        async with own_monitor(monitor) as qmp:
            await qmp.execute("set-action", {"reboot": "reset"})  # and not -no-reboot
            await qmp.execute("system_reset")
        await it.guest.ready()
        await it.wait_for_it()
        await it.move()


async def pause(qmp: Qmp) -> None:
    await qmp.execute("stop")


async def panic(qmp: Qmp) -> None:
    await human(qmp, "o /b 0x505 1")  # pvpanic


async def sleep(qmp: Qmp) -> None:
    await human(qmp, f"o /h 0x604 {1 << 13 | 1 << 10:#x}")  # S3 to PM1a_CNT of q35


async def human(qmp: Qmp, line: str) -> None:
    await qmp.execute("human-monitor-command", {"command-line": line})


async def becomes(qmp: Qmp, state: str) -> None:
    with trio.fail_after(10):
        while (await qmp.execute("query-status"))["status"] != state:
            await trio.sleep(0.02)


@EACH_QEMU
@pytest.mark.parametrize(
    ("halt", "state"),
    [
        (pause, "paused"),
        pytest.param(panic, "guest-panicked", marks=pytest.mark.long),
        pytest.param(sleep, "suspended", marks=pytest.mark.long),
    ],
)
async def test_a_guest_that_does_not_run(
    qemu: q.QemuBinary,
    halt: Callable[[Qmp], Awaitable[None]],
    state: str,
    folder: Path,
    boot: tuple[Path, Path],
) -> None:
    """It arrives as it was, and again; a paused one with its disk goes on where it is then."""
    image = folder / "disk"
    image.write_bytes(bytes(16 * MIB))
    options = ("-device", "pvpanic", "-action", "panic=pause")
    config = chosen(qemu, options=options, second_qmp=folder / "own0", disk=image)
    async with qemu_pair(folder, boot, **config) as it:
        await it.boot()
        async with own_monitor(folder / "own0") as qmp:
            await halt(qmp)
            await becomes(qmp, state)
        for mode in ("hybrid", "postcopy"):
            monitor = folder / f"own{it.moves + 1}"
            await it.wait_for_it(second_qmp=monitor)
            result = await it.here.migrate(VM, it.there, mode=mode)
            if state == "suspended" and qemu.version < (9, 0):
                assert "wake it by QMP `system_wakeup`" in result["error"]
                return
            assert result["event"] == "completed", result
            it.moves += 1
            async with own_monitor(monitor) as qmp:
                assert (await qmp.execute("query-status"))["status"] == state
        async with own_monitor(monitor) as qmp:
            if state == "suspended":
                await qmp.execute("system_wakeup")
                await becomes(qmp, "running")
            if state == "paused":
                await qmp.execute("cont")
                before = await it.guest.report()
                while before.disk_ops >= (await it.guest.report()).disk_ops:
                    pass
                await it.check()


@contextmanager
def sampled(take: Callable[[], int]) -> Iterator[list[int]]:
    """Samples, as many as a thread of its own can take, from before the first to after the last."""
    samples, done = [take()], threading.Event()

    def run() -> None:
        while not done.wait(0.001):
            samples.append(take())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def anonymous(pid: int) -> int:
    """Bytes of a process's memory that are of no file."""
    return int(procfs.status(pid)["RssAnon"].split()[0]) << 10


def memfds(pid: int) -> int:
    """Bytes in memory that a process has only descriptors of."""
    allocated = 0
    for number, link in procfs.descriptors(pid).items():
        if link.startswith("/memfd:"):
            with suppress(OSError):  # closed since
                allocated += os.stat(f"/proc/{pid}/fd/{number}").st_blocks * 512
    return allocated


@pytest.mark.long
async def test_memory_at_the_destination(folder: Path, boot: tuple[Path, Path]) -> None:
    """QEMU and daemon together never have more than the guest's RAM and a fiftieth of it."""
    size, work = 2048 * MIB, q.Workload(test_mb=1792, rate=2000)
    small = {"accel": "tcg,thread=multi,tb-size=16"}  # QEMU's own memory is not in question
    config = chosen(QEMUS[-1], memory=size, workload=work, **small)
    async with qemu_pair(folder, boot, **config) as it:
        await it.boot()
        there = (await it.wait_for_it()).pid
        assert it.there.process is not None
        daemon = it.there.process.pid

        def held() -> int:
            # In this order, as pages go from the one to the other.
            return anonymous(there) + anonymous(daemon) + memfds(daemon)

        with sampled(lambda: memfds(daemon)) as staged, sampled(held) as samples:
            result = await it.here.migrate(VM, it.there, mode="hybrid")
        assert result["event"] == "completed", result
        it.moves += 1
        await it.check()
    memory = result["memory"]
    carried = (memory["pages"] - memory["zeroPages"]) * memory["pageSize"]
    print(f"carried {carried}, most {max(samples) - samples[0]}, {len(samples)} samples")
    assert max(staged) > carried // 2  # else this says nothing
    assert carried < max(samples) - samples[0] <= size * 1.02
    assert max(samples) - samples[0] <= carried * 1.02
