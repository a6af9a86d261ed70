# SPDX-License-Identifier: Apache-2.0
"""Hosts that are daemons on this machine's loopback, and the demo's small VMM.

Owns the daemons' processes, folders and ports. Speaks to them as any client does, by the control
socket; knows nothing of their inside.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from postcopyd.errors import PostcopydError
from postcopyd.tasks import threads
from postcopyd.varlink.client import Client, ConnectionLost, ErrorReply, NoAnswer

START_S = 20.0
PACKAGE = Path(__file__).resolve().parent.parent
Status = dict[str, Any]


class DemoError(PostcopydError):
    """A demo host did not do what was asked; the sentence has its own words."""

    name = "DemoFailed"


def _free_port() -> int:
    """Below those that the kernel gives to connections: nobody takes it while a daemon is away."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(16600, 32768)))  # noqa: S311
            return int(probe.getsockname()[1])


class Host:
    """One daemon. `call` and `migrate` wait in a thread: guests can be followed meanwhile."""

    #: Where the package is that it runs: the same that runs this.
    site = PACKAGE.parent

    #: What runs that package.
    program: tuple[str, ...] = (sys.executable, "-m", "postcopyd")

    #: What the daemon is run by: words before its command.
    by: tuple[str, ...] = ()

    def __init__(
        self, folder: Path, name: str, options: tuple[str, ...], tls: Path | None = None
    ) -> None:
        self.name = name
        folder = folder.absolute()
        self.control = str(folder / f"{name}.control")
        self.state = folder / f"{name}.state"
        self.log = folder / f"{name}.log"
        self.address = f"127.0.0.1:{_free_port()}"
        self.options = options
        self.tls = ("--tls-dir", str(tls)) if tls else ("--tls", "off")
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Starts the daemon; returns once it answers. Raises DemoError with its words."""
        serve = ["serve", "--control", self.control, "--listen", self.address, *self.tls]
        serve += ["--config", os.devnull]  # and not that of a daemon of this machine
        serve += ["--state-dir", str(self.state), *self.options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.by, *self.program, *serve],
                cwd=self.site,
                stdin=subprocess.DEVNULL,
                stderr=log,
                stdout=log,
                start_new_session=True,
            )
        with trio.move_on_after(START_S):
            while self.process.poll() is None:
                with suppress(NoAnswer):
                    Client(self.control).close()
                    return
                await trio.sleep(0.02)
        raise DemoError(f"starting the daemon {self.name}: {self.log.read_text()[-2000:]}")

    def end(self, number: int = signal.SIGTERM) -> None:
        """Ends the daemon and waits for it."""
        if self.process is not None:
            self.process.send_signal(number)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One call of the control socket's interface. Raises PostcopydError for its errors."""

        def call() -> dict[str, Any]:
            try:
                with Client(self.control) as client:
                    return client.call(f"io.postcopyd.{method}", **parameters)
            except ErrorReply as error:
                sentence = error.parameters.get("message", str(error.parameters))
                raise PostcopydError(sentence, error.name.rpartition(".")[2]) from None
            except NoAnswer as error:
                said = f"{error}: {self.log.read_text()[-2000:]}"
                raise DemoError(f"the daemon {self.name} does not answer ({said})") from None

        return await trio.to_thread.run_sync(call, limiter=threads.DEMO, abandon_on_cancel=True)

    async def attach(self, name: str, driver: str, path: Path | str) -> None:
        await self.call("Attach", name=name, driver=driver, socket=str(path))

    async def status(self, name: str) -> Status:
        status: Status = (await self.call("Status", name=name))["status"]
        return status

    async def migrate(
        self,
        name: str,
        to: Host,
        show: Callable[[Status], None] = lambda _: None,
        **options: Any,
    ) -> dict[str, Any]:
        """Migrates and waits for the result object, whatever it says."""
        started = await self.call("Migrate", name=name, to=to.address, **options)
        return await self.result(name, started["migration"], show)

    async def result(
        self, name: str, migration: str, show: Callable[[Status], None] = lambda _: None
    ) -> dict[str, Any]:
        """Follows a migration to its result."""

        def follow() -> dict[str, Any]:
            with suppress(ConnectionLost), Client(self.control) as client:
                for reply in client.stream("io.postcopyd.Watch", name=name):
                    status = reply["status"]
                    result: dict[str, Any] = status.get("result") or {}
                    if result.get("migration") == migration:
                        return result
                    show(status)
            raise DemoError(f"the daemon {self.name} ended during the migration of {name}")

        return await trio.to_thread.run_sync(follow, limiter=threads.DEMO, abandon_on_cancel=True)


@asynccontextmanager
async def open_hosts(
    folder: Path,
    names: tuple[str, ...] = ("host1", "host2"),
    options: tuple[str, ...] = (),
    *,
    tls: bool = False,
) -> AsyncIterator[list[Host]]:
    """Daemons that run, ended when the block is left. `options` go to each `serve`; `tls` with
    certificates made in `folder`."""
    hosts = [
        Host(folder, name, options, certified(folder, name) if tls else None) for name in names
    ]
    try:
        async with trio.open_nursery() as nursery:
            for host in hosts:
                nursery.start_soon(host.start)
        yield hosts
    finally:
        for host in hosts:
            host.end()


def certified(folder: Path, name: str, address: str = "127.0.0.1") -> Path:
    """The folder with the certificate of a host, by a CA that all of them in `folder` have."""
    from postcopyd.cli import certs  # only where there is TLS

    certs.make(folder / f"{name}.tls", [name, address], folder / "ca")
    return folder / f"{name}.tls"


class ProcessGuest:
    """The demo guest: examples/vmm.c, a small VMM whose threads write and check their memory."""

    program = Path(__file__).with_name("demo-guest")
    """Installed beside this module."""

    def __init__(self, path: Path, *options: str) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [str(self.program), "--socket", str(path), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if b"listening" not in line:
            self.kill()
            raise DemoError(f"starting the demo guest: {line.decode(errors='replace').strip()}")

    def ask(self, line: str) -> dict[str, str]:
        """One of the guest's own verbs, which it answers whoever drives it: the words of the
        answer."""
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(self.path))
            with s.makefile("rw") as lines:
                lines.write(line + "\n")
                lines.flush()
                answer = lines.readline().strip()
        if not answer.startswith("ok"):
            raise DemoError(f"asking the demo guest {line!r}: {answer or 'it ended'}")
        return dict(word.split("=", 1) for word in answer.split()[1:])

    def verify(self) -> tuple[int, int]:
        """(pages checked, bad ones) of all of the guest's memory."""
        words = self.ask("verify")
        return int(words["pages"]), int(words["bad"])

    def kill(self) -> None:
        if self.process.poll() is None:  # or its number may be another's by now
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
