# SPDX-License-Identifier: Apache-2.0
"""The versions of QEMU to test with: the installed one and the newer ones that `make test` has
unpacked (tools/newest-qemu), where $POSTCOPYD_QEMU names none."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from postcopyd.demo.initramfs import MissingPartError
from postcopyd.demo.qemu_guest import QemuBinary, find_qemus

BUILD = Path(__file__).parent.parent / ".build"


def name_qemus() -> None:
    """In $POSTCOPYD_QEMU, for all who look there."""
    if "POSTCOPYD_QEMU" in os.environ:
        return
    named = [shutil.which("qemu-system-x86_64") or ""]
    root = BUILD / "qemu/root"  # which has no firmware of its own
    firmware = [f"{root}/usr/share/qemu", "/usr/share/seabios", "/usr/lib/ipxe/qemu"]
    options = ",".join(f"-L,{folder}" for folder in firmware)
    named.append(f"{root}/usr/bin/qemu-system-x86_64,{options}")
    named.append(f"{BUILD}/sid/qemu-system-x86_64")
    os.environ["POSTCOPYD_QEMU"] = ":".join(filter(None, named))


name_qemus()
QEMUS: list[QemuBinary] = []
with suppress(MissingPartError):
    QEMUS = find_qemus()


def module_folder(qemu: Path | str) -> str:
    """$QEMU_MODULE_DIR for one that is unpacked: what it loads for devices like virtio-vga. Those
    of another build it does not take."""
    return str(Path(qemu).parent.parent / "lib/x86_64-linux-gnu/qemu")


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
