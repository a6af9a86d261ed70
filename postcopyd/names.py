# SPDX-License-Identifier: Apache-2.0
"""Names of VMs and words of others: what may stand in a name, and what may be shown.

A name goes a long way: to the other host, into records, arguments of hooks, logs, terminals. It may
what libvirt takes for one, less what one of these would read as something else. Words that others
have written (a peer, a VMM, a hook) pass `plain` where they come in. Imports nothing.
"""

from __future__ import annotations

import re

LONGEST = 255
"""Bytes of a name: libvirt, which has a file for each, takes no more."""

# Control characters, ends of lines, halves of characters, and what turns the direction of writing
# around, so that a line can say what it does not (Unicode, UAX #9).
UNSEEN = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
"""A regular expression's class, without its brackets."""

_UNSEEN = re.compile(f"[{UNSEEN}]")


def problem(name: str) -> str:
    """Why this cannot be the name of a VM, to stand behind "because"; or nothing."""
    if not name:
        return "a name has at least one character"
    if "/" in name or name in (".", ".."):
        return "it would be a path: a name has no / and is not . or .."
    if name.startswith("-"):
        return "programs would take it for an option: a name does not begin with -"
    if _UNSEEN.search(name):
        return "it has invisible characters (line ends, other control characters)"
    if len(name.encode()) > LONGEST:
        return f"it has more than {LONGEST} bytes"
    return ""


def plain(text: str) -> str:
    """Words of others as they may be shown: on one line, and nothing that moves a cursor."""
    return _UNSEEN.sub(lambda found: " " if found[0] in "\t\n\r" else "?", text)
