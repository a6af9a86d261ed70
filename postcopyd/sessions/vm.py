# SPDX-License-Identifier: Apache-2.0
"""One attached VM as the daemon knows it: its driver, its record, and the status that people see.

Owns the driver's connection and the status object. At most one migration uses a VM at a time
(`claim`). Only this file writes the record, so that one place knows its fields.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

import structlog
import trio
from msgspec import ValidationError, convert, to_builtins
from msgspec.structs import replace

from postcopyd import counts
from postcopyd.errors import PostcopydError, shortage
from postcopyd.host import procfs
from postcopyd.model import PhaseTime, Result, Status
from postcopyd.records.schema import Attachment, Ownership, Record, RecordedStatus
from postcopyd.records.store import StateNotWritten, Store
from postcopyd.vmm import Vmm

ENDING_S = 10.0
"""How long a request waits for the last steps of a migration that is over."""


UNDER_WAY = frozenset({"precopy", "handover", "postcopy"})
"""Phases in which a session has the VM."""

DAEMON: Final = "the daemon"
"""What has claimed a VM while the daemon itself works at it, in no session."""


class Waiting(Protocol):
    """An arrival whose engine goes on taking faults until the source is there again, or, if pages
    were lost, for as long as the VMM lives."""

    async def vmm_ended(self, farewell: str | None) -> None:
        """Ends the arrival, as the VMM has ended; `farewell` is what the VMM has said of that."""


class Spawn(Protocol):
    """Starts a task of the daemon for one VM, which goes on when the session that asked for it
    pauses. Returns whether it begins: not in a daemon that ends."""

    def __call__(self, task: Callable[..., Awaitable[None]], /, *args: Any) -> bool: ...


class Claim:
    """A VM that was taken, and is given back at the end of the `with`. That may be in another task:
    the call that asks for a migration takes the VM, and the migration gives it back."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None:
        self._vm.give_back()


