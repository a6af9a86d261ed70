# SPDX-License-Identifier: Apache-2.0
"""Headroom against folders that look like /proc, /sys and the cgroup file systems."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopyd.sessions import headroom
from postcopyd.sessions.headroom import Arrival, Host
from postcopyd.vmm import Region

GIB = 1 << 30
PID = 42


class FakeHost:
    """A host with 8 GiB available and no groups, until a test says otherwise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = Host(folder / "proc", folder / "sys")
        self.mounts: list[str] = []
        self.write("proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {8 * GIB >> 10} kB\n")
        self.write(f"proc/{PID}/cgroup", "0::/")

    def write(self, path: str, text: object) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def mount(self, kind: str, options: str, root: str = "/") -> str:
        name = f"cgroups-{len(self.mounts)}"
        self.mounts.append(f"30 1 0:9 {root} {self.folder}/{name} rw - {kind} {kind} {options}")
        self.write("proc/self/mountinfo", "\n".join(self.mounts))
        return name

    def unified(self, path: str, **files: object) -> None:
        defaults: dict[str, object] = {"max": "max", "high": "max", "current": 0}
        for key, value in (defaults | files).items():
            name = "memory.stat" if key == "stat" else f"memory.{key}"
            self.write(f"{path}/{name}", value)


@pytest.fixture
def fake(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, GIB)
    yield fd
    os.close(fd)


def ram(fd: int | None = None, size: int = GIB) -> Region:
    return Region("ram0", size >> 12, 4096, 0x7F0000000000, fd, 0)


def problems(fake: FakeHost, arrival: Arrival, *others: Arrival) -> list[str]:
    return headroom.problems(arrival, headroom.maps(arrival, fake.host), others, fake.host)


def here(*regions: Region, stager: int | None = None) -> Arrival:
    return Arrival(PID, regions, stager)


def test_all_fits(fake: FakeHost, memfd: int) -> None:
    """A guest that fits everywhere has no problem."""
    assert problems(fake, here(ram(memfd))) == []


def test_what_the_host_has_is_counted_less_what_others_were_promised(fake: FakeHost) -> None:
    """6 GiB promised to others leave no room for a guest of 2 GiB on a host with 8. They are no
    matter of a group that they are not in."""
    mount = fake.mount("cgroup2", "rw")
    for pid in (PID, PID + 1):
        fake.write(f"proc/{pid}/cgroup", f"0::/web{pid}")
        fake.unified(f"{mount}/web{pid}", max=7 * GIB)
    assert problems(fake, here(ram(size=2 * GIB)), Arrival(PID + 1, [ram(size=5 * GIB)])) == []
    (problem,) = problems(fake, here(ram(size=2 * GIB)), Arrival(PID + 1, [ram(size=6 * GIB)]))
    assert "needs 8.01 GiB more here and the host has 8.00 GiB left" in problem


