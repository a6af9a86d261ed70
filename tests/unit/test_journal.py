# SPDX-License-Identifier: Apache-2.0
"""Where the log goes: what journald gets, what happens when it is slow or gone, and no secrets."""

from __future__ import annotations

import ast
import base64
import errno
import functools
import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from fake_daemon import FakeDaemon
from session_faults import cut, made_clock, world

from postcopyd.control import methods
from postcopyd.daemon import journal
from postcopyd.dest.invitation import Invitation

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a process has it that has just started, and nothing left of it afterwards."""
    monkeypatch.setattr(journal, "dropped", 0)
    yield
    structlog.reset_defaults()


def parsed(data: bytes) -> dict[str, str]:
    """As https://systemd.io/JOURNAL_NATIVE_PROTOCOL has it."""
    fields = {}
    while data:
        key, end, rest = data.partition(b"\n")
        assert end
        key, equals, value = key.partition(b"=")
        if not equals:
            size = struct.unpack("<Q", rest[:8])[0]
            value, rest = rest[8 : 8 + size], rest[8 + size :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]*", key)
        fields[key.decode()] = value.decode()
        data = rest
    return fields


class Journald:
    """The receiving end, and a stream that stderr would be."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = str(folder / "journal")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.settimeout(5)
        self.stream, ours = socket.socketpair()
        self.stream.setblocking(False)
        self._keep = ours
        sink = journal.Journal(self.path, ours.fileno())
        processors = [structlog.processors.add_log_level, *sink.processors]
        structlog.configure(processors=processors, logger_factory=lambda *_: sink)

    def next(self) -> dict[str, str]:
        return parsed(self.socket.recv(1 << 20))

    def close(self) -> None:
        for one in (self.socket, self.stream, self._keep):
            one.close()
        structlog.get_config()["logger_factory"]()._socket.close()


@pytest.fixture
def journald(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journald]:
    made = Journald(tmp_path, monkeypatch)
    yield made
    made.close()


def test_fields(journald: Journald) -> None:
    """An entry has what one filters by, and a sentence with the figures and what went wrong."""
    log = structlog.get_logger().bind(vm="web1", migration="m1", role="source", phase="handover")
    log.warning("migration paused", peer="host2:16525", downtime_ms=7.923, none=None, error="no")
    assert journald.next() == {
        "MESSAGE": "web1: migration paused, peer host2:16525, downtime_ms 7.92: no",
        "MESSAGE_ID": journal.MESSAGE_IDS["migration paused"],
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "postcopyd",
        "VM": "web1",
        "MIGRATION": "m1",
        "ROLE": "source",
        "PHASE": "handover",
        "PEER": "host2:16525",
        "DOWNTIME_MS": "7.92",
        "ERROR": "no",
    }
    log.info("serving", listen=["[::]:1", "192.0.2.1:1"])
    assert journald.next()["LISTEN"] == "[::]:1 192.0.2.1:1"
    log.info("phase", after="precopy", after_ms=1200.0)
    entry = journald.next()
    assert entry["MESSAGE"] == "web1: phase handover, after precopy, after_ms 1200"
    assert (entry["PRIORITY"], "MESSAGE_ID" in entry) == ("6", False)


def test_lines_within_a_value(journald: Journald) -> None:
    """A traceback, and text that looks like another field, is one value and no field of its own."""
    try:
        raise RuntimeError("a\nPRIORITY=0\nMESSAGE=b")
    except RuntimeError:
        structlog.get_logger().exception("bug in a session", why="c\nVM=d", token=b"secret")
    entry = journald.next()
    assert "VM" not in entry
    assert (entry["PRIORITY"], entry["WHY"], entry["TOKEN"]) == ("3", "c\nVM=d", "6 bytes")
    assert entry["MESSAGE"].startswith("bug in a session, why c\nVM=d")
    assert "PRIORITY=0\nMESSAGE=b" in entry["MESSAGE"]
    assert "Traceback" in entry["MESSAGE"]


def test_what_is_long_is_cut(journald: Journald) -> None:
    """An entry is no larger than a datagram may be; also of what cannot be encoded."""
    structlog.get_logger().error("e", error="\udcff" * (1 << 20))
    entry = journald.next()
    assert len(entry["ERROR"]) >= journal.LONGEST
    assert journal.dropped == 0


def test_a_slow_journal_is_not_waited_for(journald: Journald) -> None:
    """Entries that do not fit are dropped and counted; the next one that fits says how many."""
    log, kept = structlog.get_logger(), 0
    for _ in range(10_000):
        log.info("x")
        if journal.dropped:
            break
        kept += 1
    log.info("x")
    assert journal.dropped == 2
    for _ in range(kept):
        assert "DROPPED" not in journald.next()
    log.info("again")
    assert journald.next()["DROPPED"] == "2"
    log.info("and on")
    assert "DROPPED" not in journald.next()


def test_a_journal_that_is_gone(journald: Journald) -> None:
    """Entries go to the stream with their priority on each line, and are dropped when nobody
    reads that either."""
    os.unlink(journald.path)
    log = structlog.get_logger()
    log.error("one\ntwo")
    assert journald.stream.recv(1000) == b"<3>one\n<3>two\n"
    for _ in range(10_000):
        log.info("x" * 1000)
        if journal.dropped:
            break
    assert journal.dropped == 1
    journald.stream.close()
    log.info("y")
    assert journal.dropped == 2


def test_when_stderr_is_the_journal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the very stream that the service manager names; not one that was redirected since."""
    with open(tmp_path / "a", "w") as file, open(tmp_path / "b", "w") as other:
        status = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert journal.is_journal(file.fileno())
        assert not journal.is_journal(other.fileno())
        monkeypatch.delenv("JOURNAL_STREAM")
        assert not journal.is_journal(file.fileno())


