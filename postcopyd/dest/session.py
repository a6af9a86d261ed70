# SPDX-License-Identifier: Apache-2.0
"""The arrival of one guest, from the offer until it is drained here, or given back: the phases in
their order.

Each phase is a file: `admission`, `arrival`, `load`, `run`, `drain`. `pause` or `farewells` may
come instead of the next phase. handover.py decides order and ownership. The phases share the
`Migration`; once guest RAM is emptied they also have its `Memory`, which is whole.

Owns, for the time of one arrival: the present control connection, the invitation for its data
connections, and, on the stack `_held`, each on top of what it borrows, the descriptors of guest
RAM, our duplicates of the userfaultfds (the VMM keeps its own), the page record and the engine. One
task at a time runs the session: a task of the daemon, which has claimed the VM, and whose cancel
ends the arrival. The tasks of a phase end with the phase. While the session waits (`vm.waiting`) it
has no task, and only the daemon takes it from there: to `resume` it, to `poison`, or because the
VMM has ended.

What fails before the grant is called off, and the source has its guest. After the grant the guest
is this host's: losing the connection then pauses the migration.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, cast

import trio

from postcopyd import counts
from postcopyd import protocol as p
from postcopyd.dest import admission, arrival, farewells, pause, run
from postcopyd.dest.drain import Drain
from postcopyd.dest.invitation import Invitation, wrong_token
from postcopyd.dest.load import Load
from postcopyd.dest.memory import Memory
from postcopyd.dest.migration import Migration, Stage
from postcopyd.dest.restart import adopted_again
from postcopyd.errors import PostcopydError, shortage
from postcopyd.handover import DESTINATION_RUNS, Happened, Machine
from postcopyd.net.channel import Channel
from postcopyd.net.codec import parse
from postcopyd.records.schema import Arrival
from postcopyd.sessions import hugepages
from postcopyd.sessions.shared import Shared
from postcopyd.sessions.vm import Vm
from postcopyd.vmm import Shape


class DestinationSession:
    """Made and run by the daemon for a control connection whose offer has named a VM, or made from
    a record by `restored`. The daemon calls `resume` for each further connection."""

    def __init__(self, vm: Vm, offer: p.Offer, channel: Channel, shared: Shared) -> None:
        self.vm = vm
        self._migration = Migration(vm, offer, channel, shared)
        self._held = AsyncExitStack()
        self._shape: Shape | None = None
        self._memory: Memory | None = None
        self._invitation: Invitation | None = None

    # --- the life of a migration -----------------------------------------------------------------

    async def run(self) -> None:
        """Runs the whole arrival. Failures are shown in the VM's status and told to the source."""
        await self._whole(self._arrive)

    async def _arrive(self) -> None:
        m = self._migration
        async with m.channel.alive():
            async with m.heard():
                shape = self._shape = await admission.admit(m, self._held)
                memory = self._memory = await arrival.adopt(m, shape, self._held)
                memory.engine.register()  # from here on each access waits for its page
                await (await self._invite(memory)).taken_up()
            handover = await arrival.passes(m, memory)
            await Load(m, memory, handover.whole).until_granted()
            await run.run(m, memory)
            await Drain(m, memory).until_drained()
        await self._leave()

    async def resume(self, channel: Channel, asked: p.Resume) -> None:
        """Runs the rest of the arrival on a new connection, whose epoch the daemon has compared."""
        m = self._migration
        m.channel, channel.machine = channel, m.machine
        m.shared.limits.arrivals.take(m.offer.migration, self.memory.size)
        await self._whole(lambda: self._go_on(asked))

    async def _go_on(self, asked: p.Resume) -> None:
        """Goes on after a lost connection: invites new data connections, runs the guest if it does
        not run yet, and tells the source what is here, before the source pushes the rest."""
        m, memory = self._migration, self.memory
        m.machine.received(asked)
        await memory.engine.disconnect()
        async with m.channel.alive():
            async with m.watched():
                invitation = await self._invite(memory)
                if not m.ran:
                    await run.cont(m, memory)
            await run.say_ran(m, memory)
            counts.recoveries["destination"] += 1
            m.log.info("migration recovered", pages=memory.engine.stats.confirmed_pages)
            await pause.tell_what_is_here(m, memory, invitation)
            await Drain(m, memory).until_drained()
        await self._leave()

    async def finish(self) -> None:
        """Ends an arrival that had every page when the previous daemon died."""
        await self._whole(self._finish)

    async def _finish(self) -> None:
        drain = Drain(self._migration, self.memory)
        await drain.end()
        await drain.told()
        await self._leave()

    async def _invite(self, memory: Memory) -> Invitation:
        invitation = self._invitation = Invitation(self._migration, memory.engine)
        await invitation.send()
        return invitation

    async def _leave(self) -> None:
        """Closes everything at the end; if pages were lost, the session waits instead (`over`)."""
        memory = self._memory
        if memory is None or not memory.engine.lost:
            await self.close()
            return
        with trio.CancelScope(shield=True):
            await memory.engine.disconnect()
        admission.no_longer_promised(self._migration, memory.shape)
        self.vm.waiting = self

    async def close(self) -> None:
        """Closes everything. Only when nothing is registered any more, the VMM has ended, or its
        guest is not to be trusted."""
        self._withdraw()
        self._memory = self._shape = None
        with trio.CancelScope(shield=True):
            await self._held.aclose()

    def _withdraw(self) -> None:
        """Takes no data connections any more."""
        if self._invitation is not None:
            self._invitation.withdraw()
            self._invitation = None

    # --- when it goes wrong ----------------------------------------------------------------------

    async def _whole(self, steps: Callable[[], Awaitable[None]]) -> None:
        try:
            await steps()
        except PostcopydError as error:
            await self._end_early(error)
        except Exception as error:
            if (known := shortage(error)) is None:
                self._migration.log.exception("bug in the destination's session")
            bug = PostcopydError(f"internal error: {error!r}", "InternalError")
            await self._end_early(known or bug)
        except trio.Cancelled:
            await self._end_early(PostcopydError("the daemon was stopped", "DaemonStopped"))
            raise

    async def _end_early(self, error: PostcopydError) -> None:
        m = self._migration
        with trio.CancelScope(shield=True):
            if m.stage is Stage.HERE:
                m.log.warning("after drained", error=str(error))
                m.machine.happened(Happened.LOST)
                await self._leave()
            elif m.machine.state in DESTINATION_RUNS:
                await self._paused(error)
            else:
                await self._called_off(error)

    async def _called_off(self, error: PostcopydError) -> None:
        """Before the grant: leaves this host as it was."""
        off = farewells.CallingOff(self._migration, error)
        await off.undo(self._shape, self._memory)
        await self.close()
        await off.leave()

    async def _paused(self, error: PostcopydError) -> None:
        """After the grant: the guest waits for its missing pages, and nothing ends it."""
        m, driver = self._migration, self.vm.driver
        m.machine.happened(Happened.LOST)
        self._withdraw()  # data connections with the old token are of no use
        await m.channel.aclose()
        if driver is None or await pause.vmm_has_ended(m, driver, error):
            await self.vmm_ended(driver.farewell if driver is not None else None)
            return
        distrust = await pause.stand_still(m, self.memory, error)
        if distrust is None:
            self.vm.waiting = self
        else:
            await self.close()
        pause.show(m, error, distrust)

    # --- what others have it do ------------------------------------------------------------------

    async def check(self) -> None:
        """Answers an offer that only asks whether it would be taken."""
        await admission.check(self._migration)

    async def take_data(self, stream: trio.SocketStream, hello: p.DataHello) -> None:
        """Takes a data connection that names this migration. Raises PostcopydError, OSError."""
        if self._invitation is None:
            raise wrong_token(hello)
        await self._invitation.take(stream, hello)

    async def drop(self) -> None:
        """Closes the control connection: the source has lost it and asks on another one."""
        await self._migration.channel.aclose()

    async def poison(self) -> None:
        """Gives up the missing pages, as a person has decided. Raises PostcopydError."""
        await pause.poison(self._migration, self.memory)

    async def vmm_ended(self, farewell: str | None) -> None:
        """Ends the arrival of a guest that was this host's, as its VMM has ended."""
        await self.close()
        farewells.vmm_ended(self._migration, farewell)

    @classmethod
    async def restored(
        cls, vm: Vm, about: dict[str, Any], channel: Channel, shared: Shared
    ) -> DestinationSession:
        """The session of a guest that was granted to the previous daemon of this host.

        Faults are taken again when this returns. Raises PostcopydError; then nothing is closed in
        the VMM, and its threads go on waiting.
        """
        session = cls(vm, parse(about["offer"], p.Offer), channel, shared)
        m = session._migration
        m.remember(cast(Arrival, about))  # compared with that schema when it was read
        if distrust := about.get("foreign"):
            raise PostcopydError(distrust, "NotTrusted")
        async with AsyncExitStack() as held:
            session._memory = await adopted_again(m, held)
            session._held.callback(m.forget_pages)  # runs after the others are closed
            session._held.push_async_callback(held.pop_all().aclose)
        admission.promise(m, session.memory.shape, session._held)
        if session.complete and "answer" in about:
            m.stage = Stage.HERE
        return session

    # --- what others see -------------------------------------------------------------------------

    @property
    def memory(self) -> Memory:
        """Only from when guest RAM is emptied until `close`; every guest that was granted has
        it."""
        assert self._memory is not None
        return self._memory

    @property
    def machine(self) -> Machine:
        return self._migration.machine

    @property
    def accepted(self) -> bool:
        """Whether it is certain that the source means this VM."""
        return self._migration.stage >= Stage.ACCEPTED

    @property
    def complete(self) -> bool:
        """Whether every page is here or lost; the source may not know. False after `poison`."""
        return self._memory is not None and self._memory.engine.complete and not self.poisoned

    @property
    def ran(self) -> bool:
        """Whether, as far as is known, the guest runs here or is paused as it was. If not, it is
        run when the source asks."""
        return self._migration.ran

    @property
    def poisoned(self) -> bool:
        """Whether a person has given up missing pages."""
        return self._migration.given_up

    @property
    def over(self) -> bool:
        """Whether every page is here or lost, and that is recorded. A session that is kept then has
        lost pages: its engine serves for as long as the VMM lives, see `pause.poison`."""
        return self._migration.stage is Stage.HERE

    @property
    def lost(self) -> int:
        """How many pages were lost."""
        return self._memory.engine.lost if self._memory is not None else 0

    @property
    def huge(self) -> hugepages.Ram | None:
        """The RAM that may be in huge pages, once all of it is here."""
        return self._migration.huge
