# SPDX-License-Identifier: Apache-2.0
"""A domain that waits for its guest: libvirt makes it, by a restore from a stream that comes later.

Owns the helper process of that restore, until libvirt's call has returned or `call_off`. libvirt
works at the domain all that time, and keeps its monitor from everybody. So its RAM is found in
/proc: by size, by what the kernel says of the mapping, and where that leaves a choice by QEMU's own
list of blocks. Once QEMU can be asked, and before the guest runs, all of it is compared with what
QEMU says (`not_where_it_was`).
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import AsyncIterable, Iterator
from contextlib import suppress

import trio

from postcopyd.host import procfs
from postcopyd.tasks import threads
from postcopyd.tasks.nursery import open_nursery
from postcopyd.vmm import Region, Shape, VmmError, VmmGone, VmmTimeout, looked_at
from postcopyd.vmm.libvirt import calls
from postcopyd.vmm.libvirt.monitor import process_of
from postcopyd.vmm.qemu import ram
from postcopyd.vmm.qemu.blocks import Block

MADE_S = 30.0
"""How long libvirt may take to start a QEMU; the first one after its start takes 8 s."""

RETURN_S = 10.0
"""How long libvirt may take, once it has the whole stream, to find the guest there: it runs hooks
of its own meanwhile. The guest runs nowhere, so not for long."""

LOOK_S = 0.01

ADDRESS, LENGTH = 52, 28
"""Of a RAMBlock in QEMU (include/exec/ramblock.h, 7.2 to 11.1): so many bytes before its name stand
the address of its memory and how much of that is in use."""

MOST = 256 << 10
"""Bytes of one piece."""


class Restore:
    """The call to libvirt that makes the domain, and returns once the guest is loaded."""

    def __init__(self, name: str, uri: str) -> None:
        self._doing = f"making the domain {name}, to wait for its guest"
        self._name, self._uri = name, uri
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: trio.socket.SocketType | None = None
        self.whole = False  # the end of the stream was sent

    async def begin(self, xml: str, changed: str, like: Shape) -> int:
        """Has libvirt start the QEMU, and returns its process once all RAM is there that `like`
        has. `changed` is the XML to take instead, if libvirt finds the same machine in it; empty
        for none. Raises PostcopydError; then call `call_off`."""
        self._process, ours = calls.start(self._uri, "restore")
        self._channel = trio.socket.from_stdlib_socket(ours)
        await self._piece(xml.encode())
        await self._piece(changed.encode())
        try:
            with trio.fail_after(MADE_S):
                async with open_nursery() as nursery:
                    nursery.start_soon(self._must_not_return)
                    pid = await self._started(like)
                    nursery.cancel_scope.cancel()
        except trio.TooSlowError:
            raise VmmTimeout(
                f"{self._doing}: libvirt has not started a QEMU with its memory within "
                f"{MADE_S:.0f} s, or its parts are not known by name: see the logs of libvirt and "
                f"of the domain"
            ) from None
        return pid

    async def _started(self, like: Shape) -> int:
        """A process that is older than the helper is another one: libvirt may have left the file of
        a QEMU that has ended, whose number another QEMU has now."""
        assert self._process is not None
        asked = procfs.started(self._process.pid)
        while True:
            with suppress(VmmGone):
                pid = process_of(self._name)
                with suppress(OSError):
                    if procfs.started(pid) >= asked and all(places(like, pid)):
                        return pid
            await trio.sleep(LOOK_S)

    async def _must_not_return(self) -> None:
        await self._answer()
        raise VmmError(f"{self._doing}: libvirt says that the guest is there already")

    async def feed(self, receive: AsyncIterable[bytes]) -> None:
        """Gives the stream to libvirt; returns once libvirt has found the guest loaded. Raises
        PostcopydError, and whatever `receive` raises."""
        async for data in receive:
            for at in range(0, len(data), MOST):
                await self._piece(data[at : at + MOST])
        self.whole = True
        await self._piece(b"")
        try:
            with trio.fail_after(RETURN_S):
                await self._answer()
        except trio.TooSlowError:
            raise VmmTimeout(
                f"{self._doing}: libvirt has not returned for {RETURN_S:.0f} s after the whole "
                f"stream: see the logs of libvirt and of the domain"
            ) from None
        await self.call_off()

    async def _piece(self, data: bytes) -> None:
        """An error is told by the answer."""
        assert self._channel is not None
        with suppress(OSError):
            await calls.send_all(self._channel, struct.pack(">I", len(data)) + data)

    async def _answer(self) -> None:
        assert self._channel is not None
        text = b""
        while not text.endswith(b"\n") and (piece := await self._channel.recv(1 << 16)):
            text += piece
        calls.answered(self._doing, text)

    async def call_off(self) -> None:
        """Ends the helper, which ends a load that goes on. Idempotent."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            process, self._process = self._process, None
            await calls.leave(process)


