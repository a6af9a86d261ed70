# SPDX-License-Identifier: Apache-2.0
"""The form of a record: its fields, their types, and which of them each kind of ownership needs.

A record is read by a daemon that did not write it: by a restarted one, or by a newer one. So it is
checked against this schema before anything is done by it; one that does not fit affects its own VM
only. Fields that are not named here are kept as they are: a newer daemon has written them. Knows no
files: store.py reads and writes.
"""

# Without `from __future__ import annotations`: it hides from TypedDict which fields are required.

from typing import Annotated, Any, Literal, NamedTuple, NotRequired, Required, TypedDict

import msgspec

from postcopyd.host import procfs

VERSION = 1

Ownership = Literal["held", "intent", "granted", "arriving", "loading", "owned", "declined"]
Phase = Literal["idle", "precopy", "handover", "postcopy", "paused", "drained", "failed"]
Count = Annotated[int, msgspec.Meta(ge=0)]


class RecordedStatus(TypedDict, total=False):
    """What people were shown last."""

    vm: str
    role: Literal["", "source", "destination"]
    phase: Required[Phase]
    migration: str
    peer: str
    mode: str
    remaining: Count
    message: str
    result: dict[str, Any]


class Record(TypedDict):
    """`NAME.json`. `boot`: the boot of the host in which the VMM's process was started (older
    records have none). `void`: an intent may still be on disk, but does not hold any more."""

    version: Literal[1]
    vm: NotRequired[str]  # only where the file's name does not tell
    ownership: Ownership
    epoch: Count
    driver: str
    socket: str
    pid: Count
    started: Count
    boot: NotRequired[str]
    void: NotRequired[bool]
    status: RecordedStatus
    about: dict[str, Any]


class Request(TypedDict, total=False):
    """Of a migration, like model.MigrateRequest."""

    to: Required[str]
    mode: str
    keep_source: bool
    persistent: bool
    undefine_source: bool


class DaemonId(TypedDict):
    """Like protocol.DaemonId."""

    machine: str
    boot: str
    state: str


class Granted(TypedDict):
    """The daemon that a guest is granted to, like Granted in source/granted.py."""

    at: str
    host: str
    daemon: DaemonId | None


class Keeper(TypedDict):
    """Of a guest that was granted: the process that keeps its memory, like native.keeper.Keeper.
    `regions`: of each its address there, and its offset in its file, None for one without a
    file. `definition`: the VMM is ended, or about to be, and can be made anew of this and of the
    device state (`NAME.device`); `vacated`: it is. `remade`: process and start of the one that was
    made for a guest that is taken back, until that is this host's again."""

    pid: Count
    started: Count
    page: Count
    regions: list[tuple[Count, Count | None]]
    definition: NotRequired[str]
    vacated: NotRequired[bool]
    remade: NotRequired[tuple[Count, Count]]


class Departure(TypedDict):
    """`about` of a guest that is leaving or has left. `marked`: when the guest was stopped, a mark
    was left in its VMM, if the driver has one (older versions had none). `lost`: how many pages a
    guest lacks that was taken back, and process and start of the VMM whose page tables know which.
    """

    migration: str
    request: Request
    regions: list[tuple[str, Count, Count]]
    run: bool
    marked: NotRequired[bool]
    downtime: tuple[float, dict[str, float]]
    recoveries: Count
    passes: NotRequired[list[dict[str, Any]]]
    why_now: NotRequired[str]
    identity: NotRequired[list[str]]
    granted: NotRequired[Granted]
    keeper: NotRequired[Keeper]
    lost: NotRequired[tuple[Count, Count, Count]]


class Offer(TypedDict):
    """The part of an arrival's offer that tells two offers apart; protocol.py reads the rest."""

    epoch: Count


class RecordedRegion(TypedDict):
    name: str
    pages: Count
    page_size: Count
    address: Count
    offset: Count
    file: NotRequired[
        bool | list[Count] | None
    ]  # the file's device and inode; in older records: whether there is a file


class Arrival(TypedDict):
    """`about` of a guest that is arriving or has arrived."""

    migration: str
    offer: Offer
    ram: list[RecordedRegion]
    userfaultfds: Count
    run: bool
    ran: bool
    told: bool
    ran_ns: int
    given_up: NotRequired[bool]
    foreign: NotRequired[str]
    acknowledged: NotRequired[bool]
    identity: NotRequired[list[str]]
    answer: NotRequired[dict[str, Any]]


class Past(TypedDict, total=False):
    """`about` when nothing is to go on: what is left of it answers a source that asks."""

    migration: str
    offer: Offer
    identity: list[str]
    answer: dict[str, Any]


class Intent(TypedDict):
    """`NAME.intent`: says that a guest may be at another host, and which host to ask."""

    version: Literal[1]
    vm: str
    migration: str
    peer: str
    epoch: Count
    driver: str
    socket: str
    boot: str
    time: str
    identity: NotRequired[list[str]]
    granted: NotRequired[Granted]
    definition: NotRequired[str]  # of a VMM that ends here as soon as the guest runs there


class Answered(TypedDict):
    """How an arrival ended. The VM has been in another migration since, or was detached."""

    migration: str
    offer: Offer
    answer: dict[str, Any]
    identity: NotRequired[list[str]]


class Answers(TypedDict):
    """`NAME.answers`, the newest last."""

    version: Literal[1]
    vm: str
    answers: list[Answered]


_ABOUT: dict[Ownership, type] = {
    "intent": Departure,
    "granted": Departure,
    "arriving": Arrival,
    "loading": Arrival,
    "owned": Arrival,
}


class Attachment(NamedTuple):
    """How to reach a VMM, and which process it is: read once, when it was attached. Another process
    that gets the same number later is not taken for it, nor is one of another boot."""

    driver: str
    socket: str
    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, record: Record) -> "Attachment | None":
        if not record["socket"]:
            return None
        boot = record.get("boot", "")
        return cls(record["driver"], record["socket"], record["pid"], record["started"], boot)

    def ended(self) -> bool:
        """Whether the process has certainly ended. Raises OSError when that cannot be known."""
        if self.boot and self.boot != procfs.boot_id():
            return True
        return not self.started or procfs.started(self.pid) != self.started


def checked(read: Any) -> Record:
    """Returns what was read, if it is a record. Raises ValueError."""
    _fits(read, Record)
    about = read["about"]
    try:
        _fits(about, _ABOUT.get(read["ownership"], Past))
    except ValueError as error:
        raise ValueError(f"about its migration {error}") from None
    record: Record = read
    return record


def checked_intent(read: Any) -> Intent:
    """The same for an intent."""
    _fits(read, Intent)
    intent: Intent = read
    return intent


def checked_answers(read: Any) -> Answers:
    """The same for answers."""
    _fits(read, Answers)
    answers: Answers = read
    return answers


def _fits(read: Any, kind: type) -> None:
    version = read.get("version") if isinstance(read, dict) else None
    if "version" in kind.__annotations__ and version != VERSION:
        raise ValueError(f"it is of version {version}, not {VERSION}")
    if missing := kind.__required_keys__ - read.keys():  # type: ignore[attr-defined]
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    try:
        msgspec.convert(read, kind)
    except msgspec.ValidationError as error:
        said = str(error)
        raise ValueError(f"it does not make sense: {said[:1].lower()}{said[1:]}") from None
