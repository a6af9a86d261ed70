# SPDX-License-Identifier: Apache-2.0
"""The demo's guest in QEMU with all that tests, chaos and benchmarks want of it: devices, RAM
in parts, a workload that they set, commands, and its reports one by one."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path

import trio
from guests import modules

from postcopyd.demo import initramfs
from postcopyd.demo import qemu_guest as demo
from postcopyd.demo.initramfs import MissingPartError
from postcopyd.demo.qemu_guest import MIB, GuestError, QemuBinary, QemuProcess, Sweep

# All that a caller needs for a guest can be had from here.
__all__ = [
    "MIB", "Echo", "Guest", "GuestConfig", "GuestError", "MissingPartError", "QemuBinary",
    "QemuProcess", "Report", "Sweep", "Workload", "boot", "write_known_disk",
]  # fmt: skip


def boot(folder: Path) -> tuple[Path, Path]:
    """A kernel of this host, and an initramfs for it in `folder` with modules for all devices.

    Raises `MissingPartError`, also where there is no QEMU to boot it in.
    """
    demo.find_qemus()
    kernel, archive = initramfs.find_kernel(), folder / "initramfs"
    needed = modules.load_order(modules.folder_of(kernel.resolve()), modules.DEVICES)
    initramfs.write(archive, initramfs.find_init(), needed)
    return kernel, archive


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the guest does all the time; the same words as in guest_init.c."""

    test_mb: int | None = None
    """Memory that proves itself, in MiB; by default all but what Linux needs."""
    hot_mb: int = 0
    """MiB of it that the workers work on, each on its part; the rest lies idle. 0 for all of it."""
    rate: int = -1
    """Operations per second of all workers; 0 idle, -1 unlimited."""
    report_ms: int = 50
    disk_rate: int = 200
    """Operations per second, where there is a disk."""
    readers: int = 0
    """Threads that instead read the disk all the time, made by `write_known_disk`, and prove what
    they have read, then and later; 16 at most."""
    read_kb: int = 256
    """Of one read."""
    read_mb: int = 8
    """Guest RAM that all of them read into."""
    net_rate: int = 200
    """Datagrams per second, where there is a network."""


@dataclass(frozen=True, kw_only=True)
class GuestConfig(demo.GuestConfig):
    """A guest in one QEMU, with what tests vary."""

    backends: int = 1
    """All RAM is shared equally by them, each a region and a NUMA node."""
    backing: Path = Path("/dev/shm")
    """A folder on tmpfs or hugetlbfs."""
    ram_kind: str = "file"
    """What the RAM is: "file", "memfd" or "ram", which QEMU calls memory backends, or "plain": what
    QEMU does with -m alone."""
    ram_options: str = ""
    """More of each backend, with a comma before it."""
    mem_paths: tuple[str, ...] = ()
    """Files named outright, one for each backend, instead of `backing`; not removed at the end."""
    disk: Path | None = None
    net_port: int | None = None
    """The port of `Guest.echo`; None for no network."""
    balloon: str | None = None
    """Options of virtio-balloon, "" for none of them; None for no balloon."""
    user: str | None = None
    second_qmp: Path | None = None
    """A monitor of one's own, beside the daemon's."""
    workload: Workload = field(default_factory=Workload)

    def ram_files(self) -> tuple[str, ...]:
        if self.mem_paths or self.ram_kind != "file":
            return ()
        names = (f"postcopyd-{os.getpid()}-{self.name}-ram{i}" for i in range(self.backends))
        return tuple(str(self.backing / name) for name in names)

    def ram(self) -> list[str]:
        if self.ram_kind == "plain":
            return super().ram()
        options = []
        size = self.memory // self.backends
        files = self.mem_paths or self.ram_files()
        for i in range(self.backends):
            backend = f"memory-backend-{self.ram_kind},id=ram{i},size={size}"
            if self.ram_kind == "file":
                backend += f",mem-path={files[i]},share=on"
            options += ["-object", backend + self.ram_options]
            if self.backends > 1:
                options += ["-numa", f"node,nodeid={i},memdev=ram{i}"]
        single = ",memory-backend=ram0" if self.backends == 1 else ""
        return [*options, "-machine", self.machine + single]

    def more(self) -> list[str]:
        options = demo.monitor(self.second_qmp) if self.second_qmp else []
        if self.disk:
            file = f"file.driver=file,file.filename={self.disk},file.cache.direct=on"
            options += ["-blockdev", f"driver=raw,node-name=disk0,cache.direct=on,{file}"]
            options += ["-device", "virtio-blk-pci,drive=disk0"]
        if self.net_port is not None:
            options += ["-netdev", "user,id=net0"]
            options += ["-device", "virtio-net-pci,netdev=net0,mac=52:54:00:70:63:64,romfile="]
        if self.balloon is not None:
            options += ["-device", ",".join(filter(None, ["virtio-balloon-pci", self.balloon]))]
        if self.user:
            as_user = ["-run-with", f"user={self.user}"]
            options += as_user if self.qemu.version >= (9, 1) else ["-runas", self.user]
        return options

    def confinement(self, elevate: str = "deny") -> list[str]:
        # QEMU changes its user when the filter is already there, and must be allowed to.
        return super().confinement("allow" if self.user else elevate)

    @property
    def test_mb(self) -> int:
        work = self.workload
        read_into = 2 * work.read_mb if work.readers else 0
        return work.test_mb or super().test_mb - read_into

    def kernel_arguments(self) -> list[str]:
        work = self.workload
        words = [f"pc.rate={work.rate}", f"pc.report={work.report_ms}", f"pc.hot={work.hot_mb}"]
        if self.disk and work.readers:
            words += [f"pc.readers={work.readers}", f"pc.read_kb={work.read_kb}"]
            words += [f"pc.read_mb={work.read_mb}"]
        elif self.disk:
            words += [f"pc.disk={work.disk_rate}"]
        if self.net_port is not None:
            # The addresses of QEMU's user network: the guest's, and what stands for this host.
            words += [f"pc.net={work.net_rate}", "pc.ip=10.0.2.15"]
            words += [f"pc.peer=10.0.2.2:{self.net_port}"]
        return [*super().kernel_arguments(), *words]


