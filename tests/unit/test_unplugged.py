# SPDX-License-Identifier: Apache-2.0
"""Memory that a guest gives back to its VMM at the destination, while its pages still come."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_vmm import PAGE, address_of
from session_faults import Clock, cut, kill_destination, world
from session_world import World

from postcopyd.dest.unplugged import unplugged
from postcopyd.vmm import Region


def unplugging(then: Callable[[World, str], None] | None) -> Callable[[World, str], None]:
    def unplug(made: World, point: str) -> None:
        made.destination.vmm.unplug()
        if then is not None:
            then(made, point)

    return unplug


@pytest.mark.parametrize("mode", ["postcopy", "hybrid"])
@pytest.mark.parametrize("then", [None, cut, kill_destination])
async def test_memory_is_unplugged(
    then: Callable[[World, str], None] | None, mode: str, tmp_path: Path, clock: Clock
) -> None:
    """A DIMM that is unplugged before its pages have come needs them no more: the rest comes, and
    the migration ends."""
    async with world(tmp_path, {"<- progress": unplugging(then)}) as made:
        await made.migrate(mode=mode)
        assert not made.stuck
        assert (made.source.phase, made.destination.phase) == ("drained", "drained")
        assert made.destination.vmm.same(made.source.vmm)
        assert made.guest.broken == []
        assert made.result["recoveries"] <= 2
        # By its file memory is told from what is mapped at its place later, after each restart.
        assert all(region["file"] for region in made.destination.vm.about["ram"])
        assert not [entry for entry in made.logs if str(entry["event"]).startswith("bug")]


def test_what_is_unplugged() -> None:
    """Only what is mapped no more, not even in part, nor moved over by another file's memory."""
    pages = 4
    file, other = os.memfd_create("ram"), os.memfd_create("other")
    try:
        for fd in (file, other):
            os.ftruncate(fd, pages * PAGE)
        ram, foreign = mmap.mmap(file, pages * PAGE), mmap.mmap(other, pages * PAGE)
        private = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE)
        here = Region("ram", pages, PAGE, address_of(ram), file, 0)
        part = Region("part", 2 * pages, PAGE, address_of(ram) - pages * PAGE, file, 0)
        taken = Region("taken", pages, PAGE, address_of(foreign), file, 0)
        anonymous = Region("anonymous", pages, PAGE, address_of(private), None, 0)
        nowhere = Region("nowhere", pages, PAGE, 1 << 20, None, 0)
        assert unplugged(os.getpid(), [here, part, taken, anonymous, nowhere]) == [2, 4]
    finally:
        os.close(file)
        os.close(other)
