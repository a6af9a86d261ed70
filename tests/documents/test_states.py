# SPDX-License-Identifier: Apache-2.0
"""docs/WHEN-IT-GOES-WRONG.md has a place for each message that a guest in trouble can show, and for
none that it cannot."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from console import ROOT
from shown import PLACE, Shown, sentences, shown

PAGE = (ROOT / "docs/WHEN-IT-GOES-WRONG.md").read_text()
# What the page writes for what is filled in.
_PLACES = re.compile(r"\b(NAME|HOST1|HOST2|WHY|FILE|ID|N)\b")
_WHY = "... WHY is: "
# Where a migration is, not where it went wrong; and what is always true.
FINE = ("idle", "precopy", "handover", "postcopy")


class Row(NamedTuple):
    """One of the tables under `Look`; `...` stands for any words."""

    phase: str
    message: str


def rows() -> Iterator[Row]:
    for line in PAGE.splitlines():
        if line.startswith("| ") and line.count(" | ") >= 2 and "| phase |" not in line:
            phase, message = (cell.strip() for cell in line.strip("| ").split(" | ")[:2])
            if phase.startswith("`") or "WHY is" in message:
                for one in re.split(r"; or: ", message.removeprefix(_WHY)):
                    kind = _WHY if message.startswith(_WHY) else phase.strip("`")
                    yield Row(kind, _PLACES.sub(PLACE, one))


def fits(pattern: str, text: str) -> bool:
    """Whether text is what a pattern with places, and dots for any words, may become."""
    parts = re.split(rf"({PLACE}| ?\.\.\.)", pattern)
    made = "".join(".*" if part in (PLACE, "...", " ...") else re.escape(part) for part in parts)
    return re.fullmatch(made, text, re.S) is not None


def _only(one: Shown) -> bool:
    return one._replace(phase="") not in ALL


def same(row: Row, message: Shown) -> bool:
    """Either may be the more general one."""
    if message.phase not in ("", row.phase):
        return False
    return fits(row.message, message.message) or fits(message.message, row.message)


ALL = shown()
# Where a name has two messages, one may be for another phase than the call names.
SHOWN = [one for one in ALL if one.phase not in FINE and (not one.phase or _only(one))]
ROWS = list(rows())


@pytest.mark.parametrize("message", SHOWN, ids=lambda one: f"{one.where}: {one.message[:40]!r}")
def test_each_message_has_its_row(message: Shown) -> None:
    assert any(same(row, message) for row in ROWS), message


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.message[:40])
def test_each_row_can_be_shown(row: Row) -> None:
    if row.phase == _WHY:
        known = [text for text in sentences() if len(text) > 20]
        assert any(fits(f"...{row.message}...", text) for text in known), row
    else:
        assert any(same(row, message) for message in ALL), row
