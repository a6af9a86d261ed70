# SPDX-License-Identifier: Apache-2.0
"""Turns messages into bytes and back: msgpack, one map for each, within the limits of protocol.py.
No I/O.

`Codec` belongs to one direction of one connection and knows no messages; `pack` and `parse` know
their types.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

import msgpack
from msgspec import Struct, ValidationError, convert, to_builtins

from postcopyd.protocol import (
    DEVICE_CHUNK,
    MAX_CONTAINERS,
    MAX_ITEMS,
    MAX_MESSAGE,
    MAX_STRING,
    AnyMessage,
    LocalProtocolError,
    RemoteProtocolError,
)

T = TypeVar("T")


class Codec:
    """Turns the bytes of one direction of one connection into msgpack objects.

    `feed` takes what was received and `objects` gives what is complete; call them in turn. Bytes
    beyond a complete object are kept. Raises RemoteProtocolError for bytes that are no msgpack, for
    a map that has a key twice, for extension types, and beyond the limits of protocol.py; after
    that the connection is useless. `room` is how many bytes the next object may have, `first` for
    the first one.
    """

    def __init__(self, first: int = MAX_MESSAGE) -> None:
        self.room = first
        self._unpacker = msgpack.Unpacker(
            raw=False,
            strict_map_key=True,
            object_pairs_hook=self._map,
            list_hook=self._counted,
            ext_hook=_no_extension,
            max_buffer_size=0,  # checked below: what is legal must not depend on the chunks
            max_str_len=MAX_STRING,
            max_bin_len=DEVICE_CHUNK,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
        self._fed = 0
        self._begin = 0  # where the object begins that is not complete yet, counted as _fed
        self._containers = 0  # complete ones in that object

    def feed(self, data: bytes) -> None:
        self._fed += len(data)
        self._unpacker.feed(data)

    def objects(self) -> Iterator[Any]:
        while True:
            try:
                obj = self._unpacker.unpack()
            except msgpack.exceptions.OutOfData:
                self._limit(self._fed)
                return
            except (ValueError, msgpack.exceptions.UnpackException) as error:
                # Also bad UTF-8, map keys that are not strings, nesting beyond msgpack's limit.
                why = str(error) or type(error).__name__
                raise RemoteProtocolError(
                    f"the peer sent what is no msgpack message: {why}"
                ) from None
            end = self._unpacker.tell()
            self._limit(end)
            self._begin, self._containers, self.room = end, 0, MAX_MESSAGE
            yield obj

    @property
    def beyond(self) -> int:
        """Bytes that were fed and belong to no complete object."""
        return self._fed - self._begin

    def _counted(self, container: T) -> T:
        self._containers += 1
        if self._containers > MAX_CONTAINERS:
            raise ValueError(f"more than {MAX_CONTAINERS} arrays and maps in one")
        return container

    def _map(self, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a map has one key twice")
        return self._counted(found)

    def _limit(self, end: int) -> None:
        if end - self._begin > self.room:
            raise RemoteProtocolError(
                f"the peer sent a message of more than {self.room} bytes"
            ) from None


def _no_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code}")


def pack(message: Struct) -> bytes:
    """The bytes of a message or of a data connection's first object.

    Raises LocalProtocolError when it is larger than the peer would take.
    """
    packed: bytes = msgpack.packb(to_builtins(message, builtin_types=(bytes,)))
    if len(packed) > MAX_MESSAGE:
        raise LocalProtocolError(
            f"a {type(message).__name__} of {len(packed)} bytes is more than a message may have, "
            f"{MAX_MESSAGE}"
        )
    return packed


def parse(obj: Any, kind: type[T]) -> T:
    """Checks a received object against a type of protocol.py. Raises RemoteProtocolError."""
    try:
        # bytes are a type of their own: msgspec would take Base64 text for them, as JSON needs.
        return convert(obj, kind, builtin_types=(bytes,))
    except ValidationError as error:
        tag = obj.get("type") if isinstance(obj, dict) else None
        what = tag if isinstance(tag, str) else type(obj).__name__
        raise RemoteProtocolError(
            f"the peer sent a bad {what!r:.32} message: {error!s:.200}"
        ) from None


def parse_message(obj: Any) -> AnyMessage:
    return parse(obj, AnyMessage)  # type: ignore[arg-type]  # a union is no type to mypy


def other_program(first: bytes, *, tls: bool) -> str:
    """Which program answered with these bytes, if it is plainly not postcopyd; "" if that cannot be
    said. `tls`: the client began with TLS."""
    known = {b"HTTP/": "an HTTP server", b"SSH-": "an SSH server"}
    for beginning, what in known.items():
        if first.startswith(beginning):
            return what
    if first[:1] in (b"\x15", b"\x16") and first[1:2] == b"\x03":  # records of TLS
        return "" if tls else "another program, with TLS,"
    line = first.split(b"\n")[0].rstrip(b"\r")
    if len(line) >= 4 and all(0x20 <= byte < 0x7F for byte in line):
        return f"another program (it says {line.decode()[:60]!r})"
    return ""
