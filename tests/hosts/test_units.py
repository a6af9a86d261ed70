# SPDX-License-Identifier: Apache-2.0
"""The units as systemd reads them, without running them."""

from __future__ import annotations

import re
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


def test_who_makes_keepers_has_no_filter() -> None:
    """The kernel lets nobody suspend another's seccomp filter who has one; the unit names what
    systemd makes one for."""
    text = (UNITS / "postcopyd-keeper@.service").read_text()
    settings = set(re.findall(r"^(\w+)=", text, re.M))
    filters = set(re.findall(r"(\w+)=", text[text.index("All other limits") :]))
    assert len(filters) > 15
    assert not settings & filters
    for filtered in ("RestrictNamespaces", "ProtectClock", "SystemCallFilter"):
        assert filtered in filters


@pytest.mark.parametrize("unit", sorted(p.name for p in UNITS.glob("*.s[eo]*[et]")))
def test_systemd_knows_each_line(unit: str) -> None:
    """A line with a typing error would be ignored, with a warning that nobody reads."""
    done = analyze("verify", UNITS / unit)
    # That the package is not installed here is not meant.
    said = [line for line in done.stderr.splitlines() if str(UNITS) in line]
    assert said == []
