# SPDX-License-Identifier: Apache-2.0
"""Shows migrations: live on a terminal of any width, as lines elsewhere, as JSON for programs.

Owns words and units on the screen. Takes status and result objects as the control socket gives
them; fields may be missing. Makes no calls of its own.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from postcopyd.units import duration, size

Object = Mapping[str, Any]

# Shortest time between two plain lines, unless the phase changes.
LINE_SECONDS = 1.0
_BAR = 40
_LABEL = 15
"""Columns before the value of a row, if label and value fit side by side."""

_NARROW = 50
"""Terminals with fewer columns get values below their labels, and no bars."""

_COLOURS = {"precopy": "36", "handover": "33", "postcopy": "36", "paused": "1;31", "drained": "32",
            "failed": "31"}  # fmt: skip
"""SGR codes by phase."""


class Screen(NamedTuple):
    """What is written to. Without `columns` it is no terminal, and nothing is cut or wrapped."""

    columns: int | None = None
    colour: bool = False
    blocks: bool = False  # whether it can show more than ASCII

    def cut(self, text: str, columns: int | None = None) -> str:
        """The text, cut to so many columns, or to those of the screen."""
        columns = self.columns if columns is None else columns
        if columns is None or width(text) <= columns:
            return text
        end = next(at for at in range(len(text), -1, -1) if width(text[:at]) < columns)
        return text[:end] + ("…" if self.blocks else "~")

    def wrap(self, text: str, indent: int = 0) -> list[str]:
        """The text as lines that fit, the later ones indented."""
        if self.columns is None:
            return [text]
        return textwrap.wrap(text, self.columns, subsequent_indent=" " * indent) or [""]

    def paint(self, text: str, phase: str) -> str:
        code = _COLOURS.get(phase) if self.colour else None
        return f"\x1b[{code}m{text}\x1b[0m" if code else text


PLAIN = Screen()


def width(text: str) -> int:
    """Columns that the text takes: East Asian characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def padded(text: str, columns: int) -> str:
    return text + " " * (columns - width(text))


def screen() -> Screen:
    """Standard output in its present state."""
    if not sys.stdout.isatty():
        return PLAIN
    said, columns = os.environ.get("COLUMNS", ""), 0
    with suppress(OSError):
        columns = int(said) if said.isdecimal() else os.get_terminal_size(1).columns
    dumb = os.environ.get("TERM", "dumb") == "dumb"
    return Screen(
        columns=max(columns or 80, 20),
        colour=not (dumb or os.environ.get("NO_COLOR")),
        blocks=sys.stdout.encoding.lower().startswith("utf"),
    )


def emit(event: Object) -> None:
    """One JSON object on a line of its own."""
    print(json.dumps(event, separators=(",", ":")), flush=True)


def figures(status: Object) -> str:
    """How far a migration is: remaining memory, rate, faults and how long they wait."""
    parts = []
    if total := status.get("totalBytes"):
        parts.append(f"{size(status.get('remaining', 0))} of {size(total)} remaining")
    elif status.get("remaining"):
        parts.append(f"{size(status['remaining'])} remaining")
    if rate := status.get("bytesPerSecond"):
        parts.append(f"{size(rate)}/s")
    if (faults := status.get("faults")) and faults.get("count"):
        parts.append(f"{faults['count']} faults ({_latency(faults)})")
    return ", ".join(parts)


def _latency(faults: Object) -> str:
    known = [(name, faults.get(f"{name}Us")) for name in ("p50", "p99", "max")]
    return ", ".join(f"{name} {duration(us)}" for name, us in known if us is not None)


def line(status: Object) -> str:
    """One line on a VM."""
    what = [status.get("phase", ""), figures(status)]
    if status.get("phase") not in ("precopy", "postcopy"):
        what.append(status.get("message", ""))
    return f"{status.get('vm', '')}: " + ", ".join(part for part in what if part)


def found(what: Object) -> list[str]:
    """What a VMM was found to be, as clauses."""
    kinds = {"private": "private memory", "shared": "shared memory", "memfd": "a memfd"}
    lines = []
    for ram in what.get("ram", ()):
        kind = ram.get("path") or kinds.get(ram["kind"], ram["kind"])
        pages = f"{size(ram['bytes'])} in pages of {size(ram['pageSize'])}"
        lines.append(f"guest RAM {ram['name']}, {pages}, {kind}")
    return lines + [f"device state, {state}" for state in [what.get("deviceState")] if state]


class View(Protocol):
    """Shows the states of a migration as they come; used with `with`."""

    def __enter__(self) -> View: ...
    def __exit__(self, *exc: object) -> None: ...
    def show(self, status: Object) -> None: ...


