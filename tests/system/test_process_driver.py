# SPDX-License-Identifier: Apache-2.0
"""The process driver against the demo VMM and a KVM vCPU."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from needs import missing
from process_driver import QUICK, driver, pieces_of, save_all

from postcopyd.host import procfs
from postcopyd.vmm import Region, Shape, VmmError, VmmGone
from postcopyd.vmm.process.driver import ProcessVmm

pytestmark = pytest.mark.trio

ROOT = Path(__file__).parents[2]
FLAGS = [
    "-O2",
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Werror",
    "-pthread",
]
FREE_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")

UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER = 0xC018AA3F, 0xC020AA00, 0x8010AA01
UFFDIO_COPY, UFFDIO_WAKE = 0xC028AA03, 0x8010AA02


# --- parts


def compile_c(folder: Path, source: str) -> Path:
    program = folder / Path(source).stem
    subprocess.run(["cc", *FLAGS, "-o", program, ROOT / source], check=True)
    return program


@pytest.fixture(scope="module")
def demo_vmm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(tmp_path_factory.mktemp("demo"), "examples/vmm.c")


@pytest.fixture(scope="module")
def kvm_vmm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        missing("/dev/kvm")
    return compile_c(tmp_path_factory.mktemp("kvm"), "tests/guests/kvm_vmm.c")


class Guest:
    """A VMM's process, and the demo guest's own verbs on a connection of the test's."""

    def __init__(self, program: Path, path: Path, *options: str) -> None:
        self.socket = str(path)
        self.process = subprocess.Popen(
            [program, "--socket", path, *options], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        assert json.loads(first or "{}").get("event") == "listening"

    def say(self, line: str) -> dict[str, int]:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(self.socket)
            client.sendall(line.encode() + b"\n")
            answer = client.makefile().readline().split()
        assert answer[:1] == ["ok"], answer
        return {key: int(value) for key, value in (word.split("=") for word in answer[1:])}

    def wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    def tell(self, line: str) -> None:
        """Without an answer."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self.socket)
            client.sendall(line.encode() + b"\n")


Start = Callable[..., Guest]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    guests: list[Guest] = []

    def start_one(program: Path, *options: str) -> Guest:
        guests.append(Guest(program, tmp_path / f"vmm{len(guests)}.sock", *options))
        return guests[-1]

    yield start_one
    for guest in guests:
        guest.process.kill()
        guest.process.communicate()


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


class Pager(threading.Thread):
    """Answers the faults of one userfaultfd from another VMM's memory, page by page."""

    def __init__(self, uffd: int, there: Shape, here: Shape) -> None:
        super().__init__()
        self.uffd, self.here, self.faults = uffd, here, 0
        self.memory = os.open(f"/proc/{there.pid}/mem", os.O_RDONLY)
        self.pairs = list(zip(there.regions, here.regions, strict=True))
        self.failed: BaseException | None = None
        self.done = os.eventfd(0)
        fcntl.ioctl(uffd, UFFDIO_API, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
        for region in here.regions:
            request = struct.pack("QQQQ", region.address, region.size, 1, 0)
            fcntl.ioctl(uffd, UFFDIO_REGISTER, bytearray(request))
        self.start()

    def run(self) -> None:
        try:
            while self.done not in (ready := select.select([self.uffd, self.done], [], [])[0]):
                assert ready
                with contextlib.suppress(BlockingIOError):
                    self.answer(os.read(self.uffd, 32))
        except BaseException as error:
            self.failed = error

    def answer(self, message: bytes) -> None:
        assert message[0] == 0x12
        self.faults += 1
        self.copy(struct.unpack_from("Q", message, 16)[0])

    def copy(self, address: int) -> None:
        there, here = next(
            pair for pair in self.pairs if 0 <= address - pair[1].address < pair[1].size
        )
        size = here.page_size
        address &= -size
        page = os.pread(self.memory, size, there.address + address - here.address)
        source = ctypes.create_string_buffer(page, size)
        request = struct.pack("QQQQq", address, ctypes.addressof(source), size, 0, 0)
        try:
            fcntl.ioctl(self.uffd, UFFDIO_COPY, bytearray(request))
        except FileExistsError:
            fcntl.ioctl(self.uffd, UFFDIO_WAKE, bytearray(struct.pack("QQ", address, size)))

    def finish(self) -> None:
        """All that is missing, then unregistered."""
        for _, region in self.pairs:
            for address in range(region.address, region.address + region.size, region.page_size):
                self.copy(address)
            request = struct.pack("QQ", region.address, region.size)
            fcntl.ioctl(self.uffd, UFFDIO_UNREGISTER, bytearray(request))
        self.stop()
        assert self.failed is None

    def stop(self) -> None:
        os.eventfd_write(self.done, 1)
        self.join()
        for fd in (self.done, self.memory, self.uffd):
            os.close(fd)


def copy_file(there: Region, here: Region) -> None:
    """By hand: what the source's file has; its holes stay holes."""
    assert there.fd is not None and here.fd is not None
    at, end = there.offset, there.offset + there.size
    with contextlib.suppress(OSError):
        while (at := os.lseek(there.fd, at, os.SEEK_DATA)) < end:
            os.pwrite(here.fd, os.pread(there.fd, 4096, at), at - there.offset + here.offset)
            at += 4096


# --- the demo VMM


@pytest.mark.parametrize("how", ["shutdown", "shutdown while asked", "kill", "end"])
async def test_an_end_that_was_meant(demo_vmm: Path, start: Start, how: str) -> None:
    """The VMM's last word tells an end that its guest meant from a crash, and from one of ours."""
    guest = start(demo_vmm, "--memory", "16M")
    async with driver(guest.socket) as vmm:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vmm.gone)
                nursery.start_soon(vmm.gone)  # a session's and its daemon's
                await trio.testing.wait_all_tasks_blocked()
                if how == "kill":
                    guest.process.kill()
                elif how == "end":
                    await vmm.end()
                else:
                    guest.tell("shutdown")
                    with contextlib.suppress(VmmGone):
                        while how != "shutdown":
                            await vmm.inspect("source")
        assert vmm.farewell == ("its guest shut down" if how.startswith("shutdown") else None)


async def test_inspect_describes_the_vmm_as_it_is(demo_vmm: Path, start: Start) -> None:
    """State, process, regions, page size and facts are the VMM's, and nothing is in the way."""
    guest = start(demo_vmm, "--memory", "8M", "--regions", "2", "--threads", "3")
    async with driver(guest.socket) as vmm:
        shape = await vmm.inspect("source")
        assert ("running", guest.process.pid, ()) == (shape.state, shape.pid, shape.problems)
        assert [("ram0", 1024, 4096, 0), ("ram1", 1024, 4096, 4 << 20)] == [
            (region.name, region.pages, region.page_size, region.offset) for region in shape.regions
        ]
        assert {
            "vmm": "demo",
            "layout": "memory=8388608 regions=2 page=4096",
            "cpu": "threads=3 wild=1",
        } == shape.facts
        shape.close()
        wrong_role = await vmm.inspect("destination")
        assert "waits for an incoming migration" in wrong_role.problems[0]
        wrong_role.close()


@pytest.fixture
def huge_tmpfs(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "huge"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m,huge=always", "tests", folder]
    if os.geteuid() != 0 or subprocess.run(mount).returncode:
        missing("root, and a kernel with transparent huge pages, for a tmpfs of them")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


async def test_huge_pages_of_a_vmm_that_waits_for_a_guest(
    demo_vmm: Path, start: Start, huge_tmpfs: Path, kernel_says: Callable[..., None]
) -> None:
    """Where the kernel would put zeros into RAM that is waited for, a VMM that may get huge pages
    is refused with what to do, and one that has forbidden them is not."""
    ram = ("--memory", "8M", "--backing", "file", "--path")
    waits = start(demo_vmm, *ram, str(huge_tmpfs / "a"), "--incoming")  # the example forbids them
    runs = start(demo_vmm, *ram, str(huge_tmpfs / "b"))
    for zeros in (0, 1):
        kernel_says(zeros=zeros)
        for guest in (waits, runs):
            async with driver(guest.socket) as vmm:
                shape = await vmm.inspect("destination")
                shape.close()
            exposed = [problem for problem in shape.problems if "MADV_NOHUGEPAGE" in problem]
            assert len(exposed) == (guest is runs and zeros), shape.problems


@pytest.mark.parametrize("options", [("--backing", "file"), ("--backing", "memfd", "--wild", "5")])
async def test_a_guest_whose_memory_is_copied_by_hand_goes_on(
    demo_vmm: Path, start: Start, shm: Path, options: tuple[str, ...]
) -> None:
    """Save, copy the file, load, run: every page is what the guest wrote, with several regions."""
    more = ["--memory", "16M", "--regions", "2", "--device-state", "3M", *options]
    files = [["--path", str(shm / side)] if "file" in options else [] for side in "ab"]
    one = start(demo_vmm, *more, *files[0])
    two = start(demo_vmm, *more, *files[1], "--incoming")
    one.wait(lambda: one.say("verify")["pages"] == 4096)
    async with driver(one.socket) as source, driver(two.socket) as destination:
        there, here = await source.inspect("source"), await destination.inspect("destination")
        assert () == there.problems + here.problems
        assert there.facts == here.facts
        state = await save_all(source)
        assert len(state) > 3 << 20
        for a, b in zip(there.regions, here.regions, strict=True):
            copy_file(a, b)
        await destination.load(pieces_of(state))
        assert {"pages": 4096, "bad": 0, "zero": 0, "stale": 0, "torn": 0} == two.say("verify")
        await destination.run()
        assert "running" == (await destination.inspect("source")).state
        assert 0 == two.say("verify")["bad"]
        await source.finish(keep=False)
        assert 0 == one.process.wait(10)
        await destination.end()
        assert [] == list(shm.iterdir())
        there.close()
        here.close()


@pytest.mark.parametrize("backing", ["memfd", "anonymous", "hugetlbfs"])
async def test_missing_pages_are_faulted_in_through_the_userfaultfd(
    demo_vmm: Path, start: Start, backing: str
) -> None:
    """After adopt every page is missing; load and the running guest fault each one in, once."""
    page = 2 << 20 if backing == "hugetlbfs" else 4096
    if page > 4096 and int(FREE_HUGE_PAGES.read_text()) < 8:
        missing("8 free huge pages of 2 MiB")
    options = ["--memory", "8M", "--backing", backing, "--threads", "3"]
    one, two = start(demo_vmm, *options), start(demo_vmm, *options, "--incoming")
    assert {} == one.say(f"balloon {page} {page}")
    async with driver(one.socket) as source, driver(two.socket) as destination:
        there, here = await source.inspect("source"), await destination.inspect("destination")
        (uffd,) = await destination.adopt(here)
        pager = Pager(uffd, there, here)
        state = await save_all(source)
        await destination.load(pieces_of(state))
        assert pager.faults == 1  # --load-touches
        await destination.run()
        assert {"pages": 2048, "bad": 0, "zero": 0, "stale": 0, "torn": 0} == two.say("verify")
        assert (8 << 20) // page <= pager.faults  # two threads may wait for one page
        pager.finish()
        await destination.release()
        assert source.before == "running"
        await source.finish(keep=True)
        shape = await source.inspect("source")
        assert shape.state == "paused"
        for each in (there, here, shape):
            each.close()


async def test_pages_wait_and_never_read_as_zeros_when_the_daemon_dies(
    demo_vmm: Path, start: Start
) -> None:
    """The VMM's own copy of the userfaultfd keeps pages missing, and is handed out again."""
    options = ["--memory", "4M", "--load-touches", "0"]
    one, two = start(demo_vmm, *options), start(demo_vmm, *options, "--incoming")
    async with driver(one.socket) as source:
        there = await source.inspect("source")
        async with driver(two.socket) as destination:
            here = await destination.inspect("destination")
            pager = Pager((await destination.adopt(here))[0], there, here)
            await destination.load(pieces_of(await save_all(source)))
            pager.stop()
            await destination.run()
        async with driver(two.socket) as destination:
            (uffd,) = await destination.adopted()
            with pytest.raises(
                OSError, match="Invalid argument"
            ):  # the API is done on it: it is the same one
                fcntl.ioctl(uffd, UFFDIO_API, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
            # Faults that were read and not answered come again after a wake.
            region = here.regions[0]
            fcntl.ioctl(
                uffd, UFFDIO_WAKE, bytearray(struct.pack("QQ", region.address, region.size))
            )
            with os.fdopen(os.dup(uffd), "rb", 0) as messages:
                assert select.select([messages], [], [], 30)[0]
            pager.memory = os.open(f"/proc/{there.pid}/mem", os.O_RDONLY)
            pager.uffd = uffd
            for address in range(region.address, region.address + region.size, 4096):
                pager.copy(address)
            assert 0 == two.say("verify")["bad"]
            os.close(uffd)
            os.close(pager.memory)
        there.close()
        here.close()


async def test_a_lost_page_is_noticed(demo_vmm: Path, start: Start) -> None:
    """The demo guest tells zero, stale and torn pages apart, so that a clean verify means much."""
    guest = start(demo_vmm, "--memory", "4M")
    async with driver(guest.socket) as vmm:
        shape = await vmm.inspect("source")
        await save_all(vmm)
        while guest.say("verify")["pages"] != 1024:
            pass
        (region,) = shape.regions
        assert region.fd is not None
        old = os.pread(region.fd, 4096, 7 * 4096)
        if not any(old):
            pytest.fail("the guest has not written page 7 yet")
        version = struct.unpack_from("Q", old, 8)[0]
        os.pwrite(region.fd, bytes(4096), 5 * 4096)
        os.pwrite(region.fd, b"\1" * 100, 6 * 4096 + 2000)
        assert {"pages": 1024, "bad": 2, "zero": 1, "stale": 0, "torn": 1} == guest.say("verify")
        await vmm.rollback()
        guest.wait(lambda: version_of(region, 7) > version)
        await save_all(vmm)
        os.pwrite(region.fd, old, 7 * 4096)
        assert 1 == guest.say("verify")["stale"]
        shape.close()


def version_of(region: Region, page: int) -> int:
    assert region.fd is not None
    version: int = struct.unpack("Q", os.pread(region.fd, 8, page * 4096 + 8))[0]
    return version


@pytest.mark.parametrize("when", ["before", "stopped", "saving"])
async def test_rollback_puts_the_guest_back_as_it_was(
    demo_vmm: Path, start: Start, when: str
) -> None:
    """A save cancelled anywhere is undone: a running guest runs, a paused one stays paused."""
    guest = start(demo_vmm, "--memory", "4M", "--device-state", "8M")
    async with driver(guest.socket) as vmm:

        async def cancelled_save() -> None:
            with trio.CancelScope() as scope:
                if when == "before":
                    scope.cancel()

                async def send(piece: bytes) -> None:
                    scope.cancel()
                    await trio.lowlevel.checkpoint()

                await vmm.save(send, scope.cancel if when == "stopped" else lambda: None)
            assert scope.cancelled_caught

        async def state() -> str:
            shape = await vmm.inspect("source")
            shape.close()
            return shape.state

        await cancelled_save()
        await vmm.rollback()
        await vmm.rollback()
        assert "running" == await state()
        await vmm._do("stop")
        await cancelled_save()
        await vmm.rollback()
        assert "paused" == await state()


async def test_a_disconnect_half_way_changes_nothing(demo_vmm: Path, start: Start) -> None:
    """A driver lost between stop and save, or in the middle of load, leaves the VMM as it was."""
    one = start(demo_vmm, "--memory", "4M")
    two = start(demo_vmm, "--memory", "4M", "--incoming")
    async with driver(one.socket) as vmm:
        await vmm._do("stop")
    async with driver(one.socket) as vmm:
        shape = await vmm.inspect("source")
        assert "paused" == shape.state
        state = await save_all(vmm)

    class Lost(Exception):
        pass

    async def cut_short() -> AsyncIterator[bytes]:
        yield state[:300]
        raise Lost

    async with driver(two.socket) as vmm:
        with pytest.raises(Lost):
            await vmm.load(cut_short())
        here = await vmm.inspect("destination")
        assert "incoming" == here.state
        with pytest.raises(VmmError, match="cut short"):
            await vmm.load(pieces_of(state[:-8]))
        with pytest.raises(VmmError, match="damaged"):
            await vmm.load(pieces_of(state[:-1] + b"?"))
        copy_file(shape.regions[0], here.regions[0])
        await vmm.load(pieces_of(state))
        await vmm.run()
    assert 0 == two.say("verify")["bad"]
    shape.close()
    here.close()


def userfaultfds(pid: int) -> int:
    links = procfs.descriptors(pid).values()
    return sum(link == "anon_inode:[userfaultfd]" for link in links)


async def test_track_leaves_nothing_in_the_vmm(demo_vmm: Path, start: Start) -> None:
    """A running source gives a new userfaultfd each time and keeps none, whoever dies when."""
    guest = start(demo_vmm, "--memory", "4M")
    pid = guest.process.pid
    async with driver(guest.socket) as vmm:
        (left,) = await vmm.adopted()  # by a daemon that was killed between two requests
        os.close(left)
        assert userfaultfds(pid) == 1
        for _ in range(20):
            uffd = await vmm.track()
            assert userfaultfds(pid) == 0
            fcntl.ioctl(uffd, UFFDIO_API, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))  # once only
            os.close(uffd)
        ours = os.listdir("/proc/self/fd")
        for attempt in range(40):
            with trio.move_on_after(attempt * 0.00005):
                os.close(await vmm.track())
            assert userfaultfds(pid) == 0, attempt
        shape = await vmm.inspect("source")
        shape.close()
        assert len(os.listdir("/proc/self/fd")) <= len(ours)
        (left,) = await vmm.adopted()
        os.close(left)
        await vmm.rollback()
        assert userfaultfds(pid) == 0
        assert shape.state == "running"
    assert 0 == guest.say("verify")["bad"]


async def test_a_vmm_is_held_still_for_a_moment(demo_vmm: Path, start: Start) -> None:
    """Stopped inside and running afterwards, however it is left; a paused guest stays paused."""
    guest = start(demo_vmm, "--memory", "4M")
    async with driver(guest.socket) as vmm:
        with pytest.raises(ZeroDivisionError):
            async with vmm.still():
                assert "paused" == await vmm._hello()
                assert vmm.before == "running"
                raise ZeroDivisionError
        assert ("running", None) == (await vmm._hello(), vmm.before)
        for attempt in range(60):
            with trio.move_on_after(attempt * 0.00002):
                async with vmm.still():
                    await trio.sleep(0.0003)
            assert "running" == await vmm._hello(), attempt
        await vmm._do("stop")
        async with vmm.still():
            assert "paused" == await vmm._hello()
        assert "paused" == await vmm._hello()


async def test_a_vmm_that_does_not_run_again_is_named(demo_vmm: Path, start: Start) -> None:
    """The sentence says that the guest stays stopped, and rollback runs it."""
    guest = start(demo_vmm, "--memory", "4M", "--misbehave", "refuse:run")
    async with driver(guest.socket) as vmm:
        with pytest.raises(VmmError, match=r"was not run again: .*told to refuse run"):
            async with vmm.still():
                pass
        assert ("paused", "running") == (await vmm._hello(), vmm.before)
        await vmm.rollback()
        assert "running" == await vmm._hello()


async def test_the_last_word_of_a_vmm_that_is_asked_after_its_end(
    demo_vmm: Path, start: Start
) -> None:
    guest = start(demo_vmm, "--memory", "16M")
    async with driver(guest.socket) as vmm:
        guest.tell("shutdown")
        guest.process.wait(10)
        with pytest.raises(VmmGone):
            await vmm.prepare()
        await vmm.gone()
        assert vmm.farewell == "its guest shut down"


@pytest.mark.parametrize("how", ["seen", "direct", "unseen"])
async def test_a_vmm_says_how_its_writes_are_seen(demo_vmm: Path, start: Start, how: str) -> None:
    """Its own word goes to the shape of the source."""
    guest = start(demo_vmm, "--memory", "4M", "--writes", how)
    async with driver(guest.socket) as vmm:
        shape = await vmm.inspect("source")
        shape.close()
    assert (how == "direct", how == "unseen") == (
        shape.direct_io is not None and "demo, as it says," in shape.direct_io,
        shape.untracked is not None and "demo says so" in shape.untracked,
    )
    assert [shape.direct_io, shape.untracked].count(None) == 1 + (how == "seen")


async def test_another_process_that_maps_the_ram_cannot_be_tracked(
    demo_vmm: Path, start: Start
) -> None:
    """What it writes is not in the VMM's page tables, so it is named."""
    guest = start(demo_vmm, "--memory", "4M")
    script = (
        "import mmap,sys\n"
        "m=mmap.mmap(int(sys.argv[1]), 4096)\n"
        "print('mapped',flush=True); sys.stdin.read()"
    )
    async with driver(guest.socket) as vmm:
        shape = await vmm.inspect("source")
        fd = shape.regions[0].fd
        assert fd is not None
        other = subprocess.Popen(
            [sys.executable, "-c", script, str(fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[fd],
        )
        with other:
            assert other.stdout is not None
            other.stdout.readline()
            again = await vmm.inspect("source")
            other.kill()
        assert again.untracked is not None
        assert f"process {other.pid} (" in again.untracked
        assert shape.untracked is None
        shape.close()
        again.close()


async def test_run_before_load_is_declined_by_nobody_and_refused(
    demo_vmm: Path, start: Start
) -> None:
    """A refusal counts as Declined only when the VMM says it is paused with a guest loaded."""
    guest = start(demo_vmm, "--memory", "4M", "--incoming")
    async with driver(guest.socket) as vmm:
        with pytest.raises(VmmError, match="no device state has been loaded"):
            await vmm.run()


async def test_a_running_guest_cannot_be_discarded(demo_vmm: Path, start: Start) -> None:
    """Adopting the wrong VMM, one that runs, is refused by it and costs it nothing."""
    guest = start(demo_vmm, "--memory", "4M")
    async with driver(guest.socket) as vmm:
        shape = await vmm.inspect("destination")
        with pytest.raises(VmmError, match="only while incoming"):
            await vmm.adopt(shape)
        shape.close()
    assert 0 == guest.say("verify")["bad"]


async def test_a_second_driver_is_turned_away_with_a_sentence(demo_vmm: Path, start: Start) -> None:
    """While one client drives the VMM another is told so at once; afterwards it may."""
    guest = start(demo_vmm, "--memory", "4M")
    async with driver(guest.socket):
        with pytest.raises(VmmError, match="another client holds this VMM"):
            await ProcessVmm.connect("web1", guest.socket)
    async with driver(guest.socket):
        pass


async def test_end_also_ends_a_vmm_that_does_not_answer(demo_vmm: Path, start: Start) -> None:
    """A stopped process cannot quit; SIGKILL through its pidfd ends it, and gone() returns."""
    guest = start(demo_vmm, "--memory", "4M")
    async with driver(guest.socket, QUICK) as vmm, trio.open_nursery() as nursery:
        nursery.start_soon(vmm.gone)
        guest.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, guest.process.pid, os.WSTOPPED)  # or it may still answer
        with trio.fail_after(10):
            await vmm.end()
    assert -signal.SIGKILL == guest.process.wait(10)


# --- a real vCPU


@pytest.mark.parametrize("backing", ["memfd", "anonymous"])
async def test_a_kvm_vcpu_faults_its_memory_in_and_goes_on(
    kvm_vmm: Path, start: Start, backing: str
) -> None:
    """KVM's accesses from kernel mode fault through the userfaultfd; the vCPU finds no bad page."""
    one = start(kvm_vmm, "--memory", "2", "--backing", backing)
    two = start(kvm_vmm, "--memory", "2", "--backing", backing, "--incoming")
    one.wait(lambda: one.say("progress")["sweeps"] > 3)
    async with driver(one.socket) as source, driver(two.socket) as destination:
        there, here = await source.inspect("source"), await destination.inspect("destination")
        assert () == there.problems + here.problems
        pager = Pager((await destination.adopt(here))[0], there, here)
        state = await save_all(source)
        sweeps = one.say("progress")["sweeps"]
        await destination.load(pieces_of(state))
        await destination.run()
        two.wait(lambda: two.say("progress")["sweeps"] > sweeps + 2)
        assert pager.faults > 256  # its code, and every page it walks
        pager.finish()
        await destination.release()
        assert {"pages": 256, "bad": 0} == two.say("verify")
        await source.rollback()
        one.wait(lambda: one.say("progress")["sweeps"] > sweeps + 2)
        assert {"pages": 256, "bad": 0} == one.say("verify")
        there.close()
        here.close()
