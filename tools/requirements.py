# SPDX-License-Identifier: Apache-2.0
"""Prints what pyproject.toml asks for as a requirements file: what runs the daemon, and the groups
that are named."""

import sys
import tomllib
from itertools import chain
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
groups = (project["dependency-groups"][name] for name in sys.argv[1:])
print("\n".join(chain(project["project"]["dependencies"], *groups)))
