# SPDX-License-Identifier: Apache-2.0
"""Starts helper.py, which speaks to libvirt: each call in a process of its own, with a time limit.

Owns which Python runs it: the daemon's own if that has libvirt's binding, else that of the host's
distribution, for which its package is made (Debian's python3-libvirt). Whoever starts a helper owns
the process, and ends it by the end of its socket.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from postcopyd.names import plain
from postcopyd.vmm import VmmError, VmmTimeout

HELPER = Path(__file__).with_name("helper.py")
DISTRIBUTION = "/usr/bin/python3"
BINDING = "/usr/lib*/python3*/*-packages/libvirt.py"
"""Of `DISTRIBUTION`, which is not started to see whether it has the binding."""

LIBVIRT = ("/run/libvirt/libvirt-sock", "/run/libvirt/virtqemud-sock")
SYSTEM = "qemu:///system"

ASK_S = 20.0
"""How long libvirt may take to answer; the first definition after its start takes 8 s."""

LOOK_S = 4.0
"""The same for which domains run, for which people wait."""

END_S = 10.0
"""How long a helper may take to end once its socket has ended."""


class LibvirtRefused(VmmError):
    """libvirt refused what it was asked; `reason` is its own sentence."""

    def __init__(self, doing: str, reason: str) -> None:
        self.reason = plain(reason).rstrip(".")
        super().__init__(f"{doing}: libvirt says: {self.reason}.")


def here(uri: str) -> bool:
    """Whether there is such a libvirt on this host, as far as a look tells."""
    return bool(uri) and (uri != SYSTEM or any(map(os.path.exists, LIBVIRT)))


def lacks(uri: str) -> str:
    """Why it cannot be asked, as far as a look tells; empty if it can be."""
    if not uri:
        return "libvirt is switched off: see `libvirt` in postcopyd.toml"
    if not here(uri):
        return f"libvirt's daemon is not there (no {' and no '.join(LIBVIRT)}): start it"
    if not _python():
        return "libvirt's binding for Python is not installed (Debian: python3-libvirt)"
    return ""


def _python() -> str:
    """One that has libvirt's binding; empty if none has."""
    if importlib.util.find_spec("libvirt"):
        return sys.executable
    return DISTRIBUTION if glob.glob(BINDING) else ""


def start(uri: str, *what: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Starts a helper; returns it and the daemon's end of its socket. Takes a millisecond."""
    python = _python() or DISTRIBUTION
    ours, theirs = socket.socketpair()
    with theirs:
        command = [python, "-I", "-B", str(HELPER), uri, *what]
        try:
            process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            ours.close()
            raise VmmError(
                f"speaking to libvirt ({uri}): {python} was not started ({error.strerror})"
            ) from None
    return process, ours


def reap(process: subprocess.Popen[bytes]) -> None:
    """Ends a helper that does not end by itself."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(0)
        return
    process.kill()
    process.wait()


async def leave(process: subprocess.Popen[bytes]) -> None:
    """Waits a while for a helper whose socket has ended, then ends it."""
    with trio.CancelScope(shield=True):
        with trio.move_on_after(END_S):
            while process.poll() is None:
                await trio.sleep(0.01)
        reap(process)


async def ask(uri: str, doing: str, what: str, within: float = ASK_S, **about: Any) -> Any:
    """One question to libvirt; `doing` begins the sentence of its failure. Raises PostcopydError,
    also for an answer that does not come."""
    process, ours = start(uri, "ask")
    try:
        with trio.socket.from_stdlib_socket(ours) as channel, trio.fail_after(within):
            text = await _exchange(channel, {"ask": what, **about})
    except trio.TooSlowError:
        raise VmmTimeout(
            f"{doing}: libvirt ({uri}) has not answered for {within:.0f} s: see its daemon's log"
        ) from None
    finally:
        reap(process)
    return answered(doing, text)


async def send_all(channel: trio.socket.SocketType, data: bytes) -> None:
    """Raises OSError if the helper has ended."""
    view = memoryview(data)
    while view:
        view = view[await channel.send(view) :]


async def _exchange(channel: trio.socket.SocketType, question: dict[str, Any]) -> bytes:
    text = b""
    with suppress(OSError):
        await send_all(channel, json.dumps(question).encode() + b"\n")
        while not text.endswith(b"\n") and (piece := await channel.recv(1 << 16)):
            text += piece
    return text


def answered(doing: str, text: bytes) -> Any:
    """What a helper has answered. Raises VmmError."""
    if not text.endswith(b"\n"):
        raise VmmError(
            f"{doing}: the program that speaks to libvirt ended early: see that libvirt's binding "
            f"for Python is installed (Debian: python3-libvirt) and that libvirt's daemon runs; "
            f"what it said is in this daemon's log"
        )
    answer = json.loads(text)
    if "error" in answer:
        raise LibvirtRefused(doing, str(answer["error"]))
    return answer["return"]
