# SPDX-License-Identifier: Apache-2.0
"""Writes shell completion, made from the command line's parser: completions.py FOLDER.

The files are named as each shell looks for them. VM names come from the daemon.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import shtab

from postcopyd.cli import main

FILES = {"bash": "postcopyd", "zsh": "_postcopyd", "fish": "postcopyd.fish"}

# Only what a name may have: shells read these words once more.
NAMES = (
    r"""postcopyd list --json 2>/dev/null | sed -n 's/.*"vm":"\([A-Za-z0-9_.@:+,-]*\)".*/\1/p'"""
)
VMS = {
    "bash": "_postcopyd_vms",
    "zsh": "_postcopyd_vms",
    "fish": "(_postcopyd_vms)",
    "preamble": {
        "bash": f'_postcopyd_vms() {{ compgen -W "$({NAMES})" -- "$1"; }}',
        "zsh": f"_postcopyd_vms() {{ compadd -- $({NAMES}); }}",
        "fish": f"function _postcopyd_vms\n  {NAMES}\nend",
    },
}
BY_METAVAR = {
    "DIR": shtab.DIRECTORY,
    "FILE": shtab.FILE,
    "NAME": VMS,
    "PATH": shtab.FILE,
    "QMP_SOCKET": shtab.FILE,
    "SOCKET": shtab.FILE,
}


def actions(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Every argument of every verb, with the verb."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                yield from ((name, inner) for inner in verb._actions)


parser = main.parser()
for verb, action in actions(parser):
    metavar = str(action.metavar)
    # The names that attach and certs want are new ones.
    if metavar in BY_METAVAR and (metavar != "NAME" or verb not in ("attach", "certs")):
        action.complete = BY_METAVAR[metavar]  # type: ignore[attr-defined]
    elif "|" in metavar and metavar.islower():
        action.choices = metavar.split("|")
for shell, file in FILES.items():
    Path(sys.argv[1], file).write_text(shtab.complete(parser, shell) + "\n")
