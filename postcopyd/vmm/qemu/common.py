# SPDX-License-Identifier: Apache-2.0
"""One QEMU: its monitor, its process, how it is inspected and how it ends.

Owns the QMP connection and the pidfd, until `aclose`; both halves of the driver use them.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal, Self

import trio

from postcopyd.errors import PostcopydError, shortage
from postcopyd.host import procfs
from postcopyd.names import plain
from postcopyd.tasks import threads
from postcopyd.vmm import (
    Role,
    Shape,
    State,
    Vmm,
    VmmError,
    VmmGone,
    VmmTimeout,
    kill,
    looked_at,
    process_ended,
    writers,
)
from postcopyd.vmm.qemu import blocks as ram_blocks
from postcopyd.vmm.qemu import disks as qemu_disks
from postcopyd.vmm.qemu import facts as qemu_facts
from postcopyd.vmm.qemu import farewell, ram, settings, stays
from postcopyd.vmm.qemu import state as qemu_state
from postcopyd.vmm.qemu.answers import Cpu, Migration, Status
from postcopyd.vmm.qemu.events import Events
from postcopyd.vmm.qemu.qmp import ANSWER_SECONDS, Qmp
from postcopyd.vmm.qemu.state import PAUSED, SLEEPS, STOPPED_BY_ITSELF, Now

LOOKS = trio.CapacityLimiter(4)
"""How many QEMUs are inspected at a time; others wait. Each takes hundreds of questions, which keep
this process and QEMU busy: forty at once would each be slow, and be taken for stuck."""

LOOK_ANSWERS = 6
"""An inspection may take as long as so many late answers: on a busy host no answer is quick."""

QUIT_SECONDS = 2.0  # for a QEMU whose guest is not needed any more
FAREWELL_SECONDS = 1.0  # to read what a QEMU said before it ended


class Qemu(Vmm):
    """One QEMU, by its QMP socket."""

    kind = "qemu"
    forbids = True
    device_state = "saved by QEMU without RAM, loaded as an incoming migration"

    def __init__(self, name: str, socket: str, qmp: Qmp, pid: int, pidfd: int) -> None:
        self.name = name
        self.socket = socket
        self.pid = pid
        self._qmp = qmp
        self._pidfd = pidfd
        self._settings = settings.Settings(qmp)
        # Whether this driver has forbidden huge pages; None: a previous daemon may have.
        self._forbade_huge: bool | None = None
        # What the guest did when it was last looked at.
        self._seen: Literal["running", "paused"] | None = None
        self._moved = False  # by this driver's migration, at its last stop
        self._kept = False  # whether the guest has left, and no migration of this driver has begun
        self._resumes: Events | None = None  # since `save`
        self._last_words = qmp.last(*farewell.EVENTS)
        self._made: list[int] | None = None  # userfaultfds in QEMU, by `adopt`
        # At the source, by `prepare`: the file that QEMU saves into, which this owns; the fdset in
        # QEMU by which it has it; the machine's type; all RAM blocks, which of them are guest RAM,
        # and of which the page map tells what was touched.
        self._file: int | None = None
        self._fdset = -1
        self._machine = ""
        self._addresses: dict[str, int | None] = {}
        self._guest_ram: set[str] = set()
        self._sparse: set[str] = set()
        self._ending = False  # by this driver

    @classmethod
    async def connect(cls, name: str, socket: str) -> Self:
        """Takes the monitor at a QMP socket. Raises PostcopydError within seconds if it cannot."""
        return await cls.opened(name, socket, Qmp(socket))

    @classmethod
    async def opened(cls, name: str, socket: str, qmp: Qmp) -> Self:
        """The same with a monitor that this driver owns from here on."""
        try:
            with patience(name):
                await qmp.open()
                cpus = await qmp.ask(list[Cpu], "query-cpus-fast")
            pidfd = pidfd_of(name, qmp.pid)
            # Only the kernel says whose memory is written to and which process is ended. QEMU's
            # answer must show that it speaks for itself, and not through another process.
            for cpu in cpus[:1]:
                if not procfs.has_thread(qmp.pid, cpu.thread_id):
                    os.close(pidfd)
                    raise VmmError(
                        f"Process {qmp.pid} ({procfs.command(qmp.pid)}) answers at {socket} and is "
                        f"not the QEMU of {name}, whose vCPU it says is thread {cpu.thread_id}: "
                        f"name a monitor of QEMU's own, with nothing in between."
                    )
            made = cls(name, socket, qmp, qmp.pid, pidfd)
            made._kept = True  # if a previous daemon had moved it
            return made
        except BaseException:
            qmp.close()
            raise

    @classmethod
    async def known(cls, name: str, socket: str, pid: int) -> Self:
        """As the interface says; takes the monitor at its first use. The caller must check (by the
        start time) that `pid` is still that QEMU."""
        return cls(name, socket, Qmp(socket, pid), pid, pidfd_of(name, pid))

    async def inspect(self, role: Role) -> Shape:
        """What QEMU has, and what forbids a migration in this role. Only asks and reads."""
        async with LOOKS:
            with patience(self.name, LOOK_ANSWERS), looked_at(self.name, self.pid):
                return await self._inspect(role)

    async def _inspect(self, role: Role) -> Shape:
        qmp = self._qmp
        with qmp.taking_apart():
            outline = await qemu_disks.outline(qmp)  # first: a later change then shows
        run_state = (await qmp.ask(Status, "query-status")).status
        present = await ram_blocks.blocks(qmp)
        backends = await ram.backends(qmp, present)
        devices = [device async for device in qemu_facts.devices(qmp)]
        facts = await qemu_facts.facts(qmp, backends, devices)
        guest_ram = {backend.block.name for backend in backends}
        facts |= ram_blocks.facts(present, guest_ram)
        places = await qemu_facts.places(qmp, devices)
        problems = await qemu_facts.refusals(qmp, self.pid, role, run_state, devices)
        with qmp.taking_apart():
            disks, unmovable = await qemu_disks.look(qmp, self.pid)
        problems += unmovable
        if role == "source":
            problems += ram_blocks.unknown(present, guest_ram)
        left = [one async for one in stays.sentences(qmp)] if role == "source" else []
        regions, unfit = ram.regions(backends, self.pid)
        try:
            facts |= {f"pages of {r.name}": f"{r.page_size} bytes each" for r in regions}
            problems += unfit
            problems += await trio.to_thread.run_sync(
                ram.sharers, regions, self.pid, limiter=threads.WALKS
            )
            direct, unseen = await trio.to_thread.run_sync(
                writers.look, self.pid, limiter=threads.WALKS
            )
            # SCSI commands of the guest reach the host's disk directly, with the guest's pages.
            direct += [
                device.id or device.path for device in devices if device.kind == "scsi-block"
            ]
        except BaseException:
            close_each(region.fd for region in regions)
            raise
        state: State = "paused"
        if run_state == "running" or (run_state == "suspended" and qmp.version >= SLEEPS):
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
            stays=tuple(left),
            direct_io=writers.direct_sentence(direct),
            untracked=writers.unseen_sentence(unseen),
            disks=tuple(disks),
            places=places,
            outline=outline,
        )

    @property
    def _by_hand(self) -> str:
        """How a person runs the guest: the end of a sentence."""
        return f"send QMP `cont` to {self.socket}"

    async def outline(self) -> str:
        """As the interface says."""
        with patience(self.name), self._qmp.taking_apart():
            return await qemu_disks.outline(self._qmp)

    async def gone(self) -> None:
        """Returns when QEMU has ended. Also reads the monitor meanwhile: keep it running."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._idle)
            await self._exit()
            nursery.cancel_scope.deadline = trio.current_time() + FAREWELL_SECONDS
        # Every task that waits here gets the same, whichever is first.
        if self._last_words.queue and not self._ending:
            self.farewell = farewell.farewell(self._last_words.queue[-1])

    @abc.abstractmethod
    async def _idle(self) -> None:
        """Reads to the end what QEMU says, or QEMU would keep it in memory. What it said last may
        still be on its way when it ends."""

    async def _exit(self) -> None:
        await process_ended(self._pidfd)

    async def aclose(self) -> None:
        """Leaves QEMU as it is and lets go of its monitor."""
        self._qmp.close()
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        await trio.lowlevel.checkpoint()

    async def _now(self) -> Now:
        return await qemu_state.look(self._qmp)

    async def _look(self) -> str:
        """Notes what the guest does before the driver changes it, and returns QEMU's word for that.
        Raises VmmError when somebody else moves or saves it, or when it does neither."""
        self._kept = False
        now = await self._now()
        stands = now.run_state in PAUSED | STOPPED_BY_ITSELF
        if not now.migration.over or not (now.live(self._qmp.version) or stands):
            raise VmmError(f"The guest {self.name} cannot be moved now: {now.words}.")
        self._moved = False
        self.before = self._seen = "paused" if stands else "running"
        return now.run_state

    async def _runs(self) -> bool:
        return (await self._now()).live(self._qmp.version)

    async def _why(self, status: str) -> str:
        """QEMU's reason for the end of a migration, or where to look for it."""
        reason = (await self._qmp.ask(Migration, "query-migrate")).error_desc
        return plain(reason or f"migration {status}, its own log says why").rstrip(".")

    async def end(self) -> None:
        """Ends QEMU for certain; returns when the process is gone."""
        await self._end(QUIT_SECONDS)

    async def _end(self, patience: float) -> None:
        self._ending = True
        with trio.move_on_after(patience):
            with suppress(PostcopydError):
                await self._qmp.execute("quit")
            await self._exit()
            return
        kill(self._pidfd, self.name, self.pid)
        await self._exit()


@contextmanager
def patience(name: str, answers: int = 1) -> Iterator[None]:
    """Raises VmmTimeout for a slow answer: QEMU takes milliseconds, or its main loop is stuck."""
    seconds = answers * ANSWER_SECONDS
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise VmmTimeout(
            f"The QEMU of {name} did not answer for {seconds:g} s: see whether it is "
            f"stopped (SIGSTOP), waits for its disks, or for pages of a migration."
        ) from None


def pidfd_of(name: str, pid: int) -> int:
    if pid <= 0:
        raise VmmGone(
            f"The process of the QEMU of {name} has no process id here: run postcopyd in the PID "
            f"namespace of QEMU or above it."
        )
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise shortage(error) or VmmGone(
            f"The QEMU process {pid} of {name} was not found ({error.strerror}): run postcopyd in "
            f"the PID namespace of QEMU or above it, and start QEMU if it has ended."
        ) from None


def close_each(descriptors: Iterable[int | None]) -> None:
    for descriptor in descriptors:
        if descriptor is not None:
            os.close(descriptor)
