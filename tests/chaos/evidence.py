# SPDX-License-Identifier: Apache-2.0
"""What a run is judged by: where the guest ran and when, and what both sides say of a migration.

Pure, except for `follow`, which reads a QEMU's own monitor, and `tracked`, which reads /proc.
Nothing here trusts the daemons for where the guest runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import schedule as s
from monitor import Monitor

from postcopyd.host import procfs

Status = dict[str, Any]


class Runs:
    """When each QEMU ran the guest, by the STOP and RESUME of its own monitor, in seconds."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float, str]] = []
        """From, to, QEMU."""
        self.since: dict[str, float] = {}
        """The QEMUs that run the guest now."""
        self.ended = ""
        """A QEMU that has ended while it ran the guest."""
        self.orderly: set[str] = set()
        """The QEMUs whose guest was switched off from within."""

    def resumed(self, qemu: str, at: float) -> None:
        self.since.setdefault(qemu, at)

    def stopped(self, qemu: str, at: float) -> None:
        if qemu in self.since:
            self.spans.append((self.since.pop(qemu), at, qemu))

    def twice(self) -> str:
        """A sentence when two QEMUs ran the guest at a time, or ""."""
        running = [(since, float("inf"), qemu) for qemu, since in self.since.items()]
        for (_, end, first), (begin, _, second) in pairwise(sorted([*self.spans, *running])):
            if begin < end and first != second:
                return f"{first} ran until {end:.6f}, and {second} from {begin:.6f} on"
        return ""

    @property
    def nowhere(self) -> float:
        """The longest time for which the guest ran in no QEMU, in seconds."""
        begins = [begin for begin, _, _ in self.spans] + [*self.since.values()]
        ends = sorted(end for _, end, _ in self.spans)
        pairs = zip(ends, sorted(begins)[1:], strict=False)
        return max((begin - end for end, begin in pairs), default=0.0)


async def follow(monitor: Monitor, qemu: str, runs: Runs) -> None:
    """Tells `runs` of a QEMU until that has ended."""
    async for event in monitor.events:
        stamp = event["timestamp"]
        at = stamp["seconds"] + stamp["microseconds"] / 1e6
        match event["event"]:
            case "RESUME":
                runs.resumed(qemu, at)
            case "STOP":
                runs.stopped(qemu, at)
            case "SHUTDOWN" if event["data"]["guest"]:
                runs.orderly.add(qemu)
    if qemu in runs.since and qemu not in runs.orderly:
        runs.ended = qemu
    runs.stopped(qemu, time.time())


def tracked(pid: int) -> list[str]:
    """What a process has of userfaultfd: descriptors, and mappings that are tracked for writes."""
    try:
        found = [link for link in procfs.descriptors(pid).values() if "userfaultfd" in link]
        flags = Path(f"/proc/{pid}/smaps").read_text().split("VmFlags:")[1:]
    except OSError:  # it has ended
        return []
    return found + [line for line in flags if "uw" in line.splitlines()[0].split()]


def returned(reporters: Iterable[str]) -> str:
    """The QEMU whose guest was heard again after another's, or "". Takes one name per report."""
    seen: set[str] = set()
    for qemu, _ in groupby(reporters):
        if qemu in seen:
            return qemu
        seen.add(qemu)
    return ""


@dataclass(frozen=True)
class Side:
    """One side at one moment: the daemon's process, and what its record says (ARCHITECTURE.md)."""

    daemon: str
    """up, down or stopped."""
    ownership: str
    phase: str

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.daemon, self.ownership, self.phase)))


def side(daemon: str, record: Path) -> Side:
    """The record is replaced as a whole, so it may be read at any time."""
    try:
        found = json.loads(record.read_bytes().partition(b" ")[2])
    except OSError:
        return Side(daemon, "", "")
    return Side(daemon, found["ownership"], found["status"]["phase"])


def phase(source: Side, destination: Side, migrating: bool, disturbed: bool, copying: bool) -> str:
    """What is under way, as schedule.py names it. `disturbed`: a fault of the network lasts.
    `copying`: of what was sent between the daemons the last is of passes."""
    if not migrating:
        return s.IDLE
    if source.ownership == "granted":
        if "drained" in (source.phase, destination.phase):
            return s.DRAINED
        down = {source.daemon, destination.daemon} != {"up"}
        if down or disturbed or "paused" in (source.phase, destination.phase):
            return s.RECOVERY
        return s.POSTCOPY if destination.ownership == "owned" else s.GRANTED
    if source.ownership == "intent" or destination.ownership == "loading":
        return s.HANDOVER
    if destination.ownership != "arriving":
        return s.PREPARE
    return s.PRECOPY if copying else s.ADOPTION


def where(source: Status, destination: Status) -> str:
    """Where the guest is when both say that the migration is at its end: "source" or
    "destination"; "" as long as it is not."""
    here, there = source.get("phase"), destination.get("phase")
    if source.get("role") == "source" and here == "drained":
        same = source.get("migration") == destination.get("migration")
        return "destination" if there == "drained" and same else ""
    # A source that has just become one still says what it was: the destination of the last one.
    return "source" if over(source, destination) else ""


def over(source: Status, destination: Status) -> bool:
    """Whether neither has anything to do, nor waits for anybody."""
    return {source.get("phase"), destination.get("phase")} <= {"failed", "idle", "drained"}
