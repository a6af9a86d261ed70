# SPDX-License-Identifier: Apache-2.0
"""QMP by libvirt's monitor: a helper process that takes and gives what QEMU would.

Owns that process, from the first use until `close`. So whoever speaks QMP need not know whose
monitor it is.
"""

from __future__ import annotations

import socket as stdlib_socket
import subprocess

import trio

from postcopyd.vmm import VmmGone, VmmTimeout
from postcopyd.vmm.libvirt import calls
from postcopyd.vmm.qemu.qmp import Greeting, Qmp, QmpBusy

OPEN_S = 20.0
"""How long a helper may take to have libvirt's monitor; on a busy host Python starts slowly."""


class LibvirtMonitor(Qmp):
    """The monitor of one domain; `pid` is its QEMU's, by libvirt's word (`process_of`)."""

    def __init__(self, uri: str, name: str, pid: int = 0) -> None:
        super().__init__(f"of {name} ({uri})", pid)
        self._uri, self._name = uri, name
        self._helper: subprocess.Popen[bytes] | None = None

    async def open(self, patience: float = OPEN_S) -> None:
        try:
            await super().open(patience)
        except QmpBusy:
            raise VmmTimeout(
                f"libvirt ({self._uri}) has not let its monitor of {self._name} be used within "
                f"{patience:.0f} s: see that its daemon runs, and its log"
            ) from None

    async def _connected(self) -> trio.socket.SocketType:
        self._end_helper()
        self._pid = process_of(self._name)
        self._helper, ours = calls.start(self._uri, "monitor", self._name)
        ours.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_PASSCRED, 1)
        return trio.socket.from_stdlib_socket(ours)

    def _sent_by(self, pid: int) -> None:
        """The greeting is the helper's, which is not the VMM."""

    async def learn_version(self) -> None:
        """QEMU's own version: while libvirt works at a domain, its monitor does not say."""
        answer = {"version": await self.execute("query-version")}
        version = self.as_kind(Greeting, answer, "`query-version`").version.qemu
        self._version = (version.major, version.minor, version.micro)

    def close(self) -> None:
        super().close()
        self._end_helper()

    def _end_helper(self) -> None:
        if self._helper is not None:
            calls.reap(self._helper)
            self._helper = None


def process_of(name: str) -> int:
    """The QEMU of a domain. Raises VmmGone."""
    path = f"/run/libvirt/qemu/{name}.pid"
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        raise VmmGone(
            f"libvirt runs no domain {name} here (there is no {path}): see `virsh list`"
        ) from None
