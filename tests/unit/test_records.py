# SPDX-License-Identifier: Apache-2.0
"""What one daemon has recorded and the next one reads: its schema, its gaps, its age."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import trio

from postcopyd.daemon import registry
from postcopyd.daemon.daemon import Daemon
from postcopyd.daemon.restart import FOUND, found
from postcopyd.errors import PostcopydError
from postcopyd.host import procfs
from postcopyd.records import schema
from postcopyd.records.schema import Ownership
from postcopyd.records.store import StateNotWritten, Store, read_intent
from postcopyd.sessions.shared import Shared

# As the version of commit e7939b1 has written them, at each word of ownership.

STATUS = {"vm": "web1", "role": "", "phase": "idle", "migration": "", "peer": "", "remaining": 0,
          "message": "attached, no migration"}  # fmt: skip
RECORD: dict[str, Any] = {
    "version": 1,
    "driver": "process",
    "socket": "/nowhere/web1",
    "pid": 1 << 23,
    "started": 77,
    "epoch": 1,
    "ownership": "held",
    "status": STATUS,
    "about": {},
}
REQUEST = {"to": "host2:16525", "mode": "hybrid", "bandwidth": None, "precopy_passes": None,
           "max_downtime_ms": None, "keep_source": False}  # fmt: skip
LEAVING = {
    "migration": "m1",
    "request": REQUEST,
    "regions": [["ram0", 24, 4096]],
    "run": True,
    "downtime": [3.5, {"save": 1.0}],
    "recoveries": 0,
    "passes": [{"pages": 1, "bytes": 2, "seconds": 0.5, "left": 0}],
    "why_now": "",
    "identity": [],
}
REGION = {"name": "ram0", "pages": 24, "page_size": 4096, "address": 1 << 32, "offset": 0}
ARRIVING = {
    "migration": "m1",
    "offer": {"type": "offer", "migration": "m1", "vm": "web1", "driver": "process", "facts": {},
              "regions": [{"name": "ram0", "pages": 24, "page_size": 4096}], "connections": 1,
              "epoch": 1, "check": False, "staged": False},
    "ram": [{**REGION, "file": True}],
    "userfaultfds": 1,
    "run": True,
    "ran": True,
    "told": True,
    "ran_ns": 5,
    "identity": [],
}  # fmt: skip


def of(ownership: str, phase: str) -> dict[str, Any]:
    about = {"intent": LEAVING, "granted": LEAVING, "arriving": ARRIVING, "loading": ARRIVING,
             "owned": ARRIVING}.get(ownership, {})  # fmt: skip
    role = "source" if about is LEAVING else "destination" if about else ""
    status = {**STATUS, "role": role, "phase": phase, "migration": "m1", "peer": "host2:16525"}
    return copy.deepcopy({**RECORD, "ownership": ownership, "status": status, "about": about})


EACH = {
    "held": of("held", "idle"),
    "intent": of("intent", "handover"),
    "granted": of("granted", "postcopy"),
    "gone": of("granted", "drained"),
    "arriving": of("arriving", "idle"),
    "loading": of("loading", "handover"),
    "owned": of("owned", "postcopy"),
    "declined": of("declined", "failed"),
}


def write(store: Store, name: str, record: Any) -> None:
    """With a right checksum."""
    body = json.dumps(record).encode()
    (store.directory / f"{name}.json").write_bytes(b"%08x %s\n" % (zlib.crc32(body), body))


def spoilt(record: Any) -> Iterator[tuple[str, Any]]:
    """The record with each of its fields gone, or of another type, at any depth."""
    if isinstance(record, dict):
        for key, value in record.items():
            yield key, {k: v for k, v in record.items() if k != key}
            for wrong in (None, [], {}, "x", -1, 1.5):
                yield f"{key}={wrong!r}", {**record, key: wrong}
            for what, inside in spoilt(value):
                yield f"{key}.{what}", {**record, key: inside}
    elif isinstance(record, list) and record:
        for what, inside in spoilt(record[0]):
            yield f"0.{what}", [inside, *record[1:]]


@asynccontextmanager
async def started(store: Store) -> AsyncIterator[Daemon]:
    """A daemon that has been started on what is there; nothing of it may fail."""
    async with trio.open_nursery() as nursery:
        made = Daemon(Shared(store), nursery)
        made.restore()
        for vm in made.vms.values():
            with trio.fail_after(5):
                await vm.free.wait()
        yield made
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("word", EACH)
def test_records_of_older_versions_are_read(word: str, tmp_path: Path) -> None:
    """A daemon of this version takes over from one that wrote no boot id and no `void`."""
    store = Store(tmp_path)
    write(store, "web1", EACH[word])
    assert store.load()["web1"] == EACH[word]


@pytest.mark.parametrize("word", EACH)
async def test_a_bad_record_is_the_trouble_of_its_vm(word: str, tmp_path: Path) -> None:
    """Whichever field of a record is missing or makes no sense: the daemon starts, the other VMs
    are there, and this one says what is wrong, or nothing is."""
    store = Store(tmp_path)
    names = []
    for number, (_, record) in enumerate(spoilt(EACH[word])):
        names.append(f"bad{number}")
        write(store, names[-1], record)
    write(store, "web1", RECORD)
    assert len(names) > 50
    async with started(store) as made:
        assert made.status("web1").phase == "idle"
        for name in names:
            status = made.status(name)
            assert status.phase in schema.Phase.__args__
            assert isinstance(status.message, str)
            assert "internal error" not in status.message, (name, status)


async def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    """Of a record without a field, with one of another type, and without what its word needs."""
    store = Store(tmp_path)
    write(store, "one", {k: v for k, v in RECORD.items() if k != "about"})
    write(store, "two", {**RECORD, "epoch": "3"})
    write(store, "three", {**EACH["granted"], "about": {}})
    write(store, "four", [])
    async with started(store) as made:
        said = {name: made.status(name).message for name in made.vms}
    assert f"reading the record {tmp_path}/one.json: it lacks about; move it away" in said["one"]
    assert "it does not make sense: expected `int`, got `str` - at `$.epoch`" in said["two"]
    assert "about its migration it lacks downtime, migration, recoveries" in said["three"]
    assert "it is of version None, not 1" in said["four"]


async def test_what_a_newer_daemon_shows(tmp_path: Path) -> None:
    """A field of the status that this version does not record may be of any kind."""
    store = Store(tmp_path)
    status = {**RECORD["status"], "elapsedMs": "PT5S", "passes": 3, "weather": "fine"}
    write(store, "web1", {**RECORD, "status": status})
    async with started(store) as made:
        assert made.status("web1").phase == "idle"


async def test_a_bad_record_beside_an_intent(tmp_path: Path) -> None:
    """It is said that the record cannot be read, not that the host has restarted; the destination
    is asked all the same, and asked elsewhere when a person says so."""
    store = Store(tmp_path)
    write(store, "web1", {**RECORD, "epoch": None})
    store.save_intent("web1", INTENT)
    async with started(store) as made:
        status = made.status("web1")
        assert "web1.json: it does not make sense" in status.message
        assert status.peer == "127.0.0.1:1"
        await made.recover("web1", "127.0.0.1:2")
        assert made.status("web1").peer == "127.0.0.1:2"
    assert store.intents()["web1"]["peer"] == "127.0.0.1:2"


# --- processes -----------------------------------------------------------------------------------


def test_a_process_of_another_boot_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that has survived a restart of the host names no process of this one, whatever has
    its number and its start time now; one without a boot id is of an older version, not host."""
    monkeypatch.setattr(procfs, "started", lambda pid: 77)
    attached = schema.Attachment("qemu", "/run/web1.qmp", 9, 77, procfs.boot_id())
    assert not attached.ended()
    assert not attached._replace(boot="").ended()
    assert attached._replace(boot="another").ended()
    assert attached._replace(started=78).ended()


