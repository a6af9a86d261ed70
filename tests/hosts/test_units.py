# SPDX-License-Identifier: Apache-2.0
"""The units as systemd reads them, without running them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from needs import missing

UNITS = Path(__file__).parents[2] / "systemd"


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        missing("systemd-analyze: the Debian package systemd")
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_service_is_hardened() -> None:
    """At or below 3.0; what is left is explained at the end of the unit."""
    done = analyze("security", "--offline=true", "--threshold=30", UNITS / "postcopyd.service")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("unit", ["postcopyd.service", "postcopyd.socket"])
def test_systemd_knows_each_line(unit: str) -> None:
    """A line with a typing error would be ignored, with a warning that nobody reads."""
    done = analyze("verify", UNITS / unit)
    # That the package is not installed here is not meant.
    said = [line for line in done.stderr.splitlines() if str(UNITS) in line]
    assert said == []
