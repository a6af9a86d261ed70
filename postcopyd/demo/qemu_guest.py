# SPDX-License-Identifier: Apache-2.0
"""The verifying guest in QEMU: its command line on either host, its processes, its serial line.

Owns the QEMU processes of one guest and what the guest says of itself, wherever it runs at the
moment.  It must not know how the guest is moved: it never touches the first QMP socket, which
serves one client only, and that is the daemon.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import trio

from postcopyd.demo.initramfs import (
    MISSING_KERNEL,
    Kernel,
    MissingPartError,
    find_init,
    find_kernel,
    write_initramfs,
)
from postcopyd.errors import PostcopydError

# All that a caller needs for a guest can be had from here.
__all__ = [
    "MISSING_KERNEL", "MISSING_QEMU", "Echo", "Guest", "GuestConfig", "GuestError", "Kernel",
    "MissingPartError", "QemuBinary", "QemuProcess", "Report", "Sweep", "Workload", "command",
    "find_init", "find_kernel", "find_qemu", "open_guest", "write_initramfs",
    "write_known_disk",
]  # fmt: skip

MISSING_QEMU = (
    "found no QEMU to run the guest in: install the Debian package qemu-system-x86, or name a "
    "qemu-system-x86_64 in $POSTCOPYD_QEMU"
)

MIB = 1 << 20
# Emulated, and beside a second QEMU on two cores, a guest of 16 GiB still starts within this.
BOOT_SECONDS = 180.0
# A command is lost when the guest moves while it is on its way; the guest answers one id once.
ASK_AGAIN_SECONDS = 2.0
SOCKET_NAME_BYTES = 107  # sun_path, without its final NUL: unix(7)


_T = TypeVar("_T")


class GuestError(PostcopydError):
    """QEMU or its guest did not do what was asked of it; the sentence says what is known."""


@dataclass(frozen=True)
class QemuBinary:
    """A QEMU on this host; `options` come first on its command line: -L for an unpacked one."""

    path: Path
    version: tuple[int, int, int]
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


def find_qemu() -> list[QemuBinary]:
    """The binaries in `$POSTCOPYD_QEMU`, else the one in PATH; without those that do not start.

    The variable is a list separated by ":"; each entry a path, or a path and its first options
    separated by commas: `/opt/q10/bin/qemu-system-x86_64,-L,/opt/q10/share/qemu`.
    """
    named = os.environ.get("POSTCOPYD_QEMU") or shutil.which("qemu-system-x86_64") or ""
    found = []
    for entry in filter(None, named.split(":")):
        path, *options = entry.split(",")
        with suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run(
                [path, "--version"], capture_output=True, text=True, check=True, timeout=30
            )
            if version := re.search(r"version (\d+)\.(\d+)\.(\d+)", said.stdout):
                major, minor, patch = (int(number) for number in version.groups())
                found.append(QemuBinary(Path(path), (major, minor, patch), tuple(options)))
    return found


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the guest does all the time; the same words as in guest_init.c."""

    test_mb: int | None = None
    """Memory that proves itself, in MiB; by default all but what Linux needs."""
    hot_mb: int = 0
    """MiB of it that the workers work on, each on its part; the rest lies idle. 0 for all of it."""
    threads: int | None = None
    order: str = "random"
    write_percent: int = 100
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
class GuestConfig:
    """A guest in one QEMU; for the destination take it with `incoming` and another `name`."""

    qemu: QemuBinary
    kernel: Path
    initramfs: Path
    name: str = "guest"
    memory: int = 1024 * MIB
    """Bytes of guest RAM, shared equally by `backends`, each a region and a NUMA node."""
    vcpus: int = 2
    backends: int = 1
    backing: str | Path = Path("/dev/shm")
    """A folder on tmpfs or hugetlbfs, or "memfd"."""
    mem_paths: tuple[str, ...] = ()
    """Files named outright, one for each backend, instead of `backing`; not removed at the end."""
    accel: str = "tcg,thread=multi"
    machine: str = "q35"
    """Both sides must say the same: between versions of QEMU name one, as pc-q35-7.2."""
    cpu: str = "qemu64"
    disk: Path | None = None
    disk_cache: str = "none"
    """"none" for O_DIRECT, "writeback" for the page cache."""
    net_port: int | None = None
    """The port of `Guest.echo`; None for no network."""
    balloon: str | None = None
    """Options of virtio-balloon, "" for none of them; None for no balloon."""
    user: str | None = None
    sandbox: bool = True
    incoming: bool = False
    second_qmp: Path | None = None
    """A monitor of one's own, beside the daemon's."""
    workload: Workload = field(default_factory=Workload)

    def ram_files(self) -> tuple[str, ...]:
        """The file of each backend; empty where they have no name."""
        if self.mem_paths or self.backing == "memfd":
            return self.mem_paths
        names = (f"postcopyd-{os.getpid()}-{self.name}-ram{i}" for i in range(self.backends))
        return tuple(str(Path(self.backing) / name) for name in names)


