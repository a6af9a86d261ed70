# SPDX-License-Identifier: Apache-2.0
"""What a QEMU is doing: whether its guest runs, and who stopped it if not; with words for people.

Only asks. A guest that the driver stopped or moved is under its guard (`settings`): no migration or
save by somebody else can have begun since that was set. So a driver that finds its guest stopped,
under that guard, with no migration going on, may send `cont`: nobody can come between its look and
its command. A guest that is stopped without a guard was stopped by somebody else.
"""

from __future__ import annotations

from dataclasses import dataclass

from postcopyd.vmm.qemu import settings
from postcopyd.vmm.qemu.answers import Migration, Parameters, Status
from postcopyd.vmm.qemu.qmp import Qmp

PAUSED = {"paused", "prelaunch"}
STOPPED_BY_ITSELF = {"guest-panicked", "io-error", "watchdog"}
"""What the guest did is no reason to leave it where it is: it arrives as it was."""
SLEEPS = (9, 0)
"""Since this version a guest that sleeps (S3) can be stopped and goes on sleeping afterwards."""

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
    """What a QEMU was doing at one look."""

    running: bool
    run_state: str
    migration: Migration
    guard: str | None  # None: no guard of this driver

    def held(self, guard: str) -> bool:
        """Whether the guest is stopped for the reason that the guard names, and nobody else is
        moving or saving it."""
        stands = PAUSED | ({"postmigrate"} if guard == settings.MOVED else set())
        return self.guard == guard and self.run_state in stands and self.migration.over

    def live(self, version: tuple[int, int, int]) -> bool:
        """Whether the guest does what it does by itself: it runs, or sleeps and can be stopped."""
        return self.running or (self.run_state == "suspended" and version >= SLEEPS)

    @property
    def words(self) -> str:
        if not self.migration.over:
            return (
                f"somebody else is moving or saving it (QMP query-migrate: "
                f"{self.migration.status}): see where it runs once that is over"
            )
        return WORDS.get(self.run_state, f"its run state is {self.run_state}")


async def look(qmp: Qmp) -> Now:
    """Asks for the guard last: if it is there, then it was there at the other answers, or only this
    driver has set it since."""
    status, migration, parameters = await qmp.ask_all(
        ("query-status", None, Status),
        ("query-migrate", None, Migration),
        ("query-migrate-parameters", None, Parameters),
    )
    guard = parameters.tls_creds if parameters.tls_creds in settings.GUARDS else None
    return Now(status.running, status.status, migration, guard)
