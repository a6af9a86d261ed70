# SPDX-License-Identifier: Apache-2.0
"""One attached VM as the daemon knows it: its driver, its record, and the status that people see.

Owns the driver's connection and the status object. At most one migration uses a VM at a time
(`claim`). The record is written here, so that there is one place that knows its fields.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

import structlog
import trio
from msgspec import convert, to_builtins
from msgspec.structs import replace

from postcopyd import counts
from postcopyd.errors import PostcopydError, shortage
from postcopyd.host import procfs
from postcopyd.model import Status
from postcopyd.records.schema import Attachment, Ownership, Record, RecordedStatus
from postcopyd.records.store import StateNotWritten, Store
from postcopyd.vmm import Vmm

ENDING_S = 10.0
"""How long a request waits for the last steps of a migration that is over."""


UNDER_WAY = frozenset({"precopy", "handover", "postcopy"})
"""Phases in which a session has the VM."""

DAEMON: Final = "the daemon"
"""Who claims a VM that the daemon itself works at, in no session."""


class Waiting(Protocol):
    """An arrival whose engine goes on taking faults: until the source is there again, or for good
    where pages were lost."""

    async def vmm_ended(self, farewell: str | None) -> None:
        """Ends it for good, as the VMM has ended; `farewell` is what it has said of that."""


class Claim:
    """A VM that was taken, given back at the end of the `with`: which may be in another task, as
    a VM is taken in the call that asks for a migration, and given back by the migration."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None:
        self._vm.give_back()


