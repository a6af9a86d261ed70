# SPDX-License-Identifier: Apache-2.0
"""Many guests that leave for one host at once, which takes one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import trio
from pair import MIB, Pair, cli, completed, open_pair, status_until, verified, worked

from postcopyd.errors import PostcopydError


@pytest.fixture
def limited() -> Iterator[Pair]:
    options = ("--max-arrivals", "1", "--host-bandwidth", "64M", "--max-vms", "3")
    with open_pair(*options) as pair:
        yield pair


async def test_evacuation(limited: Pair) -> None:
    """They arrive in the order in which they asked; one is cancelled while it waits, runs on, and
    can come later. All arrive whole."""
    a, b = limited
    moved = [await limited.place("--memory", "4M", "--rate", "20000") for _ in range(3)]
    names = [name for name, _, _ in moved]
    extra = limited.guest("--memory", "4M", "--incoming")
    with pytest.raises(PostcopydError, match="max-vms") as refused:
        await limited.attach(b, "extra", extra)
    assert refused.value.name == "Refused"
    go = limited.folder / "go"
    limited.hook(names[0], "source", "handover", f"while [ ! -e {go} ]; do sleep 0.05; done\n")
    results: dict[str, dict[str, Any]] = {}

    async def move(name: str) -> None:
        results[name] = await a.migrate(name, b, mode="hybrid")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(move, names[0])
        await status_until(b, names[0], lambda status: status["phase"] == "precopy")
        for name, place in zip(names[1:], ("it is next", "1 other"), strict=True):
            nursery.start_soon(move, name)
            await status_until(
                a, name, lambda s, place=place: f"waits for its turn at {b.address}: {place}" in
                s["message"]
            )  # fmt: skip
        await worked(moved[1][1], 100)
        assert (await cli("cancel", names[1], "--control", a.control))[0] == 0
        await status_until(a, names[1], lambda status: status["phase"] == "failed")
        await status_until(a, names[2], lambda status: ": it is next" in status["message"])
        go.touch()
    assert [*results] == [names[1], names[0], names[2]]
    assert results.pop(names[1])["event"] == "cancelled"
    for result in (*results.values(), await a.migrate(names[1], b, mode="hybrid")):
        completed(result, 4 * MIB, mode="hybrid")
    for _, _, there in moved:
        await verified(there)
