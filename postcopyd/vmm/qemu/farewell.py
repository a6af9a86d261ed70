# SPDX-License-Identifier: Apache-2.0
"""What a QEMU says of its own end before it ends, as people would say it.

Only what makes an end certain and meant is here: the guest has stopped for good, or somebody told
QEMU to end. An error of QEMU's own (`host-error`) is a crash with a word before it.
"""

from __future__ import annotations

from typing import Any

EVENTS = ("SHUTDOWN", "RESET", "RESUME")
"""A QEMU that outlives SHUTDOWN (`-no-shutdown`) may be reset and run again: then it was no end."""

_MEANT = {
    "guest-shutdown": "its guest shut down",
    "guest-reset": "its guest rebooted, and its VMM ends then",
    "guest-panic": "its guest panicked",
    "host-qmp-system-reset": "its VMM was told to reset it, and ends then",
    "host-qmp-quit": "its VMM was told to quit",
    "host-signal": "its VMM was told to end by a signal",
    "host-ui": "its VMM was told to end at its window",
}


def farewell(last: dict[str, Any] | None) -> str | None:
    """By the last of these events; None: there was none that is an end."""
    data = (last or {}).get("data")
    if not isinstance(data, dict) or (last or {}).get("event") != "SHUTDOWN":
        return None
    return _MEANT.get(str(data.get("reason")))
