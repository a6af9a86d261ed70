# SPDX-License-Identifier: Apache-2.0
"""Hooks: executables in one folder, run at named phases of a migration on either host.

Each is called as `HOOK VM ROLE PHASE` with a JSON object on stdin (vm, role, phase, migration,
peer, message), in the order of their names, one after the other. ROLE is source or destination.
VM is a name that names.py allows, which may have spaces and quotes in it.

  prepare     before anything is touched; may veto (any exit status but 0), has HOOK_S seconds.
              At the destination it may create the VMM and `postcopyd attach` it.
  handover    source only: everything is ready, the guest is about to stop; may veto, HOOK_S seconds
  running     destination: the guest runs here now
  drained     both: all of the guest is at the destination
  failed      both: the guest was not granted, was declined or taken back; it is at the source
  ended       both: the guest ended at the destination on purpose, before all of it had come

What a hook prints to stderr is its reason in the refusal, and goes to the log.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import IO, Any

import structlog
import trio

from postcopyd.errors import PostcopydError
from postcopyd.names import plain

HOOK_S = 30.0
"""Seconds that one hook may take. Then it is killed, which in a phase with a veto is a veto."""

VETO_PHASES = frozenset({"prepare", "handover"})

log = structlog.get_logger()


class HookVeto(PostcopydError):
    """A hook refused, or did not end in time."""

    name = "HookVeto"


async def run_hooks(directory: Path | None, vm: str, role: str, phase: str, **about: Any) -> None:
    """Runs the hooks of a phase. Raises HookVeto in a phase that has a veto; logs otherwise."""
    if directory is None or not directory.is_dir():
        return
    for hook in sorted(directory.iterdir()):
        if not hook.is_file() or not os.access(hook, os.X_OK):
            continue
        reason = await _run(hook, vm, role, phase, about)
        if reason is None:
            continue
        if phase in VETO_PHASES:
            raise HookVeto(f"the hook {hook} refused to let {vm} go on ({role}, {phase}): {reason}")
        log.warning("hook failed", vm=vm, role=role, phase=phase, hook=str(hook), reason=reason)


async def _run(hook: Path, vm: str, role: str, phase: str, about: dict[str, Any]) -> str | None:
    """The reason why a hook failed, or None."""
    try:
        return await _run_it(hook, vm, role, phase, about)
    except OSError as error:
        return f"it cannot be run: {error.strerror}"


async def _run_it(hook: Path, vm: str, role: str, phase: str, about: dict[str, Any]) -> str | None:
    # No pipes: a VMM that the hook has started would hold their other ends. No files of a folder:
    # the daemon's unit lets it write to no folder for that.
    with _memory() as asked, _memory() as answered:
        asked.write(json.dumps({"vm": vm, "role": role, "phase": phase, **about}).encode())
        asked.seek(0)
        try:
            with trio.fail_after(HOOK_S):
                done = await trio.run_process(
                    [str(hook), vm, role, phase],
                    stdin=asked.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=answered.fileno(),
                    check=False,
                )
        except trio.TooSlowError:
            return f"it did not end within {HOOK_S:.0f} s"
        if done.returncode == 0:
            return None
        answered.seek(0)
        said = answered.read().decode(errors="replace").strip()
        return plain(said[-500:]) or f"exit status {done.returncode}"


def _memory() -> IO[bytes]:
    """A file that has no name."""
    return os.fdopen(os.memfd_create("hook"), "w+b")
