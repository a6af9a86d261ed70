# SPDX-License-Identifier: Apache-2.0
"""Threads: each call has a pool of its kind, and no kind waits for another."""

from __future__ import annotations

import ast
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from postcopyd.errors import PostcopydError
from postcopyd.net import connection
from postcopyd.source import engine as source_engine
from postcopyd.source.engine import Look, SourceEngine
from postcopyd.tasks import threads
from postcopyd.vmm import Region

POOLS = {name: value for name, value in vars(threads).items() if name.isupper()}
PACKAGE = Path(__file__).parents[2] / "postcopyd"


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Each call, by its dotted name as it is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_each_thread_is_of_a_kind() -> None:
    """No call in a thread leaves its pool to trio, whose one pool is shared by all; nor does one by
    another way that trio has for files and names. Hooks and the demo start processes with it."""
    seen = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, call in calls(ast.parse(path.read_text())):
            where = f"{path.relative_to(PACKAGE)}:{call.lineno}"
            assert not name.startswith(("trio.Path", "trio.open_file", "trio.wrap_file")), where
            if name.endswith("to_thread.run_sync"):
                given = {one.arg: ast.unparse(one.value) for one in call.keywords}
                assert given.get("limiter", "").removeprefix("threads.") in POOLS, where
                seen.add(given["limiter"].removeprefix("threads."))
            if name.endswith(("run_process", "open_process")):
                assert path.name == "hooks.py" or path.parent.name == "demo", where
    assert seen == POOLS.keys()


@asynccontextmanager
async def all_taken(*but: trio.CapacityLimiter) -> AsyncIterator[None]:
    """Within, every pool has nothing left, trio's own neither, but for these."""
    pools = [trio.to_thread.current_default_thread_limiter(), *POOLS.values()]
    free = trio.Event()
    async with trio.open_nursery() as nursery:
        for pool in pools:
            if pool not in but and pool.total_tokens != float("inf"):
                for _ in range(int(pool.total_tokens)):
                    await nursery.start(hold, pool, free)
        yield
        free.set()


async def hold(
    pool: trio.CapacityLimiter, free: trio.Event, task_status: trio.TaskStatus[None]
) -> None:
    async with pool:
        task_status.started()
        await free.wait()


async def test_the_blackout_waits_for_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all pools taken, the look at a stopped guest, and what ends its engine, go on."""
    monkeypatch.setattr(source_engine, "AT_ONCE_PAGES", 0)  # a guest that is looked at in a thread
    fd = os.memfd_create("ram")
    os.truncate(fd, 1 << 20)
    region = Region("ram", address=0, pages=256, page_size=4096, offset=0, fd=fd)
    engine = SourceEngine([region], os.getpid())
    try:
        async with all_taken():
            with trio.fail_after(10):
                await engine.scan()
                with pytest.raises(PostcopydError, match="Invalid argument"):  # nothing is tracked
                    await engine.look(Look.STOPPED)
                await engine.disconnect()
                await engine.aclose()
    finally:
        os.close(fd)


@contextmanager
def name_servers(answer: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, names of hosts are looked up so; addresses are as ever."""
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *more: Any, **named: Any) -> Any:
        flags = more[4] if len(more) > 4 else named.get("flags", 0)
        if flags & socket.AI_NUMERICHOST:
            return real(host, *more, **named)
        return answer(host.decode() if isinstance(host, bytes) else host)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield


async def test_silent_name_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a host is dialled whose name nobody answers for, it has one thread, and trio's
    own pool none of it; another host's name is looked up beside it; each who dials gives up in
    time, and the answer that comes at last is for who waits then."""
    monkeypatch.setattr(connection, "CONNECT_S", 0.2)
    silent, asked = threading.Event(), []

    def answer(host: str) -> Any:
        asked.append(host)
        if host == "host2.example":
            silent.wait()
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def dials(host: str) -> None:
        with pytest.raises(PostcopydError, match=r"no answer within|Name or service not known"):
            await connection.dial(host, 16525, "postcopyd control")

    with name_servers(answer, monkeypatch):
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    nursery.start_soon(dials, "host2.example")
            await dials("host2.example")
            assert asked == ["host2.example"]
            assert threads.NAMES.borrowed_tokens == 1
            assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
            await dials("host3.example")
            assert asked == ["host2.example", "host3.example"]
        finally:
            silent.set()
        while connection.RESOLVER._under_way:
            await trio.sleep(0.001)
        await dials("host2.example")
        assert asked.count("host2.example") == 2


async def test_names_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host is reached by its name, whose look-up is shared by all who dial it at that time."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    asked: list[str] = []

    def answer(host: str) -> Any:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    with name_servers(answer, monkeypatch):
        for _ in range(2):
            stream = await connection.dial("host2.example", port, "postcopyd control")
            await stream.aclose()
    assert asked == ["host2.example"] * 2
    for listener in listeners:
        await listener.aclose()
