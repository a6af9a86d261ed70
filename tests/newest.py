# SPDX-License-Identifier: Apache-2.0
"""The newest libvirt: a Debian sid with it, and postcopyd's package for that, both made by
tools/newest-libvirt.

Owns how files are laid over that Debian's, which no test writes to.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from needs import missing

MADE = Path(__file__).parent.parent / ".build/libvirt"
ROOT = MADE / "root"


def package() -> Path:
    """Of postcopyd. Skips the test where sid could not be made, as for its kernel."""
    packages = sorted((MADE / "deb").glob("postcopyd_*.deb"))
    if (MADE / "none").exists():
        pytest.skip("sid has no libvirt today: tools/newest-libvirt could not make it")
    if not packages:
        missing("the newest libvirt: `make newest-libvirt` fetches it")
    return packages[-1]


def with_package(folder: Path) -> str:
    """Layers of an overlay: that Debian with the package installed, for which `folder` has room."""
    upper, work, root = (folder / name for name in ("upper", "work", "root"))
    for part in (upper, work, root):
        part.mkdir()
    options = f"lowerdir={ROOT},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "none", "-o", options, root], check=True)
    try:
        shutil.copy(package(), root / "root")
        command = ["chroot", root, "dpkg", "--install", f"/root/{package().name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["umount", root], check=True)
    return f"{upper}:{ROOT}"
