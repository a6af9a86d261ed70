# SPDX-License-Identifier: Apache-2.0
"""The verifying guest in QEMU: its command line on either host, its processes, its serial line.

Owns the QEMU processes of one guest and what the guest says of itself, wherever it runs at the
moment.  It must not know how the guest is moved: it never touches the QMP socket, which serves one
client only, and that is the daemon. tests/guests/qemu.py has a guest with more, for tests.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

import trio

from postcopyd.demo.initramfs import MissingPartError
from postcopyd.errors import PostcopydError

MIB = 1 << 20
# Emulated, and beside a second QEMU on two cores, a guest of 16 GiB still starts within this.
BOOT_SECONDS = 180.0
# Its first process is there after two, on an idle host. But several vCPUs are emulated by as many
# threads, and in one of some hundred boots Linux changes its own code while another vCPU runs that:
# all are in an exception for ever then, before anything of ours has run. Such a guest boots again.
INIT_SECONDS, BOOTS = 60.0, 3
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


def find_qemus() -> list[QemuBinary]:
    """The binaries in `$POSTCOPYD_QEMU`, else the one in PATH; without those that do not start.

    Raises `MissingPartError` where there is none.

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
    if not found:
        raise MissingPartError(
            "found no QEMU to run the guest in: install the Debian package qemu-system-x86, or "
            "name a qemu-system-x86_64 in $POSTCOPYD_QEMU"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class GuestConfig:
    """A guest in one QEMU; for the destination take it with `incoming` and another `name`."""

    qemu: QemuBinary
    kernel: Path
    initramfs: Path
    name: str = "guest"
    memory: int = 1024 * MIB
    """Bytes of guest RAM."""
    vcpus: int = 2
    accel: str = "tcg,thread=multi"
    machine: str = "q35"
    """Both sides must say the same: between versions of QEMU name one, as pc-q35-7.2."""
    incoming: bool = False

    def command(self, qmp_path: Path, serial_path: Path) -> list[str]:
        """The command line, for either side of a migration."""
        return [
            *(str(self.qemu.path), *self.qemu.options),
            *("-name", self.name, "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-display", "none", "-vga", "none"),
            *("-accel", self.accel, "-cpu", "qemu64", "-smp", str(self.vcpus)),
            *("-m", f"{self.memory // MIB}M", *self.ram()),
            *("-kernel", str(self.kernel), "-initrd", str(self.initramfs)),
            *("-append", " ".join(self.kernel_arguments())),
            *(*monitor(qmp_path), *self.more()),
            # QEMU makes them in this order, so monitors listen when `launch` has the serial line.
            *("-chardev", f"socket,id=serial0,path={serial_path},server=on,wait=off"),
            *("-serial", "chardev:serial0", *self.confinement()),
            *(("-incoming", "defer", "-S") if self.incoming else ()),
        ]

    def ram_files(self) -> tuple[str, ...]:
        """Files of guest RAM that are made for this QEMU, and removed at its end."""
        return ()

    def ram(self) -> list[str]:
        """Options for the machine and for guest RAM, beside -m: none are needed."""
        return ["-machine", self.machine]

    def more(self) -> list[str]:
        """Options for what a guest of another kind has besides."""
        return []

    def confinement(self, elevate: str = "deny") -> list[str]:
        denied = f"obsolete=deny,elevateprivileges={elevate},spawn=deny,resourcecontrol=deny"
        return ["-sandbox", f"on,{denied}"]

    @property
    def test_mb(self) -> int:
        """Memory that proves itself, in MiB: Linux, its page structures and our tables take about
        90 MiB and 3 % of the rest."""
        return max(16, (self.memory // MIB - 96) * 15 // 16)

    def kernel_arguments(self) -> list[str]:
        words = ["console=ttyS0,115200", "quiet", "loglevel=4", "panic=-1", "mitigations=off"]
        # Under emulation zeroing memory twice is a good part of the time until the guest is ready.
        words += ["init_on_alloc=0"]
        # A guest that waits for its memory has no fault of its own to report.
        words += ["nowatchdog", "rcupdate.rcu_cpu_stall_suppress=1"]
        if self.accel.startswith("tcg"):
            words += ["tsc=reliable"]  # else each look at the clock is a trip out of the guest
            # Else Linux panics on a busy host, whose emulated timer ticks too late for that check.
            words += ["no_timer_check"]
        return [*words, f"pc.mb={self.test_mb}"]


def monitor(path: Path) -> list[str]:
    return ["-qmp", f"unix:{path},server=on,wait=off"]


@dataclass(frozen=True)
class Sweep:
    """Every page of the test memory checked while all workers were stopped."""

    pages: int
    bad: int


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
    over: trio.Event = field(default_factory=trio.Event)
    """It has ended, and its files are removed."""

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
    """One guest, followed over all QEMUs that run it in turn.  Made by `open`."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self.folder = folder
        self.errors: list[str] = []
        self.console: deque[str] = deque(maxlen=50)
        """What the kernel says, and lines that could not be read."""
        self._nursery = nursery
        self._qemus: list[QemuProcess] = []
        self._current: QemuProcess | None = None
        self._partial = b""
        self._hello = False
        self._ready: dict[str, str] | None = None
        self._reports = 0
        self._bad_pages = 0
        self._answers: dict[str, dict[str, str]] = {}
        self._last_id = 0
        self._heard = trio.lowlevel.ParkingLot()

    @classmethod
    @asynccontextmanager
    async def open(cls, folder: Path) -> AsyncIterator[Self]:
        """A guest without a QEMU yet; sockets and logs are made in `folder`, whose name must be
        short.

        At the end all its QEMUs are killed, however the end comes about.
        """
        async with trio.open_nursery() as nursery:
            try:
                yield cls(folder, nursery)
            finally:
                nursery.cancel_scope.cancel()

    async def launch(self, config: GuestConfig) -> QemuProcess:
        """Start a QEMU; return when its sockets are there, and a guest that boots has begun its
        first process.  It is killed when the guest is closed.

        Raises `GuestError`, with QEMU's own words, if it ends before that.
        """
        for _ in range(BOOTS):
            self._hello = False
            if not config.incoming:
                self._ready = None  # it boots, anew perhaps
            qemu: QemuProcess = await self._nursery.start(self._run, config)
            if config.incoming or await self._wait(lambda: self._hello, INIT_SECONDS):
                break
            qemu.kill()
            await qemu.over.wait()
        return qemu

    async def ready(self, seconds: float = BOOT_SECONDS) -> int:
        """Until all test memory is filled; the number of its pages."""
        said = await self._until(lambda: self._ready, "booted", seconds)
        if self.errors:
            raise GuestError(f"the guest has booted, but not whole: {'; '.join(self.errors)}")
        return int(said["pages"])

    async def bad_pages(self, seconds: float = 60.0) -> int:
        """Wrong pages that it has come across since it booted, as it says next."""
        before = self._reports
        await self._until(lambda: self._reports > before, "sent a report", seconds)
        return self._bad_pages

    async def sweep(self, seconds: float = 600.0) -> Sweep:
        """Have every page checked, the workers stopped meanwhile; they go on as before."""
        found = await self._ask("sweep", seconds)
        return Sweep(int(found["pages"]), int(found["bad"]))

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
        files = [qmp, serial, *map(Path, config.ram_files())]
        for file in files:
            file.unlink(missing_ok=True)
        with log.open("wb") as errors:
            process = await trio.lowlevel.open_process(
                config.command(qmp, serial),
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
            qemu.over.set()

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
            if mark != "pc":
                raise ValueError
            self.heard(kind, dict(word.split("=", 1) for word in rest.split()), name)
        except (KeyError, ValueError):  # the kernel has spoken, in the middle of a line perhaps
            self.console.append(line)

    def heard(self, kind: str, fields: dict[str, str], name: str) -> None:
        """A line of guest_init.c, on the serial line of the QEMU `name`.

        Raises KeyError or ValueError for what is none.
        """
        match kind:
            case "report":
                self._bad_pages = int(fields["bad"])
                self._reports += 1
            case "done":
                self._answers[fields.pop("id")] = fields
            case "hello":
                self._hello = True
            case "ready":
                self._ready = fields
            case _:
                raise ValueError


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