def write_known_disk(path: Path, size: int) -> None:
    """A raw image for `Workload.readers`: `size` bytes, each block as guest_init.c's `fill` makes a
    page of that number plus DISK_INDEX, in version 1. 16 MiB take half a second."""
    with path.open("wb") as file:
        for index in range(_DISK_INDEX, _DISK_INDEX + size // 4096):
            word = _mix(_mix((index + _GOLDEN) & _WORD) ^ 1)
            words = ((word + i * _GOLDEN) & _WORD for i in range(1, 511))
            file.write(struct.pack("<512Q", index, 1, *words))


_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_DISK_INDEX = 1 << 40


def _mix(x: int) -> int:
    """The finaliser of SplitMix64, as in guest_init.c."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31


@dataclass(frozen=True)
class Report:
    """What the guest said at one moment; all counts are since it booted."""

    at: float
    """When the line arrived, seconds of `trio.current_time`."""
    qemu: str
    """Name of the configuration whose serial line it came from."""
    guest_ms: int
    """The guest's own clock, which does not run while the guest is stopped."""
    ops: tuple[int, ...]
    """Operations of each worker: one page checked, and written with the next version."""
    bad: int
    """Wrong pages, each counted when noticed, then mended."""
    gap_us: int
    """The longest time between two operations of a worker, since the last report."""
    laps: int
    disk_ops: int
    """Blocks written and read again, or reads of `Workload.readers`."""
    disk_bad: int
    net_sent: int
    net_received: int
    net_bad: int

    @property
    def operations(self) -> int:
        return sum(self.ops)


@dataclass
class Echo:
    """Answers the guest's datagrams, and remembers which have arrived."""

    port: int
    arrivals: list[int] = field(default_factory=list)
    """Their sequence numbers."""

    @property
    def duplicates(self) -> int:
        """A number sent twice means that the guest ran twice."""
        return len(self.arrivals) - len(set(self.arrivals))


class Guest(demo.Guest):
    """The demo's guest, whose reports are kept, and which obeys."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        super().__init__(folder, nursery)
        self.reports: list[Report] = []
        self.bad: list[dict[str, str]] = []
        """The first wrong pages in detail: the fields of guest_init.c's `pc bad`."""

    async def echo(self) -> Echo:
        """Answer the guest's datagrams on a free port of this host: `GuestConfig.net_port`."""
        udp = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        await udp.bind(("127.0.0.1", 0))
        echo = Echo(udp.getsockname()[1])

        async def answer() -> None:
            with udp:
                while True:
                    datagram, peer = await udp.recvfrom(65536)
                    echo.arrivals.append(int.from_bytes(datagram[:8], "little"))
                    await udp.sendto(datagram, peer)

        self._nursery.start_soon(answer)
        return echo

    def boots_again(self) -> None:
        """It is reset: `ready` waits anew."""
        self._ready = None

    async def report(self, after: Report | None = None, seconds: float = 60.0) -> Report:
        """The first report that arrives from now on; or, given one, the next after it."""
        index = self.reports.index(after) + 1 if after else len(self.reports)
        await self._until(lambda: len(self.reports) > index, "sent a report", seconds)
        return self.reports[index]

    async def stop(self) -> None:
        """Until the guest's workers have all stopped; the guest itself runs on."""
        await self._ask("stop")

    async def go(self) -> None:
        """After `stop`."""
        await self._ask("go")

    async def rate(self, operations: int) -> None:
        """Per second, of all workers; 0 idle, -1 unlimited."""
        await self._ask(f"rate {operations}")

    async def hot(self, megabytes: int) -> None:
        """What the workers work on from now on: MiB of the test memory, 0 for all of it."""
        await self._ask(f"hot {megabytes}")

    async def discard(self, pages: int) -> None:
        """Give so many pages, picked at random, back to the guest's kernel; they hold zeros."""
        await self._ask(f"discard {pages}")

    async def quit(self, seconds: float = 60.0) -> None:
        """Switch the guest off, from within; until its QEMU has ended."""
        await self._ask("quit", seconds)
        with trio.move_on_after(seconds):
            if self._current:  # always: it has answered
                await self._current.wait()
            return
        raise self._error(f"the guest's QEMU has not ended {seconds:.0f} s after the guest")

    def heard(self, kind: str, fields: dict[str, str], name: str) -> None:
        match kind:
            case "report":
                self.reports.append(_read_report(fields, name))
            case "bad":
                self.bad.append(fields)
            case _:
                super().heard(kind, fields, name)


def _read_report(fields: dict[str, str], name: str) -> Report:
    def numbers(key: str) -> tuple[int, ...]:
        return tuple(int(number) for number in fields[key].split(","))

    (guest_ms,), (bad,), (gap_us,), (laps,) = map(numbers, ("t", "bad", "gap", "laps"))
    disk_ops, disk_bad = numbers("disk")
    sent, received, net_bad = numbers("net")
    return Report(
        trio.current_time(), name, guest_ms, numbers("ops"), bad, gap_us, laps,
        disk_ops, disk_bad, sent, received, net_bad,
    )  # fmt: skip
