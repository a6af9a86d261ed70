# SPDX-License-Identifier: Apache-2.0
"""Drives an unmodified QEMU by QMP: inspect, save, roll back; adopt, load, run.

QEMU moves its device state by its own migration stream, through a socket pair of which we hold
the other end; capability `x-ignore-shared` keeps guest RAM out of it. This module knows QEMU's
states and what leads from one to the other. It knows nothing of peers, pages or ownership, and
keeps nothing that QEMU could not be asked again after a restart of the daemon, except the settings
it found (without them the defaults are put back) and whether the guest ran.

The source:       running --migrate--> (STOP) finish-migrate --> postmigrate --cont--> running
The destination:  inmigrate --stop, migrate-incoming--> paused --cont--> running

Others may stop, move and save the guest by QEMU's own means. What this driver did is told from
what they did by a guard that it leaves in QEMU (`settings`, `state`), and it undoes only
its own.

`pause-before-switchover` is not used: the stop would last 1.5 ms longer (QEMU waits 1 ms for stray
wake-ups of its semaphore), cancelling in that moment hangs QEMU 7.2, and it guards nothing, because
after `completed` the source can still go back by `cont`.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Literal, Self

import trio

from postcopyd.errors import PostcopydError, shortage
from postcopyd.host import procfs
from postcopyd.names import plain
from postcopyd.tasks import threads
from postcopyd.vmm import (
    Declined,
    Role,
    Shape,
    State,
    Vmm,
    VmmError,
    VmmGone,
    VmmTimeout,
    process_ended,
    writers,
)
from postcopyd.vmm.qemu import disks as qemu_disks
from postcopyd.vmm.qemu import facts as qemu_facts
from postcopyd.vmm.qemu import farewell, hugepages, ram, settings, stream, userfaultfd
from postcopyd.vmm.qemu import state as qemu_state
from postcopyd.vmm.qemu.answers import Cpu, Migration, Status
from postcopyd.vmm.qemu.qmp import ANSWER_SECONDS, Events, Qmp, QmpClosed, QmpRefused
from postcopyd.vmm.qemu.settings import ARRIVING, BANDWIDTH, IGNORE, LATE, MOVED, STOPPED
from postcopyd.vmm.qemu.state import PAUSED, Now

# Faults of one userfaultfd are read by one thread: several serve several vCPUs better, but each
# costs threads. Region i belongs to descriptor i % number.
MAX_DESCRIPTORS = 4

LOOKS = trio.CapacityLimiter(4)
"""QEMUs that are looked at, at a time: hundreds of questions each, on which this process and theirs
are at work. Forty at once would each be slow, and be taken for stuck. Who waits has patience."""

LOOK_ANSWERS = 6
"""A look may take as long as so many late answers: on a busy host none is quick."""

FAIL_SECONDS = 2.0  # for a migration whose stream has lost its other end
QUIT_SECONDS = 2.0  # for a QEMU whose guest is not needed any more
FINISH_SECONDS = 10.0  # for one that may have disks to flush
STOP_SECONDS = 30.0  # for a guest's disks to be drained
CONT_SECONDS = 10.0  # for a guest that we stopped and whose disks may still be draining
DISK_LOCK_SECONDS = 5.0  # how long a destination that was just killed may still hold a disk
FAREWELL_SECONDS = 1.0  # for the rest of what a QEMU that has ended has said
POLL_SECONDS = 0.005


class QemuVmm(Vmm):
    """One QEMU, by its QMP socket."""

    kind = "qemu"

    def __init__(self, name: str, socket: str, qmp: Qmp, pid: int, pidfd: int) -> None:
        self.name = name
        self.socket = socket
        self.pid = pid
        self._qmp = qmp
        self._pidfd = pidfd
        self._settings = settings.Settings(qmp)
        # Whether we have forbidden huge pages; None: an adoption of another daemon's may have.
        self._forbade_huge: bool | None = None
        # What the guest did when it was last looked at.
        self._seen: Literal["running", "paused"] | None = None
        self._moved = False  # by our own migration, at its last stop
        self._resumes: Events | None = None  # since `save`
        self._last_words = qmp.last(*farewell.EVENTS)
        self._made: list[int] | None = None  # userfaultfds in QEMU, by `adopt`
        self._ending = False  # by us

    @classmethod
    async def connect(cls, name: str, socket: str) -> Self:
        """Take the monitor at a QMP socket. Raises PostcopydError within seconds when it cannot."""
        qmp = Qmp(socket)
        try:
            with _patience(name):
                await qmp.open()
                cpus = await qmp.ask(list[Cpu], "query-cpus-fast")
            pidfd = _pidfd(name, qmp.pid)
            # Whose memory is written to and who is ended is for the kernel to say. What QEMU says
            # shows that it speaks for itself, and not through another process.
            for cpu in cpus[:1]:
                if not procfs.has_thread(qmp.pid, cpu.thread_id):
                    os.close(pidfd)
                    raise VmmError(
                        f"Process {qmp.pid} ({procfs.command(qmp.pid)}) answers at {socket} and is "
                        f"not the QEMU of {name}, whose vCPU it says is thread {cpu.thread_id}: "
                        f"name a monitor of QEMU's own, with nothing in between."
                    )
            return cls(name, socket, qmp, qmp.pid, pidfd)
        except BaseException:
            qmp.close()
            raise

    @classmethod
    async def known(cls, name: str, socket: str, pid: int) -> Self:
        """As the interface says; its monitor is taken at first use. That `pid` is still that QEMU
        (by its start time) is the caller's to see."""
        return cls(name, socket, Qmp(socket, pid), pid, _pidfd(name, pid))

    async def inspect(self, role: Role) -> Shape:
        """What is there and what forbids a migration in this role. Only asks and reads."""
        async with LOOKS:
            with _patience(self.name, LOOK_ANSWERS):
                return await self._inspect(role)

    async def _inspect(self, role: Role) -> Shape:
        qmp = self._qmp
        with qmp.taking_apart():
            outline = await qemu_disks.outline(qmp)  # first: what changes from here on shows
        run_state = (await qmp.ask(Status, "query-status")).status
        backends = await ram.backends(qmp)
        devices = [device async for device in qemu_facts.devices(qmp)]
        facts = await qemu_facts.facts(qmp, backends, devices)
        places = await qemu_facts.places(qmp, devices)
        problems = await qemu_facts.refusals(qmp, self.pid, role, run_state, devices)
        with qmp.taking_apart():
            disks, unmovable = await qemu_disks.look(qmp, self.pid)
        problems += unmovable
        regions, unfit = ram.regions(backends, self.pid, qmp.version)
        try:
            facts |= {f"pages of {r.name}": f"{r.page_size} bytes each" for r in regions}
            problems += unfit
            problems += await trio.to_thread.run_sync(
                ram.sharers, regions, self.pid, limiter=threads.WALKS
            )
            direct, unseen = await trio.to_thread.run_sync(
                writers.look, self.pid, limiter=threads.WALKS
            )
            # SCSI commands of the guest go to the host's disk as they are, with the guest's pages.
            direct += [
                device.id or device.path for device in devices if device.kind == "scsi-block"
            ]
        except BaseException:
            _close(region.fd for region in regions)
            raise
        state: State = "paused"
        if run_state == "running":
            state = "running"
        elif run_state == "inmigrate":
            state = "incoming"
        self._seen = "running" if state == "running" else "paused"
        return Shape(
            state=state,
            pid=self.pid,
            regions=tuple(regions),
            facts=facts,
            problems=tuple(problems),
            direct_io=writers.direct_sentence(direct),
            untracked=writers.unseen_sentence(unseen),
            disks=tuple(disks),
            places=places,
            outline=outline,
        )

    async def outline(self) -> str:
        """As the interface says."""
        with _patience(self.name), self._qmp.taking_apart():
            return await qemu_disks.outline(self._qmp)

    # ---- the source

    async def prepare(self) -> None:
        """Note what the guest does, and the settings that `save` changes; nothing is changed."""
        await self._look()
        await self._settings.note(settings.SOURCE)

    async def track(self) -> int:
        """As the interface says: some thread of QEMU makes it, between two of its instructions."""
        try:
            if (await self._now()).migration.over:  # or they may be QEMU's own
                await userfaultfd.close_all(self.pid)
            return await userfaultfd.borrow(self._qmp, self.pid)
        except OSError as error:
            raise VmmError(
                f"The descriptors of QEMU {self.pid} cannot be seen ({error.strerror}): see that "
                f"it runs, and run postcopyd as root."
            ) from None

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """Between QMP `stop`, which is answered when the disks are drained, and `cont`."""
        before = self.before
        if await self._look() != "running":
            self.before = before
            yield
            return
        with self._qmp.events("RESUME") as events:
            try:
                await self._hold()
                yield
            finally:
                resumed = await self._move_again(events)
                self.before = before
        if resumed:
            raise VmmError(
                f"The guest {self.name} was resumed by someone else while its written pages were "
                f"looked at: leave it alone and migrate again."
            )

    async def _hold(self) -> None:
        """The guard first: a guest that is stopped under it was stopped by us."""
        _, stopped, migration = await self._qmp.execute_all(
            [
                settings.parameters(tls_creds=STOPPED),
                ("stop", None),
                ("query-migrate", None),
            ],
            patience=STOP_SECONDS,
        )
        if isinstance(stopped, QmpRefused):
            raise stopped
        if not self._qmp.as_kind(Migration, migration, "`query-migrate`").over:
            raise VmmError(
                f"Somebody else began to move or save the guest {self.name} just now: wait for "
                f"the end of that and migrate again."
            )

    async def _move_again(self, events: Events) -> bool:
        """Run the guest after a stop of our own, also in a task that is cancelled. Returns whether
        somebody else had run it.

        QEMU takes commands in their order: a `stop` that nobody waits for any more comes before.
        """
        try:
            with trio.fail_after(CONT_SECONDS, shield=True):
                now = await self._quiet(STOPPED)
                # The answers come behind the event of whoever ran the guest before us.
                resumed = now.running or events.take() is not None
                if now.held(STOPPED):
                    await self._run_again()
                elif not now.running:
                    raise VmmError(
                        f"The guest {self.name} was stopped for a moment and was not run again, as "
                        f"somebody else has had a hand on it meanwhile: {now.words}."
                    )
                await self._settings.unguard()
                return resumed
        except (trio.TooSlowError, VmmTimeout):
            raise VmmTimeout(
                f"The guest {self.name} was stopped for a moment, and QEMU has not run it again "
                f"within {CONT_SECONDS:g} s: see what its disks wait for, then send QMP `cont` to "
                f"{self.socket}, if nobody has moved it meanwhile."
            ) from None

    async def save(
        self, send: Callable[[bytes], Awaitable[None]], stopped: Callable[[], None]
    ) -> None:
        """Stop the guest and stream its device state; returns with QEMU in postmigrate.

        `stopped` is called once: at STOP, or at the start for a guest that did not run. RAM is
        final when this returns and not at STOP, after which QEMU waits for its disks. After a
        failure or cancellation `rollback` has to be called. Raises VmmError, VmmGone, and
        whatever `send` raises.
        """
        with self._qmp.events("STOP", "RESUME", "MIGRATION") as events:
            known = await self._settings.note(settings.SOURCE)
            if await self._look() == "paused":
                stopped()
            self._watch()
            async with (
                stream.opened(self._qmp) as ours,
                stream.crew() as crew,  # until the relay has seen the end of the stream
            ):
                crew.start_soon(stream.relay, ours, send)
                await self._begin(known)
                await self._saved(events, stopped if self.before == "running" else None)
            while (event := events.take()) is not None:
                self._must_not_resume(event)

    async def _begin(self, known: dict[str, bool]) -> None:
        """Our own migration, in one piece with what has to be so for its time. While it goes on
        QEMU takes no other, and afterwards the guard is there."""
        with trio.CancelScope(shield=True):  # or nobody would know whose migration goes on
            # What comes after `migrate` may be answered only when the device state was read: QEMU
            # holds its main loop up while it writes that.
            _, ignoring, begun = await self._qmp.execute_all(
                [
                    *settings.ours(known),
                    ("migrate", {"uri": stream.URI}),
                ],
                unheard=[settings.parameters(tls_creds=MOVED)],
            )
            if not isinstance(begun, QmpRefused):
                self._moved = True
            else:
                # In this order: without the guard nobody's save may leave guest RAM out.
                put_back, _ = await self._qmp.execute_all(
                    [
                        settings.capabilities({IGNORE: self._settings.found_ignoring}),
                        settings.parameters(tls_creds=""),
                    ]
                )
                refused = isinstance(put_back, QmpRefused) and not isinstance(ignoring, QmpRefused)
                if refused and not (await self._now()).migration.over:
                    # Somebody else's began between two of our commands and leaves guest RAM out:
                    # what cannot be right has to fail.
                    await self._qmp.execute("migrate_cancel")
        for refusal in (begun, ignoring):
            if isinstance(refusal, QmpRefused):
                raise VmmError(
                    f"QEMU would not save the device state of {self.name}: {refusal.reason}."
                )

    async def _saved(self, events: Events, stopped: Callable[[], None] | None) -> None:
        while True:
            event = await events.next()
            self._must_not_resume(event)
            status = event["data"].get("status")
            if event["event"] == "STOP" and stopped is not None:
                stopped()
                stopped = None
            elif status == "completed":
                # At once, and nobody waits for it: what others save from now on is to be whole.
                await self._qmp.tell(
                    *settings.capabilities({IGNORE: self._settings.found_ignoring})
                )
                if stopped is not None:
                    raise VmmError(f"QEMU saved the guest of {self.name} without stopping it.")
                return
            elif status in ("failed", "cancelled"):
                raise VmmError(
                    f"QEMU gave up saving the device state of {self.name}: "
                    f"{await self._why(status)}."
                )

    def _must_not_resume(self, event: dict[str, Any]) -> None:
        if event["event"] == "RESUME":
            raise VmmError(
                f"The guest {self.name} was resumed by someone else while it was being handed "
                f"over: leave it alone and migrate again."
            )

    def check_saved(self) -> None:
        if self._resumes is not None and self._resumes.queue:
            raise VmmError(
                f"The guest {self.name} was resumed by someone else after its state was saved: "
                f"leave it alone and migrate again."
            )

    def _watch(self, *, on: bool = True) -> None:
        """For who runs the guest from now on, or no more."""
        if self._resumes is not None:
            self._qmp.unsubscribe(self._resumes)
        self._resumes = self._qmp.subscribe("RESUME") if on else None

    async def rollback(self) -> str:
        """The guest as it was before we stopped it, from whatever state QEMU is in. Idempotent.

        A guest that was paused and whose state was saved whole stays in QEMU's run state
        postmigrate (nothing leads from there to paused but running): `cont` runs it as ever, but it
        must run before it can be migrated again. Raises VmmError when it cannot be run again.
        """
        self._watch(on=False)
        before = self.before or self._seen
        now = await self._quiet(STOPPED, MOVED)
        moved = self._moved = self._moved or now.guard == MOVED
        if before == "running" and (now.held(STOPPED) or now.held(MOVED)):
            await self._run_again()
            now = await self._now()
        await self._settings.restore()
        if moved and now.running:
            await self._announce()
        self._seen, self.before = before, None
        if now.migration.over:  # or they may be QEMU's own
            with suppress(PostcopydError, OSError):  # of no use, and no harm
                await userfaultfd.close_all(self.pid)
        stands = PAUSED | ({"postmigrate"} if moved else set())
        if not now.migration.over or before is None:
            return "" if now.migration.over else now.words
        as_it_was = now.running if before == "running" else now.run_state in stands
        if not as_it_was and now.running:
            return "it was paused, and somebody else has run it meanwhile"
        return "" if as_it_was else now.words

    async def mark(self) -> None:
        """As the interface says: the guard. Its migration is known by the bandwidth that it has
        set, and goes on or is over; a pause has no such sign, but to end one makes no second guest.
        """
        now = await self._now()
        guard = None
        if now.run_state in {"finish-migrate", "postmigrate"}:
            ours = (await self._settings.read()).max_bandwidth == BANDWIDTH
            guard = MOVED if ours else None
        elif now.run_state == "paused" and now.migration.over:
            guard = STOPPED
        if guard is not None and now.guard is None:
            await self._settings.guard(guard)

    async def _announce(self) -> None:
        """Switches may have learnt the destination's port from its announcement."""
        found = await self._settings.read()
        await self._qmp.execute(
            "announce-self",
            {
                "initial": found.announce_initial,
                "max": found.announce_max,
                "rounds": found.announce_rounds,
                "step": found.announce_step,
            },
        )

    async def _quiet(self, *guards: str) -> Now:
        """What QEMU is at once no migration goes on that has begun under one of these guards, or
        that a stop of ours was put upon. Others are left alone, and their end is not waited for.

        Our end of our own migration's stream is closed, so it fails by itself in milliseconds,
        unless it has been written whole, and then it completes. QEMU takes its disks back after
        either. After `migrate_cancel` past the stop, 7.2 runs the guest with its disks inactive and
        aborts at their next use: that is for a migration that neither writes nor stops, and for a
        pause that somebody else asked for.
        """
        deadline = trio.current_time() + FAIL_SECONDS
        while True:
            now = await self._now()
            status, stopping = now.migration.status, now.run_state == "finish-migrate"
            if now.guard not in guards or (now.migration.over and not stopping):
                return now
            if now.guard == MOVED:
                stuck = not stopping and trio.current_time() > deadline
                if status == "pre-switchover" or (stuck and not now.migration.over):
                    await self._qmp.execute("migrate_cancel")
                if status == "cancelling":  # 7.2 may have missed it on its way into the pause
                    with suppress(QmpRefused):
                        await self._qmp.execute("migrate-continue", {"state": "cancelling"})
            await trio.sleep(POLL_SECONDS)

    async def _run_again(self) -> None:
        """`cont`, for a guest of which it was just seen that we hold it."""
        deadline = trio.current_time() + DISK_LOCK_SECONDS
        while True:
            try:
                await self._qmp.execute("cont", patience=math.inf)
                return
            except QmpRefused as refusal:
                if "lock" not in refusal.reason or trio.current_time() > deadline:
                    raise VmmError(
                        f"The guest {self.name} stays stopped at the source, as QEMU would not run "
                        f"it again ({refusal.reason}): see who holds its disks, which may be this "
                        f"same guest, running elsewhere; if it does not, release them and send QMP "
                        f"`cont` to {self.socket}."
                    ) from None
            await trio.sleep(POLL_SECONDS * 10)

    async def finish(self, keep: bool) -> None:
        """The guest runs elsewhere: end this QEMU, or leave it stopped. Fine if it has ended."""
        self._watch(on=False)
        if not keep:
            await self._end(FINISH_SECONDS)
        else:
            with suppress(QmpClosed):
                await self._settings.restore()

    # ---- the destination

    async def adopt(self, shape: Shape) -> list[int]:
        """Empty the RAM and make the userfaultfds in QEMU: min(4, number of regions) of them.

        Region i of the shape belongs to descriptor i % number; they are sorted by their number in
        QEMU, so that `adopted` can give them in the same order.
        Raises PostcopydError; then nothing is left in QEMU, and the RAM is as good as empty.
        """
        state = (await self._qmp.ask(Status, "query-status")).status
        if state != "inmigrate":
            raise VmmError(
                f"The QEMU of {self.name} does not wait for a guest (run state {state}), so its "
                f"RAM was not touched: start it anew with -incoming defer."
            )
        regions = list(shape.regions)
        sharers = await trio.to_thread.run_sync(
            ram.sharers, regions, self.pid, limiter=threads.WALKS
        )
        if sharers:
            raise VmmError(sharers[0])
        await userfaultfd.close_all(self.pid)
        await self._settings.apply(settings.DESTINATION)
        # Whatever its options: the guest runs when it is told to and not before.
        await self._qmp.execute("stop")
        descriptors: dict[int, int] = {}
        try:
            if not self._forbade_huge:  # before it is emptied, and then there are none
                self._forbade_huge = await hugepages.forbid(self.pid)
            await self.discard(shape)
            for _ in range(min(len(regions), MAX_DESCRIPTORS)):
                ours, number = await userfaultfd.create(self._qmp, self.pid)
                descriptors[number] = ours
            self._made = sorted(descriptors)
        except BaseException:
            _close(descriptors.values())
            with trio.CancelScope(shield=True), suppress(PostcopydError, OSError):
                await self.release()
            raise
        return [descriptors[number] for number in sorted(descriptors)]

    async def discard(self, shape: Shape) -> None:
        """Empty the RAM. Raises VmmError when not all of it could be."""
        await trio.to_thread.run_sync(
            ram.empty, list(shape.regions), self.pid, limiter=threads.WALKS
        )

    async def adopted(self) -> list[int]:
        """Duplicates of the userfaultfds in QEMU, in the order that `adopt` returned them."""
        return userfaultfd.duplicates(self.pid)

    async def load(self, receive: AsyncIterable[bytes]) -> None:
        """Feed the device state; returns with the guest paused and the stream at its end.

        After any failure this QEMU is of no use any more: `end` it. Raises VmmError, VmmGone, and
        whatever `receive` raises.
        """
        arguments: dict[str, Any] = {"uri": stream.URI}
        if self._qmp.version >= (9, 1):
            arguments["exit-on-error"] = False
        with self._qmp.events("RESUME", "MIGRATION") as events:
            async with stream.opened(self._qmp) as ours, stream.crew() as crew:
                await self._qmp.execute("migrate-incoming", arguments)
                crew.start_soon(stream.feed, ours, receive, self._nearly_loaded)
                await self._loaded(events)
        if self._takes_disks and (disks := await qemu_disks.untaken(self._qmp)):
            raise VmmError(
                f"QEMU could not take the disk{'s' if disks[1:] else ''} {', '.join(disks)} of "
                f"{self.name}, which is to stay paused: see who holds the images (its own log "
                f"says more), and start this QEMU anew."
            )

    @property
    def _takes_disks(self) -> bool:
        """At the end of the load. QEMU before 10 aborts when it gives away disks that it has not
        taken, which `cont` does; so those of a guest that stays paused are taken then."""
        return self.before == "paused" and self._qmp.version < (10, 0)

    async def _nearly_loaded(self) -> None:
        """QEMU waits for the last byte and has read all that x-ignore-shared is about. Were it on
        any longer, a save by somebody else would leave out guest RAM; from here on one reads it
        all, and waits for pages as the guest does. Until the guest runs none may begin.
        """
        states = {IGNORE: False}
        if self._takes_disks:
            states[LATE] = False
        commands = [
            settings.capabilities(states),
            settings.parameters(tls_creds=ARRIVING),
        ]
        with suppress(QmpClosed):  # `_loaded` hears of it too, and says so
            for answer in await self._qmp.execute_all(commands, patience=math.inf):
                if isinstance(answer, QmpRefused):
                    raise answer

    async def _loaded(self, events: Events) -> None:
        ran = False
        while True:
            event = await events.next()
            ran |= event["event"] == "RESUME"
            status = event["data"].get("status")
            if status == "failed":
                raise VmmError(
                    f"QEMU could not load the device state of {self.name}: "
                    f"{await self._why(status)}; see that both QEMUs have the same devices, and "
                    f"start this one anew."
                )
            if status == "completed":
                if ran:
                    raise VmmError(f"QEMU ran {self.name} before it was told to: end it.")
                return

    async def run(self) -> None:
        """Run the guest. Raises Declined when it certainly did not run, another PostcopydError when
        that cannot be known. Waits while QEMU waits for a page."""
        with self._qmp.events("RESUME") as events:
            try:
                await self._qmp.execute("cont", patience=math.inf)
            except QmpClosed as closed:
                if closed.unsent:
                    raise Declined(f"The guest {self.name} was not run: {closed}") from None
                raise
            except QmpRefused as refusal:
                if not await self._runs():
                    raise Declined(
                        f"QEMU would not run the guest {self.name} ({refusal.reason}): see that "
                        f"its disks are not in use elsewhere."
                    ) from None
                return
            resumed = events.take() is not None
        # QEMU answers `cont` after RESUME; a state that it ignores `cont` in is neither yes nor no.
        if not resumed and not await self._runs():
            raise VmmError(
                f"QEMU accepted to run {self.name} but does not: look at QMP query-status."
            )
        with suppress(PostcopydError):  # others may move and save it again; it runs in any case
            await self._qmp.tell(*settings.parameters(tls_creds=""))

    async def release(self) -> None:
        """Close the userfaultfds in QEMU and put its settings back.

        Only after the guest is drained, or before `load`."""
        if self._made is None:  # by an adoption of another daemon's, if any
            await userfaultfd.close_all(self.pid)
        else:
            await userfaultfd.close(self.pid, self._made)
        self._made = None
        if self._forbade_huge is not False:
            await hugepages.allow(self.pid, known=bool(self._forbade_huge))
            self._forbade_huge = None
        await self._settings.restore()

    async def end(self) -> None:
        """End QEMU for certain; returns when the process is gone."""
        await self._end(QUIT_SECONDS)

    async def _end(self, patience: float) -> None:
        self._ending = True
        with trio.move_on_after(patience):
            with suppress(PostcopydError):
                await self._qmp.execute("quit")
            await self._exit()
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        await self._exit()

    # ---- both

    async def gone(self) -> None:
        """Returns when QEMU has ended. Also reads the monitor meanwhile: keep it running."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._idle)
            await self._exit()
            nursery.cancel_scope.deadline = trio.current_time() + FAREWELL_SECONDS
        # The same for each that waits here, whoever is first.
        if self._last_words.queue and not self._ending:
            self.farewell = farewell.farewell(self._last_words.queue[-1])

    async def _idle(self) -> None:
        """Reads to the end: what QEMU has said last may still be on its way."""
        with suppress(PostcopydError):
            await self._qmp.drain()

    async def _exit(self) -> None:
        await process_ended(self._pidfd)

    async def aclose(self) -> None:
        """Leave QEMU as it is and let go of its monitor."""
        self._qmp.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        await trio.lowlevel.checkpoint()

    async def _now(self) -> Now:
        return await qemu_state.look(self._qmp)

    async def _look(self) -> Literal["running", "paused"]:
        """Note what the guest does before we change it. Raises VmmError when somebody else has a
        hand on it, or when it does neither."""
        now = await self._now()
        if not now.migration.over or not (now.running or now.run_state in PAUSED):
            raise VmmError(f"The guest {self.name} cannot be moved now: {now.words}.")
        self._moved = False
        self.before = self._seen = "running" if now.running else "paused"
        return self.before

    async def _runs(self) -> bool:
        return (await self._qmp.ask(Status, "query-status")).running

    async def _why(self, status: str) -> str:
        """QEMU's reason for the end of a migration, or where to look for it."""
        reason = (await self._qmp.ask(Migration, "query-migrate")).error_desc
        return plain(reason or f"migration {status}, its own log says why").rstrip(".")


@contextmanager
def _patience(name: str, answers: int = 1) -> Iterator[None]:
    """Questions are answered in milliseconds, or QEMU's main loop is stuck."""
    patience = answers * ANSWER_SECONDS
    try:
        with trio.fail_after(patience):
            yield
    except trio.TooSlowError:
        raise VmmTimeout(
            f"The QEMU of {name} did not answer for {patience:g} s: see whether it is "
            f"stopped (SIGSTOP), waits for its disks, or for pages of a migration."
        ) from None


def _pidfd(name: str, pid: int) -> int:
    if pid <= 0:
        raise VmmGone(
            f"The process of the QEMU of {name} has no number here: run postcopyd in the PID "
            f"namespace of QEMU or above it."
        )
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise shortage(error) or VmmGone(
            f"The QEMU process {pid} of {name} was not found ({error.strerror}): run postcopyd in "
            f"the PID namespace of QEMU or above it, and start QEMU if it has ended."
        ) from None


def _close(descriptors: Iterable[int | None]) -> None:
    for descriptor in descriptors:
        if descriptor is not None:
            os.close(descriptor)
