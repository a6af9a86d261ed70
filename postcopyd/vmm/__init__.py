# SPDX-License-Identifier: Apache-2.0
"""The interface that every driver of a VMM has: what postcopyd asks of a VMM.

This package owns the conversation with a VMM: finding its guest RAM, stopping and running the
guest, moving its device state. It must not know of pages, peers, ownership or migrations. A driver
does what a session tells it, once, and says truthfully how that ended. A driver author reads this
file; writers.py, which finds for any VMM what writes to guest RAM unseen; and tasks/threads.py, as
every slow call belongs into a thread of one of its pools.

The order of calls. Source: `connect`, `inspect`, `prepare`, `save`, then `finish`; or `rollback`
at any point before the grant, and also after a grant that was declined or taken back. `track` and
`still` come between `inspect` and `save`, if at all. Destination: `connect`, `inspect`, `adopt`,
`load`, `run`, `release`; or `release` and `end` from any point before `run`. Descriptors of guest
RAM and userfaultfds belong to the caller as soon as they are returned.
"""

from __future__ import annotations

import abc
import os
import signal
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import trio

from postcopyd.errors import PostcopydError, shortage
from postcopyd.host import procfs
from postcopyd.names import plain

State = Literal["running", "paused", "incoming"]
Role = Literal["source", "destination"]

Kind = Literal["private", "shared", "memfd", "file"]
"""Of guest RAM: memory of the VMM's own, or a private mapping of hugetlbfs; shared anonymous
memory; a memfd; a file with a name."""


class VmmError(PostcopydError):
    """The VMM refused what was asked, or failed at it; the connection to it still works."""

    name = "VmmFailed"


class VmmProtocolError(PostcopydError):
    """The VMM broke the rules of its own protocol, or went beyond a limit."""

    name = "VmmProtocol"


class VmmTimeout(PostcopydError):
    """The VMM gave no answer in the time allowed; whether it did what was asked is unknown."""

    name = "VmmTimeout"


class VmmGone(PostcopydError):
    """Nobody answers at the VMM's socket, or the VMM ended."""

    name = "VmmGone"


class Declined(PostcopydError):
    """`run` was refused by the VMM and no vCPU has run: ownership may go back to the source."""

    name = "Declined"


@dataclass(frozen=True)
class Region:
    """One mapping of guest RAM in the VMM."""

    name: str
    pages: int
    page_size: int  # bytes
    address: int  # in the VMM's address space
    fd: int | None  # the shared file behind it, ours to close; None: anonymous memory
    offset: int  # of the mapping in the file, bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return self.pages * self.page_size

    @property
    def backing(self) -> tuple[Kind, str]:
        """Its kind, and the path of a file that has one. Raises OSError."""
        if self.fd is None:
            return "private", ""
        path = os.readlink(f"/proc/self/fd/{self.fd}")
        if path.startswith("/memfd:"):
            return "memfd", ""
        if path.startswith(("/dev/zero", "/SYSV")):
            return "shared", ""
        return "file", path


@dataclass(frozen=True)
class DiskFile:
    """A file, device or server behind a disk, as the VMM has it open."""

    path: str  # as the VMM calls it
    where: str  # what it is on, for people: "ext4", "block device", "nbd"
    shared: bool  # other hosts may have it too, by what it is on
    writable: bool  # the guest's writes go there
    #: By kind, what two hosts may compare. If one kind has the same value on both, they have the
    #: same file (or the same content, if nobody writes to it); if another value, they do not.
    ids: dict[str, str]


@dataclass(frozen=True)
class Disk:
    """A disk as the guest has it."""

    name: str  # of its device, the same on both hosts
    chain: str  # formats and sizes, or "empty"; must be equal on both hosts
    files: tuple[DiskFile, ...]  # must be the same on both; empty if the content crosses by itself


