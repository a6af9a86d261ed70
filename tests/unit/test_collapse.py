# SPDX-License-Identifier: Apache-2.0
"""Huge pages for guests that have arrived: where they are wanted, where holes forbid them, and how
the work ends. The kernel's part is played by a table; mappings and holes are real."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from postcopyd.records.store import Store
from postcopyd.sessions import hugepages
from postcopyd.sessions.hugepages import HUGE_PAGE, PAGES, SMALL_PAGE, Area, Ram, Work, eligible
from postcopyd.sessions.vm import Vm
from postcopyd.vmm import Region

BASE = 0x7F0000000000


def smaps(
    size: int,
    *,
    at: int = BASE,
    huge: int = 1,
    flags: str = "rd wr sh mr mw me ms",
    device: str = "00:00",
    inode: int = 0,
    offset: int = 0,
) -> list[str]:
    """One mapping in /proc/PID/smaps, with the fields that matter and some others."""
    return [
        f"{at:x}-{at + size:x} rw-s {offset:08x} {device} {inode}        /dev/shm/a guest\n",
        f"Size:       {size >> 10:8} kB\n",
        "AnonHugePages:         0 kB\n",
        f"THPeligible:           {huge}\n",
        f"VmFlags: {flags}\n",
    ]


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """/sys/kernel/mm/transparent_hugepage with huge pages for who asks for them."""
    for name, text in {
        "enabled": "always [madvise] never",
        "shmem_enabled": "always within_size [advise] never deny force",
        "hugepages-2048kB/enabled": "always [inherit] madvise never",
        "hugepages-2048kB/shmem_enabled": "always [inherit] within_size advise never",
        "khugepaged/max_ptes_none": "511",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
    return tmp_path


@pytest.fixture
def mounted() -> str:
    """The number of a file system that is mounted here."""
    device = os.stat("/proc").st_dev
    return f"{os.major(device):02x}:{os.minor(device):02x}"


def spans(lines: list[str], ram: Ram, settings: Path) -> list[tuple[int, int]]:
    """Huge pages that are eligible: (first, how many), counted from BASE."""
    return [
        ((area.start - BASE) // HUGE_PAGE, (area.end - area.start) // HUGE_PAGE)
        for area in eligible(lines, ram, settings)
    ]


def whole(size: int = 8 * HUGE_PAGE, at: int = BASE) -> Ram:
    return Ram(os.getpid(), ((at, size),))


def test_ram_leaves_out_hugetlbfs() -> None:
    """Regions in pages that are huge anyway are not this module's."""
    regions = [
        Region("small", 512, SMALL_PAGE, BASE, None, 0),
        Region("huge", 4, HUGE_PAGE, 2 * BASE, None, 0),
    ]
    assert Ram.of(7, regions) == Ram(7, ((BASE, HUGE_PAGE),))


@pytest.mark.parametrize(
    ("ram", "expected"),
    [
        (((BASE, 8 * HUGE_PAGE),), [(0, 8)]),
        (((BASE + HUGE_PAGE, 2 * HUGE_PAGE), (BASE + 4 * HUGE_PAGE, HUGE_PAGE)), [(1, 2), (4, 1)]),
        (((BASE + SMALL_PAGE, 3 * HUGE_PAGE),), [(1, 2)]),
        (((BASE + SMALL_PAGE, HUGE_PAGE),), []),
        (((BASE + 8 * HUGE_PAGE, HUGE_PAGE),), []),
        (((BASE - HUGE_PAGE, 20 * HUGE_PAGE),), [(0, 8)]),
        ((), []),
    ],
)
def test_only_guest_ram(
    settings: Path, mounted: str, ram: tuple[tuple[int, int], ...], expected: list[tuple[int, int]]
) -> None:
    """Only whole huge pages of guest RAM, however the mapping goes on around it."""
    lines = smaps(8 * HUGE_PAGE, device=mounted, inode=9)
    assert spans(lines, Ram(os.getpid(), ram), settings) == expected


def test_split_mappings(settings: Path, mounted: str) -> None:
    """A region in several mappings, of which the kernel would not have one in huge pages."""
    lines = [
        *smaps(HUGE_PAGE, at=BASE - HUGE_PAGE),
        *smaps(2 * HUGE_PAGE, device=mounted, inode=9),
        *smaps(HUGE_PAGE, at=BASE + 2 * HUGE_PAGE, huge=0, device=mounted, inode=9),
        *smaps(2 * HUGE_PAGE, at=BASE + 3 * HUGE_PAGE, offset=5 << 21, device=mounted, inode=9),
    ]
    assert spans(lines, whole(), settings) == [(0, 2), (3, 2)]
    areas = list(eligible(lines, whole(), settings))
    assert [area.offset for area in areas] == [0, 5 << 21]
    inner = list(eligible(lines, whole(HUGE_PAGE, BASE + 4 * HUGE_PAGE), settings))
    assert [area.offset for area in inner] == [6 << 21]
    assert inner[0].mapping == (BASE + 3 * HUGE_PAGE, BASE + 5 * HUGE_PAGE)