def command(config: GuestConfig, qmp_path: Path, serial_path: Path) -> list[str]:
    """The command line of `config`, for either side of a migration."""
    arguments = [str(config.qemu.path), *config.qemu.options]
    arguments += [
        *("-name", config.name, "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none", "-vga", "none"),
        *("-accel", config.accel, "-cpu", config.cpu, "-smp", str(config.vcpus)),
        *("-m", f"{config.memory // MIB}M", *_memory(config)),
        *("-kernel", str(config.kernel), "-initrd", str(config.initramfs)),
        *("-append", _kernel_arguments(config)),
    ]
    for path in filter(None, (qmp_path, config.second_qmp)):
        arguments += ["-qmp", f"unix:{path},server=on,wait=off"]
    # QEMU makes them in this order, so both monitors listen when `launch` has the serial line.
    arguments += ["-chardev", f"socket,id=serial0,path={serial_path},server=on,wait=off"]
    arguments += ["-serial", "chardev:serial0"]
    if config.disk:
        direct = "on" if config.disk_cache == "none" else "off"
        file = f"file.driver=file,file.filename={config.disk},file.cache.direct={direct}"
        arguments += ["-blockdev", f"driver=raw,node-name=disk0,cache.direct={direct},{file}"]
        arguments += ["-device", "virtio-blk-pci,drive=disk0"]
    if config.net_port is not None:
        arguments += ["-netdev", "user,id=net0"]
        arguments += ["-device", "virtio-net-pci,netdev=net0,mac=52:54:00:70:63:64,romfile="]
    if config.balloon is not None:
        arguments += ["-device", ",".join(filter(None, ["virtio-balloon-pci", config.balloon]))]
    if config.incoming:
        arguments += ["-incoming", "defer", "-S"]
    if config.user:
        as_user = ["-run-with", f"user={config.user}"]
        arguments += as_user if config.qemu.version >= (9, 1) else ["-runas", config.user]
    if config.sandbox:
        # QEMU changes its user when the filter is already there, and must be allowed to.
        elevate = "allow" if config.user else "deny"
        denied = f"obsolete=deny,elevateprivileges={elevate},spawn=deny,resourcecontrol=deny"
        arguments += ["-sandbox", f"on,{denied}"]
    return arguments


def _memory(config: GuestConfig) -> Iterable[str]:
    size = config.memory // config.backends
    files = config.ram_files()
    for i in range(config.backends):
        kind = f"memory-backend-file,mem-path={files[i]}" if files else "memory-backend-memfd"
        yield from ("-object", f"{kind},id=ram{i},size={size},share=on")
        if config.backends > 1:
            yield from ("-numa", f"node,nodeid={i},memdev=ram{i}")
    single = ",memory-backend=ram0" if config.backends == 1 else ""
    yield from ("-machine", config.machine + single)


