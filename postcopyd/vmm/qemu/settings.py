# SPDX-License-Identifier: Apache-2.0
"""The migration settings of a QEMU: the driver's during a migration, then again those it found.

Owns capabilities, bandwidth, and the guard. They stay in QEMU when the daemon dies; a daemon that
finds them without having set them puts QEMU's defaults back.

**The guard** is `tls-creds` with a name that no credentials have: any migration or save that
somebody else begins fails at once in QEMU, with that name in its error. It is set while the driver
holds the guest stopped or has moved it. It also tells whose doing a stop is: a guest that is
stopped under the guard was stopped by postcopyd, even if that daemon is dead; a guest that is
stopped without it was stopped by somebody else.
"""

from __future__ import annotations

from typing import Any

from postcopyd.vmm.qemu.answers import Capability, Parameters
from postcopyd.vmm.qemu.qmp import Qmp, QmpRefused

# The stream has 0.3 MB, or 16 MB with a VGA card, and should never be throttled.
BANDWIDTH = 1 << 40
QEMU_DEFAULT_BANDWIDTH = 128 << 20

# x-ignore-shared changes the stream. It may have been on at hosts with an older version of this
# driver, which set it on both sides, as somebody else may.
# late-block-activate: without it QEMU before 10 takes the disks' locks at load, not at `cont`.
IGNORE, LATE = "x-ignore-shared", "late-block-activate"
DESTINATION = {IGNORE: False, "events": True, LATE: True}

STOPPED = "postcopyd-holds-this-guest-stopped"
MOVED = "postcopyd-moves-this-guest"
ARRIVING = "postcopyd-waits-for-this-guest"
GUARDS = {STOPPED, MOVED, ARRIVING}

Command = tuple[str, dict[str, Any]]


def capabilities(states: dict[str, bool]) -> Command:
    what = [{"capability": name, "state": state} for name, state in states.items()]
    return "migrate-set-capabilities", {"capabilities": what}


def parameters(**values: Any) -> Command:
    """Keywords have _ where the parameter has -."""
    names = {name.replace("_", "-"): value for name, value in values.items()}
    return "migrate-set-parameters", names


class Settings:
    """The settings of one QEMU."""

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp
        self._found: tuple[dict[str, bool], int] | None = None

    async def apply(self) -> None:
        """Sets those of `DESTINATION` that this QEMU knows, and the bandwidth, which comes first as
        it shows whose settings they are: if the daemon is killed, QEMU may take the first command
        and not the second. Raises QmpRefused."""
        now = await self._capabilities()
        known = {name: state for name, state in DESTINATION.items() if name in now}
        if self._found is None:
            self._found = ({name: now[name] for name in known}, (await self.read()).max_bandwidth)
        await self._all([parameters(max_bandwidth=BANDWIDTH), capabilities(known)])

    async def read(self) -> Parameters:
        return await self._qmp.ask(Parameters, "query-migrate-parameters")

    async def restore(self) -> None:
        """Puts back what `apply` found, unless somebody has changed it since; the guard last.
        Idempotent. Raises QmpRefused during a migration that began under these settings."""
        now, set_now = await self.read(), await self._capabilities()
        states: dict[str, bool] = {}
        bandwidth = QEMU_DEFAULT_BANDWIDTH
        if self._found is not None:
            found, bandwidth = self._found
            states = {
                name: state
                for name, state in found.items()
                if set_now.get(name) == DESTINATION[name] != state
            }
        elif now.max_bandwidth == BANDWIDTH:  # set by a previous daemon
            states = {name: False for name in DESTINATION if set_now.get(name)}
        await self._all(
            ([capabilities(states)] if states else [])
            + ([parameters(max_bandwidth=bandwidth)] if now.max_bandwidth == BANDWIDTH else [])
        )
        if now.tls_creds in GUARDS:
            await self.unguard()
        self._found = None

    async def guard(self, name: str) -> None:
        """Keeps others from moving or saving the guest; the name says why."""
        await self._all([parameters(tls_creds=name)])

    async def unguard(self) -> None:
        """Lets others move and save the guest again."""
        await self._all([parameters(tls_creds="")])

    async def _all(self, commands: list[Command]) -> None:
        if not commands:
            return
        for answer in await self._qmp.execute_all(commands):
            if isinstance(answer, QmpRefused):
                raise answer

    async def _capabilities(self) -> dict[str, bool]:
        answer = await self._qmp.ask(list[Capability], "query-migrate-capabilities")
        return {entry.capability: entry.state for entry in answer}