@pytest.mark.parametrize("flags", ["um", "uw", "ui", "ht"])
def test_not_while_registered(settings: Path, mounted: str, flags: str) -> None:
    """Not where a userfaultfd still waits for pages, and not on hugetlbfs."""
    lines = smaps(HUGE_PAGE, flags=f"rd wr sh {flags}", device=mounted, inode=9)
    assert spans(lines, whole(), settings) == []


def test_not_where_it_cannot_be(settings: Path, mounted: str) -> None:
    """A mapping that begins within a huge page of its file cannot map it as one."""
    lines = smaps(2 * HUGE_PAGE, offset=SMALL_PAGE, device=mounted, inode=9)
    assert spans(lines, whole(), settings) == []


ANONYMOUS, MEMFD = ("00:00", 0, "enabled"), ("00:fffff", 9, "shmem_enabled")


@pytest.mark.parametrize(
    ("kind", "chosen", "flags", "wanted"),
    [
        (ANONYMOUS, ("madvise", "inherit"), "hg", True),
        (ANONYMOUS, ("madvise", "inherit"), "", False),
        (ANONYMOUS, ("always", None), "", True),  # before Linux 6.8
        (ANONYMOUS, ("always", "never"), "hg", False),  # only smaller ones are wanted
        (ANONYMOUS, ("never", "always"), "", True),
        (ANONYMOUS, ("never", "inherit"), "hg", False),
        (MEMFD, ("never", "inherit"), "", False),
        (MEMFD, ("advise", "inherit"), "hg", True),
        (MEMFD, ("never", "within_size"), "", True),
        (MEMFD, ("force", "inherit"), "", True),
        (MEMFD, ("deny", "inherit"), "hg", False),
    ],
)
def test_the_size_that_is_wanted(
    settings: Path,
    kind: tuple[str, int, str],
    chosen: tuple[str, str | None],
    flags: str,
    wanted: bool,
) -> None:
    """THPeligible may be said for the sake of another size; then it is not ours to give."""
    (device, inode, name), (top, two_mib) = kind, chosen
    (settings / name).write_text(f"other [{top}] another\n")
    if two_mib is None:
        (settings / "hugepages-2048kB" / name).unlink()
    else:
        (settings / "hugepages-2048kB" / name).write_text(f"[{two_mib}] another\n")
    lines = smaps(HUGE_PAGE, flags=f"rd wr {flags}", device=device, inode=inode)
    assert bool(spans(lines, whole(), settings)) is wanted


@pytest.mark.parametrize(("text", "holes"), [("511", 256), ("0", 0), ("64", 64), (None, 256)])
def test_most_holes(settings: Path, text: str | None, holes: int) -> None:
    """Half of a huge page, or less where the operator says so."""
    path = settings / "khugepaged/max_ptes_none"
    path.unlink() if text is None else path.write_text(text)
    assert hugepages.most_holes(settings) == holes


