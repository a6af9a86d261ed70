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
from needs import missing

from postcopyd.errors import PostcopydError
from postcopyd.host import procfs
from postcopyd.names import problem
from postcopyd.records import schema as records
from postcopyd.records import store as store_module
from postcopyd.records.store import StateNotWritten, Store, read_intent, to_file

WRITER = """
import sys
from pathlib import Path
from postcopyd.records.store import Store
store = Store(Path(sys.argv[1]))
for n in range(2000):
    store.save("web1", {**RECORD, "about": {"fill": str(n % 10) * (5000 - n % 7)}})
"""
RECORD: dict[str, Any] = {
    "ownership": "held",
    "epoch": 3,
    "driver": "qemu",
    "socket": "/run/web1.qmp",
    "pid": 9,
    "started": 77,
    "status": {"phase": "paused"},
    "about": {},
}
OTHER = {**RECORD, "epoch": 4}
WRITER = f"RECORD = {RECORD}\n{WRITER}"
INTENT = {
    "migration": "m1",
    "peer": "host2:16525",
    "epoch": 3,
    "driver": "qemu",
    "socket": "/run/web1.qmp",
}


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


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder]).returncode:
        missing("the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_record_survives(tmp_path: Path) -> None:
    """What was saved is loaded by the next daemon, one record for each VM."""
    store = Store(tmp_path / "made" / "anew")
    store.save("web1", RECORD)
    store.save("web.2:a@b", OTHER)
    loaded = Store(store.directory).load()
    assert loaded == {
        "web1": {"version": store_module.VERSION, **RECORD},
        "web.2:a@b": {"version": store_module.VERSION, **OTHER},
    }


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=5))
def test_any_record_survives(tmp_path_factory: pytest.TempPathFactory, result: Any) -> None:
    """Whatever text a peer's sentence puts into a record, and whatever a newer version adds to it,
    it is loaded as it was saved."""
    store = Store(tmp_path_factory.mktemp("state"))
    record = {**result, **RECORD, "status": {"phase": "paused", "result": result}}
    record.pop("version", None)
    store.save("web1", record)
    assert store.load()["web1"] == {"version": store_module.VERSION, **record}


NAMES = ("web1", "web.2:a@b", "my web server", "datenbank-ö", "数据库", ".hidden", "a%20b", "a~b",
         "$(reboot)", "'; rm *", "x" * 255, "数" * 85, "数" * 84 + "据")  # fmt: skip


def test_any_name_has_files_of_its_own(tmp_path: Path) -> None:
    """Each name that a VM may have keeps its record, pages and intent apart from all others, in
    files that can be listed, and a daemon of later finds it by its name again."""
    store = Store(tmp_path)
    assert not any(problem(name) for name in NAMES)
    for name in NAMES:
        store.save(name, {**RECORD, "about": {"of": name}})
        store.save_intent(name, INTENT)
        os.close(store.open_pages(name))
    files = os.listdir(tmp_path) + os.listdir(store.durable)
    assert len(files) == 3 * len(NAMES) + 1
    assert all(name.isascii() and name.isprintable() and " " not in name for name in files)
    later = Store(tmp_path)
    found = {name: record["about"]["of"] for name, record in later.load().items()}
    assert found == {name: name for name in NAMES}
    assert set(later.intents()) == set(NAMES)
    for name in NAMES:
        assert read_intent(store.durable, name) == later.intents()[name]
        later.remove(name)
    assert os.listdir(tmp_path) == ["durable"]
    assert os.listdir(store.durable) == []


@given(st.text(min_size=1, max_size=255), st.text(min_size=1, max_size=255))
def test_names_of_files_are_one_to_one(one: str, other: str) -> None:
    """Two VMs never share a file, nor leave the folder."""
    assert (to_file(one) == to_file(other)) == (one == other)
    assert "/" not in to_file(one) and len(to_file(one)) <= 200 and to_file(one)[0] != "."


