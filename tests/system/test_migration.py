# SPDX-License-Identifier: Apache-2.0
"""Process guests moved between two real daemons, all of their memory checked by themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from needs import missing
from pair import (
    MIB,
    Host,
    Pair,
    cli,
    command,
    completed,
    ended,
    filled,
    last_json,
    status_until,
    until,
    verified,
    worked,
)

from postcopyd.errors import PostcopydError

ROOT = Path(__file__).parents[2]
FREE_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
PLACED = 4  # in the record of pages: record.h


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pcm", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def huge_pages() -> int:
    """Bytes of huge pages for each of two VMMs."""
    count = 12
    if int(FREE_HUGE_PAGES.read_text()) < 2 * count:
        missing(f"{2 * count} free huge pages of 2 MiB")
    return count * 2 * MIB


@pytest.mark.parametrize(
    "options",
    [
        "--memory 48M --threads 4",
        "--memory 48M --threads 2 --regions 6 --backing memfd",
        "--memory 32M --threads 16 --regions 4 --backing file",
        "--memory 48M --threads 3 --backing anonymous",
        "--memory 32M --threads 2 --regions 8 --backing anonymous --rate 50",
        "--memory 32M --threads 1 --rate 50",
        "--memory 1G --threads 4 --wild 64 --load-touches 200",
        "--memory 512M --threads 4 --wild 64 --backing anonymous",
        "--memory 64K --threads 1 --rate 20000",
        "--memory 4K --threads 1 --rate 20000",
        "--memory 48M --threads 2 --device-state 24M",
    ],
)
async def test_moves_a_guest(pair: Pair, tmpfs: Path, options: str) -> None:
    """However its memory is made and used, a guest goes on at the destination, every page right."""
    name, (a, b) = pair.name(), pair
    words = tuple(options.split())
    file = [("--path", str(tmpfs / side)) if "file" in words else () for side in ("a", "b")]
    here = await pair.attach(a, name, pair.guest(*words, *file[0]))
    there = await pair.attach(b, name, pair.guest(*words, *file[1], "--incoming"))
    await worked(here, 20 if "50" in words else 2000)
    result = await a.migrate(name, b)
    total = {"M": MIB, "G": 1024 * MIB, "K": 1024}[words[1][-1]] * int(words[1][:-1])
    completed(result, total)
    wild = int(words[words.index("--wild") + 1]) if "--wild" in words else 1
    assert result["memory"]["zeroPages"] >= total // 4096 * (wild - 1) // wild
    await verified(there, total // 4096)
    await worked(there, 20)
    assert (await trio.to_thread.run_sync(there.report))["bad"] == 0
    await ended(here)
    for host, role in ((a, "source"), (b, "destination")):
        status = await host.status(name)
        assert (status["role"], status["phase"], status["remaining"]) == (role, "drained", 0)
        assert status["migration"] == result["migration"]
        await host.call("Detach", name=name)
    assert not [file for host in pair for file in host.state.glob(f"{name}.*")]


@pytest.mark.parametrize("regions", [1, 3])
async def test_moves_huge_pages(pair: Pair, huge_pages: int, regions: int) -> None:
    """A guest on 2 MiB pages is moved in these."""
    options = ("--memory", str(huge_pages), "--regions", str(regions), "--threads", "4")
    name, here, there = await pair.place(*options, "--backing", "hugetlbfs")
    a, b = pair
    completed(await a.migrate(name, b), huge_pages, 2 * MIB)
    await verified(there, huge_pages // 4096)
    await worked(there)
    await ended(here)
    there.kill()


async def test_moves_a_paused_guest(pair: Pair) -> None:
    """A guest that was paused is paused at the destination, and whole when it runs again."""
    name, here, there = await pair.place()
    a, b = pair
    await a.call("Detach", name=name)
    assert command(here, "stop") == "ok"
    await a.attach(name, "process", here.path)
    completed(await a.migrate(name, b))
    report = await trio.to_thread.run_sync(there.report)
    assert report["state"] == "paused"
    assert (await trio.to_thread.run_sync(there.report))["ops"] == report["ops"]
    await verified(there)
    await b.call("Detach", name=name)
    assert command(there, "run") == "ok"
    await worked(there)


async def test_keeps_the_source(pair: Pair) -> None:
    """With keepSource the source's VMM is left, stopped, and cannot be moved by mistake."""
    name, here, there = await pair.place()
    a, b = pair
    completed(await a.migrate(name, b, keepSource=True))
    assert (await trio.to_thread.run_sync(here.report))["state"] == "paused"
    with pytest.raises(PostcopydError, match="was given to"):
        await a.migrate(name, b)
    status = await a.status(name)
    assert status["phase"] == "drained" and status["result"]["event"] == "completed"
    await a.call("Detach", name=name)
    assert command(here, "stop") == "ok"
    await verified(there)


