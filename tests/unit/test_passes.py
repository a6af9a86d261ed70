# SPDX-License-Identifier: Apache-2.0
"""When passes stop: for guests of every kind, on links of every rate."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.errors import PostcopydError
from postcopyd.source import passes
from postcopyd.source.passes import Pass, why_now

Mode = Literal["hybrid", "precopy"]
GUEST = 262144  # pages: 1 GiB


def moved(mode: Mode, rate: float, writes: float, hot: int, most: int | None = None) -> list[Pass]:
    """The passes of a guest that writes at random to `hot` of its pages, `writes` pages a second,
    over a link of `rate` pages a second."""
    done: list[Pass] = []
    left = GUEST
    while True:
        seconds = left / rate
        # Of `hot` pages, after n writes at random, those written at least once.
        written = round(hot * (1 - (1 - 1 / hot) ** (writes * seconds))) if hot else 0
        done.append(Pass(left, left * 4096, seconds, written))
        left = written
        if why_now(mode, done, most, 0.3):
            return done
        assert len(done) < 100


def test_an_idle_guest_takes_one_pass() -> None:
    """Nothing is left, so nothing is waited for."""
    assert [one.left for one in moved("hybrid", 250_000, 0, 0)] == [0]


def test_a_quiet_guest_is_nearly_all_there() -> None:
    """One that writes a tenth of what the link carries is handed over with what takes 20 ms."""
    done = moved("hybrid", 250_000, 25_000, GUEST)
    assert 2 <= len(done) <= 4
    assert done[-1].left_s <= passes.SHORT_S


def test_a_busy_guest_is_not_copied_twice() -> None:
    """One that writes all of its memory again in a pass gains nothing by another."""
    assert len(moved("hybrid", 100_000, 1_000_000, GUEST)) == 1


def test_a_small_working_set_is_left_to_postcopy() -> None:
    """What is written all the time is copied no more than once again, the rest is there."""
    done = moved("hybrid", 100_000, 1_000_000, GUEST // 8)
    assert len(done) == 2
    assert done[-1].left <= GUEST // 8


@given(
    rate=st.floats(1e3, 1e7),
    writes=st.floats(0, 1e8),
    hot=st.integers(0, GUEST),
    most=st.none() | st.integers(1, 12),
)
def test_hybrid_ends(rate: float, writes: float, hot: int, most: int | None) -> None:
    """Whatever the guest does; a pass but the first leaves less than it sent, or is the last."""
    done = moved("hybrid", rate, writes, hot, most)
    assert len(done) <= (passes.MOST if most is None else most)
    for before, after in pairwise(done):
        assert before.left <= passes.PAYS * before.pages
        assert after.pages == before.left


def test_passes_are_limited() -> None:
    """`--precopy-passes` is how many at most, also where more would pay."""
    assert len(moved("hybrid", 100_000, 50_000, GUEST)) > 2
    assert len(moved("hybrid", 100_000, 50_000, GUEST, most=2)) == 2


def test_precopy_fits_its_downtime() -> None:
    """Precopy goes on until what is left fits, and no longer."""
    done = moved("precopy", 100_000, 50_000, GUEST)
    assert done[-1].left_s <= 0.3
    assert all(one.left_s > 0.3 for one in done[:-1])


@pytest.mark.parametrize("most", [None, 3])
def test_precopy_gives_up(most: int | None) -> None:
    """A guest that writes faster than the link carries is not handed over: it says so."""
    with pytest.raises(PostcopydError, match=r"does not converge.*--mode hybrid") as error:
        moved("precopy", 100_000, 1_000_000, GUEST, most)
    assert error.value.name == "NotConverging"
