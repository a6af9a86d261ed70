# SPDX-License-Identifier: Apache-2.0
"""The demo leaves no process behind, wherever it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from postcopyd import demo
from postcopyd.demo.hosts import DemoError

pytestmark = pytest.mark.trio


async def test_a_second_guest_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[Path] = []

    class Guest:
        def __init__(self, path: Path, *options: str) -> None:
            if "--incoming" in options:
                raise DemoError("starting the demo guest: no memory")
            self.path = path
            alive.append(path)

        def kill(self) -> None:
            alive.remove(self.path)

    monkeypatch.setattr(demo, "ProcessGuest", Guest)
    with pytest.raises(DemoError):
        await demo._process(tmp_path, 1 << 20, True)
    assert alive == []
