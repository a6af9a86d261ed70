# SPDX-License-Identifier: Apache-2.0
"""Hooks: what they are told, in which order, and which of them can stop a migration."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from postcopyd.sessions import hooks
from postcopyd.sessions.hooks import HookVeto, run_hooks


def make(folder: Path, name: str, script: str, mode: int = 0o755) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(mode)
    return path


async def run(folder: Path | None, phase: str = "prepare", **about: Any) -> None:
    await run_hooks(folder, "web1", "source", phase, **about)


async def test_no_folder_no_hooks(tmp_path: Path) -> None:
    """Without a folder, or with one that is not there or empty, nothing happens."""
    for folder in (None, tmp_path / "none", tmp_path):
        await run(folder)


async def test_hook_is_told_what_happens(tmp_path: Path) -> None:
    """A hook gets VM, role and phase as arguments and everything as JSON on stdin."""
    make(tmp_path, "tell", f'echo "$1 $2 $3" > {tmp_path}/args; cat > {tmp_path}/about')
    await run(tmp_path, "drained", migration="m1", peer="host2:16525", message="it's done\n")
    assert (tmp_path / "args").read_text() == "web1 source drained\n"
    assert json.loads((tmp_path / "about").read_text()) == {
        "vm": "web1",
        "role": "source",
        "phase": "drained",
        "migration": "m1",
        "peer": "host2:16525",
        "message": "it's done\n",
    }


async def test_a_hook_that_writes_on_terminals(tmp_path: Path) -> None:
    """What a hook says is shown on one line, without what moves a cursor."""
    make(tmp_path, "evil", r"printf '\033[2Jno room\nat all\007' >&2; exit 1")
    with pytest.raises(HookVeto) as caught:
        await run(tmp_path)
    assert str(caught.value).endswith(": ?[2Jno room at all?")


@pytest.mark.parametrize("name", ["my web server", "$(reboot)", "'; rm *", "数据库"])
async def test_any_name_is_one_argument(tmp_path: Path, name: str) -> None:
    """A hook gets the name as it is, whatever a shell would make of it."""
    make(tmp_path, "tell", f'printf %s "$1" > {tmp_path}/name')
    await run_hooks(tmp_path, name, "source", "prepare")
    assert (tmp_path / "name").read_text() == name


async def test_no_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that may write to its own two folders only, as its unit has it, runs hooks too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    make(tmp_path, "no", "read -r about; echo not today >&2; exit 1")
    with pytest.raises(HookVeto, match="not today"):
        await run(tmp_path)


async def test_hooks_run_in_the_order_of_their_names(tmp_path: Path) -> None:
    """One after the other; what is no executable file is passed over."""
    (tmp_path / "hooks").mkdir()
    for name in ("20-b", "10-a", "30-c"):
        make(tmp_path / "hooks", name, f"echo {name} >> {tmp_path}/order")
    make(tmp_path / "hooks", "15-off", f"echo off >> {tmp_path}/order", mode=0o644)
    (tmp_path / "hooks" / "16-folder").mkdir()
    await run(tmp_path / "hooks")
    assert (tmp_path / "order").read_text().split() == ["10-a", "20-b", "30-c"]


@pytest.mark.parametrize("phase", ["prepare", "handover"])
async def test_veto_names_hook_and_reason(tmp_path: Path, phase: str) -> None:
    """What a refusing hook says on stderr is in the error, and those after it do not run."""
    make(tmp_path, "1-no", "echo 'backup is running' >&2; exit 3")
    make(tmp_path, "2-later", f"touch {tmp_path}/ran")
    with pytest.raises(HookVeto, match=rf"1-no refused .*web1.*{phase}\): backup is running"):
        await run(tmp_path, phase)
    assert not (tmp_path / "ran").exists()


async def test_veto_without_a_word(tmp_path: Path) -> None:
    """A hook that refuses silently is quoted by its exit status, or the signal that ended it."""
    hook = make(tmp_path, "no", "exit 7")
    with pytest.raises(HookVeto, match="exit status 7"):
        await run(tmp_path)
    hook.write_text("#!/bin/sh\nkill -9 $$\n")
    with pytest.raises(HookVeto, match="exit status -9"):
        await run(tmp_path)


@pytest.mark.parametrize("phase", ["running", "drained", "failed"])
async def test_no_veto_when_it_is_too_late(tmp_path: Path, phase: str) -> None:
    """A hook that fails in a phase that only tells is logged, and the others run."""
    make(tmp_path, "1-no", "echo sorry >&2; exit 1")
    make(tmp_path, "2-later", f"touch {tmp_path}/ran")
    with structlog.testing.capture_logs() as logs:
        await run(tmp_path, phase)
    assert [(line["event"], line["reason"]) for line in logs] == [("hook failed", "sorry")]
    assert (tmp_path / "ran").exists()


async def test_hook_that_does_not_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After HOOK_S a hook is a veto and is not left running."""
    monkeypatch.setattr(hooks, "HOOK_S", 0.5)
    make(tmp_path, "slow", f"echo $$ > {tmp_path}/pid; exec sleep 60")
    began = time.monotonic()
    with pytest.raises(HookVeto, match="did not end within"):
        await run(tmp_path)
    assert time.monotonic() - began < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


async def test_hook_that_cannot_be_run(tmp_path: Path) -> None:
    """A hook without its interpreter is a veto that says why."""
    path = make(tmp_path, "bad", "")
    path.write_text("#!/nonexistent/sh\n")
    with pytest.raises(HookVeto, match="cannot be run: No such file"):
        await run(tmp_path)


async def test_hook_that_writes_much_and_reads_nothing(tmp_path: Path) -> None:
    """Output without end and an unread stdin neither block nor fill the error."""
    make(tmp_path, "loud", "yes | head -c 1000000 >&2; yes | head -c 1000000; exit 1")
    with pytest.raises(HookVeto) as caught:
        await run(tmp_path, message="x" * 500_000)
    assert len(str(caught.value)) < 1000


async def test_hook_says_bytes_that_are_no_text(tmp_path: Path) -> None:
    """A reason in no known encoding is still a reason."""
    make(tmp_path, "bytes", r"printf '\377\376 no' >&2; exit 1")
    with pytest.raises(HookVeto, match=r" no$"):
        await run(tmp_path)
