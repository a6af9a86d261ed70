# SPDX-License-Identifier: Apache-2.0
"""Varlink interface files: parsing them, and checking JSON values against them.

Owns the grammar and the mapping of types to JSON of UAPI.20 (the Varlink specification). Knows
nothing of sockets, messages or of what any interface is for: text and values in, errors out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# What fits the combined signed and unsigned 64-bit range, as the specification recommends.
INT_MIN, INT_MAX = -(2**63), 2**64 - 1

_NAME = re.compile(r"[A-Z][A-Za-z0-9]*\Z")
_FIELD = re.compile(r"[A-Za-z](_?[A-Za-z0-9])*\Z")
_INTERFACE = re.compile(r"[A-Za-z](-*[A-Za-z0-9])*(\.[A-Za-z0-9](-*[A-Za-z0-9])*)+\Z")
_TOKEN = re.compile(
    r"(?P<space>\s+)|#(?P<comment>[^\r\n]*)|(?P<token>->|\[string\]|\[\]|[?():,]|[A-Za-z0-9._-]+)"
)
_SCALARS = frozenset({"bool", "int", "float", "string", "object", "any"})


class InterfaceError(ValueError):
    """An interface file that does not follow the grammar; the text names the line."""


class InvalidValue(ValueError):
    """A value that its declared type does not allow; `parameter` is the dotted path to it."""

    def __init__(self, parameter: str) -> None:
        super().__init__(parameter)
        self.parameter = parameter


@dataclass(frozen=True)
class Scalar:
    """`bool`, `int`, `float`, `string`, `object` or `any`."""

    name: str


@dataclass(frozen=True)
class Named:
    """A type of the same interface, by its name."""

    name: str


@dataclass(frozen=True)
class Enum:
    """One of some names."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Array:
    """A list of values of one type."""

    of: Type


@dataclass(frozen=True)
class Map:
    """Values of one type by string."""

    of: Type


@dataclass(frozen=True)
class Maybe:
    """A value, or null, or nothing."""

    of: Type


@dataclass(frozen=True)
class Struct:
    """Named fields; `docs` holds the comment in front of each."""

    fields: Mapping[str, Type]
    docs: Mapping[str, str] = field(default_factory=dict)


Type = Scalar | Named | Enum | Array | Map | Maybe | Struct


@dataclass(frozen=True)
class Method:
    """What a method takes and gives."""

    input: Struct
    output: Struct


@dataclass(frozen=True)
class Interface:
    """One parsed interface file: `text` as it was written, members by name, comments in `docs`."""

    name: str
    text: str
    types: Mapping[str, Struct | Enum]
    methods: Mapping[str, Method]
    errors: Mapping[str, Struct]
    docs: Mapping[str, str]

    def check(self, struct: Struct, value: Mapping[str, Any], path: str = "") -> dict[str, Any]:
        """The fields of `value` that are not null, each checked against its declared type.

        Raises InvalidValue for a field that is not declared, that is missing or of another type.
        """
        for name in value:
            if name not in struct.fields:
                raise InvalidValue(path + name)
        checked = {}
        for name, kind in struct.fields.items():
            item = value.get(name)
            if item is not None:
                checked[name] = self._value(kind, item, path + name)
            elif not isinstance(kind, Maybe):
                raise InvalidValue(path + name)
        return checked

    def _value(self, kind: Type, value: Any, path: str) -> Any:
        match kind:
            case Maybe(of):
                return None if value is None else self._value(of, value, path)
            case Named(name):
                return self._value(self.types[name], value, path)
            case Struct() if isinstance(value, dict):
                return self.check(kind, value, path + ".")
            case Enum(names) if isinstance(value, str) and value in names:
                return value
            case Array(of) if isinstance(value, list):
                return [self._value(of, item, f"{path}[{i}]") for i, item in enumerate(value)]
            case Map(of) if isinstance(value, dict):
                return {key: self._value(of, item, f"{path}.{key}") for key, item in value.items()}
            case Scalar(name) if _is_scalar(name, value):
                return value
        raise InvalidValue(path)


def _is_scalar(name: str, value: Any) -> bool:
    # In Python a bool is an int; in JSON it is not.
    match name:
        case "bool":
            return isinstance(value, bool)
        case "int":
            is_int = isinstance(value, int) and not isinstance(value, bool)
            return is_int and INT_MIN <= value <= INT_MAX
        case "float":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "string":
            return isinstance(value, str)
        case "object":
            return isinstance(value, dict)
        case _:
            return value is not None


