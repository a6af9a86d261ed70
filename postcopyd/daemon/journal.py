# SPDX-License-Identifier: Apache-2.0
"""Where the daemon's log goes: a terminal, the journal with fields to filter by, or lines.

Owns what a log entry looks like and the identity of the events that matter (`MESSAGE_IDS`). Says
nothing itself. Writing never waits and never raises: what cannot be written at once is dropped and
counted, because a migration must not stand still for a reader of its log.

The journal's protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL. By hand, as libsystemd's call,
which python3-systemd wraps, waits for a journal that does not read.
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
"""Characters of one field: a datagram with all of them fits a socket's buffer."""

SHORTAGE_S = 10.0
"""How often it is said that connections have to wait."""

PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""syslog(3). An error is something that an operator must act on; a warning, that something was
refused, lost or is tried again; info is what there is to read of a migration that goes well."""

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
"""MESSAGE_ID by event; docs/MONITORING.md has them too. Never changed, as people filter by them."""

dropped = 0
"""Entries that could not be written."""


def configure_logging() -> None:
    """To stderr: readable on a terminal, fields in the journal, one key=value line elsewhere.

    $POSTCOPYD_LOG_LEVEL is the least of debug, info, warning and error that is written.
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
        cache_logger_on_first_use=False,  # a daemon of a test configures it again
    )


def is_journal(fd: int) -> bool:
    """Whether a descriptor is the stream to the journal that the service manager has set up: a
    child that has it redirected inherits the variable all the same (systemd.exec(5))."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class Stream:
    """One line for each entry, or what suits a terminal, to a descriptor."""

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        terminal = os.isatty(fd)
        self.processors: list[Any] = [structlog.processors.TimeStamper(fmt="iso", utc=True)]
        if terminal:
            # With a traceback that is plain: others show what variables hold, keys too.
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
    """Entries with fields, to journald; where that does not listen, lines with a priority for the
    stream that stderr is."""

    def __init__(self, path: str = JOURNAL, fd: int = 2) -> None:
        self._path, self._fd = path, fd
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._lost = 0
        self.processors: list[Any] = [structlog.processors.format_exc_info, fields]

    def msg(self, **entry: str) -> None:
        global dropped  # noqa: PLW0603  # of the process, as the journal is
        if self._lost:
            entry["DROPPED"] = str(self._lost)
        try:
            self._socket.sendto(datagram(entry), self._path)
        except BlockingIOError:  # journald is slow: nobody waits for it
            self._lost += 1
            dropped += 1
        except OSError:  # it is started again, or is not there
            for line in entry["MESSAGE"].splitlines():
                write(self._fd, f"<{entry['PRIORITY']}>{line}")
        else:
            self._lost = 0

    debug = info = warning = error = critical = msg


def write(fd: int, line: str) -> None:
    """A line, if there is room for it now; counted as dropped otherwise."""
    global dropped  # noqa: PLW0603
    data = line.encode(errors="backslashreplace") + b"\n"
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    try:
        while data:
            if not any(found & select.POLLOUT for _, found in poll.poll(0)):
                dropped += 1
                return
            # What a pipe or socket that is ready certainly takes without waiting.
            data = data[os.write(fd, data[: select.PIPE_BUF]) :]
    except OSError:  # nobody reads it any more
        dropped += 1


def fields(logger: Any, method: str, entry: dict[str, Any]) -> dict[str, str]:
    """A structlog processor: the journal's fields of an entry, `vm=` as VM= and so on."""
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
"""Parts of an entry that its MESSAGE or PRIORITY has, and no field of its own."""

_APART = _SPOKEN | {"vm", "migration", "role", "phase", "error"}
"""Those that do not stand among the values of its sentence."""


def sentence(said: Mapping[str, str]) -> str:
    """`web1: migration completed, peer host2:16525, downtime_ms 7.9`, and what went wrong last."""
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
    """The fields of one entry as journald reads them: KEY=value, or with a length where the value
    has lines of its own."""
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
        return f"{len(value)} bytes"  # keys and tokens are bytes, and no reader's business
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)


class Shortage(logging.Handler):
    """What trio says of a listener that can take no connection, ten times a second with a
    traceback: a sentence each ten seconds instead."""

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