@pytest.mark.parametrize("limited", ["", "/machine", "/machine/web1"])
@pytest.mark.parametrize("file", ["max", "high"])
def test_each_group_above_the_vmm_counts(fake: FakeHost, limited: str, file: str) -> None:
    """A limit on any ancestor is found and named, throttling (memory.high) like killing."""
    mount = fake.mount("cgroup2", "rw")
    fake.write(f"proc/{PID}/cgroup", "0::/machine/web1")
    for group in ("", "/machine", "/machine/web1"):
        fake.unified(mount + group)
    fake.unified(mount + limited, **{file: GIB // 2}, current=0)
    (problem,) = problems(fake, here(ram()))
    assert f"memory cgroup {limited or '/'} has 0.50 GiB left" in problem


def test_whoever_is_charged_counts(fake: FakeHost) -> None:
    """Pages that come before the guest are charged to the daemon, whose limits count as well."""
    mount = fake.mount("cgroup2", "rw")
    for pid, group in ((PID, "/machine"), (PID + 1, "/daemon")):
        fake.write(f"proc/{pid}/cgroup", f"0::{group}")
        fake.unified(mount + group)
    fake.unified(mount + "/daemon", max=GIB // 2, current=0)
    assert problems(fake, here(ram())) == []
    (problem,) = problems(fake, here(ram(), stager=PID + 1))
    assert "memory cgroup /daemon has 0.50 GiB left" in problem


def test_page_cache_makes_way(fake: FakeHost) -> None:
    """Inactive page cache of a group is not in the way of its guest."""
    mount = fake.mount("cgroup2", "rw")
    fake.write(f"proc/{PID}/cgroup", "0::/web1")
    fake.unified(f"{mount}/web1", max=2 * GIB, current=GIB + GIB // 2)
    assert len(problems(fake, here(ram()))) == 1
    fake.unified(f"{mount}/web1", max=2 * GIB, current=GIB + GIB // 2, stat=f"inactive_file {GIB}")
    assert problems(fake, here(ram())) == []


def test_the_old_hierarchy_counts_too(fake: FakeHost) -> None:
    """cgroup v1: the memory controller's own tree, and no other controller's."""
    fake.mount("cgroup", "rw,cpu")
    mount = fake.mount("cgroup", "rw,memory", root="/container")
    fake.write(f"proc/{PID}/cgroup", "3:cpu:/x\n4:memory:/container/web1")
    fake.write(f"{mount}/memory.limit_in_bytes", 0x7FFFFFFFFFFFF000)
    fake.write(f"{mount}/web1/memory.limit_in_bytes", GIB)
    fake.write(f"{mount}/web1/memory.usage_in_bytes", GIB // 4)
    fake.write(f"{mount}/web1/memory.stat", "total_inactive_file 0")
    (problem,) = problems(fake, here(ram()))
    assert "memory cgroup /web1 has 0.75 GiB left: raise its memory.limit_in_bytes" in problem


def test_what_the_file_has_already_counts_as_had(fake: FakeHost, memfd: int) -> None:
    """A preallocated file needs nothing: its pages are given back before others come."""
    fake.write("proc/meminfo", f"MemAvailable: {GIB >> 11} kB")
    assert len(problems(fake, here(ram(memfd)))) == 1
    os.posix_fallocate(memfd, 0, GIB * 3 // 4)
    assert problems(fake, here(ram(memfd))) == []


def mapped(fake: FakeHost, start: int, size: int, **fields: str) -> str:
    """A mapping of the VMM; sizes in its fields are in GiB."""
    lines = "".join(
        f"{key}: {value}\n" if key == "VmFlags" else f"{key}: {int(float(value) * GIB) >> 10} kB\n"
        for key, value in fields.items()
    )
    return f"{start:x}-{start + size:x} rw-p 00000000 00:00 0\n{lines}".rstrip()


def test_what_private_memory_has_already_counts_as_had(fake: FakeHost) -> None:
    """A preallocated or locked one gives back what it has before other pages come. Memory beside it
    in one mapping is not counted for it. The stager has to have room for all of it."""
    guest = here(ram())
    fake.write("proc/meminfo", f"MemAvailable: {GIB >> 11} kB")
    fake.write(f"proc/{PID}/smaps", mapped(fake, 0x7F0000000000, GIB, Rss="0.75"))
    assert problems(fake, guest) == []
    fake.write(f"proc/{PID}/smaps", mapped(fake, 0x7F0000000000, 2 * GIB, Rss="1.25"))
    (problem,) = problems(fake, guest)
    assert "needs 0.75 GiB more" in problem
    fake.write(f"proc/{PID}/smaps", mapped(fake, 0x7F0000000000, GIB, Rss="1"))
    mount = fake.mount("cgroup2", "rw")
    fake.write(f"proc/{PID + 1}/cgroup", "0::/daemon")
    fake.unified(f"{mount}/daemon", max=GIB // 2)
    assert problems(fake, guest) == []
    (problem,) = problems(fake, here(ram(), stager=PID + 1))
    assert "cgroup /daemon has 0.50 GiB left" in problem


def test_what_the_kernel_says_of_private_memory() -> None:
    """Half of it was touched."""
    with mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_DONTDUMP)  # so it is no part of another mapping
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory[: 32 << 20] = b"\1" * (32 << 20)
        view = ctypes.c_char.from_buffer(memory)
        region = Region("ram0", 64 << 8, 4096, ctypes.addressof(view), None, 0)
        seen = headroom.maps(Arrival(os.getpid(), [region]))
        del view
    assert headroom._lacks([region], seen) == 32 << 20


def test_a_tmpfs_that_is_too_small_is_named(fake: FakeHost) -> None:
    """The size of the file system of the RAM file is a limit like the others."""
    stat = os.statvfs("/dev/shm")
    too_much = stat.f_blocks * stat.f_frsize + GIB
    fake.write("proc/meminfo", f"MemAvailable: {too_much >> 9} kB")
    path = Path("/dev/shm") / f"headroom-{os.getpid()}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        (problem,) = problems(fake, here(ram(fd, too_much)))
    finally:
        os.close(fd)
        path.unlink()
    assert f"the tmpfs of {path} has" in problem


def test_huge_pages_come_from_their_pool(fake: FakeHost) -> None:
    """Free pages that are reserved by somebody, and an exhausted overcommit, are not free."""
    pool = "sys/kernel/mm/hugepages/hugepages-2048kB"
    for name, value in (("free", 600), ("resv", 200), ("nr_overcommit", 0), ("surplus", 0)):
        fake.write(f"{pool}/{name}_hugepages", value)
    region = Region("ram0", 512, 2 << 20, 0, None, 0)
    (limit,) = headroom.hugetlb_limits(PID, region.page_size, fake.host)
    assert limit.room == 400 * (2 << 20)
    fake.write(f"{pool}/nr_overcommit_hugepages", 112)
    (limit,) = headroom.hugetlb_limits(PID, region.page_size, fake.host)
    assert limit.room == region.size


@pytest.mark.parametrize(
    ("flags", "had", "fits"), [("nr", 0, False), ("nr", 1, True), ("rd", 0, True)]
)
def test_huge_pages_that_it_has_or_has_reserved(
    fake: FakeHost, flags: str, had: int, fits: bool
) -> None:
    """They come back to it. In passes private ones wait in ordinary memory beside them."""
    pool = "sys/kernel/mm/hugepages/hugepages-2048kB"
    for name in ("free", "resv", "nr_overcommit", "surplus"):
        fake.write(f"{pool}/{name}_hugepages", 0)
    region = Region("ram0", 512, 2 << 20, 0x7F0000000000, None, 0)
    fields = {"Private_Hugetlb": str(had), "VmFlags": f"rd wr {flags}"}
    fake.write(f"proc/{PID}/smaps", mapped(fake, region.address, GIB, **fields))
    assert ([] == problems(fake, here(region))) == fits
    fake.write("proc/meminfo", f"MemAvailable: {GIB >> 11} kB")
    assert any("the host has 0.50" in one for one in problems(fake, here(region, stager=PID)))
