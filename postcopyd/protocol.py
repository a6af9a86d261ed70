# SPDX-License-Identifier: Apache-2.0
"""Every message between two daemons, and its limits. No I/O, no roles.

The source opens all connections of a migration, to the destination's one TCP port. Each begins with
one unencrypted msgpack string that names its kind (`CONTROL`, `DATA`, or the same with TLS). So one
port serves all, and each side can say in a sentence that the other has no TLS. Then:

  control   a stream of msgpack maps, each a message below with its name under "type", both ways
  data      one `DataHello` from the source, answered by `DataWelcome`; then page frames only

net/codec.py turns messages into bytes and back. C reads and writes page frames (wire.h has their
layout); `pack_frame` and `unpack_frame` do the same in Python, for tests and for people who read a
captured stream. docs/PROTOCOL.md explains the protocol; handover.py says which message may come
when.
"""

from __future__ import annotations

import struct
from hashlib import sha256
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct
from msgspec.structs import force_setattr

from postcopyd import names
from postcopyd.errors import PostcopydError
from postcopyd.names import plain

VERSION = 1
"""Protocol version. A peer of another version is refused with a sentence."""

QUEUE = "queue"
"""Named by a source that understands Queued."""

DISKS = "disks"
"""Named by a destination that compares disks."""

LOSSES = "losses"
"""Named by a daemon that sends and understands page frames of kind LOST_PAGES."""

MAKES = "makes"
"""Named by a destination that makes a VMM by the definition in an offer, where the source's driver
gives one."""

FEATURES: frozenset[str] = frozenset({QUEUE, DISKS, LOSSES, MAKES})
"""What this daemon can do beyond the version; only what both sides name is used."""

CONTROL = "postcopyd control"
DATA = "postcopyd data"
CONTROL_TLS = "postcopyd control tls"
"""TLS with both certificates begins after this string; messages follow inside TLS."""
DATA_TLS = "postcopyd data tls"
"""`DataHello` and `DataWelcome` follow unencrypted; then TLS with a pre-shared key, and frames."""

MAX_MESSAGE = 1 << 20
"""Bytes of one message: an offer with 256 regions and its facts has some 64 KiB."""

MAX_FIRST = 20 << 10
"""Bytes of the first message of a control connection: `Hello`, or `Error` with a sentence. Anybody
may send one."""

MAX_DATA_FIRST = 1024
"""Bytes of the first object of a data connection, which anybody may send too."""

DEVICE_CHUNK = 64 << 10
"""Bytes of device state in one message, so that a keepalive or an error never waits long."""

MAX_REGIONS = 256
MAX_CONNECTIONS = 32
"""Push connections of one migration; there is one urgent connection besides."""

KEEPALIVE_S = 1.0
"""A side that has sent nothing for this long sends a keepalive."""

DEAD_S = 10.0
"""A peer that has sent nothing for this long counts as dead: ten keepalives did not come."""

MAX_ITEMS = 512
"""Items of one array or map: the facts of an offer. An unpacker allocates what a header says before
the items are there. So without this limit a few kilobytes of headers would ask for gigabytes."""

MAX_CONTAINERS = 4096
"""Arrays and maps of one message: an offer has one for each region, and two for each disk and each
file of one. An empty one is one byte of a message and 64 of memory, and there may be as many peers
as there are connections."""

LOST = "Lost"
"""Name of the error of a destination that will never need this source's pages: a person has given
up the guest there, and it runs nowhere. A source that reads it asks no more by itself."""

POISONED = "Poisoned"
"""Name of the error when a person has given up only the missing pages: the guest runs on there
without them. An older source goes on asking."""

ENDED = "Ended"
"""Name of the error when the guest shut down at the destination, or somebody told its VMM to end,
before all of its memory had come. A source that reads it does not need its copy any more; an older
one goes on asking."""

MAX_SENTENCE = 4096
"""Characters of a sentence or a fact."""

MAX_STRING = 4 * MAX_SENTENCE
"""Bytes of one string: a sentence in UTF-8."""

# Names become parts of log lines, arguments of hooks, what a terminal shows. So a name with
# characters that cannot be shown is refused; in sentences such characters are replaced.
_NO_CONTROLS = rf"\A[^{names.UNSEEN}]*\Z"

Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=_NO_CONTROLS)]
VmName = Annotated[str, Meta(min_length=1, max_length=names.LONGEST)]
Sentence = Annotated[str, Meta(max_length=MAX_SENTENCE)]
Bound = Annotated[str, Meta(pattern=r"\A[0-9]{1,12}\Z")]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Time = Annotated[float, Meta(ge=0, le=1e15)]  # in the unit of its name; infinity is not JSON


