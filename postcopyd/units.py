# SPDX-License-Identifier: Apache-2.0
"""Numbers for people. Imports nothing."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(us: float) -> str:
    """Microseconds for people: `120 us`, `7.9 ms`, `1.2 s`."""
    if us < 1000:
        return f"{us:.0f} us"
    return f"{us / 1000:.1f} ms" if us < 1_000_000 else f"{us / 1_000_000:.1f} s"
