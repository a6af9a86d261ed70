# SPDX-License-Identifier: Apache-2.0
"""What must outlive the daemon, and the little that must outlive the host.

`--state-dir`, on tmpfs by default, outlives the daemon:

  NAME.json      the VM: its driver and socket, the epoch of its ownership, its last migration
  NAME.pages     destination: one byte for each page, written by the native engine (uffd_native.c)

`--durable-dir`, on disk, outlives the host:

  NAME.intent    source: the guest may be at another host from now on, and whom to ask

NAME is the VM's, as `to_file` writes it.

A record is replaced as a whole by write and rename, so that a reader sees the old one or the new
one; its own checksum tells a torn one where the file system does not keep that promise. Only an
intent is fsynced: it is written before the stop, outside the blackout, and the others within it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from postcopyd.errors import PostcopydError, shortage

VERSION = 1

INTENT = frozenset(
    ("version", "vm", "migration", "peer", "epoch", "driver", "socket", "boot", "time")
)
"""The fields of an intent. A reader of this version does with these, and ignores others."""

Record = dict[str, Any]


class StateNotWritten(PostcopydError):
    """A record could not be written; what it was to say must not be acted on."""

    name = "StateNotWritten"


class Store:
    """The two folders. One daemon owns them; calls are synchronous, and short but `save_intent`."""

    def __init__(self, directory: Path, durable: Path | None = None) -> None:
        """Makes what is missing. Raises PostcopydError."""
        self.directory = directory
        self.durable = durable or directory / "durable"
        _make(self.directory, "--state-dir")
        _make(self.durable, "--durable-dir")

    def save(self, name: str, record: Record, *, durable: bool = False) -> None:
        """Replaces the record of a VM; `durable` also syncs it. Raises StateNotWritten."""
        path = self._path(name, "json")
        if _name(path) is None:
            record = {**record, "vm": name}
        try:
            _write(path, record, sync=durable)
        except OSError as error:
            raise StateNotWritten(
                f"writing the record of {name} to {path}: {error.strerror}; "
                f"nothing was changed, make room there and try again"
            ) from None

    def load(self) -> dict[str, Record]:
        """All records by VM name. Raises PostcopydError for the first that cannot be read."""
        return _all(self.load_each())

    def load_each(self) -> tuple[dict[str, Record], dict[str, str]]:
        """By VM name the records, and of those that cannot be read one sentence on why.

        What cannot be read stays as it is, for somebody to look at.
        """
        return _each(self.directory, "json", _read)

    def under_way(self) -> bool:
        """Whether a guest may be waiting for a daemon, by the records; one that cannot be read may
        be of such a guest."""
        records, unread = self.load_each()
        return bool(unread) or any(
            record["ownership"] not in ("held", "declined")
            and record["status"]["phase"] != "drained"
            for record in records.values()
        )

    def save_intent(self, name: str, intent: Record) -> None:
        """Returns once it is on disk that the guest may leave: before its VMM is stopped.

        `intent` has `migration`, `peer` (HOST:PORT, whom to ask), `epoch`, `driver` and `socket`,
        and `identity` (the names of its certificate; an older version wrote none);
        added are `vm`, `boot` (see `boot_id`) and `time` (for people). Takes as long as the disk
        takes to sync, so call it in a thread. Raises StateNotWritten.
        """
        path = self._intent(name)
        try:
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            _write(path, {**intent, "vm": name, "boot": boot_id(), "time": when}, sync=True)
        except OSError as error:
            raise StateNotWritten(
                f"writing to {path} that {name} may leave: {error.strerror}; it was not stopped: "
                f"make room there, or name another folder with --durable-dir"
            ) from None

    def forget_intent(self, name: str) -> None:
        """The outcome is known, and recorded. Without fsync: an intent too many only asks again,
        and so does one that cannot be removed."""
        with suppress(OSError):
            self._intent(name).unlink()

    def intents(self) -> dict[str, Record]:
        """All intents by VM name. Raises PostcopydError for the first that cannot be read."""
        return _all(self.intents_each())

    def intents_each(self) -> tuple[dict[str, Record], dict[str, str]]:
        """Like `load_each`; a VM whose intent cannot be read may be at another host."""
        return _each(self.durable, "intent", _read_intent)

    def remove(self, name: str) -> None:
        """Forgets a VM; its intent last, so that a daemon that dies in between asks again."""
        self._path(name, "json").unlink(missing_ok=True)
        self.remove_pages(name)
        self.forget_intent(name)

    def open_pages(self, name: str, again: bool = False) -> int:
        """A new, empty page record, or `again` the one that is there; the descriptor is the
        caller's. Raises PostcopydError, StateNotWritten for a new one."""
        path = self._path(name, "pages")
        flags = os.O_RDWR | os.O_CLOEXEC
        if again:
            try:
                return os.open(path, flags)
            except FileNotFoundError:
                raise PostcopydError(
                    f"the page record of {name} is gone: without {path} nobody knows which of its "
                    f"pages are here, so its migration cannot be continued"
                ) from None
            except OSError as error:
                raise shortage(error) or PostcopydError(
                    f"opening the page record {path} again: {error.strerror}; "
                    f"nothing was changed, mend that and try again"
                ) from None
        try:
            path.unlink(missing_ok=True)
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise StateNotWritten(
                f"making the page record {path}: {error.strerror}; make room there"
            ) from None

    def remove_pages(self, name: str) -> None:
        self._path(name, "pages").unlink(missing_ok=True)

    def _path(self, name: str, kind: str) -> Path:
        return self.directory / f"{to_file(name)}.{kind}"

    def _intent(self, name: str) -> Path:
        return self.durable / f"{to_file(name)}.intent"


