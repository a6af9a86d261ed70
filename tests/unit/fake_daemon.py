# SPDX-License-Identifier: Apache-2.0
"""A daemon without guests: what tests tell it to be, and a record of what it was asked."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec
import trio

from postcopyd.errors import PostcopydError
from postcopyd.model import Checked, Found, MigrateRequest, Ram

Status = dict[str, Any]
"""As clients see it, which may be what no daemon of this version says."""

FAULTS = {"count": 10, "p50Us": 90.5, "p99Us": 800.0, "maxUs": 2100.0}
RESULT = {
    "event": "completed",
    "vm": "web1",
    "migration": "m1",
    "mode": "postcopy",
    "downtimeMs": 7.9,
    "totalMs": 912.0,
    "brownoutMs": 830.0,
    "memory": {
        "totalBytes": 1 << 30,
        "pageSize": 4096,
        "pages": 262144,
        "zeroPages": 60000,
        "precopyPages": 0,
        "dirtyPages": 0,
        "pushedPages": 202134,
        "urgentPages": 10,
        "duplicatePages": 3,
        "lostPages": 0,
    },
    "faults": {**FAULTS, "histogramUs": {"64": 1, "128": 8, "256": 0, "512": 1}},
    "transferredBytes": 828000000,
    "bytesPerSecond": 907000000,
    "recoveries": 0,
}

FOUND = Found(
    (Ram("pc.ram", "private", 1 << 30, 4096), Ram("dimm", "file", 4 << 20, 2 << 20, "/dev/huge/a")),
    "by hand",
)
FOUND_JSON = msgspec.json.decode(msgspec.json.encode(FOUND))


class FakeDaemon:
    """Answers from `vms`; `asked` records every call that changes something, in order."""

    def __init__(self, *names: str) -> None:
        self.vms: dict[str, Status] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.watchers = 0
        self._changed = trio.Event()
        self.fail: PostcopydError | None = None
        self.migrating = trio.Event()
        self.watched = trio.Event()
        self.hold: trio.Event | None = None
        for name in names:
            self.put(name)

    def put(self, name: str, **changes: Any) -> None:
        """Change a VM's status and tell its watchers."""
        fresh = {"vm": name, "role": "", "phase": "idle", "migration": None, "peer": None}
        fresh |= {"remaining": 0, "message": f"{name} runs here"}
        self.vms[name] = {**self.vms.get(name, fresh), **changes}
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _find(self, name: str) -> Status:
        if self.fail is not None:
            raise self.fail
        if name not in self.vms:
            raise PostcopydError(f"no VM {name} is attached here", "NoSuchVm")
        return self.vms[name]

    async def attach(self, name: str, driver: str, socket: str) -> tuple[Status, Found]:
        if self.hold is not None:
            await self.hold.wait()
        self.asked.append(("attach", name, driver, socket))
        self.put(name, driver=driver)
        return self._find(name), FOUND

    async def detach(self, name: str) -> None:
        self._find(name)
        self.asked.append(("detach", name))
        del self.vms[name]
        self._tell()

    async def check(self, name: str, to: str, unsafe: bool, xml: str) -> Checked:
        self._find(name)
        self.asked.append(
            ("check", name, to, *(["unsafe"] if unsafe else []), *([xml] * bool(xml)))
        )
        return Checked(self.problems, self.warnings, FOUND)

    async def migrate(self, name: str, request: MigrateRequest) -> str:
        self._find(name)
        self.asked.append(("migrate", name, request))
        self.put(name, phase="precopy", role="source", migration="m1", peer=request.to)
        self.migrating.set()
        return "m1"

    async def cancel(self, name: str) -> None:
        self._find(name)
        self.asked.append(("cancel", name))

    async def recover(self, name: str, to: str | None) -> None:
        self._find(name)
        self.asked.append(("recover", name, to))

    async def resolve(self, name: str, decision: Literal["wait", "poison", "kill"]) -> None:
        self._find(name)
        self.asked.append(("resolve", name, decision))

    def status(self, name: str) -> Status:
        return self._find(name)

    @contextlib.asynccontextmanager
    async def watch(self, name: str) -> AsyncIterator[AsyncIterator[Status]]:
        self._find(name)

        async def states() -> AsyncIterator[Status]:
            while name in self.vms:
                changed = self._changed
                yield self.vms[name]
                await changed.wait()

        self.watchers += 1
        self.watched.set()
        try:
            async with contextlib.aclosing(states()) as iterator:
                yield iterator
        finally:
            self.watchers -= 1

    # Last, because inside the class it hides the builtin from the annotations above.
    async def unattached(self) -> list[Status]:
        return []

    def list(self) -> list[Status]:
        return [*self.vms.values()]
