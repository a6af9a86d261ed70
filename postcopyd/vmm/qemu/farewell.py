# SPDX-License-Identifier: Apache-2.0
"""What a QEMU says of its own end before it ends, in words for people.

Only ends that are certain and meant are here: the guest has stopped for good, or somebody told QEMU
to end. An error of QEMU's own (`host-error`) is a crash that is announced.
"""

from __future__ import annotations

from typing import Any

EVENTS = ("SHUTDOWN", "RESET", "RESUME")
"""A QEMU that survives SHUTDOWN (`-no-shutdown`) may be reset and run again: that was no end."""

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
    """What the last of these events says; None if it is not an end."""
    data = (last or {}).get("data")
    if not isinstance(data, dict) or (last or {}).get("event") != "SHUTDOWN":
        return None
    return _MEANT.get(str(data.get("reason")))