def test_a_record_of_a_long_name_that_cannot_be_read(tmp_path: Path) -> None:
    """It hides no other, and is shown by what its file is called."""
    store = Store(tmp_path)
    store.save("web1", RECORD)
    store.save("数" * 85, RECORD)
    (tmp_path / f"{to_file('数' * 85)}.json").write_text("torn")
    records, unread = store.load_each()
    assert list(records) == ["web1"] and list(unread) == [to_file("数" * 85)]


def test_save_replaces_the_whole_record(tmp_path: Path) -> None:
    """A second save leaves nothing of the first, and no other file."""
    store = Store(tmp_path)
    store.save("web1", {**RECORD, "long": "x" * 5000})
    store.save("web1", RECORD)
    assert "long" not in store.load()["web1"]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["web1.json"]


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
    store.save("web1", OTHER)
    assert store.load()["web1"]["epoch"] == 4


@pytest.mark.parametrize("room", [0, 20])
def test_full_disk_leaves_the_record_before(tmp_path: Path, room: int) -> None:
    """When there is no room, the error says so and the old record stands, whole."""
    store = Store(tmp_path)
    store.save("web1", RECORD)
    before = store.load()
    with no_room(room), pytest.raises(PostcopydError, match="make room") as caught:
        store.save("web1", {**OTHER, "long": "x" * 4000})
    assert caught.value.name == "StateNotWritten"
    assert store.load() == before
    store.save("web1", OTHER)
    assert store.load()["web1"]["epoch"] == 4


def test_folder_that_went_away(tmp_path: Path) -> None:
    """A state directory that was removed is an error of the save, naming the path."""
    store = Store(tmp_path / "state", tmp_path / "durable")
    store.directory.rmdir()
    with pytest.raises(PostcopydError, match="No such file") as caught:
        store.save("web1", RECORD)
    assert str(store.directory) in str(caught.value)
    with pytest.raises(PostcopydError, match="No such file"):
        store.open_pages("web1")
    with pytest.raises(PostcopydError, match="No such file"):
        store.load_each()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """A state directory below a file is refused, with the option that names another."""
    (tmp_path / "file").touch()
    with pytest.raises(PostcopydError, match="--state-dir"):
        Store(tmp_path / "file" / "state")
    with pytest.raises(PostcopydError, match="--durable-dir"):
        Store(tmp_path / "state", tmp_path / "file" / "durable")


def test_a_reader_sees_the_old_record_or_the_new(tmp_path: Path) -> None:
    """While one process saves again and again, another never reads anything in between."""
    store = Store(tmp_path)
    store.save("web1", {**RECORD, "about": {"fill": "0" * 5000}})
    seen = set()
    with subprocess.Popen([sys.executable, "-c", WRITER, tmp_path]) as writer:
        try:
            while writer.poll() is None:
                fill = store.load()["web1"]["about"]["fill"]
                assert len(set(fill)) == 1
                seen.add(fill[0])
        finally:
            writer.kill()
    assert writer.returncode == 0
    assert len(seen) > 1


def test_one_torn_record_hides_no_other(tmp_path: Path) -> None:
    """What can be read is read, what cannot is named with its reason and left as it is."""
    store = Store(tmp_path)
    for name in ("db", "web1", "web2"):
        store.save(name, RECORD)
    torn = tmp_path / "web1.json"
    torn.write_bytes(torn.read_bytes()[:30])
    before = torn.read_bytes()
    records, unreadable = store.load_each()
    assert [*records] == ["db", "web2"]
    assert [*unreadable] == ["web1"]
    assert f"{torn}: its checksum is wrong" in unreadable["web1"]
    assert torn.read_bytes() == before
    with pytest.raises(PostcopydError, match=r"web1\.json"):
        store.load()


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


