# SPDX-License-Identifier: Apache-2.0
"""Tells people what a VMM was found to be. Owns nothing."""

from __future__ import annotations

from postcopyd.errors import PostcopydError
from postcopyd.model import Found, Ram
from postcopyd.names import plain
from postcopyd.vmm import Region, Shape, Vmm


def found(driver: Vmm, shape: Shape) -> Found:
    """Of a shape whose descriptors are still open. Raises PostcopydError."""
    return Found(tuple(map(_ram, shape.regions)), driver.device_state)


def _ram(region: Region) -> Ram:
    try:
        kind, path = region.backing
    except OSError as error:
        raise PostcopydError(
            f"looking at guest RAM '{plain(region.name)}' failed ({error.strerror}): see that "
            f"/proc is mounted"
        ) from None
    return Ram(plain(region.name), kind, region.size, region.page_size, plain(path) or None)
