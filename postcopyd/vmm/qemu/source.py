# SPDX-License-Identifier: Apache-2.0
"""The half of the driver at the source: stops the guest, saves its device state, undoes that.

Owns what it has changed in QEMU (settings, the guard), until `rollback` or `finish`.
"""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from itertools import islice
from typing import Any

import trio

from postcopyd.errors import PostcopydError
from postcopyd.names import plain
from postcopyd.tasks.nursery import open_nursery
from postcopyd.vmm import (
    VmmError,
    VmmTimeout,
    looked_at,
)
from postcopyd.vmm.qemu import blocks as ram_blocks
from postcopyd.vmm.qemu import disks as qemu_disks
from postcopyd.vmm.qemu import ram, savevm, settings, userfaultfd
from postcopyd.vmm.qemu.answers import FdSet, Migration, Text
from postcopyd.vmm.qemu.blocks import Block, Piece
from postcopyd.vmm.qemu.common import Qemu
from postcopyd.vmm.qemu.events import Events
from postcopyd.vmm.qemu.qmp import QmpRefused
from postcopyd.vmm.qemu.settings import BANDWIDTH, MOVED, STOPPED
from postcopyd.vmm.qemu.state import PAUSED, STOPPED_BY_ITSELF, Now

FAIL_SECONDS = 2.0  # for a migration whose stream has lost its other end
FINISH_SECONDS = 10.0  # for a QEMU that may have disks to flush
STOP_SECONDS = 30.0  # for a guest's disks to be drained
CONT_SECONDS = 10.0  # for a guest that was stopped, and whose disks may still be draining
DISK_LOCK_SECONDS = 5.0  # how long a destination that was just killed may still hold a disk
POLL_SECONDS = 0.005
SMALL_BLOCKS = 1 << 30  # bytes of all together; displays have most of it
EARLY = 64 << 20  # bytes of them that are kept from before the stop, to see what has changed
PAGES_AT_ONCE = 256
LENT = "postcopyd-device-state"  # by this QEMU and whoever asks it know what was lent


