# SPDX-License-Identifier: Apache-2.0
"""What postcopyd asks of a VMM: the interface that every driver has.

This package owns the conversation with a VMM: finding its guest RAM, stopping and running the
guest, moving its device state. It must not know of pages, peers, ownership or migrations: it does
what a session tells it, once, and says truthfully how it ended. A driver author reads this file
and nothing else.

The order of calls. Source: `connect`, `inspect`, `prepare`, `save`, then `finish`; or `rollback`
from any point before `finish`. `track` and `still` come between `inspect` and `save`, if at all.
Destination: `connect`, `inspect`, `adopt`, `load`, `run`, `release`; or `release` and `end` from
any point before `run`. Descriptors of guest RAM and userfaultfds belong to the caller as soon as
they are returned.
"""

from __future__ import annotations

import abc
import os
import signal
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Literal, Self

import trio

from postcopyd.errors import PostcopydError, shortage
from postcopyd.host import procfs
from postcopyd.names import plain

State = Literal["running", "paused", "incoming"]
Role = Literal["source", "destination"]


class VmmError(PostcopydError):
    """The VMM refused or failed at what was asked; the connection is in order."""

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


@dataclass(frozen=True)
class DiskFile:
    """A file, device or server behind a disk, as the VMM has it open."""

    path: str  # as the VMM calls it
    where: str  # what it is on, for people: "ext4", "block device", "nbd"
    shared: bool  # other hosts may have it too, by what it is on
    writable: bool  # the guest's writes go there
    #: By kind, what two hosts may compare: one kind with the same value says that both have the
    #: same (of what nobody writes to: the same content), and one with another that they do not.
    ids: dict[str, str]


@dataclass(frozen=True)
class Disk:
    """A disk as the guest has it."""

    name: str  # of its device, the same on both hosts
    chain: str  # formats and sizes, or "empty", which must be equal on both hosts
    files: tuple[DiskFile, ...]  # what must be the same on both; empty for what crosses by itself


