# SPDX-License-Identifier: Apache-2.0
"""What the code can show of a guest, read from the code: the messages of each phase.

Finds the calls `show(...)` and `conclude(...)` and follows their `message` within the function;
what is filled in is a PLACE. Runs nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import postcopyd

PLACE = "\0"
PACKAGE = Path(postcopyd.__file__).parent


class Shown(NamedTuple):
    """A message with PLACEs; `phase` is empty where the phase stays as it is."""

    where: str
    phase: str
    message: str


def shown() -> list[Shown]:
    """Every message of a VM's status."""
    return [
        message
        for path in (*PACKAGE.glob("daemon/*.py"), PACKAGE / "sessions/vm.py", *_sessions())
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for message in _of(function, f"{path.relative_to(PACKAGE)}, {function.name}")
    ]


def _sessions() -> list[Path]:
    return sorted([*PACKAGE.glob("source/*.py"), *PACKAGE.glob("dest/*.py")])


def sentences() -> list[str]:
    """Every string of the package with something filled in, and every other one of some length."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant):
                found += _texts(node, {})
    return found


def _of(function: ast.AST, where: str) -> Iterator[Shown]:
    values = _values(function)
    for call in ast.walk(function):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("show", "conclude"):
            said = {keyword.arg: keyword.value for keyword in call.keywords}
            if "message" in said:
                phase = said.get("phase", ast.Constant(""))
                assert isinstance(phase, ast.Constant), where
                for message in _texts(said["message"], values):
                    yield Shown(where, str(phase.value), message)


def _values(function: ast.AST) -> dict[str, list[ast.expr]]:
    """What is assigned to each name; to one of a loop, what the function has put into mappings."""
    values: dict[str, list[ast.expr]] = {}
    put: list[ast.expr] = []
    loops: list[str] = []
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                values.setdefault(name, []).append(value)
            case ast.Assign(targets=[ast.Subscript()], value=value):
                put.append(value)
            case ast.For(target=ast.Tuple(elts=[_, ast.Name(id=name)])):
                loops.append(name)
    return values | dict.fromkeys(loops, put)


def _texts(node: ast.expr, values: dict[str, list[ast.expr]]) -> list[str]:
    """All texts that an expression may be."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(text) for text in product(*(_texts(part, values) for part in parts))]
        case ast.FormattedValue(value=inner):
            return _texts(inner, values)
        case ast.IfExp(body=one, orelse=other):
            return _texts(one, values) + _texts(other, values)
        case ast.BinOp(op=ast.Add(), left=left):
            return [text + PLACE for text in _texts(left, values)]
        case ast.Name(id=name) if name in values:
            assigned = [value for value in values[name] if _is_text(value)]
            return [text for value in assigned for text in _texts(value, values)] or [PLACE]
    return [PLACE]


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
