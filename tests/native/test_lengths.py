# SPDX-License-Identifier: Apache-2.0
"""No function of the engine beyond 60 lines, no file beyond 700: what is longer has two things in
it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "postcopyd"
FILES = [PACKAGE / "uffd_native.c", *sorted((PACKAGE / "native").glob("*.[ch]"))]
LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 700, 60
FUNCTION = re.compile(r"^\w[^;{}=]*\([^;{}]*\)\s*\{$.*?^\}$", re.M | re.S)
"""From the first line of its head, in the first column, to its last brace there."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_long_was_split(file: Path) -> None:
    text = file.read_text()
    long = {
        found[0].splitlines()[0]: lines
        for found in FUNCTION.finditer(text)
        if (lines := found[0].count("\n") + 1) > LINES_OF_A_FUNCTION
    }
    assert ({}, True) == (long, text.count("\n") <= LINES_OF_A_FILE), text.count("\n")


def test_functions_are_found() -> None:
    """As many as there are closing braces in the first column, but for types and tables."""
    for file in FILES:
        text = file.read_text()
        ends = len(re.findall(r"^\}$", text, re.M))
        assert ends == len(FUNCTION.findall(text)), file
