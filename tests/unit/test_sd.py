# SPDX-License-Identifier: Apache-2.0
"""What the service manager is told, where it cannot be tried with one."""

from __future__ import annotations

import socket
from pathlib import Path

from postcopyd.sd import Manager


def test_text_that_is_no_unicode(tmp_path: Path) -> None:
    """What somebody has typed, a peer for one, does not end the daemon that shows it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hears:
        hears.bind(str(tmp_path / "notify"))
        environ = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        manager = Manager(environ)
        assert not environ
        manager.tell("READY=1", "STATUS=1 VM; web1 leaving to \udcff: paused")
        assert hears.recv(1000) == rb"READY=1%bSTATUS=1 VM; web1 leaving to \udcff: paused" % b"\n"
