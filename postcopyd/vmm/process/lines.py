# SPDX-License-Identifier: Apache-2.0
"""Lines, attributes and descriptors of docs/VMM-PROTOCOL.md on one connection.

It owns the socket, and what was received and is not used yet. It must not know a verb. Everything
that a VMM can make longer or more numerous has its limit here.
"""

from __future__ import annotations

import array
import contextlib
import os
import re
import socket as sockets
import struct

import trio

from postcopyd.errors import no_descriptors
from postcopyd.vmm import VmmGone, VmmProtocolError

MAX_LINE = 4096  # bytes, with its end: one page, more than any sentence needs
MAX_FDS = 256  # waiting to be used: one for each region that a VMM may have
ROOM_FDS = 32  # in one message; the kernel drops those beyond
MAX_NUMBER = 1 << 56  # above any address or size that a process can have

_NUMBER = re.compile(r"0x[0-9a-fA-F]{1,16}|[0-9]{1,20}")


def attributes(text: str) -> dict[str, str]:
    """The `key=value` words of a line; other words are skipped."""
    return dict(word.split("=", 1) for word in text.split(" ") if "=" in word)


def number(values: dict[str, str], key: str) -> int:
    """A decimal or 0x-hexadecimal attribute. Raises `VmmProtocolError`."""
    text = values.get(key, "")
    if _NUMBER.fullmatch(text):
        value = int(text, 16 if text.startswith("0x") else 10)
        if value <= MAX_NUMBER:
            return value
    raise VmmProtocolError(f"it sent {key}={text[:40]} where a number belongs")


def close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


class Link:
    """One connection to a VMM."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock
        self.pid = 0  # of the process that wrote last, by the kernel's word
        self._fds: list[int] = []  # in the order in which they came
        self._buffer = bytearray()

    async def send(self, line: str, fd: int | None = None) -> None:
        """Sends one line, with a duplicate of `fd`. Does not raise if the VMM has ended: its last
        words, and its end, are what the caller reads next."""
        data = line.encode("ascii") + b"\n"
        rights = []
        if fd is not None:
            rights = [(sockets.SOL_SOCKET, sockets.SCM_RIGHTS, array.array("i", [fd]).tobytes())]
        with contextlib.suppress(ConnectionError):
            sent = await self.sock.sendmsg([data], rights)
            while sent < len(data):
                sent += await self.sock.send(data[sent:])

    async def line(self) -> str:
        """The next line without its end. Raises `VmmProtocolError`, `VmmGone` at the end."""
        while (end := self._buffer.find(b"\n", 0, MAX_LINE)) < 0:
            if len(self._buffer) >= MAX_LINE:
                raise VmmProtocolError(f"it sent a line of more than {MAX_LINE} bytes")
            await self._receive()
        text = self._buffer[:end].decode("latin-1")
        del self._buffer[: end + 1]
        if not text.isascii() or not text.isprintable():
            raise VmmProtocolError("it sent a line with bytes that are not printable ASCII")
        return text

    async def _receive(self) -> None:
        room = sockets.CMSG_SPACE(4 * ROOM_FDS) + sockets.CMSG_SPACE(12)
        data, control, flags, _ = await self.sock.recvmsg(65536, room, sockets.MSG_CMSG_CLOEXEC)
        for level, kind, value in control:
            if level != sockets.SOL_SOCKET:
                continue
            if kind == sockets.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(value[: len(value) - len(value) % fds.itemsize])
                self._fds.extend(fds)
            elif kind == sockets.SCM_CREDENTIALS:
                self.pid = struct.unpack("3i", value)[0]
        if flags & sockets.MSG_CTRUNC and len(self._fds) < ROOM_FDS:
            raise no_descriptors()  # recvmsg(2) itself does not fail for want of them
        if flags & sockets.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            raise VmmProtocolError("it sent more descriptors than any answer has")
        if not data:
            raise VmmGone("it closed the connection")
        self._buffer += data

    def take(self, count: int) -> list[int]:
        """Exactly `count` descriptors of an answer; they are the caller's. Raises
        `VmmProtocolError` if it has another number."""
        fds, self._fds = self._fds, []
        if len(fds) != count:
            got = len(fds)
            close_all(fds)
            raise VmmProtocolError(f"it sent {got} descriptors where {count} belong")
        return fds

    def close(self) -> None:
        close_all(self._fds)
        self.sock.close()