class JsonView:
    """Every state as a `progress` event."""

    def __enter__(self) -> JsonView:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def show(self, status: Object) -> None:
        emit({"event": "progress", **status})


class PlainView:
    """A line for each phase, and now and then one in between."""

    def __init__(self) -> None:
        self._phase = ""
        self._next = 0.0

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def show(self, status: Object) -> None:
        now = time.monotonic()
        if status.get("phase") != self._phase or now >= self._next:
            self._phase, self._next = status.get("phase", ""), now + LINE_SECONDS
            print(line(status), flush=True)

    def say(self, text: str) -> None:
        """Prints text that is to stay, on lines of its own."""
        print(text, flush=True)


class LiveView(PlainView):
    """A line for each phase, of which the last is updated in place; for terminals."""

    def __init__(self) -> None:
        super().__init__()
        self._begun = False

    def __exit__(self, *exc: object) -> None:
        if self._begun:
            print(flush=True)
        self._begun = False

    def show(self, status: Object) -> None:
        if status.get("phase") != self._phase:
            self.__exit__()
        self._phase, self._begun = status.get("phase", ""), True
        # One column stays free: terminals differ in what they do at the last one.
        here = screen()
        text = live(status, here._replace(columns=(here.columns or 80) - 1))
        print(f"\r{text}\x1b[K", end="", flush=True)

    def say(self, text: str) -> None:
        self.__exit__()
        super().say(text)