@pytest.mark.parametrize(("backing", "memory"), [("memfd", 48), ("anonymous", 16)])
async def test_kvm_guest(pair: Pair, tmp_path: Path, backing: str, memory: int) -> None:
    """A real vCPU goes on at the destination and faults all of its memory in, every page right."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        missing("/dev/kvm")
    if not shutil.which("cc"):
        missing("a C compiler")
    program, source = tmp_path / "kvm_vmm", ROOT / "tests/guests/kvm_vmm.c"
    flags = ["-O2", "-std=gnu11", "-D_GNU_SOURCE", "-pthread"]
    subprocess.run(["cc", *flags, "-o", program, source], check=True)
    name, (a, b) = pair.name(), pair
    options = ("--memory", str(memory), "--backing", backing)
    here = await pair.attach(a, name, pair.guest(*options, program=program))
    there = await pair.attach(b, name, pair.guest(*options, "--incoming", program=program))
    await until(lambda: int(here.ask("progress")["sweeps"]) > 1, "the vCPU's first sweeps")
    result = await a.migrate(name, b)
    completed(result, memory * MIB)
    assert result["faults"]["count"] > 0
    sweeps = int(there.ask("progress")["sweeps"])
    await verified(there)
    await until(lambda: int(there.ask("progress")["sweeps"]) > sweeps + 1, "more sweeps")
    assert there.ask("progress")["bad"] == "0"
    await ended(here)


async def test_there_and_back_ten_times(pair: Pair) -> None:
    """The daemons go on with the same VM under the same name as often as one likes."""
    name, there, guest = await pair.place("--memory", "12M", "--threads", "3")
    hosts, ops = pair.hosts, 0
    for turn in range(20):
        result = await hosts[turn % 2].migrate(name, hosts[1 - turn % 2])
        completed(result)
        await verified(guest)
        report = await trio.to_thread.run_sync(guest.report)
        assert (report["bad"], report["ops"] > ops) == (0, True)
        ops = report["ops"]
        there.kill()
        if turn < 19:
            there = pair.guest("--memory", "12M", "--threads", "3", "--incoming")
            await pair.attach(hosts[turn % 2], name, there)
            guest, there = there, guest


async def test_opposite_directions_at_once(pair: Pair) -> None:
    """Each daemon is source and destination at the same time, of several VMs."""
    moves = []
    for _ in range(2):
        moves.append((*await pair.place("--memory", "32M", "--threads", "2"), *pair))
        name, a, b = pair.name(), *pair
        there = pair.guest("--memory", "32M", "--threads", "2", "--incoming")
        here = pair.guest("--memory", "32M", "--threads", "2")
        await pair.attach(b, name, here)
        await pair.attach(a, name, there)
        moves.append((name, here, there, b, a))
    results: list[dict[str, Any]] = []

    async def move(name: str, source: Host, destination: Host) -> None:
        results.append(await source.migrate(name, destination))

    async with trio.open_nursery() as nursery:
        for name, _, _, source, destination in moves:
            nursery.start_soon(move, name, source, destination)
    for result in results:
        completed(result, 32 * MIB)
    for _, here, there, _, _ in moves:
        await verified(there)
        await ended(here)
        there.kill()


async def test_bandwidth(pair: Pair) -> None:
    """The push keeps to its bandwidth."""
    name, here, there = await pair.place("--memory", "16M", "--threads", "2")
    a, b = pair
    await filled(here)
    await a.call("Detach", name=name)
    assert command(here, "stop") == "ok"  # or it would fault all of its memory in
    await a.attach(name, "process", here.path)
    result = await a.migrate(name, b, bandwidth=8 * MIB)
    completed(result)
    assert result["memory"]["pushedPages"] > 4000
    assert 1900 < result["totalMs"] < 3500
    assert 7 * MIB < result["bytesPerSecond"] < 8.5 * MIB
    await verified(there)


async def test_faults_do_not_wait_for_the_bandwidth(pair: Pair) -> None:
    """What the guest asks for comes at once, however little may be pushed."""
    name, here, there = await pair.place("--memory", "16M", "--threads", "2")
    a, b = pair
    await filled(here)
    result = await a.migrate(name, b, bandwidth=512 * 1024)
    completed(result)
    assert result["memory"]["urgentPages"] > 3000
    assert result["totalMs"] < 10_000
    await verified(there)


async def test_balloon_during_and_after(pair: Pair) -> None:
    """Pages that the guest gives back once they are there read as zeros from then on."""
    name, _, there = await pair.place("--memory", "64M", "--threads", "2", "--rate", "4000")
    a, b = pair
    record = b.state / f"{name}.pages"
    given = 0

    async def give_back() -> None:
        nonlocal given
        await status_until(b, name, lambda status: status["phase"] == "postcopy")
        while given < 25:
            with record.open("rb") as file:
                pages = file.read()
            first = pages.find(bytes([PLACED]) * 16, given * 400 % len(pages))
            if first >= 0:
                await trio.to_thread.run_sync(there.ask, f"balloon {first * 4096} {16 * 4096}")
                given += 1
            await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_back)
        result = await a.migrate(name, b, bandwidth=16 * MIB)
        assert given > 5  # the record is gone with the migration
        nursery.cancel_scope.cancel()
    completed(result)
    await verified(there)
    for page in range(0, 160, 16):
        await trio.to_thread.run_sync(there.ask, f"balloon {page * 4096} {16 * 4096}")
    await worked(there)
    await verified(there)


async def test_command_line(pair: Pair) -> None:
    """The verbs of the command line say what happened by line, JSON and exit status."""
    name, here, there = await pair.place()
    a, b = pair
    to, control = ("--to", b.address), ("--control", a.control)
    assert (await cli("check", name, *to, *control))[0] == 0
    for wrong in (
        ("migrate", name, *control),
        ("migrate", name, *to, "--mode", "stopcopy", *control),
        ("migrate", name, *to, "--bandwidth", "fast", *control),
    ):
        status, lines, error = await cli(*wrong)
        assert (status, lines) == (2, []) and error
    status, lines, error = await cli("migrate", name, "--to", "127.0.0.1:1", "--json", *control)
    assert status == 1
    assert last_json(lines)["event"] == "failed" and "port 1" in last_json(lines)["error"]
    assert len(error.splitlines()) == 1
    await worked(here)
    status, lines, error = await cli("migrate", name, *to, "--json", POSTCOPYD_CONTROL=a.control)
    assert (status, error) == (0, "")
    completed(last_json(lines), mode="hybrid")
    await verified(there)
    status, lines, _ = await cli("status", name, "--json", "--control", b.control)
    assert status == 0
    keys = {"vm", "role", "phase", "migration", "peer", "remaining", "message"}
    assert keys <= last_json(lines).keys()
    assert (await cli("detach", name, *control))[0] == 0
    assert (await cli("detach", name, *control))[0] == 1


async def test_demo() -> None:
    """`postcopyd demo` moves a guest of the size asked for, and ends with the result object."""
    status, lines, error = await cli("demo", "--memory", "24M", "--json")
    assert (status, error) == (0, "")
    result = last_json(lines)
    completed(result, 24 * MIB, mode="hybrid")
    assert (result["guest"], result["verified"], result["daemons"]) == ("process", True, 2)
    assert all(json.loads(line)["event"] for line in lines[-1:])


def footprint(host: Host) -> tuple[int, int, int]:
    """(descriptors, threads, resident KiB) of a daemon; none of the threads an engine's."""
    assert host.process is not None
    proc = Path(f"/proc/{host.process.pid}")
    threads = [path.read_text() for path in proc.glob("task/*/comm")]
    assert not [thread for thread in threads if thread.startswith("pc-")]
    resident = (proc / "status").read_text().partition("VmRSS:")[2].split()[0]
    return len(list((proc / "fd").iterdir())), len(threads), int(resident)


