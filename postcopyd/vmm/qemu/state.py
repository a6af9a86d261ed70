# SPDX-License-Identifier: Apache-2.0
"""What a QEMU is at: whether its guest runs, whose doing it is when it does not, and in what words.

Only asks. A guest that we have stopped or moved is under a guard of ours (`qemu_settings`), and no
migration or save of somebody else's can have begun since that was set. So a driver that finds its
guest stopped, under that guard, with no migration going on, may send `cont`: nobody can come
between its look and its command. A guest that is stopped without it was stopped by somebody else.
"""

from __future__ import annotations

from dataclasses import dataclass

from postcopyd.vmm.qemu import settings
from postcopyd.vmm.qemu.answers import Migration, Parameters, Status
from postcopyd.vmm.qemu.qmp import Qmp

PAUSED = {"paused", "prelaunch"}

WORDS = {
    "running": "it runs",
    "paused": "it is paused, by somebody else's QMP `stop`",
    "prelaunch": "it was not run yet since QEMU was started",
    "inmigrate": "its QEMU waits for an incoming migration",
    "postmigrate": "somebody else has moved or saved it by QEMU's own `migrate` (run state "
    "postmigrate), so it may run elsewhere: run it here only when you know that it does not",
    "finish-migrate": "somebody else's migration of it is about to end: see where it runs then, "
    "before you run it anywhere",
    "shutdown": "its guest has shut down: QMP `system_reset` starts it anew",
    "suspended": "its guest sleeps (S3): QMP `system_wakeup` wakes it",
    "guest-panicked": "its guest has panicked: QMP `system_reset` starts it anew",
    "save-vm": "somebody else makes a snapshot of it: wait for its end",
    "restore-vm": "somebody else loads a snapshot of it: wait for its end",
    "io-error": "QEMU has stopped it for an error of its disks: mend that, then send QMP `cont`",
    "internal-error": "QEMU has stopped it for an error of its own, which its log names",
    "watchdog": "its watchdog has stopped it",
}


@dataclass(frozen=True)
class Now:
    """What a QEMU is at, by one look."""

    running: bool
    run_state: str
    migration: Migration
    guard: str | None  # None: no guard of ours

    def held(self, guard: str) -> bool:
        """Whether it stands still by what that guard stands for, and nobody else has a hand on
        it."""
        stands = {settings.STOPPED: PAUSED, settings.MOVED: {"postmigrate"}}[guard]
        return self.guard == guard and self.run_state in stands and self.migration.over

    @property
    def words(self) -> str:
        if not self.migration.over:
            return (
                f"somebody else is moving or saving it (QMP query-migrate: "
                f"{self.migration.status}): see where it runs once that is over"
            )
        return WORDS.get(self.run_state, f"its run state is {self.run_state}")


async def look(qmp: Qmp) -> Now:
    """The guard is asked for last: it was there when the others were answered, or was not set by
    anybody but us since."""
    status, migration, parameters = await qmp.ask_all(
        ("query-status", None, Status),
        ("query-migrate", None, Migration),
        ("query-migrate-parameters", None, Parameters),
    )
    guard = parameters.tls_creds if parameters.tls_creds in settings.GUARDS else None
    return Now(status.running, status.status, migration, guard)
