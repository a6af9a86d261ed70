# SPDX-License-Identifier: Apache-2.0
"""Writes the daemon's log: to a terminal, to the journal with fields to filter by, or as lines.

Owns the form of a log entry and the identity of the events that matter (`MESSAGE_IDS`). Logs
nothing of its own. Writing never waits and never raises: an entry that cannot be written at once is
dropped and counted, because a migration must not stand still for a reader of its log.

The journal's protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL. It is implemented here because
libsystemd's call, which python3-systemd wraps, waits for a journal that does not read.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

import structlog

from postcopyd.errors import shortage

JOURNAL = "/run/systemd/journal/socket"

IDENTIFIER = "postcopyd"

LONGEST = 16 * 1024
"""Characters of one field: a datagram with all fields fits a socket's buffer."""

SHORTAGE_S = 10.0
"""How often the log says that connections have to wait."""

PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Priorities of syslog(3). "error": an operator must act. "warning": something was refused, was
lost, or is tried again. "info": the course of a migration that goes well."""

MESSAGE_IDS = {
    "migration started": "502ba3e266aa4f8587f7e70bf652a683",
    "guest handed over": "388ea5011a2c479ea4f2baede6fc5035",
    "migration completed": "10d1624c96c84123a2b4d9d0ccd33b71",
    "migration failed": "96adb8526c634272b7abd105209bfff1",
    "migration cancelled": "cf9f8a28463447749a5584730fdf1512",
    "migration paused": "634fc85701774262a87892691111c6f6",
    "migration recovered": "b2de43158cea40f0a04e8e0dd4945086",
    "ownership changed by a person": "a55eb2bd1dbd45a496f808150afe8d66",
    "VMM ended": "5022f85636cb4fdabb6a8cdd64f30f19",
    "connection refused": "d5698f29e5224b46ad8f8fcb70a027a1",
}
"""MESSAGE_ID by event; docs/MONITORING.md has them too. They never change: people filter by
them."""

dropped = 0
"""Number of entries that could not be written."""


def configure_logging() -> None:
    """Sends the log to stderr: readable on a terminal, fields in the journal, one key=value line
    elsewhere.

    $POSTCOPYD_LOG_LEVEL is the lowest level that is written: debug, info, warning or error.
    """
    listeners = logging.getLogger("trio.serve_listeners")
    listeners.handlers, listeners.propagate = [Shortage()], False
    least = os.environ.get("POSTCOPYD_LOG_LEVEL", "info").upper()
    sink: Any = Journal() if is_journal(2) else Stream()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping().get(least, logging.INFO)
        ),
        processors=[structlog.processors.add_log_level, *sink.processors],
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=False,  # a test configures it again for each daemon
    )


def is_journal(fd: int) -> bool:
    """Whether a descriptor is the stream to the journal that the service manager has set up. The
    variable alone does not tell: a child whose stderr is redirected inherits it (systemd.exec(5)).
    """
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class Stream:
    """Writes entries to a descriptor: one line each, or as suits a terminal."""

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        terminal = os.isatty(fd)
        self.processors: list[Any] = [structlog.processors.TimeStamper(fmt="iso", utc=True)]
        if terminal:
            # The plain traceback: others show the values of variables, keys among them.
            plain = structlog.dev.plain_traceback
            colours = not os.environ.get("NO_COLOR")
            self.processors.append(
                structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=plain)
            )
        else:
            keys = ["timestamp", "level", "event"]
            self.processors += [
                structlog.processors.format_exc_info,
                structlog.processors.LogfmtRenderer(key_order=keys, bool_as_flag=False),
            ]

    def msg(self, line: str) -> None:
        write(self._fd, line)

    debug = info = warning = error = critical = msg


class Journal:
    """Sends entries with fields to journald. If journald does not listen, writes lines with a
    priority to stderr instead."""

    def __init__(self, path: str = JOURNAL, fd: int = 2) -> None:
        self._path, self._fd = path, fd
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._lost = 0
        self.processors: list[Any] = [structlog.processors.format_exc_info, fields]

    def msg(self, **entry: str) -> None:
        global dropped  # noqa: PLW0603  # counted once for the process
        if self._lost:
            entry["DROPPED"] = str(self._lost)
        try:
            self._socket.sendto(datagram(entry), self._path)
        except BlockingIOError:  # journald is slow, and the daemon does not wait for it
            self._lost += 1
            dropped += 1
        except OSError:  # journald restarts, or is not there
            for line in entry["MESSAGE"].splitlines():
                write(self._fd, f"<{entry['PRIORITY']}>{line}")
        else:
            self._lost = 0

    debug = info = warning = error = critical = msg


def write(fd: int, line: str) -> None:
    """Writes a line if the descriptor has room at once; otherwise counts it as dropped."""
    global dropped  # noqa: PLW0603
    data = line.encode(errors="backslashreplace") + b"\n"
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    try:
        while data:
            if not any(found & select.POLLOUT for _, found in poll.poll(0)):
                dropped += 1
                return
            # PIPE_BUF bytes: a pipe or socket that is ready takes so many without waiting.
            data = data[os.write(fd, data[: select.PIPE_BUF]) :]
    except OSError:  # the reader is gone
        dropped += 1


def fields(logger: Any, method: str, entry: dict[str, Any]) -> dict[str, str]:
    """A structlog processor that makes the journal's fields of an entry: `vm=` as VM= and so on."""
    said = {key: _text(value) for key, value in entry.items() if value is not None}
    found = {key.upper(): value for key, value in said.items() if key not in _SPOKEN}
    event = said["event"]
    found |= {
        "MESSAGE": sentence(said),
        "PRIORITY": str(PRIORITY[said["level"]]),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
        **({"MESSAGE_ID": MESSAGE_IDS[event]} if event in MESSAGE_IDS else {}),
    }
    return found


_SPOKEN = frozenset(("event", "level", "exception"))
"""Parts of an entry that its MESSAGE or PRIORITY has, and which get no field of their own."""

_APART = _SPOKEN | {"vm", "migration", "role", "phase", "error"}
"""Parts that are not listed among the values of the sentence."""


def sentence(said: Mapping[str, str]) -> str:
    """`web1: migration completed, peer host2:16525, downtime_ms 7.9`, with an error at its end."""
    event = said["event"]
    what = f"phase {said['phase']}" if event == "phase" else event
    values = (f"{key} {value}" for key, value in said.items() if key not in _APART)
    text = ", ".join((what, *values))
    if vm := said.get("vm"):
        text = f"{vm}: {text}"
    if error := said.get("error"):
        text += f": {error}"
    if trace := said.get("exception"):
        text += f"\n{trace}"
    return text


def datagram(entry: Mapping[str, str]) -> bytes:
    """The fields of one entry as journald reads them: KEY=value, or with a length if the value has
    several lines."""
    parts = []
    for key, value in entry.items():
        data = value[:LONGEST].encode(errors="backslashreplace")
        if b"\n" in data:
            parts.append(b"%s\n%s%s\n" % (key.encode(), struct.pack("<Q", len(data)), data))
        else:
            parts.append(b"%s=%s\n" % (key.encode(), data))
    return b"".join(parts)


def _text(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value)} bytes"  # keys and tokens are bytes, and must not be logged
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)


class Shortage(logging.Handler):
    """trio logs a listener that can take no connection ten times a second, with a traceback. This
    logs one sentence each SHORTAGE_S instead."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + SHORTAGE_S
            error = record.exc_info[1] if record.exc_info else None
            why = shortage(error) if isinstance(error, OSError) else None
            structlog.get_logger().error(
                "no connection taken, those that come wait", error=str(why or error)
            )