@pytest.mark.long
async def test_nothing_leaks(new_pair: Pair) -> None:
    """After a hundred migrations the daemons have the descriptors, threads and memory of before."""
    options = ("--memory", "1M", "--threads", "1", "--rate", "2000")

    async def chain(name: str, turns: int) -> None:
        source, destination = new_pair
        guest = await new_pair.attach(source, name, new_pair.guest(*options))
        for _ in range(turns):
            there = new_pair.guest(*options, "--incoming")
            await new_pair.attach(destination, name, there)
            completed(await source.migrate(name, destination), MIB)
            await ended(guest)
            guest, source, destination = there, destination, source
        await verified(guest)
        for host in new_pair:
            await host.call("Detach", name=name)
        guest.kill()

    async def chains(turns: int) -> list[tuple[int, int, int]]:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(chain, new_pair.name(), turns)
        return [footprint(host) for host in new_pair]

    for host, before, after in zip(new_pair, await chains(4), await chains(25), strict=True):
        # The daemon closes after it has answered, so what it has just used may still be there.
        as_before = partial(lambda host, fds: footprint(host)[0] <= fds, host, before[0])
        await until(as_before, "the descriptors of before", 10)
        assert after[1] <= before[1] + 2  # idle ones, kept for the next blocking call
        print(host.name, before, after)
        assert after[2] < before[2] + 4096
