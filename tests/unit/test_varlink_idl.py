# SPDX-License-Identifier: Apache-2.0
"""The interface parser: what it takes, what it refuses, and values held against their types."""

from __future__ import annotations

from typing import Any

import pytest

from postcopyd.varlink.idl import InterfaceError, InvalidValue, parse_interface

EVERYTHING = """# Top.
interface org.example.all-kinds
type Kind (one, two, three)
type T (
  # A flag.
  b: bool, i: int, f: float, s: string, o: object, a: any, e: (x, y), k: Kind,
  t: (n: int), l: []string, m: [string]int, set: [string](), q: ?string, ql: ?[](n: int), w: []?int
)
# Does it.
method M(t: T) -> ()
error E ()
"""


def test_every_type_parses() -> None:
    """Every type of the grammar parses, with the comments in front of members and fields."""
    interface = parse_interface(EVERYTHING)
    assert interface.name == "org.example.all-kinds"
    assert len(interface.types["T"].fields) == 15
    assert interface.docs == {"": "Top.", "Kind": "", "T": "", "M": "Does it.", "E": ""}
    assert interface.types["T"].docs["b"] == "A flag."


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "interface"),
        ("interface test", "an interface name"),
        ("interface a.b\nmethod m() -> ()", "a name"),
        ("interface a.b\nmethod M()", "'->'"),
        ("interface a.b\nmethod M(a) -> ()", "fields with types"),
        ("interface a.b\ntype T (a: int, b)", "':'"),
        ("interface a.b\ntype T (a, b: int)", "wanted, ':' found"),
        ("interface a.b\ntype T (a: ??int)", "a type"),
        ("interface a.b\ntype T (a: int, a: int)", "one field named 'a'"),
        ("interface a.b\ntype T (a__b: int)", "a field"),
        ("interface a.b\ntype T (a: U)", "U is used"),
        ("interface a.b\nmethod M() -> ()\nerror M ()", "one member named 'M'"),
        ("interface a.b\ntype T (a: int", "')'"),
        ("interface a.b\n!", "line 2: '!'"),
    ],
)
def test_a_broken_interface_is_refused(text: str, says: str) -> None:
    """What the grammar does not allow is refused, with what was wanted."""
    with pytest.raises(InterfaceError) as caught:
        parse_interface(text)
    assert says in str(caught.value)


WHOLE = {"b": True, "i": 1, "f": 1, "s": "", "o": {"z": 1}, "a": [None], "e": "x", "k": "two"}
WHOLE |= {"t": {"n": 1}, "l": ["a"], "m": {"k": 2}, "set": {"k": {}}, "w": [1, None]}


def test_values_are_checked_against_their_types() -> None:
    """A value of every type passes, and nulls of nullable fields are left out."""
    interface = parse_interface(EVERYTHING)
    checked = interface.check(interface.methods["M"].input, {"t": {**WHOLE, "q": None}})
    assert checked == {"t": WHOLE}


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"b": 1}, "t.b"),
        ({"i": True}, "t.i"),
        ({"i": 1.0}, "t.i"),
        ({"i": 2**64}, "t.i"),
        ({"f": "1"}, "t.f"),
        ({"s": 1}, "t.s"),
        ({"o": []}, "t.o"),
        ({"a": None}, "t.a"),
        ({"e": "z"}, "t.e"),
        ({"e": []}, "t.e"),
        ({"k": "four"}, "t.k"),
        ({"t": {}}, "t.t.n"),
        ({"l": {}}, "t.l"),
        ({"l": ["a", 1]}, "t.l[1]"),
        ({"m": {"k": "v"}}, "t.m.k"),
        ({"set": {"k": {"x": 1}}}, "t.set.k.x"),
        ({"ql": [{"n": ""}]}, "t.ql[0].n"),
        ({"new": 1}, "t.new"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], path: str) -> None:
    """A value of another type, or of no declared field, is refused with the path to it."""
    interface = parse_interface(EVERYTHING)
    with pytest.raises(InvalidValue) as caught:
        interface.check(interface.methods["M"].input, {"t": {**WHOLE, **change}})
    assert caught.value.parameter == path
