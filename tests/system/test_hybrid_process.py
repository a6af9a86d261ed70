# SPDX-License-Identifier: Apache-2.0
"""Process guests that are copied while they run, however their memory is made; and destinations
whose daemon is killed in the middle of that."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from pair import (
    MIB,
    Host,
    Pair,
    ProcessGuest,
    ended,
    filled,
    status_until,
    verified,
    worked,
)
from postcopyd._native import lib
from process_driver import driver
from test_hybrid import tracked
from test_migration import huge_pages, tmpfs

from postcopyd.vmm.process.mappings import is_empty

__all__ = ["huge_pages", "tmpfs"]  # fixtures

# So much, so slowly passed, that a test can break in.
MEMORY = ("--memory", "32M", "--threads", "4", "--rate", "8000")
RATE = 16 * MIB
CLAIMED = 2  # in a page record, see record.h: a thread had the page in hand


def copied(result: dict[str, Any]) -> None:
    """Went well, with at least one pass."""
    assert result["event"] == "completed", result
    assert result["mode"] == "hybrid"
    assert "warning" not in result
    assert result["passes"]
    memory = result["memory"]
    assert memory["precopyPages"] > 0
    # Each page once at least: before the handover or after it, or it is zeros.
    crossed = memory["precopyPages"] + memory["pushedPages"] + memory["urgentPages"]
    assert crossed + memory["zeroPages"] >= memory["pages"]


async def unoccupied(host: Host, name: str, guest: ProcessGuest) -> None:
    """No page of the guest RAM of a VMM that waits is there, neither mapped nor in its file."""
    await host.call("Detach", name=name)
    async with driver(guest.path) as vmm:
        shape = await vmm.inspect("destination")
        try:
            assert shape.state == "incoming"
            for region in shape.regions:
                assert is_empty(shape.pid, region)
                assert region.fd is None or os.fstat(region.fd).st_blocks == 0
        finally:
            shape.close()
    await host.attach(name, "process", guest.path)


@pytest.mark.parametrize("backing", ["anonymous", "memfd", "file", "hugetlbfs"])
async def test_there_and_back_three_times(
    pair: Pair, tmpfs: Path, backing: str, request: pytest.FixtureRequest
) -> None:
    """The guest goes on each time, every page right, and neither VMM is tracked any more."""
    memory = request.getfixturevalue("huge_pages") if backing == "hugetlbfs" else 12 * MIB
    options = ("--memory", str(memory), "--regions", "2", "--threads", "3", "--rate", "8000")
    name, hosts, guests = pair.name(), pair.hosts, 0

    def guest(*more: str) -> ProcessGuest:
        nonlocal guests
        guests += 1
        path = ("--path", str(tmpfs / str(guests))) if backing == "file" else ()
        return pair.guest(*options, "--backing", backing, *path, *more)

    here = await pair.attach(hosts[0], name, guest())
    await worked(here, 2000)
    for turn in range(6):
        source, destination = hosts[turn % 2], hosts[1 - turn % 2]
        there = await pair.attach(destination, name, guest("--incoming"))
        copied(await source.migrate(name, destination, mode="hybrid"))
        await verified(there, memory // 4096)
        await worked(there, 100)
        await ended(here)
        assert tracked(there.process.pid) == []
        here = there
    here.kill()


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
async def test_destination_is_killed_in_a_pass(new_pair: Pair, backing: str) -> None:
    """The guest never notices; the VMM that waits is empty again and takes the next attempt."""
    a, b = new_pair
    name, here, there = await new_pair.place(*MEMORY, "--backing", backing)
    await filled(here)
    started = await a.call("Migrate", name=name, to=b.address, mode="hybrid", bandwidth=RATE)
    await status_until(
        a, name, lambda s: s["phase"] == "precopy" and s.get("transferredBytes", 0) > 4 * MIB
    )
    b.end(signal.SIGKILL)
    result = await a.result(name, started["migration"])
    assert result["event"] == "failed"
    assert tracked(here.process.pid) == []
    await worked(here, 100)
    await b.start()
    status = await status_until(b, name, lambda status: status["phase"] == "failed")
    assert "ended before it was granted" in status["message"]
    await unoccupied(b, name, there)
    copied(await a.migrate(name, b, mode="hybrid"))
    await verified(there)
    await ended(here)


async def test_destination_is_killed_at_the_handover(new_pair: Pair) -> None:
    """Of anonymous memory, what had come in passes and was not placed dies with the daemon: it is
    asked for again, and comes."""
    a, b = new_pair
    name, here, there = await new_pair.place(*MEMORY, "--backing", "anonymous")
    await filled(here)
    new_pair.hook(name, "destination", "running", "kill -9 $PPID; sleep 60")
    started = await a.call("Migrate", name=name, to=b.address, mode="hybrid")
    await status_until(a, name, lambda status: status["phase"] == "paused")
    new_pair.unhook(name)
    b.end(signal.SIGKILL)
    pages = (b.state / f"{name}.pages").read_bytes()
    await b.start()
    result = await a.result(name, started["migration"])
    assert (result["event"], result["recoveries"]) == ("completed", 1)
    memory = result["memory"]
    again = memory["pushedPages"] + memory["urgentPages"]
    assert sum(one["pages"] for one in result["passes"]) >= memory["pages"]  # all passed already
    lost = sum(not page & (lib.PC_PAGE_DONE | CLAIMED) for page in pages[: memory["pages"]])
    assert again >= lost
    await verified(there)
    await worked(there, 100)
    await ended(here)
    assert tracked(there.process.pid) == []
