# SPDX-License-Identifier: Apache-2.0
"""The demo's small VMM, or another program that speaks as it does, and what it reports."""

from __future__ import annotations

import json
import os
import selectors
from pathlib import Path
from typing import Any

from postcopyd.demo import hosts
from postcopyd.demo.hosts import DemoError


class ProcessGuest(hosts.ProcessGuest):
    """`program` does not report, and is not the demo's."""

    def __init__(self, path: Path, *options: str, program: Path | None = None) -> None:
        if program:
            self.program = program
        else:
            options = (*options, "--report")
        super().__init__(path, *options)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._said = b""

    def report(self, seconds: float = 5.0) -> dict[str, Any]:
        """The next report; raises DemoError when none comes."""
        assert self.process.stdout is not None
        while more := self.process.stdout.read():  # what was said before is of the past
            self._said = (self._said + more).rpartition(b"\n")[2]
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            while True:
                line, end, rest = self._said.partition(b"\n")
                if end:
                    self._said = rest
                    if line.startswith(b"{"):
                        report: dict[str, Any] = json.loads(line)
                        return report
                elif ready.select(seconds) and (more := self.process.stdout.read()):
                    self._said += more
                else:
                    raise DemoError("the demo guest does not report")
