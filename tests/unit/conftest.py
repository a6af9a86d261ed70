# SPDX-License-Identifier: Apache-2.0
"""What several files of unit tests have: clocks that jump only when nothing moves, and the program
that speaks to libvirt, without one."""

from __future__ import annotations

import runpy
import sys
from types import ModuleType
from typing import Any

import pytest
from patient import Clock, patient_clock
from session_faults import made_clock

from postcopyd.vmm.libvirt import calls


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of a world of session_world.py, for each test with both sessions."""
    return made_clock(monkeypatch)


@pytest.fixture
def autojump_clock() -> Clock:
    """In place of pytest-trio's, which takes a thread that waits for a core for one that waits."""
    return patient_clock()


CODE = 38  # of all errors of the libvirt that is not there
CONSTANTS = {
    "VIR_ERR_NO_DOMAIN": 42,
    "VIR_ERR_OPERATION_INVALID": 55,
    "VIR_ERR_CPU_INCOMPATIBLE": CODE,
    "VIR_CPU_COMPARE_IDENTICAL": 1,
    "VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE": 1,
}


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The helper's names, with modules in place of libvirt's binding."""
    for name in ("libvirt", "libvirt_qemu"):
        binding: Any = ModuleType(name)
        vars(binding).update(CONSTANTS)
        binding.libvirtError = type(
            "libvirtError", (Exception,), {"get_error_code": lambda _: CODE}
        )
        monkeypatch.setitem(sys.modules, name, binding)
    return runpy.run_path(str(calls.HELPER))


@pytest.fixture
def restoring(helper: dict[str, Any]) -> dict[str, Any]:
    """The same of its part that makes domains which wait."""
    return runpy.run_path(str(calls.HELPER.with_name("restoring.py")))
