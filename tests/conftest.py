# SPDX-License-Identifier: Apache-2.0
"""What tests share: how a missing part of the machine is named, and the QEMUs to test with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

NEWEST = Path(__file__).parent.parent / ".build/qemu/root"


def missing(what: str) -> NoReturn:
    """This machine lacks something that the test is about: a failure on CI, a skip elsewhere."""
    if os.environ.get("CI"):
        pytest.fail(f"this machine lacks {what}")
    pytest.skip(f"this machine lacks {what}")


def pytest_configure() -> None:
    """Both QEMUs, the installed one and the newest that `make test` has unpacked."""
    newest = NEWEST / "usr/bin/qemu-system-x86_64"
    if newest.exists() and "POSTCOPYD_QEMU" not in os.environ:
        firmware = [NEWEST / "usr/share/qemu", Path("/usr/share/seabios"), Path("/usr/lib/ipxe/qemu")]
        options = ",".join(f"-L,{folder}" for folder in firmware)
        os.environ["POSTCOPYD_QEMU"] = f"/usr/bin/qemu-system-x86_64:{newest},{options}"
