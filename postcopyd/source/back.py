# SPDX-License-Identifier: Apache-2.0
"""The VMM of a guest that was not moved is told to undo what was done to it, and people are told
what came of that: only what is known, and never to run a guest that others may have moved."""

from __future__ import annotations

import structlog
import trio

from postcopyd.errors import PostcopydError
from postcopyd.sessions.vm import Vm
from postcopyd.vmm import VmmGone

ROLLBACK_S = 30.0
"""How long a VMM may take to run its guest again before the operator is told that it did not."""


async def known_again(vm: Vm) -> None:
    """Tells the driver what the daemon before has done to the guest, by the record. Raises
    PostcopydError."""
    driver, about = vm.attached(), vm.about
    driver.before = "running" if about["run"] else "paused"
    if not about.get("marked", False):
        await driver.mark()


async def undone(vm: Vm, why: str) -> tuple[str, bool]:
    """The guest is put back as its driver can; `why` it was not moved. The sentence about it, and
    whether that went well: it is here as it was, or as others have left it."""
    assert vm.driver is not None
    moved = f"{vm.name} was not moved"
    try:
        with trio.fail_after(ROLLBACK_S):
            left = await vm.driver.rollback()
    except VmmGone as gone:
        vm.log.error("rollback failed", error=str(gone))
        return (
            f"{moved} ({why}) and its VMM here has ended, by a failure or because the guest was "
            f"shut down: {gone}",
            False,
        )
    except Exception as trouble:  # a driver's bug too: the rest must happen
        said = str(trouble) or f"no answer within {ROLLBACK_S:.0f} s"
        if not isinstance(trouble, PostcopydError | trio.TooSlowError):
            structlog.get_logger().exception("bug in a driver", vm=vm.name)
        vm.log.error("rollback failed", error=said)
        return (
            f"{moved} ({why}) and its VMM here did not run it again: {said}; it is this host's, as "
            f"far as this move is concerned: look at its VMM before you run it",
            False,
        )
    return undone_as(vm.name, why, left), True


def undone_as(name: str, why: str, left: str) -> str:
    """`left` is what a driver's `rollback` has returned."""
    if left:
        return f"{name} was not moved ({why}) and was left here as it was found: {left}"
    return f"{name} was not moved and is at this host as it was: {why}"


def untouched(name: str, why: str) -> str:
    """Of a guest to which nothing was done."""
    return f"{name} was not moved, and nothing was done to it here: {why}"
