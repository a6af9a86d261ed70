# SPDX-License-Identifier: Apache-2.0
"""What people and programs see: the structs, the interface file, and who fills them in."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from msgspec.structs import fields

import postcopyd
from postcopyd.control.methods import interface
from postcopyd.model import Status
from postcopyd.varlink.idl import Struct

PACKAGE = Path(postcopyd.__file__).parent
FIELDS = {field.name for field in fields(Status)}


def test_the_status_is_that_of_the_interface() -> None:
    """Field by field, but for `driver`, which this daemon does not tell."""
    declared = interface().types["VmStatus"]
    assert isinstance(declared, Struct)
    assert {field.encode_name for field in fields(Status)} == declared.fields.keys() - {"driver"}


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_only_what_is_there_is_shown(path: Path) -> None:
    """Whoever changes a VM's status names fields of it."""
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("show", "conclude"):
            named = {keyword.arg for keyword in call.keywords if keyword.arg}
            assert named <= FIELDS | {"counted_as"}, f"line {call.lineno}"
