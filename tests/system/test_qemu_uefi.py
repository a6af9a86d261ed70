# SPDX-License-Identifier: Apache-2.0
"""A guest with UEFI: its variables, which it has in memory and QEMU in a file."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from needs import missing
from qemu_lab import Lab, Machine
from test_qemu_driver import saved

FIRMWARE = Path("/usr/share/OVMF")
GUID = "11111111-2222-3333-4444-555555555555"
ESCAPES = re.compile(rb"\x1b\[[0-9;=]*[a-zA-Z]")
BOOT_SECONDS = 120  # emulated, on a busy host


@asynccontextmanager
async def shell_at(socket: Path) -> AsyncIterator[Shell]:
    async with await trio.open_unix_socket(str(socket)) as serial:
        yield Shell(serial)


class Shell:
    """The firmware's own, on the serial line."""

    def __init__(self, serial: trio.SocketStream) -> None:
        self.serial = serial
        self.said = b""

    async def prompt(self) -> str:
        """Waits for it; what was said before. The wait for a script is skipped."""
        with trio.fail_after(BOOT_SECONDS):
            while b"Shell> " not in self.said:
                piece = await self.serial.receive_some()
                assert piece
                if b"seconds to skip" in ESCAPES.sub(b"", self.said + piece):
                    await self.serial.send_all(b"\x1b")
                self.said = ESCAPES.sub(b"", self.said + piece)
        said, self.said = self.said, b""
        return said.decode(errors="replace")

    async def set(self, name: str) -> None:
        """A variable that stays."""
        await self.serial.send_all(f"setvar {name} -guid {GUID} -nv -bs =0x5a\r".encode())
        await self.prompt()

    async def has(self, name: str) -> bool:
        await self.serial.send_all(f"setvar {name} -guid {GUID}\r".encode())
        return "5A" in await self.prompt()


def stored(store: Path, name: str) -> bool:
    return name.encode("utf-16-le") in store.read_bytes()


@pytest.mark.long
async def test_variables_cross(lab: Lab, qemu: int, tmp_path: Path) -> None:
    """What was set before the move is there after it, also in the file, and after a reset; and
    others can be set."""
    if not FIRMWARE.exists():
        missing("UEFI firmware: the Debian package ovmf")
    code, store = tmp_path / "code", tmp_path / "variables"
    shutil.copyfile(FIRMWARE / "OVMF_CODE_4M.fd", code)  # a QEMU with a /usr of its own sees it
    shutil.copyfile(FIRMWARE / "OVMF_VARS_4M.fd", store)
    machines: list[Machine] = []
    for number in range(2):
        options = [
            *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}"),
            *("-drive", f"if=pflash,unit=1,format=raw,file={store}"),
            *(
                "-chardev",
                f"socket,id=s0,path={lab.folder}/serial{number},server=on,wait=off",
                "-serial",
                "chardev:s0",
            ),
            *(["-incoming", "defer"] if number else []),
        ]
        machines.append(lab.start(qemu, *options))
    a, b = [await lab.drive(machine) for machine in machines]
    async with shell_at(lab.folder / "serial0") as shell:
        await shell.prompt()
        await shell.set("before")
    assert stored(store, "before")
    tape = await saved(a, b)
    lab.copy_ram()
    was = store.read_bytes()
    with trio.fail_after(20):
        await b.load(tape.play())
        await b.run()
        await b.release()
    assert store.read_bytes() == was
    await a.end()
    async with shell_at(lab.folder / "serial1") as shell:
        await shell.serial.send_all(b"\r")
        await shell.prompt()
        assert await shell.has("before")
        assert not await shell.has("never")
        await shell.set("after")
        await machines[1].ask("system_reset")
        await shell.prompt()
        assert await shell.has("before")
        assert await shell.has("after")
    assert stored(store, "before")
    assert stored(store, "after")
