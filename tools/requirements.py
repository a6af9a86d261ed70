# SPDX-License-Identifier: Apache-2.0
"""Prints what pyproject.toml asks for as a requirements file: all, or with `run` what runs it."""

import sys
import tomllib
from itertools import chain
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
wanted = project["project"]["dependencies"]
if sys.argv[1:] != ["run"]:
    wanted = [*wanted, *chain(*project["dependency-groups"].values())]
print("\n".join(wanted))
