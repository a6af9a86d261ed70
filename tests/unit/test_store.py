# SPDX-License-Identifier: Apache-2.0
"""The state directory: records that are whole or not there, and errors that name the file."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd import store as store_module
from postcopyd.errors import PostcopydError
from postcopyd.store import Store

WRITER = """
import sys
from pathlib import Path
from postcopyd.store import Store
store = Store(Path(sys.argv[1]))
for n in range(2000):
    store.save("web1", {"fill": str(n % 10) * (5000 - n % 7)})
"""
RECORD = {"epoch": 3, "ownership": "granted", "status": {"phase": "paused"}}


@contextmanager
def no_room(bytes_: int) -> Iterator[None]:
    """Within, no file can grow beyond this; as on a full disk, part of a write may succeed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_record_survives(tmp_path: Path) -> None:
    """What was saved is loaded by the next daemon, one record for each VM."""
    store = Store(tmp_path / "made" / "anew")
    store.save("web1", RECORD)
    store.save("web.2:a@b", {"epoch": 0}, durable=True)
    loaded = Store(store.directory).load()
    assert loaded == {
        "web1": {"version": store_module.VERSION, **RECORD},
        "web.2:a@b": {"version": store_module.VERSION, "epoch": 0},
    }


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=5))
def test_any_record_survives(tmp_path_factory: pytest.TempPathFactory, record: Any) -> None:
    """Whatever text a peer's sentence puts into a record, it is loaded as it was saved."""
    store = Store(tmp_path_factory.mktemp("state"))
    record.pop("version", None)
    store.save("web1", record)
    assert store.load()["web1"] == {"version": store_module.VERSION, **record}


def test_save_replaces_the_whole_record(tmp_path: Path) -> None:
    """A second save leaves nothing of the first, and no other file."""
    store = Store(tmp_path)
    store.save("web1", {"long": "x" * 5000})
    store.save("web1", RECORD)
    assert "long" not in store.load()["web1"]
    assert [path.name for path in tmp_path.iterdir()] == ["web1.json"]


def test_state_is_for_the_daemon_only(tmp_path: Path) -> None:
    """Folder and records cannot be read by others: they tell where guests are."""
    store = Store(tmp_path / "state")
    store.save("web1", RECORD)
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((store.directory / "web1.json").stat().st_mode) == 0o600


def test_every_torn_record_is_found(tmp_path: Path) -> None:
    """A record cut at any byte, its last newline aside, is refused with its path."""
    store = Store(tmp_path)
    store.save("web1", RECORD)
    path = tmp_path / "web1.json"
    whole = path.read_bytes()
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(PostcopydError, match=r"web1\.json"):
            store.load()


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    """A record of which one byte has changed is refused, or reads the same."""
    store = Store(tmp_path)
    store.save("web1", RECORD)
    path = tmp_path / "web1.json"
    whole, right = path.read_bytes(), store.load()
    for at in range(len(whole)):
        for flip in (1, 0x20, 0x80):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            with suppress(PostcopydError):
                assert store.load() == right


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"version": store_module.VERSION + 1}),
        json.dumps({}),
        json.dumps([1]),
        json.dumps(None),
        "{",
        "\xff",
    ],
)
def test_foreign_record_is_refused(tmp_path: Path, body: str) -> None:
    """A whole record of another version, or of no record's shape, is refused with its path."""
    data = body.encode("latin-1")
    (tmp_path / "web1.json").write_bytes(f"{zlib.crc32(data):08x} ".encode() + data + b"\n")
    with pytest.raises(PostcopydError, match=r"web1\.json.*move it away"):
        Store(tmp_path).load()


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    """A half-written record of a daemon that died, and other files, are not read."""
    store = Store(tmp_path)
    store.save("web1", RECORD)
    (tmp_path / "web1.new").write_bytes(b"torn")
    (tmp_path / "README").write_text("hello")
    assert list(store.load()) == ["web1"]
    store.save("web1", {"epoch": 4})
    assert store.load()["web1"]["epoch"] == 4


@pytest.mark.parametrize("room", [0, 20])
def test_full_disk_leaves_the_record_before(tmp_path: Path, room: int) -> None:
    """When there is no room, the error says so and the old record stands, whole."""
    store = Store(tmp_path)
    store.save("web1", RECORD)
    before = store.load()
    with no_room(room), pytest.raises(PostcopydError, match="make room") as caught:
        store.save("web1", {"epoch": 4, "long": "x" * 4000})
    assert caught.value.name == "StateNotWritten"
    assert store.load() == before
    store.save("web1", {"epoch": 4})
    assert store.load()["web1"]["epoch"] == 4


def test_folder_that_went_away(tmp_path: Path) -> None:
    """A state directory that was removed is an error of the save, naming the path."""
    store = Store(tmp_path / "state")
    store.directory.rmdir()
    with pytest.raises(PostcopydError, match="No such file") as caught:
        store.save("web1", RECORD)
    assert str(store.directory) in str(caught.value)
    with pytest.raises(PostcopydError, match="No such file"):
        store.open_pages("web1")


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """A state directory below a file is refused, with the option that names another."""
    (tmp_path / "file").touch()
    with pytest.raises(PostcopydError, match="--state-dir"):
        Store(tmp_path / "file" / "state")


def test_a_reader_sees_the_old_record_or_the_new(tmp_path: Path) -> None:
    """While one process saves again and again, another never reads anything in between."""
    store = Store(tmp_path)
    store.save("web1", {"fill": "0" * 5000})
    seen = set()
    with subprocess.Popen([sys.executable, "-c", WRITER, tmp_path]) as writer:
        try:
            while writer.poll() is None:
                fill = store.load()["web1"]["fill"]
                assert len(set(fill)) == 1
                seen.add(fill[0])
        finally:
            writer.kill()
    assert writer.returncode == 0
    assert len(seen) > 1


def test_durable_is_on_disk_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The intent is synced, file first and then its folder; other records are never."""
    synced: list[str] = []
    monkeypatch.setattr(
        store_module.os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}"))
    )
    store = Store(tmp_path)
    store.save("web1", RECORD)
    assert synced == []
    store.save("web1", RECORD, durable=True)
    assert synced == [str(tmp_path / "web1.new"), str(tmp_path)]


def test_page_record_is_new_and_empty_each_time(tmp_path: Path) -> None:
    """A page record of an earlier arrival is never used for another."""
    store = Store(tmp_path)
    first = store.open_pages("web1")
    os.write(first, b"\1\1\1")
    second = store.open_pages("web1")
    try:
        assert os.fstat(second).st_size == 0
        assert os.fstat(first).st_size == 3
        assert not os.get_inheritable(second)
    finally:
        os.close(first)
        os.close(second)


def test_remove_forgets_a_vm(tmp_path: Path) -> None:
    """After remove nothing of the VM is left, others are; removing twice is no error."""
    store = Store(tmp_path)
    for name in ("web1", "web10"):
        store.save(name, RECORD)
        os.close(store.open_pages(name))
    store.remove("web1")
    store.remove("web1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["web10.json", "web10.pages"]
