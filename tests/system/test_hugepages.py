# SPDX-License-Identifier: Apache-2.0
"""Guests that have transparent huge pages have them again after a migration, whether they went or
stayed, and no more memory."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from guests.process import ProcessGuest
from guests.qemu import QemuBinary, Workload
from needs import missing
from pair import (
    MIB,
    Host,
    Pair,
    completed,
    ended,
    filled,
    one_at_a_time,
    open_pair,
    until,
    verified,
    worked,
)
from postcopyd._native import ffi, lib
from qemu_pair import VM, qemu_pair
from qemus import EACH_QEMU, QEMUS

from postcopyd.host.procfs import smaps_entries
from postcopyd.sessions.hugepages import chosen

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MADVISE, MADV_HUGEPAGE, MADV_COLLAPSE = 28, 14, 25  # x86-64
MEMORY = 32 * MIB
GUEST = ("--memory", str(MEMORY), "--threads", "2")


@pytest.fixture(scope="module")
def daemons() -> Iterator[Pair]:
    """What is not done is no news to an operator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTCOPYD_LOG_LEVEL", "debug")
        with open_pair() as pair:
            yield pair


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with an option huge=."""
    mounted: list[Path] = []

    def mount(huge: str) -> Path:
        if os.geteuid() != 0 or not SETTINGS.is_dir():
            missing("root, and a kernel with transparent huge pages, for a tmpfs of them")
        folder = tmp_path / str(len(mounted))
        folder.mkdir()
        options = f"size=1G,huge={huge}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tests", folder], check=True)
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def backing(path: Path) -> tuple[str, ...]:
    return ("--backing", "file", "--path", str(path))


class Memory:
    """Guest RAM of a VMM as its smaps shows it: of a file, or else the anonymous mapping of a
    size."""

    def __init__(self, pid: int, path: Path | None = None, size: int = MEMORY) -> None:
        with open(f"/proc/{pid}/smaps", encoding="utf-8") as smaps:
            found = list(smaps_entries(smaps))
        self.huge, self.flags = 0, set[str]()
        self.span = (0, 0)
        for header, fields in found:
            start, end = (int(address, 16) for address in header[0].split("-"))
            anonymous = len(header) == 5 and end - start == size
            if header[-1] == str(path) if path else anonymous:
                self.span = (start, end)
                self.flags |= set(fields["VmFlags"])
                names = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")
                self.huge += sum(int(fields[name][0]) << 10 for name in names)
        assert self.flags


def said(host: Host, name: str) -> list[str]:
    """What a daemon's log has of a VM's huge pages."""
    lines = host.log.read_text().splitlines()
    return [line for line in lines if "huge pages" in line and f"vm={name}" in line]


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("huge", ["always", "within_size"])
async def test_huge_again(pair: Pair, mount: Callable[[str], Path], huge: str) -> None:
    """RAM that was in huge pages at the source is in huge pages at the destination, and right."""
    folder, (a, b) = mount(huge), pair
    here, there = folder / "a", folder / "b"
    name, source, destination = await pair.place(*GUEST, here=backing(here), there=backing(there))
    await filled(source)
    assert Memory(source.process.pid, here).huge == MEMORY
    completed(await a.migrate(name, b), MEMORY)
    await until(lambda: Memory(destination.process.pid, there).huge == MEMORY, "huge pages")
    await until(lambda: said(b, name), "the end of it")
    assert f"pages={MEMORY // (2 * MIB)}" in said(b, name)[0] and "left" not in said(b, name)[0]
    assert not Memory(destination.process.pid, there).flags & {"um", "uw", "ui"}
    assert allocated(there) == MEMORY
    await verified(destination, MEMORY // 4096)
    await worked(destination)
    await ended(source)


def advise(guest: ProcessGuest, *advice: int) -> None:
    """madvise of the anonymous RAM of a VMM, within it."""
    if platform.machine() != "x86_64":
        missing("a processor whose system call numbers this knows")
    if chosen(SETTINGS / "enabled") not in ("always", "madvise"):
        missing("transparent huge pages for who asks for them")
    pid = guest.process.pid
    start, end = Memory(pid).span
    for word in advice:
        arguments = ffi.new("unsigned long[6]", [start, end - start, word])
        result, error = ffi.new("long *"), ffi.new("struct adopt_error *")
        assert lib.adopt_syscall(pid, MADVISE, arguments, 5000, 0, result, error) == result[0] == 0


async def test_anonymous_memory(pair: Pair) -> None:
    """Anonymous memory that its VMM wants in huge pages is in huge pages again."""
    options = (*GUEST, "--backing", "anonymous")
    name, source, destination = await pair.place(*options)
    a, b = pair
    await filled(source)
    advise(destination, MADV_HUGEPAGE)
    completed(await a.migrate(name, b), MEMORY)
    await until(lambda: Memory(destination.process.pid).huge == MEMORY, "huge pages")
    await until(lambda: said(b, name), "the end of it")
    assert f"pages={MEMORY // (2 * MIB)}" in said(b, name)[0]  # and not by khugepaged
    assert not Memory(destination.process.pid).flags & {"um", "uw", "ui"}
    await verified(destination, MEMORY // 4096)
    await ended(source)


async def test_a_guest_that_stays(pair: Pair) -> None:
    """What tracking has split at the source is huge again after a cancel."""
    name, source, _ = await pair.place(*GUEST, "--backing", "anonymous")
    a, b = pair
    pid = source.process.pid
    await filled(source)
    advise(source, MADV_HUGEPAGE, MADV_COLLAPSE)
    assert Memory(pid).huge == MEMORY
    await a.call("Migrate", name=name, to=b.address, mode="hybrid", bandwidth=4 * MIB)
    await until(lambda: Memory(pid).huge < MEMORY // 2, "huge pages to be split")
    await a.call("Cancel", name=name)
    await until(lambda: Memory(pid).huge == MEMORY, "huge pages")
    await until(lambda: said(a, name), "the end of it")
    assert "pages=0" not in said(a, name)[0]
    assert not Memory(pid).flags & {"um", "uw", "ui"}
    await verified(source, MEMORY // 4096)


async def test_sparse_stays_sparse(pair: Pair, mount: Callable[[str], Path]) -> None:
    """No memory is taken for the holes of a guest that uses a page here and there."""
    folder, (a, b) = mount("always"), pair
    here, there = folder / "a", folder / "b"
    sparse = (*GUEST, "--wild", "64")
    name, source, destination = await pair.place(*sparse, here=backing(here), there=backing(there))
    completed(await a.migrate(name, b), MEMORY)
    await until(lambda: said(b, name), "the end of it")
    assert "pages=0" in said(b, name)[0]
    assert 0 < allocated(there) < MEMORY // 32
    assert Memory(destination.process.pid, there).huge == 0
    await worked(destination)
    assert allocated(there) < MEMORY // 32
    await verified(destination)
    await ended(source)


async def test_not_where_they_are_turned_off(pair: Pair, mount: Callable[[str], Path]) -> None:
    """An operator who has turned huge pages off does not get them."""
    folder, (a, b) = mount("never"), pair
    there = folder / "b"
    files = {"here": backing(folder / "a"), "there": backing(there)}
    name, source, destination = await pair.place(*GUEST, **files)
    completed(await a.migrate(name, b), MEMORY)
    await until(lambda: said(b, name), "the end of it")
    assert "no huge pages wanted" in said(b, name)[0]
    assert Memory(destination.process.pid, there).huge == 0
    await verified(destination)
    await ended(source)


async def test_detached_and_migrated_at_once(pair: Pair, mount: Callable[[str], Path]) -> None:
    """Who wants the VM does not wait for its huge pages, and finds nothing of them in its way."""
    folder, (a, b) = mount("always"), pair
    memory = 128 * MIB
    options = ("--memory", str(memory), "--threads", "2")
    paths = [folder / str(i) for i in range(3)]
    name, first, second = await pair.place(
        *options, here=backing(paths[0]), there=backing(paths[1])
    )
    await filled(first)
    completed(await a.migrate(name, b), memory)
    await ended(first)
    third = await pair.attach(a, name, pair.guest(*options, *backing(paths[2]), "--incoming"))
    completed(await b.migrate(name, a), memory)
    await a.call("Detach", name=name)
    assert a.process is not None
    descriptors = Path(f"/proc/{a.process.pid}/fd")

    def held() -> list[str]:
        links = []
        for fd in os.listdir(descriptors):
            try:
                links.append(os.readlink(descriptors / fd))
            except FileNotFoundError:
                continue
        return [link for link in links if str(folder) in link]

    with trio.fail_after(5):
        while held():
            await trio.sleep(0.01)
    await verified(third, memory // 4096)
    await worked(third)
    await ended(second)


async def test_qemu(mount: Callable[[str], Path], folder: Path, boot: tuple[Path, Path]) -> None:
    """A Linux guest in QEMU has huge pages again, wherever it has memory to speak of."""
    here, there = (mount("always") / name for name in ("source", "destination"))
    config = {"qemu": QEMUS[-1], "memory": 256 * MIB, "mem_paths": (f"{here},align=2M",)}
    async with qemu_pair(folder, boot, **config) as it:
        source = await it.boot()
        destination = await it.wait_for_it(mem_paths=(f"{there},align=2M",))
        assert Memory(source.pid, here).huge > 128 * MIB
        result = await it.here.migrate(VM, it.there)
        assert result["event"] == "completed", result
        await until(lambda: said(it.there, VM), "the end of it")
        assert "huge pages given back" in said(it.there, VM)[0]
        assert "left" not in said(it.there, VM)[0]
        after = Memory(destination.pid, there)
        carried = result["memory"]["pages"] - result["memory"]["zeroPages"]
        assert after.huge >= carried * 4096 * 3 // 4
        assert not after.flags & {"um", "uw", "ui"}
        assert allocated(there) < carried * 4096 * 2
        await it.check()


@EACH_QEMU
@pytest.mark.long
async def test_private_memory_of_qemu(
    qemu: QemuBinary, folder: Path, boot: tuple[Path, Path]
) -> None:
    """A guest as it was started has them at the source, after a cancel, and at the destination."""
    if chosen(SETTINGS / "enabled") not in ("always", "madvise"):
        missing("transparent huge pages for who asks for them")
    size, work = 256 * MIB, Workload(test_mb=128)
    config = {"qemu": qemu, "memory": size, "ram_kind": "plain", "workload": work}

    def huge(pid: int) -> int:
        return Memory(pid, size=size).huge

    # KSM splits huge pages of any QEMU.
    with one_at_a_time("ksm"):
        async with qemu_pair(folder, boot, **config) as it:
            pid = (await it.boot()).pid
            before = huge(pid)
            assert before > 128 * MIB
            there = await it.wait_for_it()
            await it.begin("precopy", 4 * MIB)
            await until(lambda: huge(pid) < before // 2, "huge pages to be split")
            await it.here.call("Cancel", name=VM)
            await until(lambda: huge(pid) >= before * 9 // 10, "huge pages")
            result = await it.move(mode="hybrid")
            carried = (result["memory"]["pages"] - result["memory"]["zeroPages"]) * 4096
            await until(lambda: huge(there.pid) >= carried * 3 // 4, "huge pages")
            await it.check()
