# SPDX-License-Identifier: Apache-2.0
"""Real QEMUs for tests of the driver: small TCG machines that run their firmware and no more."""

from __future__ import annotations

import math
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import qemus
import trio

from postcopyd.vmm import Role, Shape, VmmGone
from postcopyd.vmm.qemu import savevm
from postcopyd.vmm.qemu.driver import QemuVmm
from postcopyd.vmm.qemu.qmp import Qmp, QmpUnreachable

MIB = 1 << 20
RAM = 128 * MIB
MACHINE = "pc-q35-7.2"  # every version tried here knows it

QEMUS = [[str(qemu.path), *qemu.options] for qemu in qemus.QEMUS] or [["qemu-system-x86_64"]]
# `make test` has the first with itself, `make test-long` all others.
PAIRS = [
    pytest.param(a, b, marks=[pytest.mark.long] if a or b else [])
    for a in range(len(QEMUS))
    for b in range(len(QEMUS))
]


class Machine:
    """One QEMU process with two monitors: one for the driver, one for the test to look at it."""

    def __init__(self, folder: Path, qemu: list[str], name: str, options: list[str]) -> None:
        self.socket = str(folder / f"{name}.qmp")
        self.own_socket = str(folder / f"{name}.own")
        self.log = folder / f"{name}.log"
        self.ram = Path(f"/dev/shm/{folder.name}.{name}")
        command = [
            *qemu,
            "-nodefaults",
            "-display",
            "none",
            "-qmp",
            f"unix:{self.socket},server=on,wait=off",
            "-qmp",
            f"unix:{self.own_socket},server=on,wait=off",
            *(option.replace("RAMFILE", str(self.ram)) for option in options),
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.pid = self.process.pid

    async def answers(self) -> None:
        """Both monitors do, as QEMU makes the daemon's before the one of our own. On a busy machine
        many devices take QEMU longer than a driver waits for it."""
        with trio.fail_after(60):
            while True:
                assert self.process.poll() is None, self.log.read_text()
                qmp = Qmp(self.own_socket)
                try:
                    await qmp.open(math.inf)
                    return
                except QmpUnreachable:  # it is not there, or nobody listens at it yet
                    await trio.sleep(0.01)
                finally:
                    qmp.close()

    async def ask(self, command: str, **arguments: object) -> Any:
        qmp = Qmp(self.own_socket)
        try:
            return await qmp.execute(command, arguments)
        finally:
            qmp.close()

    async def state(self) -> str:
        return str((await self.ask("query-status"))["status"])

    async def writes(self, image: Path) -> bool:
        """Whether QEMU can write to its disk: it has to have taken it back for that."""
        with image.open("r+b") as file:
            file.write(bytes(4096))
        line = 'qemu-io disk0 "write -P 90 0 4k"'
        try:
            await self.ask("human-monitor-command", **{"command-line": line})
        except VmmGone:
            return False  # QEMU aborts when the disk is inactive
        return image.read_bytes()[:4096] == bytes([90]) * 4096

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.ram.unlink(missing_ok=True)


FILE = f"memory-backend-file,id=ram0,size={RAM},mem-path=RAMFILE,share=on"


class Lab:
    """Starts QEMUs and drivers, and ends them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: list[Machine] = []
        self.drivers: list[QemuVmm] = []

    def start(
        self, qemu: int, *options: str, memory: str | None = FILE, within: str = ""
    ) -> Machine:
        """`within`: what a shell does before it becomes this QEMU."""
        base = ["-machine", f"{MACHINE},accel=tcg" + (",memory-backend=ram0" if memory else "")]
        base += ["-m", f"{RAM // MIB}"] + (["-object", memory] if memory else [])
        return self.start_bare(qemu, *base, *options, within=within)

    def start_bare(self, qemu: int, *options: str, within: str = "") -> Machine:
        name = f"m{len(self.machines)}"
        shell = ["sh", "-c", f'{within}; exec "$@"', "sh"] if within else []
        machine = Machine(self.folder, [*shell, *QEMUS[qemu]], name, list(options))
        self.machines.append(machine)
        return machine

    async def drive(self, machine: Machine) -> QemuVmm:
        await machine.answers()
        driver = await QemuVmm.connect("web1", machine.socket)
        self.drivers.append(driver)
        return driver

    async def pair(
        self, source: int, destination: int, *options: str, paused: bool = False
    ) -> tuple[QemuVmm, QemuVmm]:
        return (
            await self.drive(self.start(source, *options, *(["-S"] if paused else []))),
            await self.drive(self.start(destination, *options, "-incoming", "defer")),
        )

    def copy_ram(self, source: int = 0, destination: int = 1) -> None:
        here, there = self.machines[source].ram, self.machines[destination].ram
        with here.open("rb") as read, there.open("r+b") as write:
            shutil.copyfileobj(read, write, MIB)


@asynccontextmanager
async def inspected(driver: QemuVmm, role: Role) -> AsyncIterator[Shape]:
    shape = await driver.inspect(role)
    try:
        yield shape
    finally:
        shape.close()


async def settings(machine: Machine) -> tuple[dict[str, bool], int, str | None]:
    capabilities = await machine.ask("query-migrate-capabilities")
    parameters = await machine.ask("query-migrate-parameters")
    return (
        {c["capability"]: c["state"] for c in capabilities},
        parameters["max-bandwidth"],
        parameters.get("tls-creds"),
    )


def since_the_stop() -> Callable[[bytes], bool]:
    """Tells of each piece of a save whether it was sent after the guest's stop."""
    seen = False

    def tell(data: bytes) -> bool:
        nonlocal seen
        seen = seen or data.startswith(struct.pack(">BI", savevm.SECTION_END, savevm.RAM))
        return seen

    return tell


async def mapped(driver: QemuVmm) -> None:
    """Returns once the firmware has mapped the memory of all devices, which 7.2 has to see."""
    with trio.fail_after(60):
        while True:
            async with inspected(driver, "source") as shape:
                if not any("does not say where" in problem for problem in shape.problems):
                    return
            await trio.sleep(0.05)
