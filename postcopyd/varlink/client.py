# SPDX-License-Identifier: Apache-2.0
"""A blocking Varlink client, for command lines: one connection, one call at a time.

Owns the client's half of the framing. Imports nothing that takes time to load, and knows no
interface: names and parameters are the caller's.
"""

from __future__ import annotations

import json
import math
import select
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

# Connecting to a unix socket waits only while the server's backlog is full. A service manager that
# holds the socket has one too: that a connection is made says nothing of a service.
CONNECT_SECONDS = 10.0
# Ctrl-C that comes in the instant before a call to the kernel does not interrupt it: Python has
# noted it, and looks at its notes when the call returns. So no call waits for longer than this.
TURN_MS = 500
# One call. What takes longer is begun by a call and followed by a stream.
CALL_SECONDS = 300.0


class NoAnswer(Exception):
    """Nothing could be reached at the address; the text says why."""


class ConnectionLost(Exception):
    """The connection ended before the reply came, so what became of the call is not known."""


class Silent(ConnectionLost):
    """No reply came for so many seconds."""


class ErrorReply(Exception):
    """The service answered with an error: its qualified name and parameters."""

    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        super().__init__(name)
        self.name = name
        self.parameters = parameters


class Client:
    """A connection to the service that listens on the unix socket `path`. Raises NoAnswer."""

    def __init__(self, path: str) -> None:
        self._buffer = bytearray()
        self._patience = CALL_SECONDS  # with one reply
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._connect(path)
        except OSError as error:
            self._socket.close()
            raise NoAnswer(error.strerror or str(error)) from error

    def _connect(self, path: str) -> None:
        """With a timeout of Python's the socket would not block, and a full backlog would fail."""
        deadline = time.monotonic() + CONNECT_SECONDS
        self._wait_for(TURN_MS)
        while True:
            try:
                self._socket.connect(path)
                break
            except BlockingIOError as full:
                if time.monotonic() > deadline:
                    why = f"its queue of clients was full for {CONNECT_SECONDS:.0f} s"
                    raise OSError(full.errno, why) from None
        self._wait_for(0)

    def _wait_for(self, ms: int) -> None:
        """How long a call that connects or sends waits; 0: for ever."""
        limit = struct.pack("@ll", ms // 1000, ms % 1000 * 1000)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and with it any stream."""
        self._socket.close()

    def alive(self, within: float) -> None:
        """Returns when the service has answered a call that asks for nothing. Raises NoAnswer when
        it does not in so many seconds; ErrorReply, ConnectionLost."""
        self._patience = within
        try:
            self.call("org.varlink.service.GetInfo")
        except Silent:
            raise NoAnswer(f"nobody answered within {within:.0f} s") from None
        self._patience = CALL_SECONDS

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The reply's parameters. None among the call's is left out.

        Raises ErrorReply, ConnectionLost.
        """
        self._send({"method": method}, parameters)
        return self._reply()[0]

    def stream(self, method: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """The parameters of each reply to a call with `more`. Raises ErrorReply, ConnectionLost."""
        self._send({"method": method, "more": True}, parameters)
        self._patience = math.inf  # nothing may happen for long
        continues = True
        while continues:
            reply, continues = self._reply()
            yield reply

    def _send(self, header: dict[str, Any], parameters: dict[str, Any]) -> None:
        given = {key: value for key, value in parameters.items() if value is not None}
        message = json.dumps({**header, "parameters": given}, separators=(",", ":"))
        try:
            self._socket.sendall(message.encode() + b"\0")
        except OSError as error:
            raise ConnectionLost from error

    def _reply(self) -> tuple[dict[str, Any], bool]:
        until = time.monotonic() + self._patience
        ready = select.poll()
        ready.register(self._socket, select.POLLIN)
        while (end := self._buffer.find(b"\0")) < 0:
            while not ready.poll(min(TURN_MS, 1e3 * self._patience)):
                if time.monotonic() >= until:
                    raise Silent
            try:
                data = self._socket.recv(65536)
            except OSError as error:
                raise ConnectionLost from error
            if not data:
                raise ConnectionLost
            self._buffer += data
        message = json.loads(self._buffer[:end])
        del self._buffer[: end + 1]
        parameters = message.get("parameters") or {}
        if message.get("error"):
            raise ErrorReply(message["error"], parameters)
        return parameters, bool(message.get("continues"))