class Vm:
    """`epoch` counts changes of ownership; it belongs to the guest and travels with it. `about` is
    what a session needs to go on with its migration after the daemon's death, and to answer a peer
    that asks how it ended: JSON, the session's own (schema.py), in the record until the next
    migration. `attachment` is which process its VMM is, or was; `unwritten`: the record on disk is
    behind what is known here; `void`: an intent may be on disk that holds no more."""

    def __init__(self, name: str, store: Store, driver: Vmm | None) -> None:
        self.name = name
        self.driver = driver
        self.epoch = 0
        self.ownership: Ownership = "held"
        self.claimed_by: Any = None
        self.free = trio.Event()
        self.free.set()
        self._left = trio.Event()
        self.following = trio.CancelScope()  # of the task that waits for the VMM's end
        self.waiting: Waiting | None = None
        self.about: dict[str, Any] = {}
        self.attachment: Attachment | None = None
        self.void = False
        self.unwritten = False
        self.owing: Callable[[], None] = lambda: None  # somebody writes later: the daemon's
        self._lock = -1
        self._store = store
        self.status = Status(
            vm=name,
            role="",
            phase="idle",
            migration="",
            peer="",
            remaining=0,
            message="attached, no migration",
        )
        self._changed = trio.Event()
        self._gone = False
        self._spent: dict[str, float] = {}
        self._since = time.monotonic()

    @property
    def log(self) -> Any:
        """A logger that knows the VM and where its migration is."""
        known = {key: getattr(self.status, key) for key in ("migration", "peer", "role", "phase")}
        return structlog.get_logger().bind(
            vm=self.name, **{key: value for key, value in known.items() if value}
        )

    def show(self, **changes: Any) -> None:
        """Changes fields of the status and tells who watches."""
        self._put(replace(self.status, **changes))

    def _put(self, status: Status, counted_as: counts.Result = "failed") -> None:
        before, self.status = self.status, status
        if (before.migration, before.phase) != (status.migration, status.phase):
            self._turned(before, counted_as)
        self._changed.set()
        self._changed = trio.Event()

    def _turned(self, before: Status, counted_as: counts.Result) -> None:
        """A new phase, or a new migration: notes when, says so, and counts what is over."""
        now, phase, after = time.monotonic(), self.status.phase, before.phase
        if before.migration != self.status.migration:
            self._spent = {}
        else:
            self._spent[after] = self._spent.get(after, 0.0) + now - self._since
        self._since = now
        if not self.status.migration or phase == "idle":
            return
        self.log.info("phase", after=after, after_ms=round(self._spent.get(after, 0.0) * 1e3, 2))
        if phase in ("drained", "failed"):
            result = "completed" if phase == "drained" else counted_as
            counts.ended[self.status.role, self.status.mode or "", result] += 1
            if result == "completed" and (downtime_ms := before.downtime_ms):
                counts.downtimes.observe(downtime_ms / 1e3)

    def phases(self, at: float) -> list[dict[str, Any]]:
        """How long this daemon has seen the migration in each phase, until `at` on the monotonic
        clock: each phase once, in the order they came, `ms` in all."""
        phase = self.status.phase
        last = self._spent.get(phase, 0.0) + max(at - self._since, 0.0)
        spent = self._spent | {phase: last}
        return [{"phase": phase, "ms": round(s * 1e3, 2)} for phase, s in spent.items()]

    def let_go(self) -> None:
        """Ends all watches: the VM is not this daemon's any more."""
        self._gone = True
        self._changed.set()

    def conclude(self, *, counted_as: counts.Result = "failed", **changes: Any) -> None:
        """`show` for the end of a migration: what was only progress goes. `counted_as` is how one
        counts that does not complete."""
        self._put(replace(self.status.lasting(), **changes), counted_as)

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[Status]]:
        """The current status, then each change; a slow watcher sees the newest only."""

        async def states() -> AsyncGenerator[Status, None]:
            while not self._gone:
                changed = self._changed
                yield self.status
                await changed.wait()

        async with contextlib.aclosing(states()) as iterator:
            yield iterator

    def claim(self, session: object) -> Claim:
        """Takes the VM for a session; raises PostcopydError when another has it."""
        if self.claimed_by is not None:
            raise PostcopydError(
                f"{self.name} is in migration {self.status.migration or '(starting)'} already: "
                f"wait for it or cancel it",
                "Busy",
            )
        self.claimed_by, self.free = session, trio.Event()
        return Claim(self)

    def give_back(self) -> None:
        """The end of a claim: `Claim`'s alone."""
        self.claimed_by = None
        self._must_be_told()
        self.free.set()

    @property
    def under_way(self) -> bool:
        """Whether by what is shown a migration is on its way, and not at its end or paused."""
        phase, migration = self.status.phase, self.status.migration
        preparing = phase == "idle" and bool(migration) and self.status.result is None
        return preparing or phase in UNDER_WAY

    def _must_be_told(self) -> None:
        """Whoever had this VM has said how that ended, or could not, by a bug: then it is said
        here, so that nobody waits for ever who waits for a migration."""
        if not self.under_way:
            return
        migration = self.status.migration
        away = self.ownership in ("granted", "owned")
        where = "may be at either host" if away else "is as that left it"
        message = (
            f"the migration of {self.name} ended here by an internal error, which the log has: the "
            f"guest {where}, see `postcopyd status {self.name}` on both hosts"
        )
        event = "paused" if away else "failed"
        result = {"event": event, "vm": self.name, "migration": migration, "error": message}
        self.log.error("migration ended by a bug", ownership=self.ownership)
        if away:
            self.conclude(phase="paused", message=message, result=result)
        else:
            self.conclude(phase="failed", message=message, result=result)

    async def ended(self) -> None:
        """Returns when no migration has the VM that is over but for its last steps: who has seen
        its result may go on at once; when a daemon that has just started has taken it over; and
        when a VMM that has ended is let go of: who has seen its end may attach the next one."""
        with trio.move_on_after(ENDING_S):
            while self._ending():
                await (self._left if self.claimed_by is None else self.free).wait()

    def _ending(self) -> bool:
        gone = self.driver is not None and not self._lives()
        if self.claimed_by is None:
            return gone
        over = self.status.phase in ("drained", "failed")
        arriving = self.status.role == "destination"
        return self.claimed_by is DAEMON or over or (gone and arriving)

    def attached(self) -> Vmm:
        """The driver; raises PostcopydError when the VMM is gone."""
        if self.driver is None and (self.claimed_by is not None or self._lives()):
            raise PostcopydError(
                f"{self.name} is still being taken over by this daemon, which was started anew, "
                f"and its VMM has not answered yet: try again in a moment",
                "Busy",
            )
        if self.driver is None:
            raise PostcopydError(
                f"the VMM of {self.name} is gone: start it and attach it again, "
                f"`postcopyd attach {self.name} ...`",
                "NotAttached",
            )
        return self.driver

    def _lives(self) -> bool:
        """Whether the VMM that is not reached is a process all the same, as far as is known."""
        try:
            return self.attachment is not None and not self.attachment.ended()
        except OSError:
            return True

    # --- its VMM ---------------------------------------------------------------------------------

    def have(self, driver: Vmm, lock: int) -> None:
        """`driver`, and the lock on its process, are this VM's from here on. Raises OSError, and
        then they are not."""
        started, boot = procfs.started(driver.pid), procfs.boot_id()
        self.attachment = Attachment(driver.kind, driver.socket, driver.pid, started, boot)
        self.have_again(driver, lock)

    def have_again(self, driver: Vmm, lock: int) -> None:
        """The same, of the process that the record names."""
        self.driver, self._lock, self._left = driver, lock, trio.Event()

    async def leave(self) -> None:
        """Lets go of the VMM, which goes on as it is, or has ended. Idempotent."""
        driver, self.driver = self.driver, None
        self._left.set()
        self.unlock()
        if driver is not None:
            await driver.aclose()

    def unlock(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    # --- what outlives the daemon ----------------------------------------------------------------

    def remember(self, record: Record) -> None:
        """The record that the daemon before this one has left: nothing has happened here."""
        self.epoch, self.ownership, self.about = (
            record["epoch"],
            record["ownership"],
            record["about"],
        )
        self.attachment = Attachment.of(record)
        self.void = record.get("void", False)
        known = {k: v for k, v in record["status"].items() if k in RecordedStatus.__annotations__}
        self.status = convert(to_builtins(self.status) | known, Status)

    def record(self, ownership: Ownership | None = None, epoch: int | None = None) -> None:
        """Writes the record before what it says is acted on. Raises PostcopydError.

        `ownership` is one of held, intent, granted (source: given away), arriving, loading, owned,
        declined (destination). A start of the daemon, and recovery, read it. What could not be
        written is not so: then ownership and epoch are as before.
        """
        before = self.ownership, self.void, self.epoch
        self.ownership = ownership or self.ownership
        self.epoch = self.epoch if epoch is None else epoch
        self.void &= ownership not in ("intent", "granted")
        known = self.attachment or Attachment("", "", 0, 0, "")
        try:
            self._store.save(
                self.name,
                {
                    **known._asdict(),
                    "epoch": self.epoch,
                    "ownership": self.ownership,
                    "void": self.void,
                    "status": to_builtins(self.status.lasting()),
                    "about": self.about,
                },
            )
        except (PostcopydError, OSError) as error:
            self.ownership, self.void, self.epoch = before
            if short := shortage(error):
                raise StateNotWritten(f"writing the record of {self.name}: {short}") from None
            raise
        self.unwritten = False

    def record_soon(self, ownership: Ownership | None) -> bool:
        """`record`, for what has happened already: what cannot be written now is written later.

        Until then the record from before stands, and what it needs must stay with it. Returns
        whether it is written.
        """
        try:
            self.record(ownership)
        except PostcopydError as error:
            self.log.error("record not written, it is tried again", error=str(error))
            self.ownership = ownership or self.ownership
            self.unwritten = True
            self.owing()
            return False
        return True

    def lacks_pages(self, whole: bytes, regions: Sequence[int]) -> bool:
        """Whether a page record is there in which a page of these regions has a state other than
        these. Raises PostcopydError when that cannot be known."""
        return self._store.lacks_pages(self.name, whole, regions)

    def note(self, about: dict[str, Any]) -> None:
        """`about` another migration, or more of the same one. Raises PostcopydError."""
        if about["migration"] != self.about.get("migration"):
            self.keep_answer()
        self.about = about

    def keep_answer(self) -> None:
        """Of an arrival that is to be forgotten here: a source that does not know how it ended will
        ask. One that is told that nothing is known of it has a person run the guest there again,
        which may run here. Raises PostcopydError."""
        about = self.about
        kind = about.get("answer", {}).get("type", "declined")
        if kind != "declined" and "offer" in about and not about.get("acknowledged"):
            what: dict[str, Any] = {"offer": {"epoch": about["offer"]["epoch"]}}
            what |= {key: about[key] for key in ("migration", "identity", "answer") if key in about}
            self._store.keep_answer(self.name, what)

    def remove_pages(self) -> None:
        """The page record of an arrival that is over; one that stays is in nobody's way."""
        try:
            self._store.remove_pages(self.name)
        except PostcopydError as error:
            self.log.error("page record not removed", error=str(error))

    def home(self) -> None:
        """The guest is this host's, so no intent of its leaving holds any more. Before that is
        recorded: who dies in between finds a record by which it comes here again."""
        self.void = True
        if (why := self.forget()) is not None:
            self.log.error("intent not forgotten, it is tried again", error=why)
            self.owing()

    def leaving(self) -> None:
        """An intent is about to be written that holds: none on disk is void from here on."""
        self.void = False

    def forget(self) -> str | None:
        """What is `void` goes. Returns why not."""
        try:
            if self.void:
                self._store.forget_intent(self.name)
        except PostcopydError as error:
            return str(error)
        self.void = False
        return None
