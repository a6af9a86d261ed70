# SPDX-License-Identifier: Apache-2.0
"""A network that breaks: a TCP proxy in front of a daemon, whose connections can be cut, reset,
stalled and refused.

Owns the connections of one direction of migration. It reads along on the control connection, to say
which message is about to pass; of what the messages mean it knows nothing.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgpack
import trio

from postcopyd import protocol as p

CHUNK = 64 << 10
SOURCE, DESTINATION = "source", "destination"
DEAD = struct.pack("ii", 1, 0)  # struct linger: closing sends RST, and nothing that waits

OnMessage = Callable[[str], Awaitable[None]]


async def nobody(_: str) -> None:
    """Nobody wants to know of messages."""


@dataclass(eq=False)
class Link:
    """One connection through the proxy: two sockets. `kind`: control, urgent, push; "" at first."""

    sides: dict[str, trio.SocketStream] = field(default_factory=dict)
    kind: str = ""
    cut: bool = False

    def end(self, *, reset: bool) -> None:
        """Both sides see the end of the stream, or a reset."""
        self.cut = True
        for stream in self.sides.values():
            with suppress(OSError):
                if reset:
                    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, DEAD)
                    stream.socket.close()
                else:
                    stream.socket.shutdown(socket.SHUT_RDWR)


class Proxy:
    """Listens on `port` of 127.0.0.1 and passes on to the daemon at `to`, HOST:PORT.

    A message is passed on once `on_message(type)` has returned.
    """

    def __init__(self, port: int, to: str, on_message: OnMessage = nobody) -> None:
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self.links: list[Link] = []
        host, _, at = to.rpartition(":")
        self._to = (host, int(at))
        self._on_message = on_message
        self._stalled = {SOURCE: 0.0, DESTINATION: 0.0}  # until when nothing goes to this side
        self._refused = 0.0
        self._accepting = trio.CancelScope()

    def cut(self, kind: str = "all") -> int:
        """Ends all connections, or those of one kind; how many. The streams end, as by FIN."""
        return self._end(kind, reset=False)

    def reset(self, kind: str = "all") -> int:
        """As `cut`, by RST: what is on its way is lost."""
        return self._end(kind, reset=True)

    def stall(self, seconds: float, to: tuple[str, ...] = (SOURCE, DESTINATION)) -> None:
        """For so long nothing arrives at these sides, not even the end of a connection."""
        for side in to:
            self._stalled[side] = max(self._stalled[side], trio.current_time() + seconds)

    def refuse(self, seconds: float) -> None:
        """For so long nobody listens here; connections that are there stay."""
        self._refused = max(self._refused, trio.current_time() + seconds)
        self._accepting.cancel()

    @property
    def disturbed(self) -> bool:
        """Something is stalled or refused at this moment."""
        return trio.current_time() < max(self._refused, *self._stalled.values())

    def _end(self, kind: str, *, reset: bool) -> int:
        meant = [link for link in self.links if kind in ("all", link.kind) and not link.cut]
        for link in meant:
            link.end(reset=reset)
        return len(meant)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                (listener,) = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
                if self._accepting.cancel_called:
                    self._accepting = trio.CancelScope()
                async with listener:
                    with self._accepting:
                        task_status.started()
                        task_status = trio.TASK_STATUS_IGNORED
                        while True:
                            nursery.start_soon(self._link, await listener.accept())
                await trio.sleep_until(self._refused)

    async def _link(self, source: trio.SocketStream) -> None:
        link = Link({SOURCE: source})
        self.links.append(link)
        try:
            link.sides[DESTINATION] = await trio.open_tcp_stream(*self._to)
            if link.cut:  # meanwhile
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pass_on, link, SOURCE, DESTINATION)
                nursery.start_soon(self._pass_on, link, DESTINATION, SOURCE)
        except OSError:  # the daemon is down
            link.end(reset=True)
        finally:
            self.links.remove(link)
            for stream in link.sides.values():
                stream.socket.close()

    async def _pass_on(self, link: Link, here: str, there: str) -> None:
        a, b = link.sides[here], link.sides[there]
        told = _Listener(link, here == SOURCE)
        try:
            while data := await a.receive_some(CHUNK):
                for message in told.feed(data):
                    await self._on_message(message)
                await self._wait(there)
                await b.send_all(data)
            await self._wait(there)
            await b.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            if not link.cut:
                await self._wait(there)
                link.end(reset=True)

    async def _wait(self, side: str) -> None:
        while trio.current_time() < self._stalled[side]:
            await trio.sleep_until(self._stalled[side])


class _Listener:
    """Reads along one direction of a connection, as far as there are messages."""

    def __init__(self, link: Link, first: bool) -> None:
        self._link = link
        self._first = first  # this direction begins with what the connection is for
        self._unpacker = msgpack.Unpacker(strict_map_key=False, unicode_errors="replace")

    def feed(self, data: bytes) -> list[str]:
        """The types of the messages that end within `data`."""
        if self._link.kind not in ("", "control"):
            return []
        messages = []
        try:
            self._unpacker.feed(data)
            for found in self._unpacker:
                if isinstance(found, dict):
                    messages += self._take(found)
                elif found == p.CONTROL and self._first:
                    self._link.kind = "control"
                if self._link.kind not in ("", "control"):
                    break
        except (ValueError, msgpack.UnpackException):
            self._link.kind = self._link.kind or "unknown"
        return messages

    def _take(self, found: dict[Any, Any]) -> list[str]:
        if self._link.kind == "control":
            return [str(found.get("type"))]
        if self._first and "urgent" in found:
            self._link.kind = "urgent" if found["urgent"] else "push"
        return []
