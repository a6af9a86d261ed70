# SPDX-License-Identifier: Apache-2.0
"""What people see of a migration, on terminals from 20 to 300 columns and elsewhere."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from fake_daemon import FAULTS, RESULT

from postcopyd.cli import progress
from postcopyd.cli.progress import PLAIN, Screen

WIDTHS = range(20, 301)
WAY = [("idle", 12.0), ("precopy", 1200.0), ("handover", 7.9), ("postcopy", 830.0)]
RESULT_ = {
    **RESULT,
    "phases": [{"phase": phase, "ms": ms} for phase, ms in WAY],
    "handedOver": "another pass would not pay: the guest has written 65536 pages again while "
    "65536 were sent",
}
PAUSED = {
    "vm": "a-guest-with-quite-a-long-name-as-some-people-give-them",
    "role": "destination",
    "phase": "paused",
    "peer": "host1.example.net (2001:db8::1)",
    "migration": "94c055d990a59098",
    "remaining": 5 << 30,
    "totalBytes": 64 << 30,
    "bytesPerSecond": 1 << 30,
    "faults": FAULTS,
    "message": "it runs here and waits for pages that are still at host1.example.net: postcopyd at "
    "2001:db8::1 says nothing for 10 s; that host connects again by itself",
    "result": RESULT_,
}
MOVING = {**PAUSED, "vm": "web1", "phase": "postcopy", "result": None, "remaining": 16 << 30}


def bare(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_nothing_is_wider_than_the_terminal(colour: bool, blocks: bool) -> None:
    """Whatever there is to say fits, at any width, and is coloured only where that is wanted."""
    for columns in WIDTHS:
        screen = Screen(columns, colour, blocks)
        shown = [
            progress.table([PAUSED, MOVING, {"vm": "a"}], screen),
            progress.block(PAUSED, screen),
            progress.summary(RESULT_, "host2.example.net:16525", screen),
            *(progress.live(status, screen) for status in (PAUSED, MOVING, {"vm": "a"})),
        ]
        for text in shown:
            for line in bare(text).splitlines():
                assert len(line) <= columns, (columns, line)
                assert line == line.rstrip()
        text = "".join(shown)
        assert ("\x1b[" in text) == colour
        assert text.isascii() or blocks


def test_what_is_cut_first() -> None:
    """The narrower a terminal, the less of a table: of a name and a phase something is always
    there, and nothing is cut where all fits."""
    wide = progress.table([PAUSED, MOVING], Screen(300)).splitlines()
    assert wide == progress.table([PAUSED, MOVING]).splitlines()
    assert wide[0].split() == ["NAME", "ROLE", "PHASE", "PEER", "REMAINING"]
    heads = [progress.table([PAUSED, MOVING], Screen(n)).splitlines()[0].split() for n in WIDTHS]
    counts = [len(head) for head in heads]
    assert counts == sorted(counts)
    assert heads[0] == ["NAME", "PHASE"]
    assert "REMAINING" in progress.table([PAUSED, MOVING], Screen(60))
    narrow = progress.table([PAUSED, MOVING], Screen(20, blocks=True)).splitlines()
    assert narrow == ["NAME        PHASE", "a-guest-w…  paused", "web1        postcopy"]


def test_rows_wrap_at_words() -> None:
    """A long value goes on below itself, and below its label where there is little room."""
    lines = progress.block(PAUSED, Screen(60)).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  message"))
    assert all(line.startswith(" " * 15) and line[15] != " " for line in lines[at + 1 :])
    said = " ".join(line[15:] for line in lines[at:])
    assert said == PAUSED["message"]
    lines = progress.block(PAUSED, Screen(30)).splitlines()
    assert lines[1:5] == [
        "  role         destination",
        "  phase        paused",
        "  peer",
        "    host1.example.net",
    ]
    assert progress.block(PAUSED, PLAIN).splitlines()[-1] == f"  message      {PAUSED['message']}"


def test_the_way_through_the_phases() -> None:
    """A summary has the time in each phase, and so has the status afterwards."""
    way = "phases       preparing 12.0 ms, precopy 1.2 s, handover 7.9 ms, postcopy 830.0 ms"
    assert f"  {way}\n" in progress.summary(RESULT_, "host2")
    assert f"  {way}\n" in progress.block({"vm": "web1", "result": RESULT_, "message": "m"})


def test_bars() -> None:
    """The longest bar is as long as there is room, and what is not nothing can be seen."""
    buckets = {"8": 1, "16": 100_000, "64": 50_000}
    lines = progress.histogram(buckets, Screen(120, blocks=True))
    bars = [line[29:].strip() for line in lines]
    assert bars == ["▏", "█" * 40, "", "█" * 20]
    assert progress.histogram(buckets)[1].endswith("  " + "#" * 40)
    assert progress.histogram(buckets, Screen(60, blocks=True))[1].endswith(" " + "█" * 31)
    live = progress.live(MOVING, Screen(100, blocks=True))
    assert live.startswith("web1 postcopy             ███████████████─────  16.0 GiB of 64.0 GiB")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Terminal()
    monkeypatch.setattr("sys.stdout", made)
    for name, value in (("COLUMNS", "72"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return made


def test_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours on a terminal that has them, unless $NO_COLOR is set; none elsewhere."""
    terminal = on_terminal(monkeypatch)
    assert progress.screen() == Screen(72, True, True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert progress.screen() == Screen(72, False, True)
    terminal.encoding = "iso8859-1"
    monkeypatch.setenv("COLUMNS", "3")
    assert progress.screen() == Screen(20, False, False)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert progress.screen() == PLAIN
    assert type(progress.lines()) is progress.PlainView


def test_a_line_for_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Live, what a phase came to stays above; what is said goes on lines of its own."""
    terminal = on_terminal(monkeypatch)
    with progress.lines() as view:
        for remaining in (3, 2, 1):
            view.show({**MOVING, "phase": "precopy", "remaining": remaining << 30})
        view.show(MOVING)
        view.say("it is there")
        view.show({**MOVING, "phase": "drained", "message": "there"})
    lines = bare(terminal.getvalue()).replace("\x1b[K", "").split("\n")
    left = [" ".join(line.split("\r")[-1].split()[:2]) for line in lines]
    assert left == ["web1 precopy", "web1 postcopy", "it is", "web1 drained", ""]


def test_names_of_any_script_fit() -> None:
    """What takes two columns is counted so: no line is too long, and columns are below each other,
    whatever guests are called."""
    vms = [
        {"vm": "数据库" * n, "role": "source", "phase": "postcopy", "peer": "h", "remaining": 0}
        for n in (1, 2, 9)
    ]
    assert [progress.width(text) for text in ("web1", "数据库", "e\u0301", "ö")] == [4, 6, 1, 1]
    for columns in WIDTHS:
        screen = Screen(columns)
        lines = progress.table([*vms, {**vms[0], "vm": "web1"}], screen).splitlines()
        if columns >= 60:
            at = {progress.width(line.split("source")[0]) for line in lines[1:]}
            assert len(at) == 1, lines
        for line in [*lines, progress.live(vms[2], screen)]:
            assert progress.width(line) <= columns, line
