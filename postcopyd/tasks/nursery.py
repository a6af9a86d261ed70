# SPDX-License-Identifier: Apache-2.0
"""A nursery that fails as its first task does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from postcopyd.errors import PostcopydError


@asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery whose failure is the failure of its first task, not a group of one.

    A session has one thing that goes wrong first; what the others met while they were cancelled for
    it is of no use to an operator. Errors that are not ours (bugs) come first.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        leaves = _leaves(group)
        bugs = [error for error in leaves if not isinstance(error, PostcopydError)]
        raise (bugs or leaves)[0] from None


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return leaves
