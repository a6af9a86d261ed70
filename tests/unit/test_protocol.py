# SPDX-License-Identifier: Apache-2.0
"""The wire: messages through the codec, its limits, and page frames in Python and in C."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, get_args

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import to_builtins
from postcopyd._native import ffi, lib

from postcopyd import names as rules
from postcopyd import protocol as p
from postcopyd.cli import progress
from postcopyd.errors import PostcopydError
from postcopyd.net.channel import check_hello
from postcopyd.net.codec import Codec, pack, parse, parse_message
from postcopyd.protocol import LocalProtocolError, RemoteProtocolError

MESSAGES: tuple[type[p.Message], ...] = get_args(p.AnyMessage)

seen = st.characters(exclude_categories=["Cs"]).filter(lambda c: rules.plain(c) == c)
names = st.text(seen, min_size=1, max_size=128)
vms = st.text(seen, min_size=1, max_size=63).filter(lambda name: not rules.problem(name))
sentences = st.text(seen, max_size=200)
counts = st.integers(0, 2**63 - 1)
times = st.floats(0, 1e15)
tokens = st.binary(min_size=32, max_size=32)
labels = st.text(seen, max_size=128)
regions = st.builds(p.RegionOffer, names, st.integers(1, 2**40), st.integers(4096, 2 << 20))
disk_files = st.builds(
    p.DiskFileOffer, sentences, names, st.booleans(), st.booleans(),
    st.dictionaries(names, sentences, max_size=3),
)  # fmt: skip
disks = st.builds(p.DiskOffer, sentences, sentences, st.lists(disk_files, max_size=3))
faults = st.builds(
    p.Faults,
    counts,
    times,
    times,
    times,
    st.dictionaries(st.text("0123456789", min_size=1, max_size=12), counts, max_size=9),
)
messages: st.SearchStrategy[p.Message] = st.one_of(
    st.builds(p.Hello, counts, st.lists(names, max_size=5), labels, labels),
    st.builds(
        p.Offer,
        names,
        vms,
        names,
        st.lists(regions, min_size=1, max_size=5),
        st.dictionaries(names, sentences, max_size=5),
        st.integers(1, p.MAX_CONNECTIONS),
        counts,
        st.booleans(),
        st.booleans(),
        st.none() | st.lists(disks, max_size=3),
        st.booleans(),
    ),
    st.builds(p.Checked, st.lists(sentences, max_size=5)),
    st.builds(p.Ready, tokens),
    st.builds(p.Device, st.binary(max_size=p.DEVICE_CHUNK)),
    st.builds(p.DeviceEnd, counts, st.booleans()),
    st.builds(p.Grant, counts),
    st.builds(p.Declined, sentences),
    st.builds(p.Progress, counts, counts, faults),
    st.builds(p.Drained, *[counts] * 7, times, faults),
    st.builds(p.Resume, names, vms, counts, st.booleans()),
    *[
        st.builds(
            kind,
            st.integers(0, p.MAX_REGIONS - 1),
            counts,
            st.integers(1, 8 * p.DEVICE_CHUNK),
            st.binary(min_size=1, max_size=p.DEVICE_CHUNK),
        )
        for kind in (p.Have, p.Stale)
    ],
    st.builds(p.Pass, counts),
    st.builds(p.Handover, st.booleans()),
    st.builds(p.Cancel, sentences),
    st.builds(p.Error, names, sentences),
    *[
        st.just(kind())
        for kind in (p.Serving, p.Passed, p.Loaded, p.Ran, p.Acknowledged, p.Keepalive)
    ],
)
disk_file = p.DiskFileOffer("/d", "nfs4", True, True, {"inode of NFS": "7"})
offer = p.Offer(
    "m1", "web1", "qemu", [p.RegionOffer("ram", 512, 4096)], {"CPU": "x"}, 2, 1,
    disks=[p.DiskOffer("vd0", "raw of 4096 bytes", [disk_file])],
)  # fmt: skip
samples: list[p.Message] = [
    p.Hello(1, ["a"], "postcopyd 1", "host1", "i", p.DaemonId("m", "b", "s")),
    offer,
    p.Checked(["no"]),
    p.Queued(3),
    p.Ready(bytes(32)),
    p.Serving(),
    p.Pass(7),
    p.Passed(),
    p.Handover(),
    p.Device(b"state"),
    p.Stale(0, 512, 9, b"\xff\x01"),
    p.DeviceEnd(5),
    p.Loaded(),
    p.Grant(1),
    p.Ran(),
    p.Declined("locked"),
    p.Progress(1, 4096, p.Faults()),
    p.Drained(1, 2, 3, 4, 5, 6, 7, 8.5, p.Faults(1, 2.0, 3.0, 4.0, {"64": 1})),
    p.Acknowledged(),
    p.Resume("m1", "web1", 2),
    p.Have(0, 512, 9, b"\xff\x01"),
    p.Cancel("by request"),
    p.Error("Refused", "no room"),
    p.Keepalive(),
]
sample = {type(message): message for message in samples}


def decoded(stream: bytes, cuts: Sequence[int] = ()) -> list[Any]:
    """What a codec makes of a stream that arrives in pieces, cut at these places."""
    codec, found = Codec(), []
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    for start, end in pairwise(edges):
        codec.feed(stream[start:end])
        found.extend(codec.objects())
    return found


def altered(message: p.Message, /, **changes: Any) -> Any:
    """The object of a message with fields changed, as it would come out of a codec."""
    return decoded(msgpack.packb(to_builtins(message, builtin_types=(bytes,)) | changes))[0]


# --- messages ------------------------------------------------------------------------------------


@given(messages, st.randoms())
def test_message_survives_any_chunks(message: p.Message, random: Any) -> None:
    """Each message comes out as it went in, however its bytes are cut."""
    stream = pack(message)
    cuts = [random.randrange(len(stream) + 1) for _ in range(5)]
    assert [message] == [parse_message(obj) for obj in decoded(stream, cuts)]


@pytest.mark.parametrize("message", samples, ids=lambda m: type(m).__name__)
def test_message_survives_byte_by_byte(message: p.Message) -> None:
    """Each kind of message comes out whole at its last byte, and not before."""
    codec = Codec()
    stream = pack(message)
    for at in range(len(stream) - 1):
        codec.feed(stream[at : at + 1])
        assert list(codec.objects()) == []
    codec.feed(stream[-1:])
    assert [parse_message(obj) for obj in codec.objects()] == [message]


def test_every_kind_of_message_is_tried() -> None:
    """The samples have each message of the protocol once, so a new one is not forgotten."""
    assert [type(message) for message in samples] == list(MESSAGES)


@given(st.lists(messages, max_size=8), st.lists(st.integers(min_value=0), max_size=12))
def test_stream_of_messages_survives_any_chunks(sent: list[p.Message], cuts: list[int]) -> None:
    """Many messages in one stream come out in order, however it is cut."""
    stream = b"".join(map(pack, sent))
    assert sent == [parse_message(obj) for obj in decoded(stream, cuts)]


def test_data_connection_objects() -> None:
    """The two objects of a data connection pass like messages, without a type."""
    for thing in (p.DataHello("m1", bytes(32), True), p.DataWelcome("m1")):
        assert parse(decoded(pack(thing))[0], type(thing)) == thing


@pytest.mark.parametrize("message", samples, ids=lambda m: type(m).__name__)
def test_unknown_fields_are_ignored(message: p.Message) -> None:
    """A field that this version does not know changes nothing, whatever is in it."""
    assert parse_message(altered(message, later=[{"a": [None, 1.5, b"x"]}])) == message


@pytest.mark.parametrize("message", samples, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("wrong", [None, True, -1, 1.5, "x", b"x", [1], {"a": 1}], ids=repr)
def test_fields_of_wrong_type_are_refused_or_right(message: p.Message, wrong: Any) -> None:
    """No field takes a value of another type: what is accepted comes back as it was sent."""
    for field, value in to_builtins(message, builtin_types=(bytes,)).items():
        try:
            taken = parse_message(altered(message, **{field: wrong}))
        except RemoteProtocolError:
            continue
        back = to_builtins(taken, builtin_types=(bytes,))[field]
        if field != "faults":  # an object of optional fields: unknown ones are ignored
            assert (back, type(back)) == (wrong, type(wrong)), (field, value)


@pytest.mark.parametrize("message", samples, ids=lambda m: type(m).__name__)
def test_missing_fields_are_refused(message: p.Message) -> None:
    """A message without a field that has no default is refused, naming the field."""
    whole = to_builtins(message, builtin_types=(bytes,))
    optional = {
        "features",
        "software",
        "host",
        "instance",
        "run",
        "check",
        "look",
        "staged",
        "whole",
        "lost",
    }
    optional |= {"daemon", "disks", "places", "unsafe", "definition"}
    for field in whole.keys() - optional - {"type"}:
        with pytest.raises(RemoteProtocolError, match=field):
            parse_message({key: value for key, value in whole.items() if key != field})


@pytest.mark.parametrize(
    "obj",
    [
        None,
        1,
        "hello",
        b"hello",
        [],
        {},
        {"type": "nonsense"},
        {"type": None},
        {"type": ["hello"]},
        {"type": "hello" * 1000},
        {"type": "Hello", "version": 1},
    ],
    ids=lambda obj: repr(obj)[:30],
)
def test_what_is_no_message_is_refused(obj: Any) -> None:
    """Objects that are no message are refused in a sentence of moderate length."""
    with pytest.raises(RemoteProtocolError) as caught:
        parse_message(obj)
    assert len(str(caught.value)) < 300


def test_type_that_is_a_deep_nest_is_refused() -> None:
    """A tag nested as deep as the unpacker allows is refused like any other wrong tag."""
    nest = decoded(b"\x81\xa4type" + b"\x91" * 1022 + b"\xc0")[0]
    with pytest.raises(RemoteProtocolError):
        parse_message(nest)


# --- versions ------------------------------------------------------------------------------------


def test_same_version_is_accepted() -> None:
    """A peer of this version is greeted, whatever features it names."""
    check_hello(p.Hello(p.VERSION, ["of the future"]))


@pytest.mark.parametrize(
    ("version", "says"), [(p.VERSION + 1, "upgrade this host's"), (p.VERSION - 1, "upgrade that")]
)
def test_other_version_is_refused_with_what_to_do(version: int, says: str) -> None:
    """A newer or older peer is refused with both versions and which host to upgrade."""
    with pytest.raises(PostcopydError, match=says) as caught:
        check_hello(p.Hello(version, [], "postcopyd 9", "host2"))
    assert caught.value.name == "VersionMismatch"
    assert "host2" in str(caught.value)
    assert "postcopyd 9" in str(caught.value)


# --- limits --------------------------------------------------------------------------------------


EVIL = "\x1b]0;owned\x07\x1b[2J\nweb1: drained\N{RIGHT-TO-LEFT OVERRIDE}\x9b"


@pytest.mark.parametrize(
    "message",
    [
        p.Checked([EVIL]),
        p.Declined(EVIL),
        p.Cancel(EVIL),
        p.Error("Refused", EVIL),
        msgspec.structs.replace(offer, facts={EVIL: EVIL}),
    ],
    ids=lambda message: type(message).__name__,
)
def test_words_of_a_peer_can_be_shown(message: p.Message) -> None:
    """Whatever a peer writes for people stays on its line and moves no cursor; the rest is as it
    was. What is built here and what comes out of the codec are the same."""
    raw = {key: _with(value) for key, value in to_builtins(message).items()}
    assert repr(EVIL)[1:-1] in repr(raw)
    parsed = parse_message(decoded(msgpack.packb(raw))[0])
    text = repr(parsed)
    assert "?]0;owned??[2J web1: drained??" in text
    assert rules.plain(text) == text
    assert parsed == message
    line = progress.line({"vm": "web1", "phase": "failed", "message": str(PostcopydError(EVIL))})
    assert "\x1b" not in line


def _with(value: Any) -> Any:
    """Words that were made plain when the message was built are as the peer sends them again."""
    if isinstance(value, str):
        return EVIL if "owned" in value else value
    if isinstance(value, dict):
        return {_with(key): _with(one) for key, one in value.items()}
    return [_with(one) for one in value] if isinstance(value, list) else value


def region(**changes: Any) -> dict[str, Any]:
    return {"name": "ram", "pages": 1, "pageSize": 4096} | changes


FAULTS = {"count": 1, "p50Us": 1.0, "p99Us": 1.0, "maxUs": 1.0, "histogram": {}}
AT_AND_BEYOND: list[tuple[p.Message, str, Any, Any]] = [
    (sample[p.Hello], "version", 2**63 - 1, 2**63),
    (sample[p.Hello], "version", 0, -1),
    (sample[p.Hello], "features", ["a"] * 64, ["a"] * 65),
    (sample[p.Hello], "features", ["a" * 128], ["a" * 129]),
    (sample[p.Hello], "software", "a" * 128, "a" * 129),
    (sample[p.Hello], "host", "a" * 256, "a" * 257),
    (sample[p.Hello], "host", "host\N{SNOWMAN}", "host\x1b[2J"),
    (offer, "migration", "a" * 128, "a" * 129),
    (offer, "migration", "a", ""),
    (offer, "vm", "web 1", "web\0one"),
    (offer, "vm", "web1", "web1\n"),
    (offer, "vm", "a" * 255, "a" * 256),
    (offer, "vm", "\N{SNOWMAN}" * 85, "\N{SNOWMAN}" * 86),
    (offer, "vm", "$(reboot)", "../../etc/x"),
    (offer, "vm", "a -rf", "-rf"),
    (offer, "vm", "...", ".."),
    (offer, "vm", "db\N{SNOWMAN}", "db\N{RIGHT-TO-LEFT OVERRIDE}"),
    (offer, "driver", "q" * 128, "q" * 129),
    (offer, "regions", [region()] * p.MAX_REGIONS, [region()] * (p.MAX_REGIONS + 1)),
    (offer, "regions", [region()], []),
    (offer, "regions", [region(pages=2**40)], [region(pages=2**40 + 1)]),
    (offer, "regions", [region(pages=1)], [region(pages=0)]),
    (offer, "regions", [region(pageSize=2 << 20)], [region(pageSize=(2 << 20) + 1)]),
    (offer, "regions", [region(pageSize=4096)], [region(pageSize=4095)]),
    (offer, "facts", {str(n): "" for n in range(512)}, {str(n): "" for n in range(513)}),
    (offer, "facts", {"a": "a" * 4096}, {"a": "a" * 4097}),
    (offer, "connections", p.MAX_CONNECTIONS, p.MAX_CONNECTIONS + 1),
    (offer, "connections", 1, 0),
    (offer, "epoch", 2**63 - 1, 2**63),
    (sample[p.Checked], "problems", ["a"] * 256, ["a"] * 257),
    (sample[p.Checked], "problems", ["\N{SNOWMAN}" * 4096], ["a" * 4097]),
    (sample[p.Ready], "token", bytes(32), bytes(33)),
    (sample[p.Ready], "token", bytes(32), bytes(31)),
    (sample[p.Ready], "token", bytes(32), "A" * 43 + "="),
    (sample[p.Device], "data", bytes(p.DEVICE_CHUNK), bytes(p.DEVICE_CHUNK + 1)),
    (sample[p.DeviceEnd], "size", 2**63 - 1, 2**63),
    (sample[p.Declined], "reason", "a" * 4096, "a" * 4097),
    (sample[p.Progress], "faults", FAULTS, FAULTS | {"p50Us": float("nan")}),
    (sample[p.Progress], "faults", FAULTS | {"maxUs": 1e15}, FAULTS | {"maxUs": float("inf")}),
    (sample[p.Progress], "faults", FAULTS | {"p99Us": 0}, FAULTS | {"p99Us": -0.1}),
    (
        sample[p.Progress],
        "faults",
        FAULTS | {"histogram": {str(n): 1 for n in range(64)}},
        FAULTS | {"histogram": {str(n): 1 for n in range(65)}},
    ),
    (
        sample[p.Progress],
        "faults",
        FAULTS | {"histogram": {"64": 1}},
        FAULTS | {"histogram": {"\x1b[2J": 1}},
    ),
    (sample[p.Drained], "brownoutMs", 0.0, float("nan")),
    (sample[p.Drained], "brownoutMs", 1e15, float("inf")),
    (sample[p.Resume], "vm", "a" * 128, ""),
    (sample[p.Resume], "vm", "web1", "--help"),
    (sample[p.Have], "region", p.MAX_REGIONS - 1, p.MAX_REGIONS),
    (sample[p.Have], "count", 8 * p.DEVICE_CHUNK, 8 * p.DEVICE_CHUNK + 1),
    (sample[p.Have], "bits", bytes(p.DEVICE_CHUNK), bytes(p.DEVICE_CHUNK + 1)),
    (sample[p.Cancel], "reason", "a" * 4096, "a" * 4097),
    (sample[p.Error], "name", "a" * 128, "a" * 129),
    (sample[p.Error], "message", "line one\nline two", "a" * 4097),
]


@pytest.mark.parametrize(
    ("message", "field", "at", "beyond"),
    AT_AND_BEYOND,
    ids=[f"{type(m).__name__}.{field}-{i}" for i, (m, field, _, _) in enumerate(AT_AND_BEYOND)],
)
def test_limit_at_and_beyond(message: p.Message, field: str, at: Any, beyond: Any) -> None:
    """Each field takes its limit and refuses what is just beyond it."""
    parse_message(altered(message, **{field: at}))
    with pytest.raises(RemoteProtocolError):
        parse_message(altered(message, **{field: beyond}))


def filler(size: int) -> bytes:
    """A message with an unknown field, of exactly `size` bytes."""
    head = b"\x82\xa4type\xa9keepalive\xa1z"
    pieces, left = [], size - len(head) - 3
    while left > 1 << 14:
        pieces.append(msgpack.packb(bytes(16000)))
        left -= len(pieces[-1])
    while left:
        pieces.append(b"\xc0" if left < 130 else msgpack.packb(bytes(128)))
        left -= len(pieces[-1])
    return head + b"\xdc" + struct.pack(">H", len(pieces)) + b"".join(pieces)


@pytest.mark.parametrize("chunk", [4096, 256 << 10, 4 << 20])
def test_message_of_the_largest_size_passes(chunk: int) -> None:
    """A message of MAX_MESSAGE bytes passes whatever it arrives with; a longer one does not."""
    good = filler(p.MAX_MESSAGE)
    assert len(good) == p.MAX_MESSAGE
    stream = pack(p.Ran()) + good + pack(p.Loaded()) + good
    assert len(decoded(stream, range(0, len(stream), chunk))) == 4
    bad = pack(p.Ran()) + filler(p.MAX_MESSAGE + 1)
    with pytest.raises(RemoteProtocolError, match="more than 1048576"):
        decoded(bad, range(0, len(bad), chunk))


def test_message_that_never_ends_is_refused_in_time() -> None:
    """A message without an end is refused as soon as it is longer than any may be."""
    codec = Codec()
    codec.feed(b"\xdc\x02\x00")
    fed = 3
    with pytest.raises(RemoteProtocolError, match="more than"):
        while fed < 2 * p.MAX_MESSAGE:
            codec.feed(msgpack.packb(bytes(8000)))
            fed += 8003
            assert list(codec.objects()) == []
    assert fed <= p.MAX_MESSAGE + 8003


@pytest.mark.parametrize(
    "head",
    [
        b"\xdd\x00\x00\x02\x01",  # array of 513
        b"\xdf\x00\x00\x02\x01",  # map of 513
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
    ],
    ids=bytes.hex,
)
def test_length_beyond_its_limit_is_refused_before_the_content(head: bytes) -> None:
    """A header that promises more than its limit is refused when it is read."""
    for prefix in (b"", b"\x81\xa1a", b"\x91" * 8):
        with pytest.raises(RemoteProtocolError):
            decoded(prefix + head)


@pytest.mark.parametrize("mark", [b"\xdb", b"\xc6", b"\xc9"], ids=["str", "bin", "ext"])
def test_string_beyond_its_limit_is_refused(mark: bytes) -> None:
    """A string too long is refused when it is there, and at MAX_MESSAGE when it is still coming."""
    for length, passes in ((p.MAX_STRING, True), (p.MAX_STRING + 1, False)):
        limit = length + (p.DEVICE_CHUNK - p.MAX_STRING if mark == b"\xc6" else 0)
        stream = mark + struct.pack(">I", limit) + (b"\x05" if mark == b"\xc9" else b"")
        stream += b"a" * limit
        if passes and mark != b"\xc9":
            assert len(decoded(stream)[0]) == limit
        else:
            with pytest.raises(RemoteProtocolError):
                decoded(stream)
    endless = mark + b"\xff\xff\xff\xff\x05" + bytes(p.MAX_MESSAGE)
    with pytest.raises(RemoteProtocolError):
        decoded(endless, range(0, len(endless), 4096))


def test_headers_without_content_ask_for_little_memory() -> None:
    """A nest of large empty arrays, a few kilobytes of headers, takes some megabytes at most."""
    tracemalloc.start()
    try:
        assert decoded(b"\xdc\x02\x00" * 900) == []
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_memory_of_a_whole_message_is_bounded() -> None:
    """What is small on the wire and large in memory is refused before it is that."""
    row = b"\xdc\x02\x00" + b"\x80" * 512
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="arrays and maps"):
            decoded(b"\xdc\x02\x00" + row * 512)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_nesting_beyond_the_unpackers_limit_is_refused() -> None:
    """A nest without end is an error of the peer, not of ours."""
    with pytest.raises(RemoteProtocolError, match="StackError"):
        decoded(b"\x91" * 5000)


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (b"\xc1", "FormatError"),
        (b"\x81\x01\x02", "int"),  # a map key that is a number
        (b"\x81\xc4\x01a\x01", None),  # ... or bytes: no message has it
        (b"\xa1\xff", "utf-8"),
        (b"\xd4\x05\x00", "ext"),
        (b"\xc7\x00\x05", "extension type 5"),
        (msgpack.packb(msgpack.Timestamp(1)), "ext"),
        (b"\x82\xa1a\x01\xa1a\x02", "one key twice"),
        (b"\x81\xa1f\x82\xa1a\x01\xa1a\x01", "one key twice"),
    ],
    ids=lambda value: value.hex() if isinstance(value, bytes) else "",
)
def test_what_is_no_msgpack_of_ours_is_refused(stream: bytes, says: str | None) -> None:
    """Broken msgpack, keys of other types, double keys and extension types end in one error."""
    with pytest.raises(RemoteProtocolError, match=says):
        parse_message(decoded(stream)[0])


@given(st.binary(max_size=200), st.lists(st.integers(min_value=0), max_size=4))
def test_random_bytes_give_objects_or_one_error(stream: bytes, cuts: list[int]) -> None:
    """Random bytes never end in an error of another kind, in the codec or in the messages."""
    try:
        found = decoded(stream, cuts)
    except RemoteProtocolError:
        return
    for obj in found:
        with pytest.raises(RemoteProtocolError):
            parse_message(obj)


@given(messages, st.data())
def test_mutated_messages_give_messages_or_one_error(message: p.Message, data: Any) -> None:
    """A message with some bytes changed is a message, or one error, or incomplete."""
    stream = bytearray(pack(message))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, min(len(stream), 400) - 1))] = data.draw(
            st.integers(0, 255)
        )
    try:
        for obj in decoded(bytes(stream)):
            parse_message(obj)
    except RemoteProtocolError:
        pass


def test_too_large_a_message_is_found_before_it_is_sent() -> None:
    """A message that the peer would refuse for its size is an error here."""
    facts = {str(n): "a" * 4096 for n in range(256)}
    with pytest.raises(LocalProtocolError, match="Offer of 10"):
        pack(p.Offer("m1", "web1", "qemu", offer.regions, facts, 1, 1))


def test_kinds_of_connections_fit_a_short_string() -> None:
    """Each connection begins with a msgpack string of one byte of header, none within another."""
    for kind in (p.CONTROL, p.DATA):
        assert msgpack.packb(kind)[0] == 0xA0 | len(kind)
    assert not p.CONTROL.startswith(p.DATA)
    assert not p.DATA.startswith(p.CONTROL)


# --- page frames ---------------------------------------------------------------------------------

frames = st.builds(
    p.Frame,
    st.sampled_from([p.REQUEST, p.PAGES, p.ZERO, p.LOST_PAGES]),
    st.integers(0, 2**16 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, p.MAX_PAYLOAD),
)


def c_encode(frame: p.Frame) -> bytes:
    out = ffi.new("uint8_t[24]")
    lib.pc_frame_encode(out, *frame)
    return bytes(ffi.buffer(out))


def c_decode(header: bytes) -> p.Frame | None:
    fields = ffi.new("int64_t[5]")
    if lib.pc_frame_decode(header, fields) != 0:
        return None
    kind, number, page, count, payload = fields
    return p.Frame(kind, number, page % 2**64, count, payload)


def python_decode(header: bytes) -> p.Frame | None:
    try:
        return p.unpack_frame(header)
    except RemoteProtocolError:
        return None


@given(frames)
def test_frame_is_the_same_in_c_and_python(frame: p.Frame) -> None:
    """Both write the same 24 bytes and read back what was written."""
    header = p.pack_frame(frame)
    assert len(header) == p.FRAME_BYTES
    assert c_encode(frame) == header
    assert c_decode(header) == python_decode(header) == frame


@given(st.binary(min_size=24, max_size=24))
def test_random_headers_are_judged_alike(header: bytes) -> None:
    """C and Python refuse the same random bytes."""
    assert c_decode(header) == python_decode(header)


@given(frames, st.integers(0, 23), st.integers(0, 255))
def test_mutated_headers_are_judged_alike(frame: p.Frame, at: int, byte: int) -> None:
    """A header with one byte changed is refused by both, or is the same frame for both."""
    header = bytearray(p.pack_frame(frame))
    header[at] = byte
    assert c_decode(bytes(header)) == python_decode(bytes(header))


@pytest.mark.parametrize("at", [0, 2, 5, 14, 19])
def test_each_mark_is_checked_by_both(at: int) -> None:
    """A header is refused when any of its five marks is another byte."""
    good = p.pack_frame(p.Frame(p.PAGES, 1, 2, 1, 4096))
    for byte in set(range(256)) - {good[at]}:
        bad = good[:at] + bytes([byte]) + good[at + 1 :]
        assert c_decode(bad) is None
        assert python_decode(bad) is None


@pytest.mark.parametrize("kind", range(256))
def test_kinds_are_judged_alike(kind: int) -> None:
    """Only the four kinds there are pass, in both."""
    header = bytearray(p.pack_frame(p.Frame(p.ZERO, 0, 0, 1, 0)))
    header[1] = kind
    known = kind in (p.REQUEST, p.PAGES, p.ZERO, p.LOST_PAGES)
    assert (c_decode(bytes(header)) is not None) is known
    assert (python_decode(bytes(header)) is not None) is known


def test_payload_at_and_beyond_its_limit() -> None:
    """A payload of MAX_PAYLOAD passes and one byte more does not, in both."""
    for payload, passes in ((p.MAX_PAYLOAD, True), (p.MAX_PAYLOAD + 1, False), (2**32 - 1, False)):
        header = p.pack_frame(p.Frame(p.PAGES, 0, 0, 512, payload))
        assert (c_decode(header) is not None) is passes
        assert (python_decode(header) is not None) is passes


@pytest.mark.parametrize("length", [0, 23, 25])
def test_header_of_another_length_is_refused(length: int) -> None:
    """What does not have 24 bytes is no header."""
    with pytest.raises(RemoteProtocolError, match="24 bytes"):
        p.unpack_frame(bytes(length))


@given(st.lists(st.tuples(frames, st.binary(max_size=300)), max_size=6))
def test_captured_frames_are_plain_msgpack(captured: list[tuple[p.Frame, bytes]]) -> None:
    """Any msgpack library reads a captured stream of frames, payload and all."""
    stream = b"".join(
        c_encode(frame._replace(payload=len(payload))) + payload for frame, payload in captured
    )
    unpacker = msgpack.Unpacker()
    unpacker.feed(stream)
    assert list(unpacker) == [[*frame[:4], payload] for frame, payload in captured]


def test_a_data_connection_can_be_read_as_a_whole() -> None:
    """Kind, hello and frames of a captured connection are one msgpack stream."""
    hello = p.DataHello("m1", bytes(32), False)
    page = bytes(range(256)) * 16
    stream = msgpack.packb(p.DATA) + pack(hello)
    stream += p.pack_frame(p.Frame(p.PAGES, 0, 7, 1, 4096)) + page
    stream += p.pack_frame(p.Frame(p.ZERO, 0, 8, 100, 0))
    unpacker = msgpack.Unpacker()
    unpacker.feed(stream)
    kind, first, *rest = unpacker
    assert kind == p.DATA
    assert parse(first, p.DataHello) == hello
    assert rest == [[p.PAGES, 0, 7, 1, page], [p.ZERO, 0, 8, 100, b""]]
