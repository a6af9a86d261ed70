# SPDX-License-Identifier: Apache-2.0
"""How long a session waits for a VMM where nothing else ends the wait: no cancel reaches the last
steps of a session, and a VMM that does not answer must hold up neither the host nor its daemon."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from postcopyd.vmm import VmmTimeout

END_S = 30.0
"""For a VMM that is told to end or to run its guest again, which may have disks to flush."""

RELEASE_S = 10.0
"""For a VMM that closes its userfaultfds, or gives its empty memory back."""


@contextmanager
def within(seconds: float, doing: str) -> Iterator[None]:
    """Raises VmmTimeout, with `doing` in its sentence, if the body takes longer."""
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise VmmTimeout(
            f"{doing}: no answer within {seconds:.0f} s; see whether its VMM is stopped (SIGSTOP) "
            f"or waits for its disks"
        ) from None