_LONGEST = 200
"""Bytes that a VM's name may take of a file's: the rest, up to NAME_MAX, is for what follows."""


def to_file(name: str) -> str:
    """What the files of a VM are called, before their ending; those of no other VM are.

    Letters, digits and _.@:+- stand for themselves, all other bytes are written %XX. A name that
    gets too long so is cut and ends with ~ and a digest; the record has it whole, in `vm`.
    """
    data = name.encode(errors="surrogatepass")
    text = re.sub(rb"[^\w.@:+-]|\A\.", lambda found: b"%%%02X" % found[0][0], data).decode()
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 65]}~{sha256(data).hexdigest()}"


def _name(path: Path) -> str | None:
    """The name of the VM that a file is of; None for one that was cut."""
    if "~" in path.stem:
        return None
    data = re.sub(rb"%([0-9A-F]{2})", lambda found: bytes.fromhex(found[1].decode()),
                  os.fsencode(path.stem))  # fmt: skip
    return data.decode(errors="replace")


def read_record(directory: Path, name: str) -> Record | None:
    """The record of one VM, as `read_intent`; with a `status` that has a role, a phase and a
    message."""
    return _of(directory, f"{to_file(name)}.json", _read_status, "--state-dir")


def read_intent(durable: Path, name: str) -> Record | None:
    """The intent of one VM, for who is not the daemon; makes nothing, takes any name.

    Raises PostcopydError when there is one, or may be, and it cannot be read.
    """
    return _of(durable, f"{to_file(name)}.intent", _read_intent, "--durable-dir")


def _of(folder: Path, file: str, read: Callable[[Path], Record], option: str) -> Record | None:
    try:
        there = file in os.listdir(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PostcopydError(
            f"reading which guests may have left, in {folder}: {error.strerror}; "
            f"run this as root, or name the folder of the daemon with {option}"
        ) from None
    return read(folder / file) if there else None


def boot_id() -> str:
    """Another one after each start of the host: random(4)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _make(folder: Path, option: str) -> None:
    """Makes a folder that is missing, on disk when this returns. Raises PostcopydError."""
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for each in missing:
            _sync(each.parent)
    except OSError as error:
        raise PostcopydError(
            f"making the folder {folder}: {error.strerror}; name another with {option}"
        ) from None


def _write(path: Path, record: Record, *, sync: bool) -> None:
    """Replaces a file as a whole. Raises OSError; the old one stands then, or the new one does."""
    body = json.dumps({"version": VERSION, **record}, sort_keys=True).encode()
    data = b"%08x %s\n" % (zlib.crc32(body), body)
    new = path.with_name(f"{path.name}.new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)
    new.replace(path)
    if sync:
        _sync(path.parent)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(path: Path, fields: frozenset[str] = frozenset()) -> Record:
    """A record that has these fields, `vm` as the file says. Raises PostcopydError naming it."""
    try:
        checksum, _, body = path.read_bytes().rstrip(b"\n").partition(b" ")
        if checksum != b"%08x" % zlib.crc32(body):
            raise ValueError("its checksum is wrong")
        record: Record = json.loads(body)
        version = record.get("version") if isinstance(record, dict) else None
        if version != VERSION:
            raise ValueError(f"it is of version {version}, not {VERSION}")
        if missing := fields - record.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if "vm" in fields and to_file(str(record["vm"])) != path.stem:
            raise ValueError(f"it is about {record['vm']}")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise PostcopydError(
            f"reading the record {path}: {why}; move it away when its VM is known to be in order"
        ) from None
    return record


def _read_intent(path: Path) -> Record:
    return _read(path, INTENT)


def _read_status(path: Path) -> Record:
    record = _read(path, frozenset({"status"}))
    status = record["status"]
    if not isinstance(status, dict) or not {"role", "phase", "message"} <= status.keys():
        raise PostcopydError(f"reading the record {path}: it does not say how its VM is")
    return record


def _each(
    folder: Path, kind: str, read: Callable[[Path], Record]
) -> tuple[dict[str, Record], dict[str, str]]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise PostcopydError(
            f"reading what is recorded in {folder}: {error.strerror}; mend that and try again"
        ) from None
    records, unreadable = {}, {}
    for path in (folder / name for name in names if name.endswith(f".{kind}")):
        name = _name(path)
        try:
            record = read(path)
            records[name or str(record.get("vm", path.stem))] = record
        except PostcopydError as error:
            unreadable[name or path.stem] = str(error)
    return records, unreadable


def _all(read: tuple[dict[str, Record], dict[str, str]]) -> dict[str, Record]:
    records, unreadable = read
    if unreadable:
        raise PostcopydError(next(iter(unreadable.values())))
    return records
