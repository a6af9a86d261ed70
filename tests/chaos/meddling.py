# SPDX-License-Identifier: Apache-2.0
"""What others do to the guest while it is moved, who know nothing of postcopyd and have a monitor
of their own: they save it, move it to a third QEMU, take a device from it; and the guest itself,
which is switched off.

Each comes to its own end, whatever the daemons do meanwhile: nobody else's work may fail because of
them, and none may seem to go well that has not. That, and what the run has to do to go on, is all
that is decided here; where the guest runs is for evidence.py.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio
from evidence import Runs
from guests import qemu as q
from lab import ANSWER_S, Lost, Vmm
from monitor import Ended, Refused

OVER = ("completed", "failed", "cancelled")


class Others:
    """One of them at a time. `done` is set while none is at work."""

    def __init__(self, folder: Path, runs: Runs, nursery: trio.Nursery) -> None:
        self.third: Vmm | None = None
        """Waits for the guest, or has it: `third_has_it`."""
        self.third_has_it = False
        self.off = ""
        """The QEMU in which the guest was switched off."""
        self.unplugged = ""
        """The QEMU that has lost a device."""
        self.done = trio.Event()
        self.done.set()
        self._folder = folder
        self._runs = runs
        self._nursery = nursery
        self._count = 0

    def _path(self) -> Path:
        self._count += 1
        return self._folder / f"other{self._count}"

    async def _begins(self, vmm: Vmm, uri: str) -> bool:
        """Whether QEMU begins another's migration; it refuses while there is one."""
        self.done = trio.Event()
        with trio.move_on_after(ANSWER_S), suppress(Refused, Ended):
            await vmm.monitor.execute("migrate", uri=uri)
            return True
        self.done.set()
        return False

    def _go_on(self, work: Callable[..., Any], *args: Any) -> bool:
        """It has begun, and comes to its end beside everything else."""
        self.done = self.done if not self.done.is_set() else trio.Event()

        async def to_its_end() -> None:
            await work(*args)
            self.done.set()

        self._nursery.start_soon(to_its_end)
        return True

    # --- a save ----------------------------------------------------------------------------------

    async def save(self, vmm: Vmm, arrived: bool, size: int) -> bool:
        """As a backup does it: to a stream, and the guest goes on. Of `size` bytes is what the
        guest works on. Returns whether it has begun."""
        path = self._path()
        stream = Stream(path)
        if not await self._begins(vmm, f"unix:{path}"):
            stream.close()
            return False
        self._nursery.start_soon(stream.drain)
        return self._go_on(self._saved, vmm, arrived, stream, size)

    async def _saved(self, vmm: Vmm, arrived: bool, stream: Stream, size: int) -> None:
        how = await outcome(vmm)
        if how == "completed":
            await stream.ended.wait()
            if stream.carried < size:
                raise Lost(
                    f"another's save of {vmm.name} has completed with {stream.carried >> 20} MiB, "
                    f"and the guest has {size >> 20} MiB"
                )
            if await vmm.state() == "postmigrate":
                await vmm.monitor.execute("cont")
        elif how == "cancelled" or (how == "failed" and not arrived):
            raise Lost(f"another's save of {vmm.name} has {how}")
        stream.close()

    # --- a third QEMU ----------------------------------------------------------------------------

    async def expect(self, third: Vmm) -> None:
        """A third QEMU that the guest may be moved to."""
        self.third, path = third, self._path()
        await third.monitor.execute("migrate-incoming", uri=f"unix:{path}")
        self._to = f"unix:{path}"

    async def leave(self, vmm: Vmm) -> bool:
        """Away to the third QEMU, by QEMU's own migration."""
        if self.third is None or not await self._begins(vmm, self._to):
            return False
        return self._go_on(self._left, vmm, self.third)

    async def _left(self, vmm: Vmm, third: Vmm) -> None:
        how = await outcome(vmm)
        if how != "completed":
            said = third.process.log_path.read_text(errors="replace").strip()
            raise Lost(f"another's migration of {vmm.name} has {how}; {third.name} said: {said}")
        while await third.state() == "inmigrate":
            await trio.sleep(0.01)
        await third.monitor.execute("cont")
        self.third_has_it = True

    # --- the guest itself ------------------------------------------------------------------------

    async def switch_off(self, vmm: Vmm, guest: q.Guest) -> bool:
        self.off = vmm.name
        return self._go_on(self._switched_off, guest)

    async def _switched_off(self, guest: q.Guest) -> None:
        """It may have moved before it obeys, and have to wait for memory to do so."""
        await guest.quit(600)
        while not self._runs.orderly:
            await trio.sleep(0.01)

    # --- devices ---------------------------------------------------------------------------------

    async def unplug(self, vmm: Vmm) -> bool:
        """A USB tablet, which needs no consent of the guest."""
        self.done = trio.Event()
        with trio.move_on_after(ANSWER_S), suppress(Refused, Ended):
            await vmm.monitor.execute("device_del", id="tablet")
            self.unplugged = vmm.name
        self.done.set()
        return self.unplugged == vmm.name


class Stream:
    """Where another's save goes to: nobody keeps it, its bytes are counted."""

    def __init__(self, path: Path) -> None:
        self.carried = 0
        self.ended = trio.Event()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        self._socket = trio.socket.from_stdlib_socket(listener)

    async def drain(self) -> None:
        with suppress(OSError):
            end, _ = await self._socket.accept()
            with end:
                while data := await end.recv(1 << 20):
                    self.carried += len(data)
        self.ended.set()

    def close(self) -> None:
        self._socket.close()


async def outcome(vmm: Vmm) -> str:
    """How that migration has ended: one of OVER, or "ended" with its QEMU."""
    try:
        while (said := await vmm.monitor.execute("query-migrate")).get("status") not in OVER:
            await trio.sleep(0.02)
    except (Refused, Ended):
        return "ended"
    return str(said["status"])


async def peripherals(vmm: Vmm) -> set[str]:
    """The ids of the devices that it has."""
    found = await vmm.monitor.execute("qom-list", path="/machine/peripheral")
    return {one["name"] for one in found}


def with_device(config: q.GuestConfig, whole: bool) -> q.GuestConfig:
    """The same guest with a device that can be taken from it, or after that was done."""
    options = ["-device", "qemu-xhci,id=usb"]
    if whole:
        options += ["-device", "usb-tablet,id=tablet,bus=usb.0"]
    qemu = dataclasses.replace(config.qemu, options=(*config.qemu.options, *options))
    return dataclasses.replace(config, qemu=qemu)
