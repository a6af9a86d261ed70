# SPDX-License-Identifier: Apache-2.0
"""The migration settings of a QEMU: ours for the time of a migration, then those found before.

Owns capabilities, bandwidth, and the guard. They stay in QEMU when the daemon dies, so a daemon
that did not set them itself puts QEMU's defaults back.

**`x-ignore-shared`** leaves guest RAM out of the stream of whoever moves or saves the guest next.
So it is on only where QEMU itself refuses that: at the source while our own migration goes on, at
the destination until all of the stream but its last byte was loaded.

**The guard** is `tls-creds` with a name that no credentials have: each migration and save that
somebody else begins fails at once, in QEMU, with that name in its error. It is set while one must
not begin, because we hold the guest stopped, or have moved it. And it says so to whoever looks: a
stopped guest under the guard is one that we have stopped, also when the daemon that did it is dead;
without the guard it is somebody else's doing.
"""

from __future__ import annotations

from typing import Any

from postcopyd.vmm.qemu.answers import Capability, Parameters
from postcopyd.vmm.qemu.qmp import Qmp, QmpRefused

# The stream is 0.3 MB, or 16 MB with a VGA card, and should never be throttled.
BANDWIDTH = 1 << 40
QEMU_DEFAULT_BANDWIDTH = 128 << 20

IGNORE = "x-ignore-shared"
SOURCE = {IGNORE: True, "events": True, "pause-before-switchover": False}
# late-block-activate: QEMU before 10 takes the disks' locks at load, where `cont` should.
LATE = "late-block-activate"
DESTINATION = {IGNORE: True, "events": True, LATE: True}

STOPPED = "postcopyd-holds-this-guest-stopped"
MOVED = "postcopyd-moves-this-guest"
ARRIVING = "postcopyd-waits-for-this-guest"
GUARDS = {STOPPED, MOVED, ARRIVING}

Command = tuple[str, dict[str, Any]]


def capabilities(states: dict[str, bool]) -> Command:
    what = [{"capability": name, "state": state} for name, state in states.items()]
    return "migrate-set-capabilities", {"capabilities": what}


def parameters(**values: Any) -> Command:
    """A parameter is written with _ for -."""
    names = {name.replace("_", "-"): value for name, value in values.items()}
    return "migrate-set-parameters", names


def ours(known: dict[str, bool]) -> list[Command]:
    """Both settings. The bandwidth first: it tells who finds it that they are ours, and of a
    daemon that is killed QEMU may take the first command and not the second."""
    return [parameters(max_bandwidth=BANDWIDTH), capabilities(known)]


class Settings:
    """The settings of one QEMU."""

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp
        self._found: tuple[dict[str, bool], int] | None = None

    async def note(self, wanted: dict[str, bool]) -> dict[str, bool]:
        """Remember what is to be put back; of our capabilities those that this QEMU knows."""
        now = await self._capabilities()
        known = {name: state for name, state in wanted.items() if name in now}
        if self._found is None:
            self._found = ({name: now[name] for name in known}, (await self.read()).max_bandwidth)
        return known

    async def apply(self, wanted: dict[str, bool]) -> None:
        """Set the capabilities that this QEMU knows, and the bandwidth. Raises QmpRefused."""
        await self._all(ours(await self.note(wanted)))

    async def read(self) -> Parameters:
        return await self._qmp.ask(Parameters, "query-migrate-parameters")

    @property
    def found_ignoring(self) -> bool:
        """Whether somebody else had switched x-ignore-shared on."""
        return self._found is not None and self._found[0].get(IGNORE, False)

    async def restore(self) -> None:
        """Put back what `note` found, where it is ours still. Idempotent. The guard is the last to
        go. Raises QmpRefused, when a migration goes on that began while a setting was ours."""
        now, set_now = await self.read(), await self._capabilities()
        both = SOURCE | DESTINATION
        found = self._found
        if found is None and now.max_bandwidth == BANDWIDTH:
            # We do not remember: set by a daemon before this one.
            found = {name: False for name in both if name in set_now}, QEMU_DEFAULT_BANDWIDTH
        if found is not None:
            states = {
                name: state
                for name, state in found[0].items()
                if set_now.get(name) == both[name] != state
            }
            bandwidth = [parameters(max_bandwidth=found[1])]
            await self._all(
                ([capabilities(states)] if states else [])
                + (bandwidth if now.max_bandwidth == BANDWIDTH else [])
            )
        if now.tls_creds in GUARDS:
            await self.unguard()
        self._found = None

    async def guard(self, name: str) -> None:
        """Others may not move or save the guest, for the reason that the name says."""
        await self._all([parameters(tls_creds=name)])

    async def unguard(self) -> None:
        """Others may move and save the guest again."""
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
