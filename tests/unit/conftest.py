# SPDX-License-Identifier: Apache-2.0
"""What several files of unit tests have."""

from __future__ import annotations

import pytest
from session_faults import Clock, made_clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of a world of session_world.py, for each test with both sessions."""
    return made_clock(monkeypatch)
