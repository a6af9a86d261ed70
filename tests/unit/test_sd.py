# SPDX-License-Identifier: Apache-2.0
"""What a service manager gives and hears, and the line that `systemctl status` shows."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from postcopyd.daemon.sd import Manager
from postcopyd.daemon.service import summary
from postcopyd.model import Status


def test_without_a_service_manager_nothing_happens() -> None:
    """A daemon that a person has started has no sockets, no watchdog, and tells nobody."""
    manager = Manager({})
    manager.tell("READY=1")
    assert (manager.sockets, manager.watchdog_s) == ([], None)


@pytest.mark.parametrize("abstract", [False, True])
def test_it_is_told_in_one_message(tmp_path: Path, abstract: bool) -> None:
    """By path or by abstract name, and not when its queue is full: the daemon never waits."""
    path = f"@{tmp_path}" if abstract else f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path.replace("@", "\0"))
        environ = {"NOTIFY_SOCKET": path, "HOME": "/root"}
        manager = Manager(environ)
        manager.tell("READY=1", "STATUS=2 VMs")
        assert listener.recv(100) == b"READY=1\nSTATUS=2 VMs"
        assert environ == {"HOME": "/root"}  # programs started from here are not told
        for _ in range(2000):
            manager.tell("WATCHDOG=1")
    manager.tell("WATCHDOG=1")


def test_text_that_is_no_unicode(tmp_path: Path) -> None:
    """What somebody has typed, a peer for one, does not end the daemon that shows it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"{tmp_path}/notify")
        manager = Manager({"NOTIFY_SOCKET": f"{tmp_path}/notify"})
        manager.tell("READY=1", "STATUS=1 VM; web1 leaving to \udcff: paused")
        assert (
            listener.recv(999) == rb"READY=1%bSTATUS=1 VM; web1 leaving to \udcff: paused" % b"\n"
        )


def test_the_watchdog_is_ours_or_not() -> None:
    """WATCHDOG_PID names whom it is for."""
    for pid, expected in (("", 1.5), (str(os.getpid()), 1.5), ("1", None)):
        assert Manager({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": pid}).watchdog_s == expected


def test_sockets_for_another_process_are_not_taken() -> None:
    """They came by inheritance, from a parent that was meant."""
    assert Manager({"LISTEN_FDS": "2", "LISTEN_PID": "1"}).sockets == []


TAKES = """
import os
from postcopyd.errors import PostcopydError
from postcopyd.daemon.sd import Manager
try:
    given = Manager(os.environ | {"LISTEN_PID": str(os.getpid())}).sockets
    print([(one.family.name, one.get_inheritable()) for one in given])
except PostcopydError as error:
    print(error)
"""


def taken(descriptor: int) -> str:
    """What a process says that has this as its first descriptor, as systemd gives it."""
    put = f"os.dup2({descriptor}, 3)\nos.environ['LISTEN_FDS'] = '1'\n"
    code = f"import os\n{put}{TAKES}"
    done = subprocess.run(
        [sys.executable, "-c", code], pass_fds=[descriptor], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_sockets_are_taken_and_kept_from_children(tmp_path: Path) -> None:
    """They are ours, by family, and no hook inherits them."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/control")
        listener.listen()
        assert taken(listener.fileno()) == "[('AF_UNIX', False)]"


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    """A socket that does not listen, and a descriptor that is no socket."""
    with socket.socket() as other, (tmp_path / "file").open("w") as file:
        assert "does not listen" in taken(other.fileno())
        assert "descriptor 3, given by the service manager, is no socket" in taken(file.fileno())


def vm(name: str, phase: Any, **about: Any) -> Status:
    plain = {"role": "source", "migration": "m1", "peer": "host2:16525", "message": ""}
    return Status(vm=name, phase=phase, **plain | about)


def test_the_status_line() -> None:
    """How many VMs, and those that move: who waits for somebody first, and not too many."""
    assert summary([]) == "0 VMs"
    assert summary([vm("a", "idle")]) == "1 VM"
    moving = [
        vm("a", "drained"),
        vm("b", "postcopy", remaining=312 << 20),
        vm("c", "paused", role="destination", peer="host1 (192.0.2.1)"),
    ]
    assert summary(moving) == (
        "3 VMs; c arriving from host1 (192.0.2.1): paused; "
        "b leaving to host2:16525: postcopy, 312.0 MiB remaining"
    )
    assert summary([vm(str(n), "precopy") for n in range(7)]).endswith("; and 3 more")
