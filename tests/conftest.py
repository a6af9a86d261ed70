# SPDX-License-Identifier: Apache-2.0
"""What all tests have: huge pages where the machine gives them, and the QEMUs to test with."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

NEWEST = Path(__file__).parent.parent / ".build/qemu/root"


HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")


@pytest.fixture(scope="session", autouse=True)
def huge_pages_reserved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Huge pages and their file system for the tests that want them, where root may; given back."""
    if os.geteuid() != 0 or not os.access(HUGE_PAGES, os.W_OK):
        yield
        return
    before = HUGE_PAGES.read_text()
    if int(before) < 192:
        HUGE_PAGES.write_text("192")
    folder = tmp_path_factory.mktemp("hugetlbfs")
    mounted = (
        subprocess.run(["mount", "-t", "hugetlbfs", "postcopyd-tests", folder]).returncode == 0
    )
    yield
    if mounted:
        subprocess.run(["umount", folder], check=True)
    HUGE_PAGES.write_text(before)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> None:
    """What a test with trio lacks is named too: pytest-trio skips anew, without the reason."""
    skipped = call.excinfo.value if call.excinfo else None
    if isinstance(skipped, pytest.skip.Exception) and not skipped.msg:
        reason = skipped.__context__
        while isinstance(reason, BaseExceptionGroup):
            reason = reason.exceptions[0]
        skipped.msg = str(reason)


def both_qemus() -> None:
    """The installed one and the newest that `make test` has unpacked, where none is named."""
    newest = NEWEST / "usr/bin/qemu-system-x86_64"
    if newest.exists() and "POSTCOPYD_QEMU" not in os.environ:
        firmware = [
            NEWEST / "usr/share/qemu",
            Path("/usr/share/seabios"),
            Path("/usr/lib/ipxe/qemu"),
        ]
        options = ",".join(f"-L,{folder}" for folder in firmware)
        os.environ["POSTCOPYD_QEMU"] = f"/usr/bin/qemu-system-x86_64:{newest},{options}"


both_qemus()  # now: a conftest.py below this one has tests for each