class LocalProtocolError(PostcopydError):
    """This daemon was about to send what the protocol forbids: a bug here."""

    name = "InternalError"


class RemoteProtocolError(PostcopydError):
    """The peer sent what the protocol forbids."""

    name = "ProtocolError"


class Message(Struct, frozen=True, tag_field="type", rename="camel"):
    """Base of all control messages. Unknown fields are ignored: a newer peer may have more."""


def _must_be_vm(name: str) -> None:
    """Raises ValueError for what cannot be a VM's name, before anything uses it: a hook is an easy
    victim."""
    if why := names.problem(name):
        raise ValueError(f"{name!r:.40} cannot be the name of a VM: {why}")


class DaemonId(Struct, frozen=True, rename="camel"):
    """Which daemon it is; its restarts change nothing. The machine (empty: it has no id), the boot
    of its kernel, which containers share, and the folder of records. They are only compared."""

    machine: Annotated[str, Meta(max_length=128, pattern=_NO_CONTROLS)]
    boot: Name
    state: Name


class Hello(Message, frozen=True, tag="hello"):
    """First message of both sides. `software` and `host` are for people. `instance` is new for each
    start of a daemon: a daemon that reads its own has dialled itself. By `daemon` a source that
    asks later knows which daemon answers."""

    version: Count
    features: Annotated[list[Name], Meta(max_length=64)] = []
    software: Annotated[str, Meta(max_length=128, pattern=_NO_CONTROLS)] = ""
    host: Annotated[str, Meta(max_length=256, pattern=_NO_CONTROLS)] = ""
    instance: Annotated[str, Meta(max_length=128, pattern=_NO_CONTROLS)] = ""
    daemon: DaemonId | None = None


class RegionOffer(Struct, frozen=True, rename="camel"):
    """One region of guest RAM; its index in the offer is its number in page frames."""

    name: Name
    pages: Annotated[int, Meta(ge=1, le=2**40)]
    page_size: Annotated[int, Meta(ge=4096, le=2 << 20)]


class DiskFileOffer(Struct, frozen=True, rename="camel"):
    """A file, device or server behind a disk: its name, the storage that it is on, whether other
    hosts can reach that storage, whether the guest's writes go there. `ids` are by kind. If both
    hosts know a kind, the same value means that they have the same file, another value that they
    have two.
    """

    path: Sentence
    where: Name
    shared: bool
    writable: bool
    ids: Annotated[dict[Name, Sentence], Meta(max_length=16)]


class DiskOffer(Struct, frozen=True, rename="camel"):
    """A disk of the guest: its device, its formats and sizes from the top of its chain down, and
    the files of that chain in the same order."""

    name: Sentence
    chain: Sentence
    files: Annotated[list[DiskFileOffer], Meta(max_length=MAX_ITEMS)]


class Offer(Message, frozen=True, tag="offer"):
    """What the source wants to send. With `check` nothing is changed and `Checked` answers.

    `facts` come from the driver: what must be equal on both hosts. `epoch` numbers the ownership
    that this migration would hand over. `staged`: pages also come before the handover. `disks` must
    be the same on both hosts; a source without the feature "disks" names none. `unsafe`: a person
    asserts that their files are the same, whatever the daemons know of them. `places` say where
    devices sit on their buses; they must be equal for devices that both hosts name. With a
    `definition`, the driver's own text, the destination makes the VMM that waits; it has the
    feature "makes".
    """

    migration: Name
    vm: VmName
    driver: Name
    regions: Annotated[list[RegionOffer], Meta(min_length=1, max_length=MAX_REGIONS)]
    facts: Annotated[dict[str, Sentence], Meta(max_length=512)]
    connections: Annotated[int, Meta(ge=1, le=MAX_CONNECTIONS)]
    epoch: Count
    check: bool = False
    staged: bool = False
    disks: Annotated[list[DiskOffer], Meta(max_length=MAX_ITEMS)] | None = None
    unsafe: bool = False
    places: Annotated[dict[str, Sentence], Meta(max_length=512)] = {}
    definition: Annotated[str, Meta(max_length=MAX_STRING)] = ""

    def __post_init__(self) -> None:
        _must_be_vm(self.vm)
        for field in ("facts", "places"):
            told = {plain(key): plain(value) for key, value in getattr(self, field).items()}
            force_setattr(self, field, told)