# --- intents -------------------------------------------------------------------------------------

INTENT = {"migration": "m0", "peer": "127.0.0.1:1", "epoch": 2, "driver": "qemu",
          "socket": "/run/web1.qmp", "identity": []}  # fmt: skip


@pytest.mark.parametrize(
    ("record", "forgotten"),
    [
        (of("held", "drained") | {"about": {"migration": "m1", "offer": {"epoch": 3}}}, True),
        (of("held", "idle"), False),
        (of("held", "idle") | {"void": True}, True),
        (of("granted", "drained"), False),
        (of("declined", "failed"), False),
    ],
    ids=["came back", "another VMM of that name", "known to be void", "away", "given up"],
)
async def test_an_intent_that_holds_no_more(
    record: dict[str, Any], forgotten: bool, tmp_path: Path
) -> None:
    """A daemon that is started forgets the intent of a guest that its records know to be here, and
    that of no other."""
    store = Store(tmp_path)
    if record["status"]["phase"] == "drained" and record["ownership"] == "held":
        record["status"]["role"] = "destination"
    write(store, "web1", record)
    store.save_intent("web1", INTENT)
    async with started(store):
        assert (read_intent(store.durable, "web1") is None) == forgotten


@pytest.mark.parametrize("drained", [False, True])
@pytest.mark.parametrize("ownership", get_args(Ownership))
def test_a_restart_knows_what_to_do(ownership: Ownership, drained: bool) -> None:
    """One row, and no other, is for a VM that was left in a state."""
    rows = [row for row in FOUND if row.ownership == ownership and row.drained in (None, drained)]
    assert rows == [found(ownership, drained)]


async def test_an_intent_that_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """It is tried again until it can be, and a daemon that is started meanwhile knows of it."""
    store = Store(tmp_path)
    write(store, "web1", of("held", "idle"))
    store.save_intent("web1", INTENT)
    forget = Store.forget_intent

    def fails(store: Store, name: str) -> None:
        raise StateNotWritten("removing it: Read-only file system")

    async with started(store) as made:
        monkeypatch.setattr(Store, "forget_intent", fails)
        vm = made.vms["web1"]
        vm.home()
        vm.record("held")
        assert store.load()["web1"]["void"]
        await trio.sleep(100)
        assert "web1" in store.intents()
        monkeypatch.setattr(Store, "forget_intent", forget)
        await trio.sleep(registry.SELDOM_S)
        assert store.intents() == {}
        assert not vm.void


async def test_recover_of_what_cannot_go_on(tmp_path: Path) -> None:
    """Whoever says `recover` of a VM whose record cannot be read is told that, and no untruth."""
    store = Store(tmp_path)
    write(store, "web1", {**RECORD, "epoch": None})
    async with started(store) as made:
        with pytest.raises(PostcopydError, match=r"cannot go on from here: .*web1\.json"):
            await made.recover("web1", None)