class Leaving(Qemu):
    """A QEMU whose guest is to leave, or has left."""

    async def prepare(self) -> None:
        """Notes what the guest does and where its memory is; changes nothing that anybody sees."""
        await self._look()
        present = await ram_blocks.blocks(self._qmp)
        guest_ram = {backend.block.name for backend in await ram.backends(self._qmp, present)}
        self._addresses = {block.name: block.address for block in present}
        self._guest_ram = guest_ram
        for sentence in ram_blocks.unknown(present, guest_ram):  # it may be unmapped since `check`
            raise VmmError(sentence)
        with looked_at(self.name, self.pid):
            self._sparse = ram_blocks.sparse(self.pid, present)
        self._machine = await self._qmp.ask(
            str, "qom-get", {"path": "/machine", "property": "type"}
        )
        await self._lend_file()

    async def track(self) -> int:
        """As the interface says. Some thread of QEMU makes it, between two of its instructions."""
        with looked_at(self.name, self.pid):
            if (await self._now()).migration.over:  # otherwise they may be QEMU's own
                await userfaultfd.close_all(self.pid)
            return await userfaultfd.borrow(self._qmp, self.pid)

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """Between QMP `stop`, which is answered when the disks are drained, and `cont`."""
        before = self.before
        await self._look()
        if self.before != "running":
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

    async def _hold(self, *more: settings.Command) -> tuple[Migration, list[Any]]:
        """Sets the guard, then stops the guest: so a stop under the guard is this driver's. Returns
        what QEMU says of migrations then, and its answers to `more`."""
        _, stopped, migration, *answers = await self._qmp.execute_all(
            [
                settings.parameters(tls_creds=STOPPED),
                ("stop", None),
                ("query-migrate", None),
                *more,
            ],
            patience=STOP_SECONDS,
        )
        if isinstance(stopped, QmpRefused):
            raise stopped
        found = self._qmp.as_kind(Migration, migration, "`query-migrate`")
        if not found.over:
            raise VmmError(
                f"Somebody else began to move or save the guest {self.name} just now: wait for "
                f"the end of that and migrate again."
            )
        return found, answers

    async def _move_again(self, events: Events) -> bool:
        """Runs the guest after a stop by this driver, even in a cancelled task. Returns whether
        somebody else had run it. Raises VmmError and VmmTimeout.

        QEMU takes commands in order, so a `stop` that nobody waits for any more comes before.
        """
        try:
            with trio.fail_after(CONT_SECONDS, shield=True):
                now = await self._quiet(STOPPED)
                # Had somebody else run the guest, the event would have come before the answers.
                resumed = now.live(self._qmp.version) or events.take() is not None
                if now.held(STOPPED):
                    await self._run_again()
                elif not now.live(self._qmp.version):
                    raise VmmError(
                        f"The guest {self.name} was stopped for a moment and was not run again, as "
                        f"somebody else has changed its state meanwhile: {now.words}."
                    )
                await self._settings.unguard()
                return resumed
        except (trio.TooSlowError, VmmTimeout):
            raise VmmTimeout(
                f"The guest {self.name} was stopped for a moment, and QEMU has not run it again "
                f"within {CONT_SECONDS:g} s: see what its disks wait for, then {self._by_hand}, "
                f"if nobody has moved it meanwhile."
            ) from None

    async def save(
        self, send: Callable[[bytes], Awaitable[None]], stopped: Callable[[], None]
    ) -> None:
        """Stops the guest and streams its device state; returns with QEMU paused, under the guard.

        `stopped` is called once: at STOP, or at the start if the guest did not run. RAM is final
        when this returns and not at STOP, after which QEMU waits for its disks. After a failure or
        cancellation the caller must call `rollback`. Raises VmmError, VmmGone, and whatever `send`
        raises.
        """
        if self._file is None:
            await self.prepare()
        with self._qmp.events("STOP", "RESUME") as events:
            run_state = await self._look()
            if self.before == "paused":
                stopped()
            self._watch()
            present = self._present(await self._qmp.execute("x-query-ramblock"))
            await send(self._opening(present))
            early = await self._send_early(send, present)
            told = self.before == "paused"

            def hear(event: dict[str, Any]) -> None:
                nonlocal told
                self._must_not_resume(event)
                if not told:
                    stopped()
                told = True

            async def listen() -> None:
                while True:
                    hear(await events.next())

            async with open_nursery() as crew:
                crew.start_soon(listen)
                migration, (table,) = await self._hold(("x-query-ramblock", {}))
                crew.cancel_scope.cancel()
            self._must_be_movable(migration)  # of others QEMU ends in the save
            if self._present(table) != present:
                raise VmmError(
                    f"The memory of the guest {self.name} beside its RAM has changed its size just "
                    f"before it was handed over, as it does while a guest boots: migrate again."
                )
            # QEMU's own migration, too, ends with RAM before it begins with devices.
            async with open_nursery() as crew:
                crew.start_soon(self._send_memory, send, present, early)
                saved = await self._saved()
            while (event := events.take()) is not None:
                hear(event)
        if not told:
            self.before = self._seen = "paused"  # and rollback leaves it so
            raise VmmError(
                f"Somebody else stopped the guest {self.name} just before it was handed over: "
                f"migrate again."
            )
        if run_state != "running":
            saved = savevm.with_run_state(saved, run_state)
        await send(savevm.devices(saved))

    async def outline(self) -> str:
        """What has been plugged or mounted since the look before the save may not be in what was
        saved: so the save counts only if there is no reason against it then either."""
        text = await super().outline()
        if self._moved:
            self._must_be_movable(await self._qmp.ask(Migration, "query-migrate"))
        return text

    def _must_be_movable(self, migration: Migration) -> None:
        if migration.blocked_reasons:
            raise VmmError(
                f"The guest {self.name} cannot be moved any more, says its QEMU: "
                f"{plain(migration.blocked_reasons[0]).rstrip('.')}. See that it can, and "
                f"migrate again."
            )

    def _present(self, table: Any) -> list[Block]:
        """QEMU's RAM blocks now, by its answer."""
        if isinstance(table, QmpRefused):
            raise table
        text = self._qmp.as_kind(Text, table, "`x-query-ramblock`").human_readable_text
        present = []
        for block in ram_blocks.table(text):
            if block.name not in self._addresses:
                raise VmmError(
                    f"The guest {self.name} has got more memory ({block.name}) just before it was "
                    f"handed over: migrate again."
                )
            present.append(replace(block, address=self._addresses[block.name]))
        if sum(block.used for block in self._small(present)) > SMALL_BLOCKS:
            raise VmmError(
                f"The QEMU of {self.name} has more than {SMALL_BLOCKS >> 20} MiB of memory beside "
                f"guest RAM, which would keep the guest stopped for long: take the device that "
                f"has it (info ramblock) from the guest."
            )
        return present

    def _small(self, present: list[Block]) -> list[Block]:
        return [block for block in present if block.name not in self._guest_ram]

    def _opening(self, present: list[Block]) -> bytes:
        return savevm.opening(
            self._machine.removesuffix("-machine"),
            [(block.name, block.used) for block in present],
            ram_blocks.zeros(self._small(present), self._sparse),
        )

    async def _send_early(
        self, send: Callable[[bytes], Awaitable[None]], present: list[Block]
    ) -> list[Piece]:
        """Sends what is in the small blocks while the guest runs, as hardly any of it changes.
        Returns it, or nothing if that is more than the daemon should keep for a moment."""
        early: list[Piece] = []
        size = 0
        with looked_at(self.name, self.pid):
            for piece in ram_blocks.pieces(self.pid, self._small(present), self._sparse):
                early.append(piece)
                size += len(piece[2])
                if size > EARLY:
                    return []
        await self._send_pages(send, ram_blocks.pages(early), savevm.SECTION_PART)
        return early

    async def _send_memory(
        self,
        send: Callable[[bytes], Awaitable[None]],
        present: list[Block],
        early: list[Piece],
    ) -> None:
        """Sends what is in the small blocks beyond what was sent, while QEMU saves its devices."""
        found = ram_blocks.pieces(self.pid, self._small(present), self._sparse)
        with looked_at(self.name, self.pid):
            pages = ram_blocks.changed(early, list(found)) if early else ram_blocks.pages(found)
        await self._send_pages(send, pages, savevm.SECTION_END)

    async def _send_pages(
        self, send: Callable[[bytes], Awaitable[None]], pages: Iterator[Piece], kind: int
    ) -> None:
        pieces = savevm.memory(pages, kind)
        while True:
            with looked_at(self.name, self.pid):
                data = b"".join(islice(pieces, PAGES_AT_ONCE))
            if not data:
                return
            await send(data)

    async def _saved(self) -> bytes:
        """What QEMU has saved of its devices."""
        # Of a guest that runs QEMU has taken the disks. One before 10 ends when it gives up disks
        # that it has given up, or has not taken.
        sure = self.before == "running" or self._qmp.version >= (10, 0)
        has_disks = sure or await qemu_disks.are_taken(self._qmp)
        filename = f"/dev/fdset/{self._fdset}"
        self._moved = True
        (done,) = await self._qmp.execute_all(
            [("xen-save-devices-state", {"filename": filename, "live": has_disks})],
            patience=STOP_SECONDS,
            unheard=[
                settings.parameters(tls_creds=MOVED),
                ("remove-fd", {"fdset-id": self._fdset}),
            ],
        )
        if isinstance(done, QmpRefused):
            raise VmmError(f"QEMU would not save the device state of {self.name}: {done.reason}.")
        assert self._file is not None
        return os.pread(self._file, os.fstat(self._file).st_size, 0)

    async def _lend_file(self) -> None:
        """A file in memory for QEMU to save into, by a descriptor that can only write: QEMU takes
        no other."""
        await self._take_back_file()
        self._file = os.memfd_create("postcopyd-device-state", os.MFD_CLOEXEC)
        lent = os.open(f"/proc/self/fd/{self._file}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            answer = await self._qmp.execute("add-fd", {"opaque": LENT}, fd=lent)
        finally:
            os.close(lent)
        self._fdset = self._qmp.as_kind(FdSet, answer, "`add-fd`").fdset_id

    async def _take_back_file(self) -> None:
        """Also one that was lent by a previous daemon. Raises PostcopydError."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        for fdset in await self._qmp.ask(list[FdSet], "query-fdsets"):
            if any(entry.opaque == LENT for entry in fdset.fds):
                with suppress(QmpRefused):  # it went meanwhile
                    await self._qmp.execute("remove-fd", {"fdset-id": fdset.fdset_id})

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
        """Starts to watch for anybody running the guest, or with `on` False stops to."""
        if self._resumes is not None:
            self._qmp.unsubscribe(self._resumes)
        self._resumes = self._qmp.subscribe("RESUME") if on else None

    async def rollback(self) -> str:
        """Leaves the guest as it was before the driver stopped it, whatever state QEMU is in.
        Idempotent. Raises VmmError when it cannot be run again. An older version's migration leaves
        a guest that was paused in postmigrate, as QEMU has no way back from there but running."""
        self._watch(on=False)
        before = self.before or self._seen
        now = await self._quiet(STOPPED, MOVED)
        moved = self._moved = self._moved or now.guard == MOVED
        if before == "running" and (now.held(STOPPED) or now.held(MOVED)):
            await self._run_again()
            now = await self._now()
        elif moved and now.migration.over and now.run_state in PAUSED | STOPPED_BY_ITSELF:
            await qemu_disks.take(self._qmp)
        await self._settings.restore()
        await self._take_back_file()
        live = now.live(self._qmp.version)
        if moved and live:
            await self._announce()
        self._seen, self.before = before, None
        if now.migration.over:  # otherwise they may be QEMU's own
            with suppress(PostcopydError, OSError):  # of no use, and no harm
                await userfaultfd.close_all(self.pid)
        stands = PAUSED | STOPPED_BY_ITSELF | ({"postmigrate"} if moved else set())
        if not now.migration.over or before is None:
            return "" if now.migration.over else now.words
        as_it_was = live if before == "running" else now.run_state in stands
        if not as_it_was and live:
            return "it was paused, and somebody else has run it meanwhile"
        return "" if as_it_was else now.words

    async def mark(self) -> None:
        """As the interface says: sets the guard. The driver's migration, over or not, is known by
        the bandwidth that it has set. A pause has no such sign, but ending one makes no second
        guest."""
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
        """Announces the guest here: switches may have learnt the destination's port from it."""
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
        """Waits for the end of a migration that began under one of these guards, or that a stop by
        this driver came upon; returns what QEMU is at then. Other migrations are left alone, and
        their end is not waited for.

        The driver's end of its migration's stream is closed. So it fails by itself in milliseconds,
        or completes if it has been written whole; after either, QEMU takes its disks back.
        `migrate_cancel` is only for a migration that neither writes nor stops, and for a pause that
        somebody else asked for: past the stop it has 7.2 run the guest with its disks inactive, and
        abort at their next use."""
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
        """`cont`, for a guest that was just seen to be stopped by this driver."""
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
                        f"same guest, running elsewhere; if it does not, release them and "
                        f"{self._by_hand}."
                    ) from None
            await trio.sleep(POLL_SECONDS * 10)

    async def finish(self, keep: bool) -> None:
        """The guest runs elsewhere: ends this QEMU, or leaves it stopped, under the guard: by that
        nobody takes it for a guest that is merely paused. Fine if it has ended. The guard goes when
        somebody runs the guest again, as far as a daemon has it attached then, or later."""
        self._watch(on=False)
        if not keep:
            await self._end(FINISH_SECONDS)
            return
        self._kept = True
        with suppress(PostcopydError):
            await self._let_go()

    async def _idle(self) -> None:
        """As it reads, it also hears when somebody runs a guest that has left and was kept."""
        with suppress(PostcopydError):
            await self._qmp.open(math.inf)
            with self._qmp.events("RESUME") as resumed:
                while True:
                    if self._kept:
                        await self._let_go()
                    await resumed.next()

    async def _let_go(self) -> None:
        """Takes the guard from a guest that somebody has run since it left: it would keep others
        from moving and saving it. Not from one of a migration that has begun meanwhile, as
        `unguard` sends before it waits."""
        now = await self._now()
        if self._kept and now.guard == MOVED and now.live(self._qmp.version):
            await self._settings.unguard()