def test_page_record_is_there_again(tmp_path: Path) -> None:
    """The page record of an arrival that goes on is opened as it was, never made anew."""
    store = Store(tmp_path)
    first = store.open_pages("web1")
    os.write(first, b"\1\1\1")
    os.close(first)
    again = store.open_pages("web1", again=True)
    try:
        assert os.pread(again, 9, 0) == b"\1\1\1"
        assert not os.get_inheritable(again)
        assert os.pwrite(again, b"\2", 1) == 1
    finally:
        os.close(again)
    store.remove_pages("web1")
    with pytest.raises(PostcopydError, match="the page record of web1 is gone"):
        store.open_pages("web1", again=True)
    assert not (tmp_path / "web1.pages").exists()


def test_remove_forgets_a_vm(tmp_path: Path) -> None:
    """After remove nothing of the VM is left, others are; removing twice is no error."""
    store = Store(tmp_path)
    for name in ("web1", "web10"):
        store.save(name, RECORD)
        os.close(store.open_pages(name))
        store.save_intent(name, INTENT)
    store.remove("web1")
    store.remove("web1")
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["web10.intent", "web10.json", "web10.pages"]


# What outlives the host.


def test_intent_survives(tmp_path: Path) -> None:
    """An intent is there for the next daemon, and for who has none, with the time and the boot."""
    store = Store(tmp_path / "state", tmp_path / "a" / "durable")
    store.save_intent("web1", INTENT)
    store.save_intent("web.2:a@b", {**INTENT, "epoch": 9})
    intents = Store(tmp_path / "lost", store.durable).intents()
    assert sorted(intents) == ["web.2:a@b", "web1"]
    intent = intents["web1"]
    assert intent.items() >= {**INTENT, "vm": "web1", "boot": procfs.boot_id()}.items()
    assert intent.keys() == records.Intent.__required_keys__
    assert intent["time"].endswith("Z")
    assert read_intent(store.durable, "web1") == intent
    assert [*store.directory.iterdir()] == []
    assert stat.S_IMODE(store.durable.stat().st_mode) == 0o700
    assert stat.S_IMODE((store.durable / "web1.intent").stat().st_mode) == 0o600


def test_intent_is_forgotten(tmp_path: Path) -> None:
    """A forgotten intent is gone for all; forgetting twice, or in a lost folder, is no error."""
    store = Store(tmp_path)
    store.save_intent("web1", INTENT)
    store.forget_intent("web1")
    store.forget_intent("web1")
    assert store.intents() == {}
    assert read_intent(store.durable, "web1") is None
    store.durable.rmdir()
    store.forget_intent("web1")
    assert read_intent(store.durable, "web1") is None
    with pytest.raises(PostcopydError, match="No such file"):
        store.intents()


def test_intent_is_on_disk_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Synced are the file, then it is renamed, then its folder; new folders too; no record is."""
    done: list[str] = []
    replace = Path.replace

    def fsync(fd: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{fd}"))

    def renamed(path: Path, target: Path) -> Path:
        done.append("rename")
        return replace(path, target)

    monkeypatch.setattr(store_module.os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    durable = tmp_path / "a" / "durable"
    store = Store(tmp_path, durable)
    assert done == [str(durable.parent), str(tmp_path)]
    store.save("web1", RECORD)
    del done[:]
    store.save_intent("web1", INTENT)
    assert done == [str(durable / "web1.intent.new"), "rename", str(durable)]


def test_intent_that_was_not_synced_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk fails at fsync, of the file or of the folder, the guest must not stop."""
    store = Store(tmp_path)
    fails = [True, False, True]

    def fsync(fd: int) -> None:
        if fails.pop(0):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(store_module.os, "fsync", fsync)
    for _ in range(2):
        with pytest.raises(StateNotWritten, match="Input/output error"):
            store.save_intent("web1", INTENT)
    assert not fails


