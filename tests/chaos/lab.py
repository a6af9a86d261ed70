# SPDX-License-Identifier: Apache-2.0
"""The two hosts and the guest of a run: processes, ports, and what can be done to them."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import evidence as e
import trio
from guests import qemu as q
from monitor import Ended, Monitor
from proxy import Proxy
from qemus import newest

from postcopyd.demo.hosts import Host
from postcopyd.errors import PostcopydError
from postcopyd.varlink.client import ConnectionLost

VM = "guest"

TERMINATE_S = 45.0
"""A daemon that is told to end takes its guests back first; source.rollback.ROLLBACK_S is 30."""
ANSWER_S = 10.0
"""How long a monitor may take to answer when its guest lacks nothing."""


class Lost(Exception):
    """The run has failed: what it shows to be impossible has happened."""


class Node:
    """One host: its daemon, and the proxy through which others reach it."""

    def __init__(
        self, folder: Path, name: str, on_message: Callable[[str], Awaitable[None]]
    ) -> None:
        self.host = Host(folder, name, ())
        # Not of those that the kernel gives to connections: it must be free at each start.
        self.host.address = f"127.0.0.1:{free_port()}"
        self.proxy = Proxy(free_port(), self.host.address, on_message)
        self.daemon = "up"
        """up, down or stopped: what was done to it."""
        self.whole = trio.Event()
        """Set while nothing is being done to the daemon."""
        self.whole.set()
        mount_folder(self.host.state)

    @property
    def side(self) -> e.Side:
        return e.side(self.daemon, self.host.state / f"{VM}.json")

    async def restart(self, number: int, seconds: float) -> None:
        """Ends the daemon by a signal and starts it again so many seconds after its end."""
        process = self.host.process
        assert process is not None
        process.send_signal(number)
        with trio.move_on_after(TERMINATE_S):
            while process.poll() is None:
                await trio.sleep(0.005)
        if process.poll() is None:
            raise Lost(f"the daemon {self.host.name} does not end when it is told to")
        await trio.sleep(seconds)
        await self.host.start()
        self._mended()

    async def pause(self, seconds: float) -> None:
        """The daemon's process stands still."""
        assert self.host.process is not None
        self.host.process.send_signal(signal.SIGSTOP)
        await trio.sleep(seconds)
        self.host.process.send_signal(signal.SIGCONT)
        self._mended()

    async def fill(self, seconds: float) -> None:
        """There is no room in the folder of its records."""
        filler = self.host.state / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        await trio.sleep(seconds)
        filler.unlink()

    def broken(self, daemon: str) -> None:
        self.daemon = daemon
        self.whole = trio.Event()

    def _mended(self) -> None:
        self.daemon = "up"
        self.whole.set()

    async def status(self) -> dict[str, Any]:
        """The status of the guest here; empty when the daemon does not say one now."""
        with trio.move_on_after(2.0), suppress(PostcopydError, OSError, ConnectionLost):
            status: dict[str, Any] = await self.host.status(VM)
            return status
        return {}


class Vmm:
    """A QEMU and our own monitor of it."""

    def __init__(self, process: q.QemuProcess, monitor: Monitor) -> None:
        self.process = process
        self.monitor = monitor
        self.name = process.config.name
        self.whole = trio.Event()
        """Set while its process is not stopped."""
        self.whole.set()

    async def freeze(self, seconds: float) -> None:
        """The process stands still, as on a host that is overloaded."""
        self.whole = trio.Event()
        self.process.process.send_signal(signal.SIGSTOP)
        await trio.sleep(seconds)
        self.process.process.send_signal(signal.SIGCONT)
        self.whole.set()

    @property
    def ended(self) -> bool:
        return self.process.process.poll() is not None

    async def state(self) -> str:
        """QEMU's own word, such as running or inmigrate; "ended", or "silent"."""
        await self.whole.wait()
        with trio.move_on_after(ANSWER_S):
            try:
                return str((await self.monitor.execute("query-status"))["status"])
            except Ended:
                return "ended"
        return "silent"


def boot(folder: Path, memory: int, rate: int) -> q.GuestConfig:
    """A guest of so many bytes that works on `rate` pages in a second.

    Raises q.MissingPartError where this machine lacks a part of it.
    """
    kernel, initramfs = q.boot(folder)
    return q.GuestConfig(
        qemu=newest(),
        kernel=kernel,
        initramfs=initramfs,
        memory=memory,
        backing=folder,
        workload=q.Workload(rate=rate),
    )


def own_mounts() -> None:
    """Mounts are this process's own from here on, and go with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    private = MS_REC | MS_PRIVATE
    if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, private, None):
        raise OSError(ctypes.get_errno(), "making mounts of this run's own")


def mount_folder(folder: Path) -> None:
    """One for records that can be filled."""
    folder.mkdir()
    options = ["-o", "size=1M,mode=0700", "postcopyd-chaos"]
    subprocess.run(["mount", "-t", "tmpfs", *options, folder], check=True)


CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000


def free_port() -> int:
    """A port below those that the kernel takes for connections (ip_local_port_range)."""
    least = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in range(least - 1, 1024, -7 - os.getpid() % 13):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            if port not in _taken:
                _taken.add(port)
                return port
    raise Lost("no port is free")


_taken: set[int] = set()


async def can_destroy() -> bool:
    """Whether `ss -K` is there and this kernel obeys it (CONFIG_INET_DIAG_DESTROY)."""
    if shutil.which("ss") is None:
        return False
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), listener.accept()[0] as accepted:
            await trio.run_process(
                ["ss", "-KtnH", f"sport = :{port}"], capture_stdout=True, capture_stderr=True
            )
            accepted.setblocking(False)
            try:
                accepted.recv(1)
            except BlockingIOError:
                return False
            except OSError:
                return True
    return False