async def regions(like: Shape, pid: int) -> tuple[list[Region], list[str]]:
    """The RAM of the QEMU that waits, as `like` names it, and why parts of it cannot be used."""
    found = []
    with looked_at("the domain", pid):
        for region, starts in zip(like.regions, places(like, pid), strict=True):
            if len(starts) != 1:
                return [], [
                    f"Guest RAM '{region.name}' cannot be told from other memory of {region.size} "
                    f"bytes before the guest is there: give the NUMA nodes different sizes."
                ]
            block = Block(region.name, region.size, region.size, starts[0])
            found.append(ram.Backend(region.name, "memory", region.size, False, block))
        return await trio.to_thread.run_sync(ram.regions, found, pid, limiter=threads.WALKS)


def places(like: Shape, pid: int) -> list[list[int]]:
    """For each region, the mappings that may be it: one, once QEMU has all of them. Raises
    OSError."""
    there = list(_ram(pid))
    sizes = [region.size for region in like.regions]
    found = []
    for region in like.regions:
        starts = [start for start, size in there if size == region.size]
        if starts and (len(starts) > 1 or sizes.count(region.size) > 1):
            starts = _named(region, starts, pid)
        found.append(starts)
    return found


def _named(region: Region, starts: list[int], pid: int) -> list[int]:
    """Those that QEMU has a block for of this name and size, in its heap. Raises OSError."""
    found = set()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for heap in (one for one in procfs.mappings(pid) if one.path == "[heap]"):
            data = os.pread(memory.fileno(), heap.length, heap.start)
            for name in (region.name, f"/objects/{region.name}"):
                at = ADDRESS - 1
                while (at := data.find(name.encode() + b"\0", at + 1)) >= 0:
                    (address,) = struct.unpack_from("<Q", data, at - ADDRESS)
                    (length,) = struct.unpack_from("<Q", data, at - LENGTH)
                    if address in starts and length == region.size:
                        found.add(address)
    return sorted(found)


def _ram(pid: int) -> Iterator[tuple[int, int]]:
    """Address and size of each mapping that may be guest RAM: memory that is written, that no code
    is in, and that QEMU has advised the kernel about (dd: not to dump it; mg: to merge it). TCG's
    own buffer has code. Raises OSError."""
    span = (0, 0)
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            first, _, rest = line.partition(" ")
            if not first.endswith(":"):
                start, _, end = first.partition("-")
                span = (int(start, 16), int(end, 16) - int(start, 16))
            elif first == "VmFlags:":
                flags = set(rest.split())
                if "wr" in flags and "ex" not in flags and flags & {"dd", "mg"}:
                    yield span


def not_where_it_was(like: Shape, present: list[Block]) -> str | None:
    """Compares the RAM that was adopted with what QEMU says, once it can be asked."""
    by_name = {block.name.removeprefix("/objects/"): block for block in present}
    for region in like.regions:
        block = by_name.get(region.name)
        if block is None or (block.address, block.total) != (region.address, region.size):
            return region.name
    return None