class Memory:
    """Huge pages of a tmpfs file, mapped in this process as a VMM has them."""

    def __init__(self, fd: int, data: list[int]) -> None:
        """`data`: how many small pages of each huge page there are."""
        size = len(data) * HUGE_PAGE
        os.ftruncate(fd, size)
        for huge, pages in enumerate(data):
            for page in range(pages):  # every other one first, so that there are many holes
                at = page * 2 if page * 2 < PAGES else (page * 2) % PAGES + 1
                os.pwrite(fd, b"guest" + bytes(91), huge * HUGE_PAGE + at * SMALL_PAGE)
        self.fd = fd
        self.mapped = mmap.mmap(fd, size)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.mapped))
        with open("/proc/self/maps", encoding="utf-8") as lines:
            spans = [line.split()[0].split("-") for line in lines]
        self.mapping = next(
            (int(a, 16), int(b, 16)) for a, b in spans if int(a, 16) <= start < int(b, 16)
        )
        self.area = Area(self.mapping, start, start + size, 0)
        self.start = start


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pcm", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def file(folder: Path) -> Iterator[int]:
    fd = os.open(folder / "ram", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


class Kernel:
    """Answers pc_collapse from a table of huge page to answers, the last one for good."""

    def __init__(self, start: int, answers: dict[int, list[int]] | None = None) -> None:
        self.start, self.answers = start, answers or {}
        self.asked: list[int] = []

    def pc_collapse(self, pidfd: int, address: int, size: int) -> int:
        assert size == HUGE_PAGE and pidfd >= 0
        huge = (address - self.start) // HUGE_PAGE
        self.asked.append(huge)
        answers = self.answers.get(huge, [0])
        return -(answers.pop(0) if len(answers) > 1 else answers[0])


def worked(
    monkeypatch: pytest.MonkeyPatch, memory: Memory, answers: dict[int, list[int]] | None = None
) -> tuple[list[int], list[float], dict[str, Any]]:
    """Which huge pages were asked for, the pauses that were wanted, and what was said of it."""
    kernel = Kernel(memory.start, answers)
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(hugepages, "lib", kernel)
    monkeypatch.setattr(
        hugepages, "log", SimpleNamespace(info=lambda _, **about: lines.append(about))
    )
    before = len(os.listdir("/proc/self/fd"))
    pauses = []
    with Work(os.getpid(), [memory.area]) as work:
        while (pause := work.turn()) is not None:
            pauses.append(pause)
        work.say("vm")
    assert len(os.listdir("/proc/self/fd")) == before
    (line,) = lines
    return kernel.asked, pauses, line


def test_holes_stay_holes(monkeypatch: pytest.MonkeyPatch, file: int, settings: Path) -> None:
    """Only where half of it is data at least: more memory than that is not to be had."""
    monkeypatch.setattr(hugepages, "most_holes", lambda: PAGES // 2)
    memory = Memory(file, [PAGES, 0, 1, PAGES // 2 - 1, PAGES // 2, PAGES - 1, 0])
    offset = os.lseek(file, 0, os.SEEK_CUR)
    asked, _, line = worked(monkeypatch, memory)
    assert asked == [0, 4, 5]
    assert line == {"vm": "vm", "pages": 3}
    assert os.lseek(file, 0, os.SEEK_CUR) == offset  # the VMM's own offset stays where it was
    monkeypatch.setattr(hugepages, "most_holes", lambda: 0)
    assert worked(monkeypatch, memory)[0] == [0]


@pytest.mark.parametrize(
    ("answers", "asked", "line"),
    [
        ({1: [errno.EINVAL]}, [0, 1, 2, 3], {"pages": 3, "left": 1, "error": "Invalid argument"}),
        ({1: [errno.EAGAIN, 0]}, [0, 1, 2, 3, 1], {"pages": 4}),
        (
            {1: [errno.EAGAIN], 2: [errno.EBUSY, errno.EAGAIN, 0]},
            [0, 1, 2, 3, 1, 2, 1, 2],
            {"pages": 3, "left": 1, "error": "Device or resource busy"},
        ),
        ({1: [errno.ENOMEM]}, [0, 1], {"pages": 1, "left": 1, "error": "Cannot allocate memory"}),
        ({0: [errno.EPERM]}, [0], {"pages": 0, "left": 1, "error": "Operation not permitted"}),
        ({2: [errno.ESRCH]}, [0, 1, 2], {"pages": 2, "left": 1, "error": "No such process"}),
    ],
)
def test_failures(
    monkeypatch: pytest.MonkeyPatch,
    file: int,
    answers: dict[int, list[int]],
    asked: list[int],
    line: dict[str, Any],
) -> None:
    """What is of one range is passed over or tried again; what the next would meet ends it."""
    memory = Memory(file, [PAGES] * 4)
    done = worked(monkeypatch, memory, answers)
    assert done[0] == asked
    assert done[2] == {"vm": "vm", **line}


def test_rests(monkeypatch: pytest.MonkeyPatch, file: int) -> None:
    """After each turn it wants to rest for as long as it has worked."""
    monkeypatch.setattr(hugepages, "TURN_S", 0.0)
    memory = Memory(file, [PAGES] * 3)
    monkeypatch.setattr(hugepages, "file_data", lambda *_: time.sleep(0.002) or PAGES)
    _, pauses, _ = worked(monkeypatch, memory)
    assert len(pauses) == 3 and min(pauses) >= 0.002


def test_anonymous_data() -> None:
    """A page that was written is data; one that was only read, or never touched, is none."""
    with mmap.mmap(-1, 2 * HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        view = ctypes.c_char.from_buffer(memory)
        start = -(-ctypes.addressof(view) // HUGE_PAGE) * HUGE_PAGE
        at = start - ctypes.addressof(view)
        del view
        for page in range(20):
            memory[at + page * 3 * SMALL_PAGE] = 1
        assert sum(memory[at + page * SMALL_PAGE] for page in range(100, 200)) == 0
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
        try:
            assert hugepages.anonymous_data(pagemap, start) == 20
        finally:
            os.close(pagemap)


class World:
    """A VM, four huge pages of it, and a kernel that lets a test do something meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, memory: Memory, folder: Path) -> None:
        self.vm = Vm("vm", Store(folder / "state"), None)
        self.driver: Any = object()
        self.vm.driver = self.driver
        self.made = 0
        self.meanwhile: Any = lambda: None
        monkeypatch.setattr(hugepages, "TURN_S", 0.0)  # one huge page each turn
        monkeypatch.setattr(hugepages, "find", lambda _: [memory.area])
        monkeypatch.setattr(hugepages, "lib", self)
        self.ram = Ram(os.getpid(), ((memory.start, 4 * HUGE_PAGE),))

    def pc_collapse(self, *_: int) -> int:
        self.made += 1
        trio.from_thread.run_sync(self.meanwhile)
        return 0


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, file: int, folder: Path) -> World:
    return World(monkeypatch, Memory(file, [PAGES] * 4), folder)


async def test_makes_all(world: World) -> None:
    """With nobody in its way it makes all that there is to make, and ends."""
    await hugepages.give_back(world.vm, world.ram)
    assert world.made == 4


async def test_steps_aside(world: World) -> None:
    """While a session has the VM nothing is done and nothing is open; then it begins anew."""
    claimed = ExitStack()
    before = len(os.listdir("/proc/self/fd"))
    world.meanwhile = lambda: (
        claimed.enter_context(world.vm.claim(world)) if world.made == 2 else None
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hugepages.give_back, world.vm, world.ram)
        await trio.testing.wait_all_tasks_blocked(0.05)
        while world.vm.claimed_by is None:
            await trio.testing.wait_all_tasks_blocked(0.05)
        assert world.made == 2
        assert len(os.listdir("/proc/self/fd")) == before
        claimed.close()
    assert world.made == 6


@pytest.mark.parametrize("how", ["detached", "given away", "ended"])
async def test_ends(world: World, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the VM is not here any more, one huge page at most is made for it."""

    def meanwhile() -> None:
        if how == "detached":
            world.vm.driver = None
        elif how == "given away":
            with world.vm.claim(world):
                world.vm.ownership = "granted"
            world.vm.driver = None
        else:
            monkeypatch.setattr(hugepages, "lib", SimpleNamespace(pc_collapse=lambda *_: -3))

    world.meanwhile = meanwhile
    with trio.fail_after(5):
        await hugepages.give_back(world.vm, world.ram)
    assert world.made == 1


async def test_detached_before_it_began(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for what could be huge takes its time in a large guest; it may be gone after it."""
    areas = hugepages.find(world.ram)

    def find(_: Ram) -> list[Area]:
        world.vm.driver = None
        return areas

    monkeypatch.setattr(hugepages, "find", find)
    with trio.fail_after(5):
        await hugepages.give_back(world.vm, world.ram)
    assert world.made == 0


async def test_given_away_while_aside(world: World) -> None:
    """A guest that a session took to another host is not looked at again."""

    def meanwhile() -> None:
        claimed.enter_context(world.vm.claim(world))
        world.vm.ownership = "granted"

    claimed = ExitStack()
    world.meanwhile = meanwhile
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hugepages.give_back, world.vm, world.ram)
        while world.vm.claimed_by is None:
            await trio.testing.wait_all_tasks_blocked(0.05)
        claimed.close()
    assert world.made == 1


async def test_stopped_with_the_daemon(world: World) -> None:
    """Cancelled, it is over with the huge page in work, and leaves nothing open."""
    before = len(os.listdir("/proc/self/fd"))
    async with trio.open_nursery() as nursery:
        world.meanwhile = nursery.cancel_scope.cancel
        nursery.start_soon(hugepages.give_back, world.vm, world.ram)
    assert world.made == 1
    assert len(os.listdir("/proc/self/fd")) == before


async def test_vmm_is_gone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VMM that has ended is no trouble, and neither is a bug: the daemon's nursery lives on."""

    def gone(_: Ram) -> list[Area]:
        raise ProcessLookupError(errno.ESRCH, "No such process")

    monkeypatch.setattr(hugepages, "find", gone)
    await hugepages.give_back(world.vm, world.ram)
    monkeypatch.setattr(hugepages, "find", lambda _: [None])
    await hugepages.give_back(world.vm, world.ram)
    assert world.made == 0