def test_elsewhere_a_line(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry is one line of key=value, from the level on that was asked for."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    journal.configure_logging()
    log = structlog.get_logger()
    log.debug("nobody reads this")
    log.info("phase", vm="web1", phase="a b\nc")
    line = capfd.readouterr().err
    assert line.endswith(' level=info event=phase vm=web1 phase="a b\\nc"\n')
    assert line.startswith("timestamp=")
    monkeypatch.setenv("POSTCOPYD_LOG_LEVEL", "error")
    journal.configure_logging()
    log.warning("nor this")
    assert capfd.readouterr().err == ""


def test_a_listener_without_descriptors(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What trio says ten times a second with a traceback is a sentence each ten seconds."""
    import logging

    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    journal.configure_logging()
    for _ in range(30):
        try:
            raise OSError(errno.EMFILE, "Too many open files")
        except OSError:
            logging.getLogger("trio.serve_listeners").error("accept", exc_info=True)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "raise LimitNOFILE" in lines[0]


# What is said.


@functools.cache
def calls() -> list[tuple[str, ast.Call]]:
    """Each call of a logger in the package."""
    found = []
    for path in sorted((ROOT / "postcopyd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("debug", "info", "warning", "error", "critical", "exception"):
                owner = ast.unparse(node.func.value)
                if owner == "log" or owner.endswith((".log", "get_logger()")):
                    found.append((f"{path.name}:{node.lineno}", node))
    return found


def test_who_only_looks_is_no_news() -> None:
    """What clients ask all the time is not what an operator reads; what changes something is."""
    service = methods.service(FakeDaemon())
    members = {method.rpartition(".")[2] for method in service.handlers.keys() - service.asking}
    assert members == {"Attach", "Detach", "Migrate", "Cancel", "Recover", "Resolve"}


def test_events_that_matter_are_said() -> None:
    """Each event with an id is logged somewhere, has an id of its own, and is documented."""
    said = {node.args[0].value for _, node in calls() if isinstance(node.args[0], ast.Constant)}
    said.add("migration paused")  # at one of two levels
    assert journal.MESSAGE_IDS.keys() <= said
    assert len(said) > 30
    ids = [*journal.MESSAGE_IDS.values()]
    assert len({*ids}) == len(ids)
    page = (ROOT / "docs" / "MONITORING.md").read_text()
    for event, number in journal.MESSAGE_IDS.items():
        assert re.fullmatch("[0-9a-f]{32}", number)
        assert re.search(rf"\| {event} \| [a-z, ]+ \| `{number}` \|", page)


def test_no_secret_is_named() -> None:
    """No call of a logger gives it a token or a key."""
    for where, node in calls():
        for part in ast.walk(node):
            name = getattr(part, "attr", None) or getattr(part, "id", "")
            assert name not in ("token", "key", "psk", "secret"), where


async def test_no_secret_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration that is paused, asked for with a wrong token and goes on: no entry has a token in
    any spelling, all have the guest, and its way through the phases is there on both hosts."""
    made_clock(monkeypatch)
    monkeypatch.setattr(Invitation, "token", Tokens(), raising=False)
    Tokens.seen.clear()
    async with world(tmp_path, {"<- progress": cut}) as made:
        await made.migrate()
    assert len(Tokens.seen) > 1
    text = repr(made.logs)
    for token in Tokens.seen:
        for spelling in (token.hex(), repr(token), base64.b64encode(token).decode()):
            assert spelling not in text
    for role in ("source", "destination"):
        entries = [entry for entry in made.logs if entry.get("role") == role]
        phases = [entry["phase"] for entry in entries if entry["event"] == "phase"]
        assert phases[-4:] == ["postcopy", "paused", "postcopy", "drained"]
        assert all((entry["vm"], entry["peer"] != "") == ("web1", True) for entry in entries)
        events = [entry["event"] for entry in entries if entry["event"] in journal.MESSAGE_IDS]
        assert events == [
            "migration started",
            "guest handed over",
            "migration paused",
            "migration recovered",
            "migration completed",
        ]
        levels = {entry["log_level"] for entry in entries}
        assert levels == {"info", "warning"}
    result = made.result
    times = {one["phase"]: one["ms"] for one in result["phases"]}
    assert [*times][-3:] == ["handover", "postcopy", "paused"]
    assert 0 < sum(times.values()) <= result["totalMs"] + 50


class Tokens:
    """Every token that was sent to a source."""

    seen: list[bytes] = []  # noqa: RUF012

    def __set__(self, invitation: Any, token: bytes) -> None:
        invitation.__dict__["token"] = token
        self.seen.append(token)

    def __get__(self, invitation: Any, owner: Any) -> Any:
        return self if invitation is None else invitation.__dict__["token"]