def live(status: Object, screen: Screen) -> str:
    """One line on a migration, with a bar if there is room."""
    phase, total = status.get("phase", ""), status.get("totalBytes") or 0
    columns = screen.columns or 80
    head = f"{screen.cut(str(status.get('vm', '')), max(columns // 3, 8))} {phase}"
    moves = phase in ("precopy", "postcopy")
    parts = [padded(head, min(24, columns // 4))]
    if moves and total and columns >= _NARROW:
        room = min(24, columns // 5)
        done = max(1 - status.get("remaining", 0) / total, 0)
        parts.append(_bar(done, room, screen).ljust(room, "─" if screen.blocks else "-"))
    said = (figures(status), str(status.get("message") or ""))
    parts.append(next((text for text in (said if moves else said[::-1]) if text), ""))
    text = screen.cut("  ".join(parts).rstrip())
    return text.replace(head, screen.paint(head, phase), 1)


def _bar(share: float, columns: int, screen: Screen) -> str:
    """A bar of at most so many columns. A share above nothing always shows something."""
    if not screen.blocks:
        return "#" * max(round(share * columns), 1 if share else 0)
    whole, eighths = divmod(max(round(share * columns * 8), 1 if share else 0), 8)
    return "█" * whole + ("▏▎▍▌▋▊▉"[eighths - 1] if eighths else "")


def view(as_json: bool) -> View:
    """The view for standard output."""
    return JsonView() if as_json else lines()


def lines() -> PlainView:
    """The view for people on standard output."""
    dumb = os.environ.get("TERM", "dumb") == "dumb"
    return LiveView() if sys.stdout.isatty() and not dumb else PlainView()


def _rows(rows: Sequence[tuple[str, str]], screen: Screen) -> list[str]:
    found = []
    for name, value in rows:
        if not value:
            continue
        columns = screen.columns or _NARROW
        narrow = columns < _NARROW and _LABEL + width(value) > columns
        label = f"  {name}\n    " if narrow else f"  {name:<12} "
        indent = 4 if narrow else _LABEL
        room = None if screen.columns is None else screen.columns - indent
        text = f"\n{' ' * indent}".join(screen._replace(columns=room).wrap(value))
        found.append(label + screen.paint(text, value if name == "phase" else ""))
    return found


def summary(result: Object, peer: str, screen: Screen = PLAIN) -> str:
    """A completed migration for people: its times and phases, its pages by kind, and how long
    faults waited."""
    memory, faults = result.get("memory") or {}, result.get("faults") or {}
    kinds = ("precopy", "dirty", "pushed", "urgent", "zero", "duplicate")
    pages = ", ".join(
        f"{memory[kind + 'Pages']} {kind}" for kind in kinds if memory.get(kind + "Pages")
    )
    times = {key: result.get(key + "Ms") for key in ("downtime", "brownout", "total")}
    moved = size(result.get("transferredBytes") or 0)
    if rate := result.get("bytesPerSecond"):
        moved += f" at {size(rate)}/s"
    rows = [(key, duration(ms * 1000) if ms is not None else "") for key, ms in times.items()]
    rows.append(("phases", _way(result)))
    rows.append(("transferred", moved))
    if memory.get("totalBytes"):
        each = size(memory.get("pageSize") or 4096)
        rows.append(("memory", f"{size(memory['totalBytes'])}, pages of {each}"))
    rows.append(("pages", pages))
    if passes := result.get("passes"):
        each = ", ".join(f"{one['pages']} in {duration(one['ms'] * 1000)}" for one in passes)
        rows.append(("passes", each))
    rows.append(("handed over", str(result.get("handedOver") or "")))
    rows.append(("warning", str(result.get("warning") or "")))
    count = faults.get("count", 0)
    rows.append(("faults", f"{count} ({_latency(faults)})" if count else "none"))
    if recoveries := result.get("recoveries"):
        rows.append(("recoveries", str(recoveries)))
    where = f"{result.get('vm', '')} runs at {peer or 'the destination'}, with all of its memory"
    head = f"{where} ({result.get('mode', 'postcopy')}, migration {result.get('migration', '')})"
    bars = histogram(faults.get("histogramUs") or {}, screen)
    return "\n".join([*screen.wrap(head, 2), *_rows(rows, screen), *bars])


def _way(result: Object) -> str:
    return ", ".join(
        f"{'preparing' if one['phase'] == 'idle' else one['phase']} {duration(one['ms'] * 1000)}"
        for one in result.get("phases") or ()
    )


def histogram(buckets: Mapping[str, int], screen: Screen = PLAIN) -> list[str]:
    """Bars for faults by latency; keys are the lower bounds of powers of two in microseconds."""
    counts = {int(bound): count for bound, count in buckets.items()}
    filled = [bound for bound, count in counts.items() if count]
    if not filled:
        return []
    found = []
    bound, most = min(filled), max(counts.values())
    columns = screen.columns or 80
    while bound <= max(filled):
        count = counts.get(bound, 0)
        if columns < _NARROW:
            found.append(f"{duration(bound):>9} {count:>9}")
        else:
            bar = _bar(count / most, min(_BAR, columns - 29), screen)
            found.append(f"    from {duration(bound):>8}  {count:>8}  {bar}".rstrip())
        bound *= 2
    return found


def block(status: Object, screen: Screen = PLAIN) -> str:
    """All that is known of one VM, one fact a line."""
    result = status.get("result") or {}
    rows = [(key, str(status.get(key) or "")) for key in ("role", "phase", "peer", "migration")]
    rows += [("driver", str(status.get("driver") or "")), ("memory", figures(status))]
    if (elapsed := status.get("elapsedMs")) is not None and not result:
        rows.append(("elapsed", duration(elapsed * 1000)))
    if result:
        ended = str(result.get("event", ""))
        if result.get("downtimeMs") is not None and ended == "completed":
            ended += f", downtime {duration(result['downtimeMs'] * 1000)}"
        if result.get("totalMs") is not None:
            ended += f", total {duration(result['totalMs'] * 1000)}"
        rows += [("last result", ended), ("phases", _way(result))]
        rows.append(("error", str(result.get("error") or "")))
    rows.append(("message", str(status.get("message") or "")))
    return "\n".join([screen.cut(str(status.get("vm", ""))), *_rows(rows, screen)])


def table(statuses: Sequence[Object], screen: Screen = PLAIN) -> str:
    """One line for each VM, under a heading. A narrow terminal has long cells cut; a narrower one
    loses columns, the least telling first."""
    rows = [("NAME", "ROLE", "PHASE", "PEER", "REMAINING")]
    for status in statuses:
        facts = [str(status.get(key) or "-") for key in ("vm", "role", "phase", "peer")]
        rows.append((facts[0], facts[1], facts[2], facts[3], size(status.get("remaining", 0))))
    widths = [max(width(row[column]) for row in rows) for column in range(5)]
    shown, least_telling = [*range(5)], [1, 4, 3]
    while screen.columns and sum(widths[c] + 2 for c in shown) - 2 > screen.columns:
        widest = max(shown, key=lambda column: widths[column])
        if widths[widest] > 10:
            widths[widest] -= 1
        elif least_telling:
            shown.remove(least_telling.pop(0))
            widths = [max(width(row[column]) for row in rows) for column in range(5)]
        else:
            break
    found = []
    for row in rows:
        cells = [padded(screen.cut(row[c], widths[c]), widths[c]) for c in shown]
        # Painted last: colours take no columns.
        at, phase = shown.index(2), cells[shown.index(2)].rstrip()
        cells[at] = screen.paint(phase, row[2]) + cells[at][len(phase) :]
        found.append("  ".join(cells).rstrip())
    return "\n".join(found)
