# SPDX-License-Identifier: Apache-2.0
"""The commands that a document shows, run in order, and what they print held against it.

A fenced block marked `console` has prompts (`host1# `, `host2# `, `# ` or `$ `), each with a
command, which goes on over lines that end in a backslash and through a here document, and what it
prints. Figures, addresses and ids may differ, as may which progress lines come; `...` stands for
any lines, within a line for any words. A comment before a block says why it is not run:
`<!-- not run: WHY -->`.

Knows no document and no host: who runs one gives a function for each prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
assert VERSION
DEB = f"postcopyd_{VERSION[1]}_amd64.deb"
"""As documents name it."""

Run = Callable[[str], tuple[int, str]]
"""A command's exit status and all that it printed."""

_FENCE = re.compile(r"^( *)```(\w*)$")
_COMMENT = re.compile(r"<!-- not run: (.+) -->")
_PROMPT = re.compile(r"((?:host\d)?[#$]) (.*)")
_HERE = re.compile(r"<<-?'?(\w+)'?")

# What a migration shows on its way depends on when one looks, and how its pages travelled on who
# was faster. The words in front are the document's promise.
_ON_THE_WAY = re.compile(r"(\S+): (idle, preparing|precopy,|handover,|postcopy,) ?.*")
_ROW = re.compile(r"  (phases|pages|passes|handed over|faults) +\S.*")
_BAR = re.compile(r"    from +[\d.]+ (us|ms|s) +\d+( +#+)?")
# A number that stands for itself, with its unit: not the one in host1.
_FIGURE = re.compile(
    r"(?<![\w/])(?:(?P<id>[0-9a-f]{16})|\d+(?:\.\d+)*(?P<unit> (?:us|ms|s|B|[KMGT]iB))?)(?![\w])"
)


@dataclass
class Command:
    """One of a document; `line` is where it stands."""

    prompt: str
    text: str
    line: int
    shown: list[str] = field(default_factory=list)


@dataclass
class Block:
    """One block of commands; `not_run` is the reason that is given."""

    line: int
    not_run: str
    commands: list[Command]


def blocks(document: Path) -> Iterator[Block]:
    """All blocks of commands. Raises AssertionError for one that cannot be read."""
    lines = iter(enumerate(document.read_text().splitlines(), 1))
    not_run = ""
    for number, line in lines:
        if comment := _COMMENT.fullmatch(line.strip()):
            not_run = comment[1]
        if fence := _FENCE.match(line):
            inside = []
            for at, text in lines:
                if text.strip() == "```":
                    break
                inside.append((at, text.removeprefix(fence[1])))
            prompts = [at for at, text in inside if _PROMPT.match(text)]
            assert fence[2] or not prompts, f"{document.name}:{prompts[0]}: a block for `console`"
            if fence[2] == "console":
                commands = list(_commands(document, inside))
                yield Block(number, not_run, commands)
        if line.strip() and not comment:
            not_run = ""


def _commands(document: Path, inside: list[tuple[int, str]]) -> Iterator[Command]:
    lines = iter(inside)
    command: Command | None = None
    for number, line in lines:
        if not (prompt := _PROMPT.fullmatch(line)):
            assert command, f"{document.name}:{number}: a block begins with a prompt, not {line!r}"
            command.shown.append(line)
            continue
        if command:
            yield command
        text, here = prompt[2], _HERE.search(prompt[2])
        while text.endswith("\\"):
            text += "\n" + next(lines)[1]
        if here:
            while text.rpartition("\n")[2] != here[1]:
                text += "\n" + next(lines)[1]
        command = Command(prompt[1], text, number)
    if command:
        yield command


def expected(shown: list[str]) -> re.Pattern[str]:
    """What output fits to what a document shows of it."""
    parts: list[str] = []
    while shown and not shown[-1].strip():
        shown = shown[:-1]
    for line in shown:
        if way := _ON_THE_WAY.fullmatch(line):
            part = rf"(?:{re.escape(way[1])}: (?:idle|precopy|handover|postcopy)\b.*\n)*"
        elif row := _ROW.fullmatch(line):
            part = rf"  {row[1]} .*\n"
        elif _BAR.fullmatch(line):
            part = r"(?:    from .*\n)*"
        elif line.strip() == "...":
            part = r"(?:.*\n)*?"
        else:
            part = _line(line) + r"\n"
        if part not in parts[-1:] or not part.endswith("*"):
            parts.append(part)
    return re.compile("".join(parts))


def _line(line: str) -> str:
    pattern, at = "", 0
    for figure in _FIGURE.finditer(line):
        pattern += _words(line[at : figure.start()])
        if figure["id"]:
            pattern += "[0-9a-f]{16}"
        else:
            kinds = "us|ms|s" if figure["unit"] and figure["unit"][-1] == "s" else r"B|[KMGT]iB"
            pattern += r"\d+(?:\.\d+)*" + (f" (?:{kinds})" if figure["unit"] else "")
        at = figure.end()
    return pattern + _words(line[at:])


def _words(text: str) -> str:
    return re.sub(r"(?:\\ )+", " +", re.escape(text)).replace(r"\.\.\.", ".*")


def run(document: Path, prompts: Mapping[str, Run]) -> int:
    """Runs all blocks; how many commands that was. Raises AssertionError where what was printed, or
    that it failed, is not what the document says."""
    count = 0
    for block in blocks(document):
        if block.not_run:
            continue
        for command in block.commands:
            status, said = prompts[command.prompt](command.text)
            where = f"{document.name}:{command.line}: {command.text}"
            said = "".join(line.rstrip() + "\n" for line in said.rstrip().splitlines())
            if not expected(command.shown).fullmatch(said):
                shown = "\n".join(command.shown)
                raise AssertionError(f"{where}\nprinted:\n{said}\nthe document says:\n{shown}")
            says_so = any(line.startswith(("postcopyd: ", "error: ")) for line in command.shown)
            assert bool(status) <= says_so, f"{where}\nexit status {status}\n{said}"
            count += 1
    return count
