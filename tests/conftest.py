# SPDX-License-Identifier: Apache-2.0
"""What all tests have: huge pages where the machine gives them, and the QEMUs to test with."""

from __future__ import annotations

import fcntl
import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import hypothesis
import pytest
from postcopyd._native import lib

from postcopyd.host import kernel

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("postcopyd", deadline=None)
hypothesis.settings.load_profile("postcopyd")

HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
HUGE_PAGES_WANTED = 256
LOCK = "/run/lock/postcopyd-tests"


@contextmanager
def huge_pages() -> Iterator[None]:
    """Enough of them for all processes of a test run, who hold one lock together; another one is
    for coming and going. The last one gives back what was not there before, which a file says."""
    with open(f"{LOCK}.turn", "w") as turn, open(LOCK, "a+") as held:
        fcntl.flock(turn, fcntl.LOCK_EX)
        held.seek(0)
        before = held.read() or HUGE_PAGES.read_text()
        held.truncate(0)
        held.write(before)
        held.flush()
        if int(before) < HUGE_PAGES_WANTED:
            HUGE_PAGES.write_text(str(HUGE_PAGES_WANTED))
        fcntl.flock(held, fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        yield
        fcntl.flock(turn, fcntl.LOCK_EX)
        with suppress(BlockingIOError):  # others still run
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.truncate(0)
            HUGE_PAGES.write_text(before)


@pytest.fixture(scope="session", autouse=True)
def huge_pages_reserved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Huge pages and their file system for the tests that want them, where root may; given back."""
    if os.geteuid() != 0 or not os.access(HUGE_PAGES, os.W_OK):
        yield
        return
    folder = tmp_path_factory.mktemp("hugetlbfs")
    with huge_pages():
        mount = ["mount", "-t", "hugetlbfs", "postcopyd-tests", folder]
        mounted = subprocess.run(mount).returncode == 0
        yield
        if mounted:
            subprocess.run(["umount", folder], check=True)


def pytest_collection_finish() -> None:
    """What is there before the first test stays; looks for garbage, which daemons take after each
    migration, pass it by. As a daemon does itself when it has started."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def kernel_says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """To have this process take the kernel for one of which its probes found this."""

    def say(*, written: int = 0, zeros: int = 0) -> None:
        found = {lib.pc_probe_written: written, lib.pc_probe_huge_zeros: zeros}
        monkeypatch.setattr(kernel, "_known", found)

    return say


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> None:
    """What a test with trio lacks is named too: pytest-trio skips anew, without the reason."""
    skipped = call.excinfo.value if call.excinfo else None
    if isinstance(skipped, pytest.skip.Exception) and not skipped.msg:
        reason = skipped.__context__
        while isinstance(reason, BaseExceptionGroup):
            reason = reason.exceptions[0]
        skipped.msg = str(reason)
