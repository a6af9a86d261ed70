# SPDX-License-Identifier: Apache-2.0
"""What several files of unit tests have: clocks that jump only when nothing moves."""

from __future__ import annotations

import pytest
from patient import Clock, patient_clock
from session_faults import made_clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of a world of session_world.py, for each test with both sessions."""
    return made_clock(monkeypatch)


@pytest.fixture
def autojump_clock() -> Clock:
    """In place of pytest-trio's, which takes a thread that waits for a core for one that waits."""
    return patient_clock()
