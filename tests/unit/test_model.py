# SPDX-License-Identifier: Apache-2.0
"""What people and programs see: the structs, the interface file, and who fills them in."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import cast

import pytest
from msgspec import to_builtins
from msgspec.structs import fields

import postcopyd
from postcopyd.control.methods import interface
from postcopyd.model import Memory, Result, Status
from postcopyd.records.schema import Record
from postcopyd.records.store import Store
from postcopyd.sessions.vm import Vm
from postcopyd.varlink.idl import Struct

PACKAGE = Path(postcopyd.__file__).parent
FIELDS = {field.name for field in fields(Status)}


def test_the_status_is_that_of_the_interface() -> None:
    """Field by field, but for `driver`, which this daemon does not tell."""
    declared = interface().types["VmStatus"]
    assert isinstance(declared, Struct)
    assert {field.encode_name for field in fields(Status)} == declared.fields.keys() - {"driver"}


def test_a_recorded_result_is_read_again() -> None:
    """As older versions recorded it too; one that cannot be read stops no daemon."""
    vm = Vm("web1", cast(Store, None), None)
    memory = Memory(1 << 20, 4096, 256, 0, 0, 0, 256, 0, 0, 3)
    shown = to_builtins(Result(event="completed", vm="web1", migration="m", memory=memory))
    known = {"vm": "web1", "role": "source", "phase": "drained"}
    about = {"ownership": "granted", "epoch": 1, "driver": "qemu", "socket": "", "pid": 0}
    record = {"version": 1, "started": 0, "about": {}, **about}
    vm.remember(cast(Record, record | {"status": known | {"result": shown}}))
    assert to_builtins(vm.status)["result"] == shown
    del shown["memory"]["lostPages"]
    vm.remember(cast(Record, record | {"status": known | {"result": shown}}))
    assert to_builtins(vm.status)["result"] == shown
    vm.remember(cast(Record, record | {"status": known | {"result": {"event": "lost"}}}))
    assert (vm.status.phase, vm.status.result) == ("drained", None)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_only_what_is_there_is_shown(path: Path) -> None:
    """Whoever changes a VM's status names fields of it."""
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("show", "conclude"):
            named = {keyword.arg for keyword in call.keywords if keyword.arg}
            assert named <= FIELDS | {"counted_as"}, f"line {call.lineno}"