class Vm:
    """`epoch` counts changes of ownership; it belongs to the guest and travels with it. `about` is
    what a session needs to go on with its migration after the daemon's death, and to answer a peer
    that asks how it ended. It is JSON, the session's own (schema.py), and in the record until the
    next migration. `attachment` says which process the VMM is, or was. `unwritten`: the record on
    disk is older than what is known here. `void`: an intent may be on disk that is not valid."""

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
        self.kinds: Mapping[str, type[Vmm]] = {}  # the daemon's drivers by name
        self.follow: Callable[[Vmm], None] = lambda driver: None  # the daemon's: waits for its end
        self.owing: Callable[[], None] = lambda: None  # the daemon's: has the record written later
        self.spawn: Spawn = lambda task, *args: False  # the daemon's: starts a task for this VM
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
        """Changes fields of the status and tells its watchers."""
        self._put(replace(self.status, **changes))

    def _put(self, status: Status, counted_as: counts.Result = "failed") -> None:
        before, self.status = self.status, status
        if (before.migration, before.phase) != (status.migration, status.phase):
            self._turned(before, counted_as)
        self._changed.set()
        self._changed = trio.Event()

    def _turned(self, before: Status, counted_as: counts.Result) -> None:
        """Notes and logs a new phase or a new migration, and counts a migration that is over."""
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

    def phases(self, at: float) -> list[PhaseTime]:
        """How long this daemon has seen the migration in each phase, until `at` on the monotonic
        clock: each phase once, in the order they came."""
        phase = self.status.phase
        last = self._spent.get(phase, 0.0) + max(at - self._since, 0.0)
        spent = self._spent | {phase: last}
        return [PhaseTime(phase, round(s * 1e3, 2)) for phase, s in spent.items()]

    def end_watches(self) -> None:
        """Ends all watches: the VM is not this daemon's any more."""
        self._gone = True
        self._changed.set()

    def conclude(self, *, counted_as: counts.Result = "failed", **changes: Any) -> None:
        """`show` for the end of a migration: drops what was only progress. `counted_as` says how a
        migration is counted that does not complete."""
        self._put(replace(self.status.lasting(), **changes), counted_as)

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[Status]]:
        """The current status, then each change; a slow watcher sees only the newest."""

        async def states() -> AsyncGenerator[Status, None]:
            while not self._gone:
                changed = self._changed
                yield self.status
                await changed.wait()

        async with contextlib.aclosing(states()) as iterator:
            yield iterator

    def claim(self, session: object) -> Claim:
        """Takes the VM for a session. Raises PostcopydError if another has it."""
        if self.claimed_by is not None:
            raise PostcopydError(
                f"{self.name} is in migration {self.status.migration or '(starting)'} already: "
                f"wait for it or cancel it",
                "Busy",
            )
        self.claimed_by, self.free = session, trio.Event()
        return Claim(self)

    def give_back(self) -> None:
        """Ends a claim. Only `Claim` calls this."""
        self.claimed_by = None
        self._must_be_told()
        self.free.set()

    @property
    def under_way(self) -> bool:
        """Whether the status shows a migration on its way, neither over nor paused."""
        phase, migration = self.status.phase, self.status.migration
        preparing = phase == "idle" and bool(migration) and self.status.result is None
        return preparing or phase in UNDER_WAY

    def _must_be_told(self) -> None:
        """Shows the end of a migration whose session, by a bug, has not shown it: else a client
        that waits for the migration would wait for ever."""
        if not self.under_way:
            return
        migration = self.status.migration
        away = self.ownership in ("granted", "owned")
        where = "may be at either host" if away else "is as that left it"
        message = (
            f"the migration of {self.name} ended here by an internal error, which the log has: the "
            f"guest {where}, see `postcopyd status {self.name}` on both hosts"
        )
        result = Result(
            event="paused" if away else "failed",
            vm=self.name,
            migration=migration,
            error=message,
        )
        self.log.error("migration ended by a bug", ownership=self.ownership)
        if away:
            self.conclude(phase="paused", message=message, result=result)
        else:
            self.conclude(phase="failed", message=message, result=result)

    async def ended(self) -> None:
        """Waits, at most ENDING_S, for what is about to end. The last steps of a migration: a
        client that has seen its result may go on at once. The daemon's own work at the VM after its
        start. Letting go of a VMM that has ended: a client that has seen its end may attach the
        next one."""
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
        """The driver. Raises PostcopydError if the VMM is gone, or not reached yet after a
        restart of the daemon."""
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

    @property
    def kind(self) -> type[Vmm] | None:
        """The class of its driver, also if its VMM has ended."""
        if self.driver is not None:
            return type(self.driver)
        return None if self.attachment is None else self.kinds.get(self.attachment.driver)

    def _lives(self) -> bool:
        """Whether the VMM's process lives, as far as is known, though there may be no driver."""
        try:
            return self.attachment is not None and not self.attachment.ended()
        except OSError:
            return True

    # --- its VMM ---------------------------------------------------------------------------------

    def have(self, driver: Vmm, lock: int) -> None:
        """Takes over `driver` and the lock on its process. Raises OSError; then the caller still
        owns them."""
        started, boot = procfs.started(driver.pid), procfs.boot_id()
        self.attachment = Attachment(driver.kind, driver.socket, driver.pid, started, boot)
        self.have_again(driver, lock)

    def have_again(self, driver: Vmm, lock: int) -> None:
        """The same, for the process that the record names."""
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
        """Takes over the record of the previous daemon. Nothing is shown, logged or counted for
        that."""
        self.epoch, self.ownership, self.about = (
            record["epoch"],
            record["ownership"],
            record["about"],
        )
        self.attachment = Attachment.of(record)
        self.void = record.get("void", False)
        known = {k: v for k, v in record["status"].items() if k in RecordedStatus.__annotations__}
        result = known.pop("result", None)
        self.status = convert(to_builtins(self.status) | known | {"result": None}, Status)
        with contextlib.suppress(ValidationError):  # of a version that had another kind of result
            self.status = replace(self.status, result=convert(result, Result | None))

    def record(self, ownership: Ownership | None = None, epoch: int | None = None) -> None:
        """Writes the record. Call it before anything acts on what it says. Raises PostcopydError.

        `ownership` is one of held, intent, granted (source: given away), arriving, loading, owned,
        declined (destination). The start of a daemon, and recovery, read it. If the record cannot
        be written, ownership and epoch are as before.
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

        Until then the previous record is valid, and what that one needs must stay. Returns whether
        it is written.
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
        """Whether there is a page record in which a page of these regions has a state that is not
        in `whole`. Raises PostcopydError if that cannot be known."""
        return self._store.lacks_pages(self.name, whole, regions)

    def note(self, about: dict[str, Any]) -> None:
        """Replaces `about`, for the same migration or another one. Raises PostcopydError."""
        if about["migration"] != self.about.get("migration"):
            self.keep_answer()
        self.about = about

    def keep_answer(self) -> None:
        """Keeps the answer of an arrival that is about to be forgotten here, for a source that does
        not know how it ended and will ask. If that source heard that nothing is known, a person
        could run the guest there again, while it may run here. Raises PostcopydError."""
        about = self.about
        kind = about.get("answer", {}).get("type", "declined")
        if kind != "declined" and "offer" in about and not about.get("acknowledged"):
            what: dict[str, Any] = {"offer": {"epoch": about["offer"]["epoch"]}}
            what |= {key: about[key] for key in ("migration", "identity", "answer") if key in about}
            self._store.keep_answer(self.name, what)

    def remove_pages(self) -> None:
        """Removes the page record of an arrival that is over. One that stays does no harm."""
        try:
            self._store.remove_pages(self.name)
        except PostcopydError as error:
            self.log.error("page record not removed", error=str(error))

    def keep_device(self, state: bytes) -> None:
        """Keeps the device state of a guest that has left. Raises PostcopydError."""
        self._store.keep_device(self.name, state)

    def device(self) -> bytes:
        """What was kept. Raises PostcopydError."""
        return self._store.device(self.name)

    def remove_device(self) -> None:
        """Removes what was kept. One that stays does no harm but that it stays."""
        try:
            self._store.remove_device(self.name)
        except PostcopydError as error:
            self.log.error("device state not removed", error=str(error))

    def home(self) -> None:
        """Removes the intent, as the guest is this host's. Call it before that is recorded: if the
        daemon dies in between, the next one finds a record by which it calls this again."""
        self.void = True
        if (why := self.forget()) is not None:
            self.log.error("intent not forgotten, it is tried again", error=why)
            self.owing()

    def leaving(self) -> None:
        """Notes that a valid intent is about to be written: none on disk is void from here on."""
        self.void = False

    def forget(self) -> str | None:
        """Removes the intent if it is `void`. Returns why that failed, or None."""
        try:
            if self.void:
                self._store.forget_intent(self.name)
        except PostcopydError as error:
            return str(error)
        self.void = False
        return None
