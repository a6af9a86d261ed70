# SPDX-License-Identifier: Apache-2.0
"""The one exception that reaches an operator: a name for programs and a sentence for people."""

from __future__ import annotations

import errno
import os

from postcopyd.names import plain

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""What the kernel says of a host, or a limit, that has nothing left; accept(2), open(2)."""


class PostcopydError(Exception):
    """What could not be done; `str()` is one sentence: what was being done, why not, what to do.

    `name` is the error's name on the control socket, without the interface (`NoSuchVm`). Whatever
    went into the sentence, of others too, it can be shown: only its own line ends stay in it.
    """

    name = "NotPossible"

    def __init__(self, sentence: str, name: str | None = None) -> None:
        super().__init__("\n".join(map(plain, sentence.split("\n"))))
        if name is not None:
            self.name = name


class NoResources(PostcopydError):
    """No descriptors left, or no memory: it says nothing of what was asked for, and may pass."""

    name = "NoResources"


def no_descriptors() -> NoResources:
    """As `shortage`, where nothing but the lack of a descriptor tells of it."""
    return NoResources(
        f"this daemon has nothing left ({os.strerror(errno.EMFILE)}): raise LimitNOFILE of its "
        f"unit, or `ulimit -n` where it was started"
    )


def shortage(error: BaseException) -> NoResources | None:
    """What an operator is told of an OSError that only says that there is nothing left."""
    if not isinstance(error, OSError) or error.errno not in SHORTAGES:
        return None
    if error.errno == errno.EMFILE:
        return no_descriptors()
    return NoResources(f"this host has nothing left: {os.strerror(error.errno)}")
