# SPDX-License-Identifier: Apache-2.0
"""Prints what pyproject.toml asks for, to run, build and test, as a requirements file."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
groups = project["dependency-groups"]
print("\n".join([*project["project"]["dependencies"], *groups["build"], *groups["dev"]]))
