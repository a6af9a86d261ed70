# SPDX-License-Identifier: Apache-2.0
"""What one daemon of a host has to itself, also after a SIGKILL of the one before; and that no task
of a daemon can end the others."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

import postcopyd
from postcopyd.records import locks
from postcopyd.records.locks import Taken
from postcopyd.records.store import Store
from postcopyd.tasks import guard

HOLDER = """
import sys, trio
from pathlib import Path
from postcopyd.records import locks
async def main():
    if sys.argv[1].isdigit():
        held = await locks.vmm(int(sys.argv[1]), "web1")
    else:
        held = locks.folders(*((Path(path), "--x") for path in sys.argv[1:]))
        await held.__aenter__()
    print("held", flush=True)
    await trio.sleep_forever()
trio.run(main)
"""


@contextmanager
def held(*what: Any) -> Iterator[subprocess.Popen[str]]:
    """Another daemon that has these folders, or this process."""
    arguments = [sys.executable, "-c", HOLDER, *map(str, what)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            yield other
        finally:
            other.kill()


@pytest.mark.parametrize("which", [0, 1])
async def test_two_daemons_share_no_records(
    which: int, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Who finds its state folder, or its durable one, in another's hands is told whose, and which
    option names another; once that one was killed it may be had."""
    ours = [(tmp_path / "state", "--state-dir"), (tmp_path / "durable", "--durable-dir")]
    for path, _ in ours:
        path.mkdir()
    path, option = ours[which]
    with held(path) as other:
        with pytest.raises(Taken, match=rf"another postcopyd \(process {other.pid}\) has them.*"
                                        rf"another folder with {option}"):  # fmt: skip
            async with locks.folders(*ours):
                pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    async with locks.folders(*ours):
        pass
    async with locks.folders(*ours):  # given back
        pass


async def test_one_folder_for_both(tmp_path: Path) -> None:
    """A folder that is both is no other daemon's."""
    Store(tmp_path, tmp_path)
    async with locks.folders((tmp_path, "--state-dir"), (tmp_path, "--durable-dir")):
        pass


async def test_a_folder_that_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a lock cannot be had for another reason the daemon starts, and says so: guests may wait
    for it."""

    def refuse(*args: Any) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(locks.os, "open", refuse)
    with structlog.testing.capture_logs() as logs:
        async with locks.folders((tmp_path, "--state-dir")):
            pass
    assert [entry["error"] for entry in logs] == ["Read-only file system"]


async def test_a_process_has_one_daemon(autojump_clock: trio.testing.MockClock) -> None:
    """A VMM that another daemon has is refused, with its number; once that one was killed it may be
    had, and by one name only."""
    with subprocess.Popen(["sleep", "60"]) as vmm:
        try:
            with held(vmm.pid) as other:
                with pytest.raises(Taken, match=rf"another postcopyd .*\(process {other.pid}\)"):
                    await locks.vmm(vmm.pid, "web1")
                other.send_signal(signal.SIGKILL)
                other.wait()
            lock = await locks.vmm(vmm.pid, "web1")
            assert not os.get_inheritable(lock)
            with pytest.raises(Taken, match="under another name"):
                await locks.vmm(vmm.pid, "web2")
            os.close(lock)
            os.close(await locks.vmm(vmm.pid, "web2"))
        finally:
            vmm.kill()


def test_the_second_daemon_does_not_start(tmp_path: Path) -> None:
    """`postcopyd serve` on records that another one has says so and ends; the first goes on."""
    program = Path(sys.executable).with_name("postcopyd")

    def serve(name: str) -> subprocess.Popen[str]:
        control = ["--control", str(tmp_path / name), "--listen", "127.0.0.1:0"]
        state = ["--state-dir", str(tmp_path / "state"), "--tls", "off"]
        return subprocess.Popen(
            [program, "serve", *control, *state], stderr=subprocess.PIPE, text=True
        )

    with serve("one") as first:
        try:
            deadline = time.monotonic() + 30
            while not (tmp_path / "one").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            with serve("two") as second:
                said = second.communicate(timeout=30)[1]
            assert second.returncode == 1
            assert f"another postcopyd (process {first.pid}) has them" in said
            assert first.poll() is None
        finally:
            first.kill()


# --- tasks ---------------------------------------------------------------------------------------


async def fails(*args: Any) -> None:
    raise RuntimeError("a bug")


async def test_a_task_that_fails_ends_no_other() -> None:
    """Its bug is in the log, and whoever it is for is told."""
    told: list[Exception] = []
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guard.outlived, told.append, fails)
    assert [str(error) for error in told] == ["a bug"]
    assert [entry["event"] for entry in logs] == ["bug in a task of the daemon"]


async def test_a_task_that_has_to_run_is_begun_anew(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """As often as it fails, and not once it has returned."""
    began = []

    async def task() -> None:
        began.append(trio.current_time())
        if len(began) < 4:
            await fails()

    with structlog.testing.capture_logs():
        await guard.always(task)
    assert len(began) == 4
    assert began[-1] - began[0] == 3 * guard.AGAIN_S


async def test_a_connection_that_fails_ends_no_other() -> None:
    """Whoever accepts connections goes on when serving one of them fails."""
    with structlog.testing.capture_logs():
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, guard.each(fails), listeners)
            for _ in range(3):
                port = listeners[0].socket.getsockname()[1]
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    assert await stream.receive_some() == b""
            nursery.cancel_scope.cancel()


def calls(tree: ast.AST, *names: str) -> Iterator[tuple[str, str]]:
    """(what is called, its arguments) of calls of these methods."""
    for node in ast.walk(tree):
        func = node.func if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Call) and isinstance(func, ast.Attribute) and func.attr in names:
            yield ast.unparse(func), ", ".join(map(ast.unparse, node.args))


def test_all_tasks_of_the_daemon_are_guarded() -> None:
    """No task is started in a nursery of the daemon, and no connection served, but through
    guard.py."""
    package = Path(postcopyd.__file__).parent
    found = 0
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for called, arguments in calls(tree, "start_soon", "start"):
            daemons = called.startswith("self._nursery.") and path.parent.name == "daemon"
            service = path.name == "service.py"
            if daemons or (service and called.startswith(("nursery.", "process."))):
                found += 1
                guarded = arguments.startswith("guard.")
                # These two take over signals and doors, and say themselves what goes wrong.
                own = service and re.match(
                    r"_signals|methods\.serve|Metrics\(daemon\)\.serve|trio\.serve_listeners",
                    arguments,
                )
                assert guarded or own, f"{path.name}: {called}({arguments})"
            if "trio.serve_listeners" in arguments:
                assert "guard.each(" in arguments, f"{path.name}: {called}({arguments})"
        if path.parent.name == "varlink":  # may be anybody's: it has a guard of its own
            continue
        for called, arguments in calls(tree, "serve_listeners"):
            found += 1
            assert arguments.startswith("guard.each("), f"{path.name}: {called}({arguments})"
    assert found >= 7