@dataclass(frozen=True)
class Shape:
    """A VMM as `inspect` found it."""

    state: State
    pid: int
    regions: tuple[Region, ...]
    facts: dict[str, str]  # what must be equal on both hosts
    problems: tuple[str, ...]  # sentences: why it cannot be migrated, each with its mend
    #: Writes that tracking sees only if pages are armed while the guest is `still`: a sentence that
    #: names what makes them. A read by direct I/O pins its pages, marks them as written when it
    #: starts, and may land after they were armed again.
    direct_io: str | None = None
    #: Writes that tracking never sees: a sentence that names what makes them. Postcopy can move the
    #: guest all the same. Both are as of now: disks come and go, so inspect again before you rely
    #: on what was seen.
    untracked: str | None = None
    disks: tuple[Disk, ...] = ()
    #: By device, where it sits on its bus, as one says that to the VMM ("port=1"): given by the VMM
    #: where nobody has, so a device that is plugged in again may get another. Equal on both hosts.
    places: dict[str, str] = field(default_factory=dict)
    #: As `outline` was when this look began.
    outline: str = ""

    def __post_init__(self) -> None:
        """Names of devices and files are the VMM's: sentences with them can be shown."""
        made = object.__setattr__  # it is frozen for everybody else
        made(self, "problems", tuple(map(plain, self.problems)))
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
    A VMM that is driven by nobody goes on as it is: losing a driver changes nothing in it.
    """

    name: str  # the VM's, as on the command line
    kind: str  # "qemu" or "process"
    socket: str
    pid: int  # of the VMM's process

    #: What the guest did just before `save` or `still` stopped it, and what `rollback` goes back
    #: to. A session that was started again sets it from its record, before it calls `rollback`; and
    #: one at the destination before the end of what it gives to `load`, to what the guest is to do.
    before: Literal["running", "paused"] | None = None

    #: What the VMM has said of its end, once `gone` has returned: a few words for people ("its
    #: guest shut down"). It was meant then, and the guest runs nowhere. None: the VMM crashed, or
    #: was killed, or told to end by `end`, or its driver cannot tell.
    farewell: str | None = None

    @classmethod
    @abc.abstractmethod
    async def connect(cls, name: str, socket: str) -> Self:
        """Attach to the VMM at the unix socket. Within seconds also when nobody answers."""

    @classmethod
    async def known(cls, name: str, socket: str, pid: int) -> Self:
        """Attach to a VMM that a daemon before this one had. Raises VmmGone.

        A driver whose VMM may be stuck in a page fault asks it nothing here: the caller has to
        answer that fault first, with the descriptors that `adopted` gives.
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

        What stands in the way of the role goes to `Shape.problems`; raises only when the VMM
        cannot be asked. The caller calls `close()` on what it gets.
        """

    async def outline(self) -> str:
        """In short, what `inspect` would find to have changed if something was plugged in, taken
        out, or put behind a disk; another text means that. Asked also while the guest stands still,
        so it takes about a millisecond. Nothing, of a VMM where nothing can be."""
        return ""

    # --- source

    @abc.abstractmethod
    async def prepare(self) -> None:
        """Set what must be set before the handover, while the guest runs on.

        `rollback` undoes it. Sets nothing that outlasts a call to `rollback`, and nothing that
        would spoil what others do with the guest meanwhile. Raises VmmError, as `save` and `still`
        do, when others move or save it, or it neither runs nor is paused.
        """

    @abc.abstractmethod
    async def save(
        self, send: Callable[[bytes], Awaitable[None]], stopped: Callable[[], None]
    ) -> None:
        """Stop the guest and stream its device state.

        Calls `stopped()` once, at the instant the guest has stopped, and `send` with each piece
        of device state as the VMM produces it. Returns when all of it was sent and guest RAM is
        final. Whatever it raises, the guest may be stopped: call `rollback`. What `send` raises
        comes through as it is.
        """

    async def track(self) -> int:
        """One new userfaultfd of the VMM's address space, for seeing what is written to guest RAM.

        Called while the guest runs, which hardly notices. The descriptor is the caller's;
        UFFDIO_API has not been done and nothing is registered. The VMM keeps no copy: when the
        caller closes it, or dies, tracking is over and nothing is left of it in the VMM. A daemon
        that is killed in here may leave an unused descriptor there; the next `track` or `rollback`
        closes it, with all others that the VMM has. Raises PostcopydError; then writes cannot be
        tracked, and nothing else is wrong.
        """
        raise VmmError(f"the {self.kind} driver cannot track what {self.name} writes")

    def still(self) -> AbstractAsyncContextManager[None]:
        """A context in which the guest is stopped and nothing writes to its RAM, I/O included.

        A guest that ran runs again afterwards, however the context is left, also when it was
        cancelled on its way in; one that was paused stays so. Not for `prepare` and `save` inside,
        which look at what the guest does. Raises PostcopydError when it cannot be stopped, when it
        does not run again (the sentence says so, and `rollback` may be tried), and when somebody
        else ran it meanwhile: then what was done inside is worth nothing. A daemon that was killed
        in here leaves the guest stopped; its successor calls `rollback` with `before` set, so what
        the guest did has to be on record first.
        """
        raise VmmError(f"the {self.kind} driver cannot hold {self.name} still")

    def check_saved(self) -> None:  # noqa: B027 (not every VMM tells)
        """Raises VmmError when somebody has run the guest since `save`. Asks and waits for nothing,
        so that nothing comes between this and what is done upon it."""

    @abc.abstractmethod
    async def rollback(self) -> str:
        """Undo what this driver, or one of a daemon before, has done to the guest, and only that:
        run it if it ran and is stopped by `still` or `save`; idempotent.

        From any point before the grant, also when another method was cancelled half-way. Others
        have a hand on the guest too: it may have been paused, moved, saved, reset or shut down by
        the VMM's own means since it was looked at, in the middle of what we do, or while no daemon
        ran. What they did is left as it is. A driver has to know, of a VMM that it finds stopped,
        whose doing that is; what it cannot know is theirs, as a guest that waits for a person is
        better than two. And a job of theirs that goes on is neither ended nor waited for.

        Returns "" when the guest is as it was, else a clause that tells how it was found and left
        ("it is paused, ..."). Raises PostcopydError when it should run here and does not; the
        sentence says what to do, and never to run it unseen.
        """

    async def mark(self) -> None:  # noqa: B027 (not every driver tells by one)
        """Leave in the VMM what `save` and `still` leave there, by which `rollback` knows whose
        doing it is that the guest stands still. For a guest that was stopped by a daemon of an
        older version, which left no mark, as its record says; idempotent, touches no other."""

    @abc.abstractmethod
    async def finish(self, keep: bool) -> None:
        """After drained: end the VMM, or with `keep` leave it stopped."""

    # --- destination

    @abc.abstractmethod
    async def adopt(self, shape: Shape) -> list[int]:
        """Empty guest RAM and return the VMM's userfaultfds, for the VMM in state incoming.

        They are the caller's; UFFDIO_API has not been done and nothing is registered. The VMM
        keeps copies of its own until `release`, so that pages wait when the caller dies. After
        `adopt` every page of every region is missing. A second call starts anew.
        """

    @abc.abstractmethod
    async def discard(self, shape: Shape) -> None:
        """Empty guest RAM of a VMM in state incoming, after an arrival that was called off."""

    async def adopted(self) -> list[int]:
        """The userfaultfds of an adoption made before this daemon was started, as duplicates.

        Nothing is emptied, and the API is done on them. Drivers that cannot ask the VMM for them
        again leave this as it is; their sessions keep the descriptors by other means.
        """
        raise VmmError(f"the {self.kind} driver cannot get the userfaultfd of {self.name} again")

    @abc.abstractmethod
    async def load(self, receive: AsyncIterable[bytes]) -> None:
        """Load the device state; the guest ends paused, whatever the VMM's options.

        Loading touches guest RAM: faults must be answered meanwhile, by somebody who does not
        wait for this call. The end of `receive` is the end of the device state. If it raises, the
        VMM is of no use any more: call `end`.
        """

    @abc.abstractmethod
    async def run(self) -> None:
        """Run the guest; returns once it runs.

        Raises `Declined` when the VMM refused and no vCPU has run. Any other error means that it
        may or may not be running.
        """

    @abc.abstractmethod
    async def release(self) -> None:
        """The VMM closes its copies of the userfaultfds; idempotent.

        Only after drained and unregistered, or when no guest was loaded: with the last copy
        missing pages become zeros.
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
        """Let go of the VMM; it goes on as it is. Idempotent."""


LOOK_AGAIN_S = 1.0
"""How long until a process is looked at again for which there was no descriptor."""


async def process_ended(pidfd: int) -> None:
    """Returns when the process of a pidfd has ended, and raises for nothing but a wrong one."""
    while True:
        try:
            own = os.dup(pidfd)  # one descriptor can be waited for by one task only
            break
        except OSError as error:
            if shortage(error) is None:
                raise
            await trio.sleep(LOOK_AGAIN_S)
    try:
        await trio.lowlevel.wait_readable(own)
    finally:
        # Or epoll keeps it, because the original lives, and at this VMM's end wakes whoever waits
        # for the descriptor that has this number then.
        trio.lowlevel.notify_closing(own)
        os.close(own)


def kill(pidfd: int, name: str, pid: int) -> None:
    """SIGKILL to the process of a pidfd, which may have ended. Raises VmmError."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass  # gone, and its parent knows
    except PermissionError:
        raise VmmError(
            f"ending the VMM of {name}: process {pid} does not quit and this daemon may not kill "
            f"it; kill it as root"
        ) from None


@contextmanager
def looked_at(name: str, pid: int) -> Iterator[None]:
    """For what reads of a VMM in /proc: it may end at any moment, and not be ours to see."""
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
