# SPDX-License-Identifier: Apache-2.0
"""The Varlink package is anybody's: it knows nothing of what it is part of here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from postcopyd import varlink

PACKAGE = Path(varlink.__file__).parent
HERE = Path(__file__).parent
TESTS = [HERE / "test_varlink.py", HERE / "test_varlink_idl.py", Path(__file__)]

# After the example of the package's own text; a thread serves, as in another process. structlog
# writes to the standard output.
RUN = """
import sys, threading, time
threading.Thread(target=trio.run, args=(main, sys.argv[1]), daemon=True).start()
while True:
    try:
        print(ask(sys.argv[1]), file=sys.stderr)
        break
    except client.NoAnswer:
        time.sleep(0.01)
print([name for name in sys.modules if "postcopyd" in name], file=sys.stderr)
"""


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*.py")), ids=lambda file: file.name)
def test_no_word_of_its_user(file: Path) -> None:
    assert not re.findall(r"(?i)postcopy|daemon|guest|migrat|\bVMs?\b", file.read_text())


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name)
def test_its_tests_import_nothing_else(file: Path) -> None:
    imported = re.findall(r"^\s*(?:from|import) (postcopyd\S*)(.*)", file.read_text(), re.M)
    assert imported
    for module, names in imported:
        assert f"{module}{names}".replace(" import ", ".").startswith("postcopyd.varlink")


def test_copied_under_another_name(tmp_path: Path) -> None:
    """The example in its own text runs, without anything else of this project."""
    shutil.copytree(PACKAGE, tmp_path / "anybody", ignore=shutil.ignore_patterns("__pycache__"))
    assert varlink.__doc__
    example = textwrap.dedent(varlink.__doc__.partition("of it:\n")[2])
    example = example.replace("from . import", "from anybody import")
    program = tmp_path / "program.py"
    program.write_text(example + RUN)
    said = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "socket")],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert said.stderr.splitlines() == ["{'waited': 0.1}", "[]"]