def _kernel_arguments(config: GuestConfig) -> str:
    work = config.workload
    megabytes = config.memory // MIB
    # Linux, its page structures and our tables take about 90 MiB and 3 % of the rest.
    read_mb = 2 * work.read_mb if work.readers else 0
    test_mb = work.test_mb or max(16, (megabytes - 96 - read_mb) * 15 // 16)
    words = ["console=ttyS0,115200", "quiet", "loglevel=4", "panic=-1", "mitigations=off"]
    # Under emulation zeroing memory twice is a good part of the time until the guest is ready.
    words += ["init_on_alloc=0"]
    # A guest that waits for its memory has no fault of its own to report.
    words += ["nowatchdog", "rcupdate.rcu_cpu_stall_suppress=1"]
    if config.accel.startswith("tcg"):
        words += ["tsc=reliable"]  # else each look at the clock is a trip out of the guest
    words += [f"pc.mb={test_mb}", f"pc.threads={work.threads or config.vcpus}"]
    words += [f"pc.order={work.order}", f"pc.write={work.write_percent}"]
    words += [f"pc.rate={work.rate}", f"pc.report={work.report_ms}", f"pc.hot={work.hot_mb}"]
    if config.disk and work.readers:
        words += [f"pc.readers={work.readers}", f"pc.read_kb={work.read_kb}"]
        words += [f"pc.read_mb={work.read_mb}"]
    elif config.disk:
        words += [f"pc.disk={work.disk_rate}"]
    if config.net_port is not None:
        # The addresses of QEMU's user network: the guest's, and what stands for this host.
        words += [f"pc.net={work.net_rate}", "pc.ip=10.0.2.15"]
        words += [f"pc.peer=10.0.2.2:{config.net_port}"]
    return " ".join(words)


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


@dataclass(frozen=True)
class Sweep:
    """Every page of the test memory checked while all workers were stopped."""

    pages: int
    bad: int
    milliseconds: int


@dataclass
class Echo:
    """Answers the guest's datagrams, and remembers when each arrived."""

    port: int
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """(seconds of `trio.current_time`, sequence number)"""

    @property
    def duplicates(self) -> int:
        """A number sent twice means that the guest ran twice."""
        return len(self.arrivals) - len({number for _, number in self.arrivals})

    def longest_gap(self, since: float = 0.0) -> float:
        """Seconds between two datagrams: the blackout as the network sees it."""
        times = [at for at, _ in self.arrivals if at >= since]
        return max((b - a for a, b in pairwise(times)), default=0.0)


@dataclass
class QemuProcess:
    """One QEMU that runs the guest, or waits for it."""

    config: GuestConfig
    qmp_path: Path
    serial_path: Path
    log_path: Path
    """What QEMU says, warnings and reasons to end."""
    process: trio.Process
    serial: socket.socket | None = None
    """None once QEMU has closed its end."""

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """At once, as a crash would; with whatever it has started."""
        if self.process.poll() is None:  # or its number may be another's by now
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Until it has ended; the exit status, negative for a signal."""
        return await self.process.wait()


class Guest:
    """One guest, followed over all QEMUs that run it in turn.  Made by `open_guest`."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self.folder = folder
        self.reports: list[Report] = []
        self.bad: list[dict[str, str]] = []
        """The first wrong pages in detail: the fields of guest_init.c's `pc bad`."""
        self.errors: list[str] = []
        self.console: deque[str] = deque(maxlen=50)
        """What the kernel says, and lines that could not be read."""
        self._nursery = nursery
        self._qemus: list[QemuProcess] = []
        self._current: QemuProcess | None = None
        self._partial = b""
        self._ready: dict[str, str] | None = None
        self._answers: dict[str, dict[str, str]] = {}
        self._last_id = 0
        self._heard = trio.lowlevel.ParkingLot()

    async def launch(self, config: GuestConfig) -> QemuProcess:
        """Start a QEMU; return when its sockets are there.  It is killed when the guest is closed.

        Raises `GuestError`, with QEMU's own words, if it ends before that.
        """
        if not config.incoming:
            self._ready = None  # it boots, anew perhaps
        qemu: QemuProcess = await self._nursery.start(self._run, config)
        return qemu

    async def echo(self) -> Echo:
        """Answer the guest's datagrams on a free port of this host: `GuestConfig.net_port`."""
        udp = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        await udp.bind(("127.0.0.1", 0))
        echo = Echo(udp.getsockname()[1])

        async def answer() -> None:
            with udp:
                while True:
                    datagram, peer = await udp.recvfrom(65536)
                    echo.arrivals.append(
                        (trio.current_time(), int.from_bytes(datagram[:8], "little"))
                    )
                    await udp.sendto(datagram, peer)

        self._nursery.start_soon(answer)
        return echo

    async def ready(self, seconds: float = BOOT_SECONDS) -> int:
        """Until all test memory is filled; the number of its pages."""
        said = await self._until(lambda: self._ready, "booted", seconds)
        if self.errors:
            raise GuestError(f"the guest has booted, but not whole: {'; '.join(self.errors)}")
        return int(said["pages"])

    async def report(self, after: Report | None = None, seconds: float = 60.0) -> Report:
        """The first report that arrives from now on; or, given one, the next after it."""
        index = self.reports.index(after) + 1 if after else len(self.reports)
        await self._until(lambda: len(self.reports) > index, "sent a report", seconds)
        return self.reports[index]

    async def sweep(self, seconds: float = 600.0) -> Sweep:
        """Have every page checked, the workers stopped meanwhile; they go on as before."""
        found = await self._ask("sweep", seconds)
        return Sweep(int(found["pages"]), int(found["bad"]), int(found["ms"]))

    async def stop(self) -> None:
        """Until the guest's workers have all stopped; the guest itself runs on."""
        await self._ask("stop")

    async def go(self) -> None:
        """After `stop`."""
        await self._ask("go")

    async def rate(self, operations: int) -> None:
        """Per second, of all workers; 0 idle, -1 unlimited."""
        await self._ask(f"rate {operations}")

    async def write_percent(self, percent: int) -> None:
        """Of the operations, those that write after they have checked."""
        await self._ask(f"write {percent}")

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

    async def _ask(self, words: str, seconds: float = 60.0) -> dict[str, str]:
        self._last_id += 1
        key = str(self._last_id)
        deadline = trio.current_time() + seconds
        while True:
            if self._current and self._current.serial:
                # The newline ends what an earlier command may have left in the guest.
                with suppress(OSError):
                    self._current.serial.send(f"\n{key} {words};\n".encode())
            left = deadline - trio.current_time()
            patience = min(left, ASK_AGAIN_SECONDS)
            answer = await self._wait(lambda: self._answers.pop(key, None), patience)
            if answer is None:
                if left <= ASK_AGAIN_SECONDS:
                    raise self._error(f"the guest has not answered {words!r} in {seconds:.0f} s")
                continue
            if answer.get("ok") == "0":
                raise GuestError(f"the guest does not know the command: {words}")
            return answer

    async def _until(self, found: Callable[[], _T | None], what: str, seconds: float) -> _T:
        value = await self._wait(found, seconds)
        if value:
            return value
        raise self._error(f"the guest has not {what} within {seconds:.0f} s")

    async def _wait(self, found: Callable[[], _T | None], seconds: float) -> _T | None:
        """What `found` returns once that is true; None when the time is over."""
        with trio.move_on_after(seconds):
            while not (value := found()):
                if not any(qemu.serial for qemu in self._qemus):
                    raise self._error("the guest runs in no QEMU any more")
                await self._heard.park()
            return value
        return None

    def _error(self, what: str) -> GuestError:
        words = [*self.errors, *self.console]
        for qemu in self._qemus:
            words += qemu.log_path.read_text(errors="replace").splitlines()
            if qemu.process.poll() is not None:
                words.append(f"{qemu.config.name} ended with status {qemu.process.returncode}")
        said = " | ".join(words[-8:]) or "nothing"
        return GuestError(f"{what}; last said by its kernel and QEMU: {said}")

    async def _run(self, config: GuestConfig, task_status: trio.TaskStatus[QemuProcess]) -> None:
        """One QEMU from its start to its end, with its files."""
        qmp, serial, log = (self.folder / f"{config.name}.{kind}" for kind in _FILES)
        if len(os.fsencode(qmp.with_suffix(".serial"))) > SOCKET_NAME_BYTES:
            raise GuestError(f"cannot make the socket {serial}: its name is too long; use /tmp")
        files = [qmp, serial, *map(Path, () if config.mem_paths else config.ram_files())]
        for file in files:
            file.unlink(missing_ok=True)
        with log.open("wb") as errors:
            process = await trio.lowlevel.open_process(
                command(config, qmp, serial),
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,  # so that what it starts can be killed with it
            )
        qemu = QemuProcess(config, qmp, serial, log, process)
        self._qemus.append(qemu)
        try:
            qemu.serial = await _connect(qemu)
            task_status.started(qemu)
            await self._follow(qemu, qemu.serial)
            await process.wait()
        finally:
            qemu.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            if qemu.serial:
                qemu.serial.close()
                qemu.serial = None
            for file in files:
                file.unlink(missing_ok=True)
            self._heard.unpark_all()

    async def _follow(self, qemu: QemuProcess, serial: socket.socket) -> None:
        """Read one serial line to its end.

        A guest that moves may do so within a line, so what the old QEMU still had to say is read
        first: it has stopped for good before the new one can say anything.
        """
        ended = False
        while not ended:
            await trio.lowlevel.wait_readable(serial)
            for other in self._qemus:
                if other is not qemu:
                    self._drain(other)
            ended = self._drain(qemu)
        serial.close()
        qemu.serial = None
        self._heard.unpark_all()

    def _drain(self, qemu: QemuProcess) -> bool:
        """Take all that is there now; True at the end of the stream."""
        while qemu.serial:
            try:
                chunk = qemu.serial.recv(65536)
            except BlockingIOError:
                return False
            except ConnectionError:
                return True
            if not chunk:
                return True
            self._current = qemu
            *lines, self._partial = (self._partial + chunk).split(b"\n")
            for line in lines:
                self._take(line.decode(errors="replace").strip(), qemu.config.name)
            self._heard.unpark_all()
        return True

    def _take(self, line: str, name: str) -> None:
        mark, _, rest = line.partition(" ")
        kind, _, rest = rest.partition(" ")
        if mark == "pc" and kind == "error":
            self.errors.append(rest.removeprefix("text="))
            return
        try:
            fields = dict(word.split("=", 1) for word in rest.split())
            match mark, kind:
                case "pc", "report":
                    self.reports.append(_read_report(fields, name))
                case "pc", "done":
                    self._answers[fields.pop("id")] = fields
                case "pc", "bad":
                    self.bad.append(fields)
                case "pc", "ready":
                    self._ready = fields
                case _:
                    self.console.append(line)
        except (KeyError, ValueError):  # the kernel has spoken in the middle of a line
            self.console.append(line)


_FILES = ("qmp", "serial", "log")


async def _connect(qemu: QemuProcess) -> socket.socket:
    """Until the serial line is ours. The monitors listen then, as QEMU makes them before it."""
    while qemu.process.poll() is None:
        serial = socket.socket(socket.AF_UNIX)
        serial.setblocking(False)
        with suppress(FileNotFoundError, ConnectionError, BlockingIOError):
            serial.connect(str(qemu.serial_path))
            return serial
        serial.close()
        await trio.sleep(0.005)
    said = qemu.log_path.read_text(errors="replace").strip()
    raise GuestError(f"cannot start {qemu.config.qemu.path}: it ended at once and said: {said}")


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


@asynccontextmanager
async def open_guest(folder: Path) -> AsyncIterator[Guest]:
    """A guest without a QEMU yet; sockets and logs are made in `folder`, whose name must be short.

    At the end all its QEMUs are killed, however the end comes about.
    """
    async with trio.open_nursery() as nursery:
        try:
            yield Guest(folder, nursery)
        finally:
            nursery.cancel_scope.cancel()
