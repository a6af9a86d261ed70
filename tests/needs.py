# SPDX-License-Identifier: Apache-2.0
"""How a test says that the machine lacks what it is about."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib import import_module
from typing import Any, NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """This machine lacks something that the test is about: a failure on CI, a skip elsewhere."""
    if os.environ.get("CI"):
        pytest.fail(f"this machine lacks {what}")
    pytest.skip(f"this machine lacks {what}")


def package(name: str) -> Any:
    """The Python package, where this machine has it."""
    try:
        return import_module(name)
    except ImportError:
        missing(f"the Python package {name}")


def libvirt() -> None:
    """libvirt's daemons, and its binding for the distribution's Python."""
    for program in ("libvirtd", "virtlogd", "virsh"):
        if shutil.which(program) is None:
            missing(f"libvirt ({program})")
    if subprocess.run(
        ["/usr/bin/python3", "-c", "import libvirt"], stderr=subprocess.DEVNULL
    ).returncode:
        missing("libvirt's binding for Python: the Debian package python3-libvirt")
