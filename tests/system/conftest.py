# SPDX-License-Identifier: Apache-2.0
"""The daemons that system tests speak to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pair import Pair, open_pair


@pytest.fixture(scope="module")
def daemons() -> Iterator[Pair]:
    """Two for most tests of a module: what one migration leaves behind, others meet."""
    with open_pair() as pair:
        yield pair


@pytest.fixture
def pair(daemons: Pair) -> Iterator[Pair]:
    yield daemons
    daemons.end_guests()


@pytest.fixture
def new_pair() -> Iterator[Pair]:
    """For tests that kill daemons."""
    with open_pair() as pair:
        yield pair
