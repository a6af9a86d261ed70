# SPDX-License-Identifier: Apache-2.0
"""Puts the daemon of one host together from its parts. Owns nothing of theirs, and decides
nothing."""

from __future__ import annotations

import trio

from postcopyd.daemon.accepting import Acceptor
from postcopyd.daemon.decisions import Decisions
from postcopyd.daemon.domains import Domains
from postcopyd.daemon.inquiries import Inquiries
from postcopyd.daemon.registry import Registry
from postcopyd.daemon.restart import Restart
from postcopyd.model import Checked, Found, MigrateRequest, Status
from postcopyd.sessions.shared import Shared


class Daemon(Registry):
    """The registry and the parts that work on its VMs. `nursery` holds the tasks of VMs."""

    def __init__(self, shared: Shared, nursery: trio.Nursery) -> None:
        super().__init__(shared, nursery)
        inquiries = Inquiries(shared, self.vms, self.spawn)
        restart = Restart(self, inquiries)
        decisions = Decisions(self, restart, inquiries)
        self._domains = Domains(self)
        self.acceptor = Acceptor(shared, self.vms, self.give_back, inquiries, self._domains)
        self.restore = restart.begin
        self.serve_peer = self.acceptor.serve_peer
        self.recover, self.resolve = decisions.recover, decisions.resolve
        self.unattached = self._domains.shown

    async def attach(self, name: str, driver: str, socket: str) -> tuple[Status, Found | None]:
        if driver == "libvirt":
            socket = self._domains.socket(name)
        return await super().attach(name, driver, socket)

    async def check(self, name: str, to: str, unsafe: bool = False, xml: str = "") -> Checked:
        await self._domains.find(name)
        return await super().check(name, to, unsafe, xml)

    async def migrate(self, name: str, request: MigrateRequest) -> str:
        await self._domains.find(name)
        return await super().migrate(name, request)
