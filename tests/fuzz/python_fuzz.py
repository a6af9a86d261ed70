# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing of what Python parses of a peer: control messages, and control calls.

`python_fuzz.py TARGET FOLDER --seconds N` mutates the inputs in FOLDER and keeps there what reaches
a line of this package in a new way; `--merge` rewrites FOLDER with as few as reach the same. An
input that is answered by anything but the errors which it may be answered by is written beside
FOLDER as `TARGET-crash`, and ends this with status 1. A loop of a page and the interpreter's own
tracing, because the parsers are small and this way it runs wherever the tests do.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from postcopyd._native import ffi, lib

from postcopyd import handover as h
from postcopyd import protocol as p
from postcopyd.config import options
from postcopyd.control import methods
from postcopyd.errors import PostcopydError
from postcopyd.net import codec as bytes_of
from postcopyd.net.codec import Codec, pack, parse_message
from postcopyd.varlink import idl, server

STATES: list[h.State] = [*h.Source, *h.Destination]
MOST = 2000  # bytes of an input
VARIES = re.compile(r"[\"'`].*?[\"'`]|\d+|\\u....")

# --- targets: each ends normally, whatever it is given, and says by the way what came of it


def control_stream(data: bytes) -> Iterator[str]:
    """What a daemon does with the bytes of a control connection, in any state of either role."""
    if len(data) < 2:
        return
    machine = h.Machine(STATES[data[0] % len(STATES)])
    step, data = max(data[1], len(data) // 32, 1), data[2:]
    codec = Codec()
    try:
        for at in range(0, len(data), step):
            codec.feed(data[at : at + step])
            for obj in codec.objects():
                message = parse_message(obj)
                yield type(message).__name__
                # What was understood can be said again, and means the same.
                again = Codec()
                again.feed(pack(message))
                assert [parse_message(one) for one in again.objects()] == [message]
                machine.received(message)
                yield machine.state.name
    except p.RemoteProtocolError as error:
        yield str(error).partition(" message: ")[2] or str(error)
    frame_header(data)


def frame_header(data: bytes) -> None:
    """A page frame's header is judged by Python as by C."""
    if len(data) < p.FRAME_BYTES:
        return
    header, fields = data[: p.FRAME_BYTES], ffi.new("int64_t[5]")
    good = lib.pc_frame_decode(header, fields) == 0
    try:
        frame = p.unpack_frame(header)
    except p.RemoteProtocolError:
        assert not good
    else:
        assert good
        assert list(fields) == [n - (1 << 64) if n >> 63 else n for n in frame]
        assert p.pack_frame(frame) == header


def control_call(data: bytes) -> Iterator[str]:
    """What the control socket does with one call, up to where the daemon is asked."""
    try:
        message = server.parse_message(data)
        handler, parameters = SERVICE.prepare(message)
        answer = handler(server.Call(message["method"], parameters, PEER, nowhere))
        try:
            answer.send(None)  # nothing in it waits
        except StopIteration as end:
            server._reply(end.value)
            yield message["method"]
    except server.Malformed as error:
        yield str(error)
    except server.VarlinkError as error:
        server._reply(error.parameters, error=error.name)
        yield error.name


class NoVms:
    """A daemon that has nothing."""

    def __getattr__(self, name: str) -> Any:
        async def refuse(*given: Any) -> None:
            raise PostcopydError(f"{name} of {given!r}", "NoSuchVm")

        return refuse

    def status(self, name: str) -> Any:
        raise PostcopydError(f"no {name}", "NoSuchVm")

    watch = status

    def list(self) -> list[Any]:
        return []


async def nowhere(_: Any) -> None: ...


SERVICE = methods.service(NoVms())
PEER = server.Peer(1, 0, 0, frozenset())
Target = Callable[[bytes], Iterator[str]]
TARGETS: dict[str, Target] = {"control": control_stream, "call": control_call}
TRACED = {module.__file__ for module in (options, methods, h, p, bytes_of, server, idl)}

# --- where to begin


def value_of(interface: idl.Interface, kind: idl.Type) -> Any:
    """A value of a type of the interface."""
    match kind:
        case idl.Maybe(of):
            return value_of(interface, of)
        case idl.Named(name):
            return value_of(interface, interface.types[name])
        case idl.Enum(names):
            return names[0]
        case idl.Scalar(name):
            return {"string": "h:1", "int": 1, "bool": True, "float": 1.5}[name]
    return {}


def samples(target: str) -> Iterator[bytes]:
    """One input of each kind that there is."""
    if target == "call":
        for name, interface in SERVICE.interfaces.items():
            for method, about in interface.methods.items():
                fields = about.input.fields.items()
                given = {field: value_of(interface, kind) for field, kind in fields}
                call = {"method": f"{name}.{method}", "parameters": given, "more": True}
                yield json.dumps(call).encode()
        return
    region = p.RegionOffer("ram", 8, 4096)
    faults = p.Faults(1, 1.0, 2.0, 3.0, {"16": 1})
    messages: list[p.Message] = [
        p.Hello(1, ["a"], "b", "c"),
        p.Offer("m", "v", "process", [region, region], {"a": "b"}, 2, 1),
        p.Checked(["no"]),
        p.Queued(3),
        p.Ready(bytes(32)),
        p.Device(b"state"),
        p.DeviceEnd(5),
        p.Grant(1),
        p.Declined("no"),
        p.Progress(1, 2, faults),
        p.Drained(8, 1, 7, 1, 0, 1, 0, 1.0, faults),
        p.Resume("m", "v", 1),
        p.Pass(1),
        p.Stale(0, 0, 8, b"\xff"),
        p.Have(0, 0, 8, b"\xff"),
        p.Cancel("no"),
        p.Error("Name", "why"),
        *(
            kind()
            for kind in (
                p.Serving,
                p.Passed,
                p.Handover,
                p.Loaded,
                p.Ran,
                p.Acknowledged,
                p.Keepalive,
            )
        ),
    ]
    for message in messages:
        for number, state in enumerate(STATES):
            if h.Received(type(message)) in h.TABLES[type(state)][state]:
                yield bytes([number, 255]) + pack(message)
                break
        else:
            yield bytes([0, 7]) + pack(message)
    yield bytes(2) + p.pack_frame(p.Frame(p.PAGES, 0, 0, 1, 4096))


# --- the loop


class Coverage:
    """Lines that were gone from and to, once or more often, of the parsers' modules; and how
    what the target says begins, without its numbers and what is quoted: much is parsed in C."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self._counts: dict[Any, int] = {}
        self._last: dict[CodeType, int] = {}

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in TRACED:
            return None
        edge = (code, self._last.get(code, 0), frame.f_lineno)
        self._counts[edge] = self._counts.get(edge, 0) + 1
        self._last[code] = frame.f_lineno
        return self._trace

    def of(self, target: Target, data: bytes) -> set[Any]:
        """What one input reaches; whatever the target raises passes."""
        self._counts, self._last = {}, {}
        sys.settrace(self._trace)
        try:
            said = {" ".join(VARIES.sub("", one).split()[:2]) for one in target(data)}
        finally:
            sys.settrace(None)
        return said | {(edge, count > 1) for edge, count in self._counts.items()}


def mutated(corpus: list[bytes], draw: random.Random) -> bytes:
    """One of the corpus, changed in one to four places."""
    data = bytearray(draw.choice(corpus))
    for _ in range(draw.randint(1, 4)):
        at, end = sorted(draw.randint(0, len(data)) for _ in range(2))
        match draw.randrange(8):
            case 0 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            case 1 if data:
                data[at % len(data)] = draw.choice((0, 1, 0x7F, 0x80, 0xC0, 0xFF, 0xDF, 0xDB, 0x22))
            case 2:
                del data[at : min(end, at + draw.choice((1, 2, 8, 64)))]
            case 3:
                data[at:at] = draw.randbytes(draw.choice((1, 2, 4, 8)))
            case 4:
                data[at:at] = data[at:end]
            case 5:
                other = draw.choice(corpus)
                data[at:] = other[draw.randint(0, len(other)) :]
            case 6:
                other = draw.choice(corpus)
                data += other[2:] if draw.random() < 0.8 else other
            case _:
                digits = str(
                    draw.choice((-1, 0, 2**31, 2**63, 2**64, 10**400, "1e999", "{}", "[]"))
                )
                data[at:at] = digits.encode()
    return bytes(data[:MOST])


def fuzz(name: str, folder: Path, seconds: float, seed: int) -> tuple[int, int]:
    """Returns how many inputs were tried, and how many were new. Raises what a target raised."""
    target, coverage, draw = TARGETS[name], Coverage(), random.Random(seed)
    corpus, tried, new = [], 0, 0
    given = [path.read_bytes() for path in sorted(folder.iterdir())] if folder.is_dir() else []

    def attempt(data: bytes, keep: bool) -> None:
        nonlocal tried, new
        tried += 1
        try:
            found = coverage.of(target, data)
        except BaseException:
            folder.with_name(f"{name}-crash").write_bytes(data)
            raise
        if not found <= coverage.seen:
            coverage.seen |= found
            corpus.append(data)
            if keep:
                new += 1
                (folder / sha256(data).hexdigest()[:16]).write_bytes(data)

    for data in given:
        attempt(data, False)
    folder.mkdir(parents=True, exist_ok=True)
    for data in samples(name):
        attempt(data, True)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        attempt(mutated(corpus, draw), True)
    return tried, new


def merge(name: str, folder: Path) -> None:
    """Leaves the small inputs that reach what all reach."""
    target, coverage = TARGETS[name], Coverage()
    paths = sorted(folder.iterdir(), key=lambda path: (path.stat().st_size, path.name))
    for path in paths:
        found = coverage.of(target, path.read_bytes())
        if found <= coverage.seen:
            path.unlink()
        coverage.seen |= found


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("target", choices=TARGETS)
    words.add_argument("folder", type=Path)
    words.add_argument("--seconds", type=float, default=0)
    words.add_argument("--seed", type=int, default=time.time_ns())
    words.add_argument("--merge", action="store_true")
    given = words.parse_args()
    if given.merge:
        merge(given.target, given.folder)
        return 0
    try:
        tried, new = fuzz(given.target, given.folder, given.seconds, given.seed)
    except Exception:
        traceback.print_exc()
        print(f"the input is in {given.folder.with_name(given.target + '-crash')}", file=sys.stderr)
        return 1
    print(f"{given.target}: {tried} inputs tried, {new} new, seed {given.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
