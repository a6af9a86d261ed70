# SPDX-License-Identifier: Apache-2.0
"""Names that libvirt allows, all the way; and places that a guest cannot be moved to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import trio
from pair import Pair, completed, ended, open_pair, status_until, verified, worked

from postcopyd.errors import PostcopydError

NAMES = ("my web server", "> $(reboot) 'x'", "数据库 ö", "long " + "数" * 83 + "x")


@pytest.fixture
def secure() -> Iterator[Pair]:
    with open_pair(tls=True) as made:
        yield made


def cli(control: object, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "postcopyd", *words, "--control", str(control)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )


@pytest.mark.parametrize("name", NAMES)
async def test_names_that_libvirt_allows(secure: Pair, name: str) -> None:
    """Such a guest is attached, moved, recovered by daemons that were killed, listed, and asked
    after on the command line; hooks get its name as it is."""
    a, b = secure
    name, here, there = await secure.place("--memory", "64M", "--rate", "8000", name=name)
    started = await a.call("Migrate", name=name, to=b.address, bandwidth=16 << 20)
    await status_until(b, name, lambda status: status["phase"] == "postcopy")
    for host in (a, b):
        host.end(signal.SIGKILL)
        await host.start()
    assert cli(a.control, "may-run", name, "--durable-dir", str(a.state / "durable")).returncode
    result = await a.result(name, started["migration"])
    assert (result["event"], result["vm"], result["recoveries"]) == ("completed", name, 1)
    await verified(there)
    await worked(there)
    await ended(here)
    shown = cli(b.control, "status", name, "--json")
    assert json.loads(shown.stdout)["vm"] == name
    assert "source prepare" in secure.hooks_run(name)
    assert "destination drained" in secure.hooks_run(name)
    for host in (a, b):
        await host.call("Detach", name=name)
        assert sorted(os.listdir(host.state)) == [".lock", "daemon-id", "durable"]
        assert os.listdir(host.state / "durable") == [".lock"]


async def test_to_itself(pair: Pair) -> None:
    """A guest that is moved to its own daemon stays, and both commands say why."""
    name, here, _there = await pair.place()
    a, _ = pair
    port = a.address.rpartition(":")[2]
    for to in (a.address, f"localhost:{port}"):
        problems = await refused(a.call("Check", name=name, to=to))
        assert "is this daemon itself: name the host" in problems
        failed = await a.result(name, (await a.call("Migrate", name=name, to=to))["migration"])
        assert failed["event"] == "failed"
        assert "is this daemon itself: name the host" in failed["error"]
    await worked(here)


async def refused(call: object) -> str:
    """What a check finds, however it says it."""
    try:
        return str((await call)["problems"])
    except PostcopydError as error:
        return str(error)


async def test_to_a_web_server(pair: Pair) -> None:
    """The port of another program is said to be that."""
    name, here, _there = await pair.place()
    a, _ = pair
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                connection.recv(1000)

        threading.Thread(target=serve, daemon=True).start()
        to = f"127.0.0.1:{server.getsockname()[1]}"
        failed = await a.result(name, (await a.call("Migrate", name=name, to=to))["migration"])
        assert failed["event"] == "failed"
        assert "an HTTP server is there, and not postcopyd" in failed["error"]
    await worked(here)


@pytest.mark.long
async def test_many_guests_at_once(pair: Pair) -> None:
    """Guests that all leave at the same time all arrive: they wait for each other where they must,
    and nobody is refused for it."""
    a, b = pair

    async def move() -> None:
        name, here, there = await pair.place("--memory", "4M", "--rate", "1000")
        placed.append(name)
        while len(placed) < 40:
            await trio.sleep(0.1)
        completed(await a.migrate(name, b))
        await verified(there)
        await ended(here)

    placed: list[str] = []
    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(move)
