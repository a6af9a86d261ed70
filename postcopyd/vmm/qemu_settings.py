# SPDX-License-Identifier: Apache-2.0
"""The migration settings of a QEMU: ours for the time of a migration, then those found before.

Owns capabilities and bandwidth. They stay in QEMU when the daemon dies, so a daemon that did not
set them itself puts QEMU's defaults back: `x-ignore-shared` must not be left on, as a later
migration by somebody else would leave the guest's RAM behind.
"""

from __future__ import annotations

from typing import Any

from postcopyd.vmm.qmp import Qmp

# The stream is 0.3 MB, or 16 MB with a VGA card, and should never be throttled.
BANDWIDTH = 1 << 40
QEMU_DEFAULT_BANDWIDTH = 128 << 20

SOURCE = {"x-ignore-shared": True, "events": True, "pause-before-switchover": False}
# late-block-activate: QEMU before 10 takes the disks' locks at load, where `cont` should.
DESTINATION = {"x-ignore-shared": True, "events": True, "late-block-activate": True}


class Settings:
    """The settings of one QEMU."""

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp
        self._found: tuple[dict[str, bool], int] | None = None

    async def apply(self, capabilities: dict[str, bool]) -> None:
        """Set the capabilities that this QEMU knows, and the bandwidth. Raises QmpRefused."""
        now = await self._capabilities()
        ours = {name: state for name, state in capabilities.items() if name in now}
        if self._found is None:
            self._found = ({name: now[name] for name in ours}, await self._bandwidth())
        await self._set(ours, BANDWIDTH)

    async def restore(self) -> None:
        """Put back what `apply` found. Idempotent; no migration may be going on."""
        if self._found is not None:
            await self._set(*self._found)
            self._found = None
            return
        bandwidth = await self._bandwidth()
        if bandwidth == BANDWIDTH:  # ours, and we do not remember: set by a daemon before this one
            ours = {
                name: False for name in await self._capabilities() if name in SOURCE | DESTINATION
            }
            await self._set(ours, QEMU_DEFAULT_BANDWIDTH)

    async def _set(self, capabilities: dict[str, bool], bandwidth: int) -> None:
        states = [{"capability": name, "state": state} for name, state in capabilities.items()]
        await self._qmp.execute("migrate-set-capabilities", {"capabilities": states})
        await self._qmp.execute("migrate-set-parameters", {"max-bandwidth": bandwidth})

    async def _capabilities(self) -> dict[str, bool]:
        answer: list[dict[str, Any]] = await self._qmp.execute("query-migrate-capabilities")
        return {entry["capability"]: entry["state"] for entry in answer}

    async def _bandwidth(self) -> int:
        return int((await self._qmp.execute("query-migrate-parameters"))["max-bandwidth"])
