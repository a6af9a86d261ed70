# SPDX-License-Identifier: Apache-2.0
"""The versions of QEMU that guests are booted with (conftest.py names them)."""

from __future__ import annotations

from typing import Any

import pytest

from postcopyd.demo import qemu_guest as q

QEMUS = q.find_qemu()


def each(versions: list[Any]) -> list[Any]:
    """A parameter for each: `make test` tries the first, and `make test-long` the others. Without
    any there is one None, for which a fixture says what is missing."""
    return [
        pytest.param(version, id=str(version), marks=[pytest.mark.long] if number else [])
        for number, version in enumerate(versions or [None])
    ]


EACH_QEMU = pytest.mark.parametrize("qemu", each(QEMUS))