class Checked(Message, frozen=True, tag="checked"):
    """Answer to an offer with `check`: why the migration would be refused. Empty: it would not."""

    problems: Annotated[list[Sentence], Meta(max_length=256)]

    def __post_init__(self) -> None:
        force_setattr(self, "problems", [plain(problem) for problem in self.problems])


class Queued(Message, frozen=True, tag="queued"):
    """The offer fits, and waits for its turn: the destination limits how many guests arrive at a
    time. It is sent again whenever `ahead`, the number of guests that come first, changes; `Ready`
    follows. Only a source with the feature "queue" gets it."""

    ahead: Count


class Ready(Message, frozen=True, tag="ready"):
    """The offer is accepted; `token` proves that data connections belong to this migration."""

    token: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Serving(Message, frozen=True, tag="serving"):
    """Guest RAM at the destination is adopted and all data connections are there. On a connection
    that resumes: all `Have` were sent. After the `DeviceEnd` of a `whole` handover: send the
    rest."""


class Pass(Message, frozen=True, tag="pass"):
    """The source has sent the pages of one more pass, and the guest still runs there. `pages` is
    the number in all passes so far, including zeros. The next pass begins only after the answer, so
    that no old copy of a page can come after a newer one."""

    pages: Count


class Passed(Message, frozen=True, tag="passed"):
    """The number of pages that `Pass` named has arrived."""


class Handover(Message, frozen=True, tag="handover"):
    """The source is about to stop the guest; device state follows. With `whole` the guest may run
    at the destination only when all of its memory is there."""

    whole: bool = False


class Device(Message, frozen=True, tag="device"):
    """A piece of the device state, in order, as the VMM produced it."""

    data: Annotated[bytes, Meta(max_length=DEVICE_CHUNK)]


class Stale(Message, frozen=True, tag="stale"):
    """Pages of one region that the guest has written since they were sent, or that were never sent.

    Bits as in `Have`. A page that was sent in a pass and is in no Stale before DeviceEnd is right.
    """

    region: Annotated[int, Meta(ge=0, lt=MAX_REGIONS)]
    first: Count
    count: Annotated[int, Meta(ge=1, le=8 * DEVICE_CHUNK)]
    bits: Annotated[bytes, Meta(min_length=1, max_length=DEVICE_CHUNK)]


class DeviceEnd(Message, frozen=True, tag="deviceEnd"):
    """All device state was sent: `size` bytes. The guest is stopped and offered.

    `run` is false for a guest that was paused before and stays paused.
    """

    size: Count
    run: bool = True


class Loaded(Message, frozen=True, tag="loaded"):
    """The destination has loaded the device state and could run the guest."""


class Grant(Message, frozen=True, tag="grant"):
    """The source has recorded that it will not run the guest again: it is the destination's."""

    epoch: Count


class Ran(Message, frozen=True, tag="ran"):
    """The guest runs at the destination (or is paused there, if the offer said so)."""


class Declined(Message, frozen=True, tag="declined"):
    """No vCPU ran at the destination and its VMM has ended: the guest is the source's again."""

    reason: Sentence

    def __post_init__(self) -> None:
        force_setattr(self, "reason", plain(self.reason))


class Faults(Struct, frozen=True, rename="camel"):
    """Faults of the guest at the destination; latencies in microseconds, from fault to placed.

    `histogram` maps the lower bound of each log2 bucket, in microseconds, to its count.
    """

    count: Count = 0
    p50_us: Time = 0.0
    p99_us: Time = 0.0
    max_us: Time = 0.0
    histogram: Annotated[dict[Bound, Count], Meta(max_length=64)] = {}


class Progress(Message, frozen=True, tag="progress"):
    """How far the destination is, in pages that its record confirms."""

    confirmed: Count
    remaining: Count
    faults: Faults


class Drained(Message, frozen=True, tag="drained"):
    """Every page is at the destination: `confirmed` must be the number that the source offered.

    `brownout_ms`: from the run to the last urgent page, by the destination's clock. `lost`: how
    many of the confirmed pages are memory errors, as the source could not read them or the
    destination could not keep them.
    """

    confirmed: Count
    zero: Count
    placed: Count
    urgent: Count
    duplicate: Count
    requests: Count
    discarded: Count
    brownout_ms: Time
    faults: Faults
    lost: Count = 0


class Acknowledged(Message, frozen=True, tag="acknowledged"):
    """The source has counted the same number and drops its copy."""


class Resume(Message, frozen=True, tag="resume"):
    """Instead of an offer, on a new connection: the connection of this migration was lost after the
    grant, so what happened to the guest? The answer is `Ran`, with `Ready` before it for new data
    connections, or `Drained`, or `Declined`. With `look` the migration does not go on, and
    `Checked` answers with what the destination says of it. A source that has restarted and has only
    its intent asks so.
    """

    migration: Name
    vm: VmName
    epoch: Count
    look: bool = False

    def __post_init__(self) -> None:
        _must_be_vm(self.vm)