@dataclass(frozen=True)
class Shape:
    """A VMM as `inspect` found it."""

    state: State
    pid: int
    regions: tuple[Region, ...]
    facts: dict[str, str]  # what must be equal on both hosts
    problems: tuple[str, ...]  # sentences: why it cannot be migrated, each with what to do
    #: Sentences: what does not come along, though the guest goes on without it.
    stays: tuple[str, ...] = ()
    #: Writes that tracking sees only if pages are armed while the guest is `still`: a sentence that
    #: names what makes them. A read by direct I/O pins its pages and marks them as written when it
    #: starts; its data may arrive after the pages were armed again.
    direct_io: str | None = None
    #: Writes that tracking never sees: a sentence that names what makes them. Postcopy can move the
    #: guest all the same. This and `direct_io` hold for the moment only: disks come and go, so
    #: inspect again before you rely on what was seen.
    untracked: str | None = None
    disks: tuple[Disk, ...] = ()
    #: By device, where it sits on its bus, in the VMM's words ("port=1"). The VMM chooses a place
    #: if nobody has, so a device that is plugged in again may get another. Equal on both hosts.
    places: dict[str, str] = field(default_factory=dict)
    #: What `outline` returned when this look began.
    outline: str = ""

    def __post_init__(self) -> None:
        """Makes sentences fit to be shown, as names of devices and files in them are the VMM's."""
        made = object.__setattr__  # the dataclass is frozen for all other code
        made(self, "problems", tuple(map(plain, self.problems)))
        made(self, "stays", tuple(map(plain, self.stays)))
        made(self, "direct_io", self.direct_io and plain(self.direct_io))
        made(self, "untracked", self.untracked and plain(self.untracked))

    def close(self) -> None:
        """Close the descriptors of all regions; call it once."""
        for region in self.regions:
            if region.fd is not None:
                os.close(region.fd)


