# SPDX-License-Identifier: Apache-2.0
"""The version before this one, as tools/version-before has built it: where it is, what it says of
itself, and hosts that are given this version in its place."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from needs import missing

from postcopyd.demo.hosts import PACKAGE, Host

BUILT = Path(__file__).parents[2] / ".build/before"
OLD = BUILT / "site"
NEW = PACKAGE.parent


def needed() -> None:
    if not (BUILT / ".done").exists():
        missing("the version before this one, which `make test-long` builds in a full clone")


def told(site: Path, script: str) -> Any:
    """What a script prints, as JSON, that imports the package of that version."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=site, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


async def upgraded(*hosts: Host, by: int = signal.SIGTERM) -> None:
    """Their daemons end, all of them before one is started again: with this version. The VMMs go
    on, as under a unit with KillMode=process."""
    for host in hosts:
        host.end(by)
    for host in hosts:
        host.site = NEW
        await host.start()