class Have(Message, frozen=True, tag="have"):
    """Pages of one region that the destination has, as its record confirms them.

    Bit i % 8 of byte i // 8 is page `first` + i, for `count` pages. The source sends again what it
    had sent and what is in no `Have`.
    """

    region: Annotated[int, Meta(ge=0, lt=MAX_REGIONS)]
    first: Count
    count: Annotated[int, Meta(ge=1, le=8 * DEVICE_CHUNK)]
    bits: Annotated[bytes, Meta(min_length=1, max_length=DEVICE_CHUNK)]


class Cancel(Message, frozen=True, tag="cancel"):
    """The source cancels the migration, before the grant."""

    reason: Sentence

    def __post_init__(self) -> None:
        force_setattr(self, "reason", plain(self.reason))


class Error(Message, frozen=True, tag="error"):
    """What went wrong at the sender, by name and in a sentence. It sends nothing after this."""

    name: Name
    message: Sentence

    def __post_init__(self) -> None:
        force_setattr(self, "message", plain(self.message))


class Keepalive(Message, frozen=True, tag="keepalive"):
    """The sender is there."""


AnyMessage = (
    Hello | Offer | Checked | Queued | Ready | Serving | Pass | Passed | Handover | Device | Stale
    | DeviceEnd | Loaded | Grant | Ran | Declined | Progress | Drained | Acknowledged | Resume
    | Have | Cancel | Error | Keepalive
)  # fmt: skip


class DataHello(Struct, frozen=True, rename="camel"):
    """The first object of a data connection, after its kind. With TLS `token` is empty: it is the
    pre-shared key, and never on this connection."""

    migration: Name
    token: Annotated[bytes, Meta(max_length=32)]
    urgent: bool

    @property
    def psk_identity(self) -> str:
        """The name of the key in TLS, which binds both sides to what they say here unencrypted."""
        return f"{self.migration} {'urgent' if self.urgent else 'push'}"


class DataWelcome(Struct, frozen=True, rename="camel"):
    """The destination's answer; frames may follow at once."""

    migration: Name


def sentence(text: str) -> str:
    """A sentence of ours as it may travel: no longer than a peer takes, and fit to be shown."""
    text = plain(text)  # paths of files may be anything
    return text if len(text) <= MAX_SENTENCE else text[: MAX_SENTENCE - 4] + " ..."


def fact(value: str) -> str:
    """A fact as it travels and is compared: if it is too long, its beginning and a digest."""
    value = plain(value)
    if len(value) <= MAX_SENTENCE:
        return value
    return f"{value[: MAX_SENTENCE - 100]} ... sha256 {sha256(value.encode()).hexdigest()}"


FRAME_BYTES = 24
MAX_PAYLOAD = 2 << 20
REQUEST, PAGES, ZERO, LOST_PAGES = 1, 2, 3, 4
_HEADER = struct.Struct(">BBBHBQBIBI")


class Frame(NamedTuple):
    """A page frame's header; `page` and `count` in pages of the region, `payload` in bytes."""

    kind: int
    region: int
    page: int
    count: int  # type: ignore[assignment]  # hides tuple.count: unused
    payload: int


def pack_frame(frame: Frame) -> bytes:
    """The 24 bytes before the payload: a msgpack array of five with fixed encodings."""
    kind, region, page, count, payload = frame
    return _HEADER.pack(0x95, kind, 0xCD, region, 0xCF, page, 0xCE, count, 0xC6, payload)


def unpack_frame(header: bytes) -> Frame:
    """The reverse. Raises RemoteProtocolError for what C would refuse as well."""
    if len(header) != FRAME_BYTES:
        raise RemoteProtocolError(
            f"a page frame's header has {FRAME_BYTES} bytes, not {len(header)}"
        )
    array, kind, m1, region, m2, page, m3, count, m4, payload = _HEADER.unpack(header)
    if (array, m1, m2, m3, m4) != (0x95, 0xCD, 0xCF, 0xCE, 0xC6):
        raise RemoteProtocolError("the peer sent what is not a page frame")
    if kind not in (REQUEST, PAGES, ZERO, LOST_PAGES) or payload > MAX_PAYLOAD:
        raise RemoteProtocolError(f"the peer sent a page frame of kind {kind} with {payload} bytes")
    return Frame(kind, region, page, count, payload)
