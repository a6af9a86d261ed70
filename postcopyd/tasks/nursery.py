# SPDX-License-Identifier: Apache-2.0
"""A nursery that fails with the error of its first task."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from postcopyd.errors import PostcopydError


@asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery that raises the error of its first task that fails, and not a group.

    In a session one thing goes wrong first. What the other tasks meet while they are cancelled for
    it is of no use to an operator. Errors other than PostcopydError (bugs) come first.
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
