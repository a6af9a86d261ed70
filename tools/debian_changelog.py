# SPDX-License-Identifier: Apache-2.0
"""Prints CHANGELOG.md's newest version as a Debian changelog; the argument: when, in Unix time."""

import re
import sys
import textwrap
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

text = (Path(__file__).parent.parent / "CHANGELOG.md").read_text()
newest = re.search(r"^## (\d\S*).*?\n(.*?)(?=^## |\Z)", text, re.M | re.S)
assert newest, "CHANGELOG.md has no version"
version, changes = newest[1], re.findall(r"^- (.*)", newest[2], re.M)
print(f"postcopyd ({version}) unstable; urgency=medium\n")
for change in changes:
    print(
        textwrap.fill(change.replace("`", ""), 80, initial_indent="  * ", subsequent_indent="    ")
    )
date = format_datetime(datetime.fromtimestamp(int(sys.argv[1]), UTC))
print(f"\n -- The postcopyd maintainers <postcopyd@localhost>  {date}")
