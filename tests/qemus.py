# SPDX-License-Identifier: Apache-2.0
"""The versions of QEMU to test with: the installed one and the newest that `make test` has
unpacked, where $POSTCOPYD_QEMU names none."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from postcopyd.demo.initramfs import MissingPartError
from postcopyd.demo.qemu_guest import QemuBinary, find_qemus

NEWEST = Path(__file__).parent.parent / ".build/qemu/root"


def both_qemus() -> None:
    newest = NEWEST / "usr/bin/qemu-system-x86_64"
    if newest.exists() and "POSTCOPYD_QEMU" not in os.environ:
        firmware = [
            NEWEST / "usr/share/qemu",
            Path("/usr/share/seabios"),
            Path("/usr/lib/ipxe/qemu"),
        ]
        options = ",".join(f"-L,{folder}" for folder in firmware)
        os.environ["POSTCOPYD_QEMU"] = f"/usr/bin/qemu-system-x86_64:{newest},{options}"


both_qemus()
QEMUS: list[QemuBinary] = []
with suppress(MissingPartError):
    QEMUS = find_qemus()


def newest() -> QemuBinary:
    """Raises MissingPartError where there is none."""
    return max(QEMUS or find_qemus(), key=lambda qemu: qemu.version)


def each(versions: list[Any]) -> list[Any]:
    """A parameter for each: `make test` tries the first, and `make test-long` the others. Without
    any there is one None, for which a fixture says what is missing."""
    return [
        pytest.param(version, id=str(version), marks=[pytest.mark.long] if number else [])
        for number, version in enumerate(versions or [None])
    ]


EACH_QEMU = pytest.mark.parametrize("qemu", each(QEMUS))
