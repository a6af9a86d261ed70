# SPDX-License-Identifier: Apache-2.0
"""How a migration looks: live on a terminal, lines elsewhere, JSON for programs.

Owns words and units on the screen. Given status and result objects as the control socket gives
them, and indulgent about fields that are missing; asks nobody for anything.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Object = Mapping[str, Any]

# Plain lines come at each change of phase, and no more often than this in between.
LINE_SECONDS = 1.0
_BAR = 40


def size(count: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(us: float) -> str:
    """Microseconds for people: `120 us`, `7.9 ms`, `1.2 s`."""
    if us < 1000:
        return f"{us:.0f} us"
    return f"{us / 1000:.1f} ms" if us < 1_000_000 else f"{us / 1_000_000:.1f} s"


def emit(event: Object) -> None:
    """One JSON object on a line of its own."""
    print(json.dumps(event, separators=(",", ":")), flush=True)


def figures(status: Object) -> str:
    """How far a migration is: remaining, rate, faults and how long they wait."""
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


class LiveView:
    """A bar that moves, with the figures behind it; for terminals."""

    def __init__(self) -> None:
        # rich takes longer to load than all the rest of the command line.
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}", markup=False),
        )
        self._task = self._progress.add_task("", total=None, figures="")

    def __enter__(self) -> LiveView:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def show(self, status: Object) -> None:
        total = status.get("totalBytes") or None
        self._progress.update(
            self._task,
            description=f"{status.get('vm', '')} {status.get('phase', '')}",
            total=total,
            completed=total - status.get("remaining", 0) if total else 0,
            figures=figures(status) or status.get("message", ""),
        )


def view(as_json: bool) -> View:
    """The view that suits standard output."""
    if as_json:
        return JsonView()
    return LiveView() if sys.stdout.isatty() else PlainView()


def _rows(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"  {name:<12} {value}" for name, value in rows if value]


def summary(result: Object, peer: str) -> str:
    """A completed migration for people: times, pages by kind, and how long faults waited."""
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
    return "\n".join([head, *_rows(rows), *histogram(faults.get("histogramUs") or {})])


def histogram(buckets: Mapping[str, int]) -> list[str]:
    """Bars for faults by latency; keys are the lower bounds of powers of two in microseconds."""
    counts = {int(bound): count for bound, count in buckets.items()}
    filled = [bound for bound, count in counts.items() if count]
    if not filled:
        return []
    lines = []
    bound, most = min(filled), max(counts.values())
    while bound <= max(filled):
        count = counts.get(bound, 0)
        # A bucket that holds anything shows something.
        bar = "#" * max(round(_BAR * count / most), 1 if count else 0)
        lines.append(f"    from {duration(bound):>8}  {count:>8}  {bar}".rstrip())
        bound *= 2
    return lines


def block(status: Object) -> str:
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
        rows += [("last result", ended), ("error", str(result.get("error") or ""))]
    rows.append(("message", str(status.get("message") or "")))
    return "\n".join([str(status.get("vm", "")), *_rows(rows)])


def table(statuses: Sequence[Object]) -> str:
    """One line for each VM under a heading."""
    rows = [("NAME", "ROLE", "PHASE", "PEER", "REMAINING")]
    for status in statuses:
        facts = [str(status.get(key) or "-") for key in ("vm", "role", "phase", "peer")]
        rows.append((facts[0], facts[1], facts[2], facts[3], size(status.get("remaining", 0))))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    padded = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)