def test_every_torn_intent_is_found(tmp_path: Path) -> None:
    """An intent cut at any byte, its last newline aside, is refused with its path, and hides no
    other."""
    store = Store(tmp_path)
    store.save_intent("web1", INTENT)
    store.save_intent("web2", INTENT)
    path = store.durable / "web1.intent"
    whole = path.read_bytes()
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(PostcopydError, match=r"web1\.intent"):
            store.intents()
        with pytest.raises(PostcopydError, match=r"web1\.intent"):
            read_intent(store.durable, "web1")
        assert [[*part] for part in store.intents_each()] == [["web2"], ["web1"]]
    path.write_bytes(whole[:-1])
    assert [*store.intents()] == ["web1", "web2"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": store_module.VERSION + 1}, "version 2"),
        ({"vm": "web2"}, "it is about web2"),
        ({"peer": None}, "it lacks peer"),
        ({"boot": None, "time": None}, "it lacks boot, time"),
    ],
)
def test_foreign_intent_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    """A whole intent of another version, of another VM, or without a field that is needed."""
    store = Store(tmp_path)
    store.save_intent("web1", INTENT)
    changed = {**store.intents()["web1"], **changes}
    body = json.dumps({k: v for k, v in changed.items() if v is not None}).encode()
    (store.durable / "web1.intent").write_bytes(b"%08x %s\n" % (zlib.crc32(body), body))
    with pytest.raises(PostcopydError, match=says):
        store.intents()


@pytest.mark.parametrize("room", [0, 20])
def test_full_disk_leaves_the_intent_before(tmp_path: Path, room: int) -> None:
    """When there is no room for an intent, the error says so and the old one stands, whole."""
    store = Store(tmp_path)
    store.save_intent("web1", INTENT)
    before = store.intents()
    for name in ("web1", "web2"):
        with no_room(room), pytest.raises(StateNotWritten, match="--durable-dir"):
            store.save_intent(name, {**INTENT, "epoch": 4})
    assert store.intents() == before


def test_full_file_system(tmp_path: Path) -> None:
    """The same on a file system that is full in truth."""
    with mounted(tmp_path / "disk", "size=16k") as disk:
        store = Store(tmp_path / "state", disk)
        store.save_intent("web1", INTENT)
        with suppress(OSError), (disk / "fill").open("wb", buffering=0) as fill:
            while True:
                fill.write(b"x" * 4096)
        with pytest.raises(StateNotWritten, match="No space left on device"):
            store.save_intent("web1", {**INTENT, "epoch": 4})
        assert store.intents()["web1"]["epoch"] == 3
        (disk / "fill").unlink()
        store.save_intent("web1", {**INTENT, "epoch": 4})
        assert store.intents()["web1"]["epoch"] == 4


def test_read_only_folder(tmp_path: Path) -> None:
    """A folder that cannot be written to fails the intent and no record; and forgetting, which is
    said."""
    with mounted(tmp_path / "disk", "size=1m") as disk:
        store = Store(tmp_path / "state", disk)
        store.save_intent("web1", INTENT)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(StateNotWritten, match="Read-only file system"):
            store.save_intent("web2", INTENT)
        store.save("web1", RECORD)
        with pytest.raises(
            StateNotWritten, match=r"removing .*web1\.intent: Read-only file system"
        ):
            store.forget_intent("web1")
        with pytest.raises(StateNotWritten, match="web1 is not forgotten"):
            store.remove("web1")
        assert [*store.intents()] == ["web1"]


@pytest.mark.parametrize("name", ["", "..", "../durable/web1", "a/b", "x" * 300, "web", "web1.int"])
def test_any_name_may_be_asked_for(tmp_path: Path, name: str) -> None:
    """A name that no VM has leads to no file of another, and is no error."""
    store = Store(tmp_path)
    store.save_intent("web1", INTENT)
    assert read_intent(store.durable, name) is None


def test_folder_of_intents_that_cannot_be_read(tmp_path: Path) -> None:
    """Where nobody can look, nobody says that there is no intent."""
    (tmp_path / "file").touch()
    with pytest.raises(PostcopydError, match="Not a directory"):
        read_intent(tmp_path / "file", "web1")
