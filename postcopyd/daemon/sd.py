# SPDX-License-Identifier: Apache-2.0
"""What a service manager and this process tell each other: sockets, readiness, the watchdog.

Owns sd_listen_fds(3), sd_notify(3) and sd_watchdog_enabled(3) as far as they are used here. Knows
nothing of the daemon. Without a service manager there are no sockets, and nothing is told.

Each is a few lines, so they are written here: python3-systemd is a C module that needs libsystemd
at build time.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

import structlog

from postcopyd.errors import PostcopydError

FIRST_FD = 3
"""SD_LISTEN_FDS_START."""

VARIABLES = (
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"),
    *("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"),
)

log = structlog.get_logger()


class Manager:
    """The service manager, as the environment describes it.

    `sockets` are those that it has opened for this process. `watchdog_s` is how long this process
    may be silent; None for no limit.
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Takes the variables out of the environment, so that programs started from here do not
        take them for their own. Raises PostcopydError."""
        told = {name: environ.pop(name, "") for name in VARIABLES}
        own = str(os.getpid())
        self._address = told["NOTIFY_SOCKET"]
        self.sockets = _sockets(int(told["LISTEN_FDS"] or 0) if told["LISTEN_PID"] == own else 0)
        patience = int(told["WATCHDOG_USEC"] or 0) / 1e6
        self.watchdog_s = patience if patience and told["WATCHDOG_PID"] in ("", own) else None

    def tell(self, *assignments: str) -> None:
        """Sends assignments such as READY=1 or STATUS=text, in one message; never waits."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        try:
            with socket.socket(socket.AF_UNIX, kind) as to:
                to.sendto("\n".join(assignments).encode(errors="backslashreplace"), address)
        except OSError as error:
            log.warning("service manager not told", what=assignments[0], error=str(error))


def _sockets(count: int) -> list[socket.socket]:
    found = []
    for fd in range(FIRST_FD, FIRST_FD + count):
        os.set_inheritable(fd, False)
        try:
            found.append(socket.socket(fileno=fd))
        except OSError as error:
            raise PostcopydError(
                f"descriptor {fd}, given by the service manager, is no socket: {error.strerror}"
            ) from None
    for given in found:
        if not given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise PostcopydError(
                f"the socket {given.getsockname()}, given by the service manager, does not listen: "
                f"say ListenStream= in its unit"
            )
    return found