class _Parser:
    """Recursive descent over the tokens; every comment is kept for the token that follows it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(_tokens(text))
        self._at = 0

    def fail(self, wanted: str) -> InterfaceError:
        _, found, where = self._tokens[min(self._at, len(self._tokens) - 1)]
        line = self._text.count("\n", 0, where) + 1
        return InterfaceError(f"line {line}: {wanted} wanted, {found or 'the end'!r} found")

    def peek(self) -> str:
        return self._tokens[self._at][1]

    def doc(self) -> str:
        return self._tokens[self._at][0]

    def accept(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self._at += 1
        return True

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise self.fail(repr(token))

    def word(self, pattern: re.Pattern[str], what: str) -> str:
        token = self.peek()
        if not pattern.match(token):
            raise self.fail(what)
        self._at += 1
        return token

    def type(self, nullable: bool = True) -> Type:
        if nullable and self.accept("?"):
            return Maybe(self.type(nullable=False))
        if self.accept("[]"):
            return Array(self.type())
        if self.accept("[string]"):
            return Map(self.type())
        if self.peek() == "(":
            return self.struct_or_enum()
        if self.peek() in _SCALARS:
            self._at += 1
            return Scalar(self._tokens[self._at - 1][1])
        return Named(self.word(_NAME, "a type"))

    def struct_or_enum(self) -> Struct | Enum:
        self.expect("(")
        fields: dict[str, Type] = {}
        docs: dict[str, str] = {}
        if self.accept(")"):
            return Struct(fields)
        while True:
            doc = self.doc()
            name = self.word(_FIELD, "a field")
            if name in docs:
                raise self.fail(f"one field named {name!r}")
            # The first entry says which it is: all have a type, or none has.
            if self.peek() == ":" and len(fields) == len(docs):
                self.expect(":")
                fields[name] = self.type()
            elif fields:
                raise self.fail("':'")
            docs[name] = doc
            if not self.accept(","):
                break
        self.expect(")")
        return Struct(fields, docs) if fields else Enum(tuple(docs))

    def struct(self) -> Struct:
        parsed = self.struct_or_enum()
        if isinstance(parsed, Enum):
            raise self.fail("fields with types")
        return parsed


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """(comment before it, token, offset) of each token, and an empty token at the end."""
    at = 0
    comments: list[str] = []
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            line = text.count("\n", 0, at) + 1
            raise InterfaceError(f"line {line}: {text[at]!r} has no meaning here")
        if found["comment"] is not None:
            comments.append(found["comment"].strip())
        elif found["token"] is not None:
            yield " ".join(comments), found["token"], at
            comments = []
        at = found.end()
    yield " ".join(comments), "", at


def _named(kind: Type) -> Iterator[str]:
    match kind:
        case Named(name):
            yield name
        case Array(of) | Map(of) | Maybe(of):
            yield from _named(of)
        case Struct(fields):
            for inner in fields.values():
                yield from _named(inner)


def parse_interface(text: str) -> Interface:
    """The interface that `text` defines. Raises InterfaceError, which names the line."""
    parser = _Parser(text)
    docs = {"": parser.doc()}
    parser.expect("interface")
    interface = parser.word(_INTERFACE, "an interface name")
    types: dict[str, Struct | Enum] = {}
    methods: dict[str, Method] = {}
    errors: dict[str, Struct] = {}
    while parser.peek():
        doc = parser.doc()
        keyword = parser.word(re.compile(r"(type|method|error)\Z"), "type, method or error")
        name = parser.word(_NAME, "a name")
        if name in docs:
            raise parser.fail(f"one member named {name!r}")
        docs[name] = doc
        if keyword == "type":
            types[name] = parser.struct_or_enum()
        elif keyword == "error":
            errors[name] = parser.struct()
        else:
            given = parser.struct()
            parser.expect("->")
            methods[name] = Method(given, parser.struct())
    parsed = Interface(interface, text, types, methods, errors, docs)
    structs = [*types.values(), *errors.values()]
    structs += [part for method in methods.values() for part in (method.input, method.output)]
    for missing in {name for part in structs for name in _named(part)} - set(types):
        raise InterfaceError(f"type {missing} is used and nowhere defined")
    return parsed