class Vmm(abc.ABC):
    """One attached VM; owns its connections to the VMM, and nothing else of it.

    Every method raises `PostcopydError` (or one of the errors above) with a sentence for the
    operator. Every method may be cancelled; `rollback`, `end` and `aclose` work afterwards.
    A VMM that loses its driver goes on as it is: nothing in it changes by that.
    """

    name: str  # the VM's, as on the command line
    kind: str  # "qemu", "libvirt" or "process"
    device_state: str  # how it goes, for people: "saved by ..."
    socket: str
    pid: int  # of the VMM's process

    #: Whether a destination of this kind is made for each arrival (`expect`), so that nobody starts
    #: and attaches it before. It ends with an arrival that is called off. Others than the daemon
    #: may run such a VMM's guest, so at the source it ends as soon as the guest runs elsewhere and
    #: its memory is kept (`vacate`); a guest that is taken back gets a new one (`remake`).
    makes: ClassVar[bool] = False

    #: Whether a seccomp filter of such a VMM is a list of calls that it forbids, and system calls
    #: that are run in it are not on that. One that lists what it allows may end the VMM for them.
    forbids: ClassVar[bool] = False

    #: What the guest did just before `save` or `still` stopped it, and what `rollback` goes back
    #: to. After a restart of the daemon the caller sets it from the record, before it calls
    #: `rollback`. At the destination the caller sets it to what the guest is to do, before the end
    #: of what it gives to `load`.
    before: Literal["running", "paused"] | None = None

    #: Whether `finish` also takes away what this host would start such a VMM of again. The caller
    #: sets it.
    undefines: bool = True

    #: What the VMM has said of its end, once `gone` has returned: a few words for people ("its
    #: guest shut down"). Then the end was meant, and the guest runs nowhere. None: the VMM crashed,
    #: was killed, or was told to end by `end`, or its driver cannot tell.
    farewell: str | None = None

    @classmethod
    @abc.abstractmethod
    async def connect(cls, name: str, socket: str) -> Self:
        """Attach to the VMM at the unix socket. Ends within seconds, also if nobody answers."""

    @classmethod
    async def known(cls, name: str, socket: str, pid: int) -> Self:
        """Attach to a VMM that a previous daemon had. Raises VmmGone.

        A driver must ask the VMM nothing here if that may be stuck in a page fault: the caller has
        to answer the fault first, with the descriptors that `adopted` gives.
        """
        driver = await cls.connect(name, socket)
        if driver.pid != pid:
            await driver.aclose()
            raise VmmGone(
                f"process {driver.pid} answers at {socket} and not {pid}, which was attached as "
                f"{name}: detach {name} and attach it again"
            )
        return driver

    @abc.abstractmethod
    async def inspect(self, role: Role) -> Shape:
        """Describe the VMM; touches nothing in it.

        Puts what stands in the way of the role into `Shape.problems`, and raises only if the VMM
        cannot be asked. At the destination that includes a VMM whose RAM may get huge pages that
        `adopt` could not forbid. Sets `Shape.direct_io` and `untracked` at the source: writers.py
        finds most of it. The caller calls `close()` on what it gets.
        """

    async def definition(self, persistent: bool | None = None, xml: str = "") -> str:
        """What another host needs to make a VMM that waits for this guest: text of this kind of
        driver, at most 16 KiB. Empty where a person makes it (`makes`). `persistent`: whether it is
        to outlast the guest there, None for as it does here. `xml`: what it is to be there."""
        return ""

    async def outline(self) -> str:
        """A short text that is another one after something was plugged in, taken out, or put behind
        a disk, which `inspect` would find. Asked also while the guest stands still, so it must take
        about a millisecond. Empty for a VMM where no such change is possible."""
        return ""

    # --- source

    @abc.abstractmethod
    async def prepare(self) -> None:
        """Set what must be set before the handover, while the guest runs on.

        `rollback` undoes it. Sets nothing that outlasts a call to `rollback`, and nothing that
        would spoil what others do with the guest meanwhile. Raises VmmError, as `save` and `still`
        do, if others move or save the guest, or if it neither runs nor is paused.
        """

    @abc.abstractmethod
    async def save(
        self, send: Callable[[bytes], Awaitable[None]], stopped: Callable[[], None]
    ) -> None:
        """Stop the guest and stream its device state.

        Calls `stopped()` once, at the instant the guest has stopped, and `send` with each piece
        of device state as the VMM produces it. Returns when all of it was sent and guest RAM is
        final. If it raises anything, the guest may be stopped: call `rollback`. What `send` raises
        comes through as it is.
        """

    async def track(self) -> int:
        """Return one new userfaultfd of the VMM's address space, to see what is written to RAM.

        Called while the guest runs, which hardly notices. The descriptor is the caller's;
        UFFDIO_API has not been done and nothing is registered. The VMM keeps no copy: when the
        caller closes the descriptor, or dies, tracking is over and nothing of it is left in the
        VMM. A daemon that is killed during this call may leave an unused descriptor there; the next
        `track` or `rollback` closes it, with all others that the VMM has. Raises PostcopydError;
        then writes cannot be tracked, and nothing else is wrong.
        """
        raise VmmError(f"the {self.kind} driver cannot track what {self.name} writes")

    def still(self) -> AbstractAsyncContextManager[None]:
        """A context in which the guest is stopped and nothing writes to its RAM, I/O included.

        A guest that ran runs again afterwards, however the context is left, also if it was
        cancelled on its way in; one that was paused stays paused. Do not call `prepare` and `save`
        inside, which look at what the guest does. Raises PostcopydError if the guest cannot be
        stopped, if it does not run again (the sentence says so, and `rollback` may be tried), and
        if somebody else ran it meanwhile: then what was done inside is worth nothing. A daemon that
        is killed inside leaves the guest stopped; the next daemon calls `rollback` with `before`
        set, so what the guest did has to be on record first.
        """
        raise VmmError(f"the {self.kind} driver cannot hold {self.name} still")

    def check_saved(self) -> None:  # noqa: B027 (not every VMM tells)
        """Raises VmmError if somebody has run the guest since `save`. Asks and waits for nothing,
        so that nothing can happen between this check and what the caller does next."""

    @abc.abstractmethod
    async def rollback(self) -> str:
        """Undo what this driver, or one of a previous daemon, has done to the guest, and only that:
        run it if it ran and was stopped by `still` or `save`. Idempotent.

        May be called at any point before the grant, after a grant that was declined or taken back,
        and after another method was cancelled half-way. Other people and programs may use the guest
        too: they may have paused, moved, saved, reset or shut it down by the VMM's own means since
        it was looked at, in the middle of our work, or while no daemon ran. Leave what they did as
        it is. If a driver finds the VMM stopped, it has to know who stopped it. If it cannot know,
        it leaves the guest stopped: one guest that waits for a person is better than two that run.
        And a job of others that goes on is neither ended nor waited for.

        Returns "" if the guest is as it was, else a clause that tells how it was found and left
        ("it is paused, ..."). Raises PostcopydError if it should run here and does not; the
        sentence says what to do, and never to run it without a look at it.
        """

    async def mark(self) -> None:  # noqa: B027 (not every driver tells by one)
        """Leave in the VMM the mark that `save` and `still` leave there, by which `rollback` knows
        who has stopped the guest. For a guest that, by its record, a daemon of an older version has
        stopped, which left no mark. Idempotent; leaves a guest in any other state alone."""

    @abc.abstractmethod
    async def finish(self, keep: bool) -> None:
        """After drained: end the VMM, or with `keep` leave it stopped."""

    @classmethod
    async def vacate(cls, name: str, socket: str, pid: int, *, undefine: bool) -> None:
        """The guest runs elsewhere: end the VMM that was its process `pid`, and, if `undefine`,
        whatever it would be started of here again; nothing starts it by itself. What is in guest
        RAM must stay, as other processes map it too. Touches no other VMM of that name. Idempotent,
        and fine if the VMM has ended. Only with `makes`."""
        raise VmmError(f"the {cls.kind} driver made no VMM of {name}")

    @classmethod
    async def remake(  # noqa: PLR0917 (a driver's own words come first, as in `expect`)
        cls,
        name: str,
        socket: str,
        definition: str,
        like: Shape,
        fill: Callable[[Shape], Awaitable[list[Region]]],
        device: bytes,
    ) -> Self:
        """Make the VMM of a guest anew that has left here and was vacated, from its `definition`.

        `like` is the guest as it was, `fill` puts its memory into the RAM of the VMM that waits,
        which is empty then, and returns the pages that are lost: whoever touches one has to get a
        memory error. `device` is all that `save` has sent. Returns the VMM as `save` leaves one:
        `rollback` runs the guest. If this raises, nothing is left. Only with `makes`.
        """
        raise VmmError(f"the {cls.kind} driver makes no VMM for {name}")

    @classmethod
    async def define(cls, name: str, socket: str, definition: str) -> bool:
        """Have what outlasted the VMM, as `definition` says, here again after `vacate`, unless
        there is something of that name; nothing starts it by itself. Returns whether there
        was anything. Only with `makes`."""
        return False

    # --- destination

    @classmethod
    async def foreseen(cls, name: str, socket: str, definition: str, like: Shape) -> Shape:
        """What `expect` would make on this host, as far as that can be known, with the `problems`
        why it would fail. Changes nothing. Only with `makes`."""
        raise VmmError(f"the {cls.kind} driver makes no VMM for {name}")

    @classmethod
    async def expect(cls, name: str, socket: str, definition: str, like: Shape) -> Self:
        """Make a VMM that waits for a guest, from what a peer says is its source's `definition`;
        `like` is the guest as the peer describes it. Only with `makes`; such a VMM ends by `end`,
        `aclose`, or this daemon's death, unless its guest was loaded."""
        raise VmmError(f"the {cls.kind} driver makes no VMM for {name}")

    async def keep(self, definition: str) -> None:  # noqa: B027 (only with `makes`)
        """The guest is here for good: have what `definition` says outlast it, as it did at the
        source. Idempotent."""

    @abc.abstractmethod
    async def adopt(self, shape: Shape) -> list[int]:
        """Empty guest RAM and return the VMM's userfaultfds, for the VMM in state incoming.

        They are the caller's; UFFDIO_API has not been done and nothing is registered. The VMM
        keeps copies of its own until `release`, so that its threads go on waiting for pages if the
        caller dies. After `adopt` every page of every region is missing. A second call starts anew.

        Some kernels put zeros into files with missing pages when they make huge pages of them
        (`kernel.fills_holes`), and the guest would read those zeros. There a driver forbids huge
        pages of guest RAM before it empties it, until `release`, or `inspect` has named it a
        problem.
        """

    @abc.abstractmethod
    async def discard(self, shape: Shape) -> None:
        """Empty guest RAM of a VMM in state incoming, after an arrival that was called off."""

    async def adopted(self) -> list[int]:
        """Return duplicates of the userfaultfds of an adoption by a previous daemon.

        Nothing is emptied, and UFFDIO_API has been done on them. Drivers that cannot ask the VMM
        for them again leave this as it is; their sessions keep the descriptors by other means.
        """
        raise VmmError(f"the {self.kind} driver cannot get the userfaultfd of {self.name} again")

    @abc.abstractmethod
    async def load(self, receive: AsyncIterable[bytes]) -> None:
        """Load the device state; the guest ends paused, whatever the VMM's options.

        Loading touches guest RAM: faults must be answered meanwhile, by a task or thread that does
        not wait for this call. The end of `receive` is the end of the device state. If this raises,
        the VMM is of no use any more: call `end`.
        """

    @abc.abstractmethod
    async def run(self) -> None:
        """Run the guest; returns once it runs.

        Raises `Declined` if the VMM refused and no vCPU has run. After any other error the guest
        may or may not be running.
        """

    @abc.abstractmethod
    async def release(self) -> None:
        """Have the VMM close its copies of the userfaultfds; idempotent.

        Only after drained and unregistered, or if no guest was loaded: when the last copy is
        closed, missing pages become zeros.
        """

    # --- both

    @abc.abstractmethod
    async def end(self) -> None:
        """End the VMM for certain: by asking, then SIGKILL. Returns when it is gone."""

    @abc.abstractmethod
    async def gone(self) -> None:
        """Return when the VMM's process has ended."""

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Let go of the VMM, which goes on as it is. Idempotent."""


LOOK_AGAIN_S = 1.0
"""How long until a descriptor for waiting is tried again, after there was none to be had."""


async def process_ended(pidfd: int) -> None:
    """Returns when the process of a pidfd has ended. Raises OSError only for a wrong pidfd."""
    while True:
        try:
            own = os.dup(pidfd)  # only one task can wait for one descriptor
            break
        except OSError as error:
            if shortage(error) is None:
                raise
            await trio.sleep(LOOK_AGAIN_S)
    try:
        await trio.lowlevel.wait_readable(own)
    finally:
        # Otherwise epoll keeps the duplicate, because the original lives. At this VMM's end it
        # would wake the task that waits for the descriptor with this number by then.
        trio.lowlevel.notify_closing(own)
        os.close(own)


def kill(pidfd: int, name: str, pid: int) -> None:
    """SIGKILL to the process of a pidfd, which may have ended. Raises VmmError."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended, and its parent has reaped it
    except PermissionError:
        raise VmmError(
            f"ending the VMM of {name}: process {pid} does not quit and this daemon may not kill "
            f"it; kill it as root"
        ) from None


@contextmanager
def looked_at(name: str, pid: int) -> Iterator[None]:
    """Wraps reads of a VMM in /proc, which may end at any moment, or not be ours to see. Raises
    VmmGone, VmmError, or the error of a shortage here, instead of OSError."""
    try:
        yield
    except OSError as error:
        if short := shortage(error):
            raise short from None
        if procfs.started(pid) == 0:
            raise VmmGone(
                f"looking at the VMM of {name}: process {pid} has ended; see why in its own log, "
                f"and attach {name} again once it runs"
            ) from None
        raise VmmError(
            f"looking at the VMM of {name}: process {pid} cannot be seen ({error.strerror}); run "
            f"postcopyd as root"
        ) from None
