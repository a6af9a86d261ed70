# SPDX-License-Identifier: Apache-2.0
"""Files of what must outlive the daemon, and of the little that must outlive the host.

`--state-dir`, on tmpfs by default, outlives the daemon:

  NAME.json      the VM: its driver and socket, the epoch of its ownership, its last migration
  NAME.pages     destination: one byte for each page, written by the native engine (record.c)
  NAME.answers   destination: how earlier arrivals ended whose sources may not know it yet
  NAME.device    source: the device state of a guest that has left and whose VMM is ended early
  daemon-id      tells this folder from those of other daemons: random

`--durable-dir`, on disk, outlives the host:

  NAME.intent    source: the guest may be at another host from now on, and which host to ask

NAME is the VM's, as `to_file` writes it.

A record is replaced as a whole by write and rename, so that a reader sees the old one or the new
one; its checksum shows a torn one where the file system does not keep that promise. Only an intent
is fsynced: it is written before the guest stops; the others are written within the blackout.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import time
import zlib
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from postcopyd.errors import PostcopydError, shortage
from postcopyd.host import procfs
from postcopyd.records import schema
from postcopyd.records.schema import VERSION, Answers, Intent, Record

T = TypeVar("T", Record, Intent, Answers)


KEPT = 100
"""Answers that are kept of one VM, the newest. No record says whether a source has acknowledged
one, so most are of no use; and no source waits for so many moves."""


class StateNotWritten(PostcopydError):
    """A record could not be written; what it was to say must not be acted on."""

    name = "StateNotWritten"


class Store:
    """The two folders. One daemon owns them. Calls are synchronous, and short but `save_intent`."""

    def __init__(self, directory: Path, durable: Path | None = None) -> None:
        """Makes folders that are missing. Raises PostcopydError."""
        self.directory = directory
        self.durable = durable or directory / "durable"
        _make(self.directory, "--state-dir")
        _make(self.durable, "--durable-dir")

    def identity(self) -> str:
        """Which folder of records this is: random, made once. If it cannot be read a new one is
        made; other hosts then take this daemon for another, which is the safe side. Raises
        StateNotWritten."""
        path = self.directory / "daemon-id"
        try:
            found = path.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            found = ""
        if re.fullmatch("[0-9a-f]{32}", found):
            return found
        made = secrets.token_hex(16)
        try:
            _replace(path, f"{made}\n".encode(), sync=True)
        except OSError as error:
            raise StateNotWritten(
                f"writing which daemon this is to {path}: {error.strerror}"
            ) from None
        return made

    def save(self, name: str, record: dict[str, Any], *, durable: bool = False) -> None:
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
        """The records by VM name; and by VM name, for those that cannot be read, a sentence on why.

        A record that cannot be read stays as it is, for somebody to look at.
        """
        return _each(self.directory, "json", _read_record)

    def under_way(self) -> bool:
        """Whether a guest may be waiting for a daemon, by the records. A record that cannot be read
        may be of such a guest."""
        found, unread = self.load_each()
        return bool(unread) or any(
            record["ownership"] not in ("held", "declined")
            and record["status"]["phase"] != "drained"
            for record in found.values()
        )

    def save_intent(self, name: str, intent: dict[str, Any]) -> None:
        """Returns once it is on disk that the guest may leave; its VMM is stopped only then.

        `intent` has `migration`, `peer` (HOST:PORT of the host to ask), `epoch`, `driver`,
        `socket`, `identity` (the names in its certificate) and `granted` (which daemon it is; older
        versions wrote neither), and the `definition` of a VMM that ends early. Adds `vm`, `boot`
        (see `procfs.boot_id`) and `time` (for people).
        Takes as long as the disk takes to sync, so call it in a thread. Raises StateNotWritten.
        """
        path = self._intent(name)
        try:
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            _write(path, {**intent, "vm": name, "boot": procfs.boot_id(), "time": when}, sync=True)
        except OSError as error:
            raise StateNotWritten(
                f"writing to {path} that {name} may leave: {error.strerror}; it was not stopped: "
                f"make room there, or name another folder with --durable-dir"
            ) from None

    def redirect_intent(self, name: str, peer: str) -> None:
        """The host to ask has another address. Syncs, as `save_intent`. Raises PostcopydError."""
        path = self._intent(name)
        if not os.path.lexists(path):
            return
        try:
            _write(path, {**_read_intent(path), "peer": peer}, sync=True)
        except OSError as error:
            raise StateNotWritten(
                f"writing to {path} that {name} is asked for at {peer}: {error.strerror}; mend "
                f"that and try again"
            ) from None

    def forget_intent(self, name: str) -> None:
        """Removes the intent of a guest that is this host's. Without fsync: an intent that comes
        back only has the other host asked again. Raises StateNotWritten."""
        _unlink(
            self._intent(name),
            f"until it is removed, `postcopyd may-run {name}` here says that it may be elsewhere",
        )

    def intents(self) -> dict[str, Intent]:
        """All intents by VM name. Raises PostcopydError for the first that cannot be read."""
        return _all(self.intents_each())

    def intents_each(self) -> tuple[dict[str, Intent], dict[str, str]]:
        """Like `load_each`; a VM whose intent cannot be read may be at another host."""
        return _each(self.durable, "intent", _read_intent)

    def keep_answer(self, name: str, about: dict[str, Any]) -> None:
        """Keeps how an arrival of this VM ended, for its source, longer than its record. Raises
        PostcopydError if it cannot."""
        path = self._path(name, "answers")
        answers = [*self._answers(name)[-KEPT + 1 :], about]
        try:
            _write(path, {"vm": name, "answers": answers}, sync=False)
        except OSError as error:
            raise StateNotWritten(
                f"writing to {path} how the move of {name} to this host ended, which its source "
                f"may not know yet: {error.strerror}; nothing was changed, make room there and try "
                f"again"
            ) from None

    def answered(self, name: str, migration: str) -> dict[str, Any]:
        """What was kept of this arrival, or nothing. Raises PostcopydError."""
        found = [one for one in self._answers(name) if one["migration"] == migration]
        return found[-1] if found else {}

    def _answers(self, name: str) -> list[dict[str, Any]]:
        path = self._path(name, "answers")
        if not os.path.lexists(path):
            return []
        answers: list[Any] = [*_read(path, schema.checked_answers)["answers"]]
        return answers

    def remove(self, name: str) -> None:
        """Forgets a VM; its intent last, so that a daemon that dies in between still asks the other
        host. Raises StateNotWritten."""
        kinds = (self._path(name, kind) for kind in ("json", "pages", "device"))
        for path in (*kinds, self._intent(name)):
            _unlink(path, f"{name} is not forgotten: mend that and try again")

    def keep_device(self, name: str, state: bytes) -> None:
        """Keeps the device state of a guest that has left. Raises StateNotWritten."""
        path = self._path(name, "device")
        try:
            _replace(path, state, sync=False)
        except OSError as error:
            raise StateNotWritten(
                f"writing the device state of {name} to {path}: {error.strerror}; make room there"
            ) from None

    def device(self, name: str) -> bytes:
        """The inverse of `keep_device`. Raises PostcopydError."""
        path = self._path(name, "device")
        try:
            return path.read_bytes()
        except OSError as error:
            raise shortage(error) or PostcopydError(
                f"reading the device state of {name} from {path}: {error.strerror}"
            ) from None

    def remove_device(self, name: str) -> None:
        """Removes it, if it is there. Raises StateNotWritten."""
        _unlink(self._path(name, "device"), "it is of no use any more: remove it by hand")

    def open_pages(self, name: str, again: bool = False) -> int:
        """A new, empty page record, or `again` the existing one; the caller owns the descriptor.
        Raises PostcopydError; for a new one StateNotWritten."""
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

    def lacks_pages(self, name: str, whole: bytes, regions: Sequence[int]) -> bool:
        """Whether there is a page record in which a page of these regions (given as numbers of
        pages) has a state that is not in `whole`. Raises PostcopydError when that cannot be known.
        """
        path = self._path(name, "pages")
        try:
            with path.open("rb") as record:
                return any(_differ(record, pages, whole) for pages in regions)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise PostcopydError(
                f"reading the page record {path}: {error.strerror}; mend that"
            ) from None

    def remove_pages(self, name: str) -> None:
        """Removes the page record of an arrival that is over. Raises StateNotWritten."""
        _unlink(self._path(name, "pages"), "it is of no use any more, and takes room")

    def _path(self, name: str, kind: str) -> Path:
        return self.directory / f"{to_file(name)}.{kind}"

    def _intent(self, name: str) -> Path:
        return self.durable / f"{to_file(name)}.intent"


_LONGEST = 200
"""Bytes of a file's name that a VM's name may take; the rest, up to NAME_MAX, is for its ending."""


def to_file(name: str) -> str:
    """The name of a VM's files without their ending; no two VMs have the same.

    Letters, digits and _.@:+- stand for themselves; any other byte is written %XX. A name that gets
    too long is cut and ends with ~ and a digest; the record has the whole name, in `vm`.
    """
    data = name.encode(errors="surrogatepass")
    text = re.sub(rb"[^\w.@:+-]|\A\.", lambda found: b"%%%02X" % found[0][0], data).decode()
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 65]}~{sha256(data).hexdigest()}"


def _name(path: Path) -> str | None:
    """The name of the VM that a file belongs to; None if the file's name was cut."""
    if "~" in path.stem:
        return None
    data = re.sub(rb"%([0-9A-F]{2})", lambda found: bytes.fromhex(found[1].decode()),
                  os.fsencode(path.stem))  # fmt: skip
    return data.decode(errors="replace")


def read_record(directory: Path, name: str) -> Record | None:
    """The record of one VM, as `read_intent`; its `status` has a role, a phase and a message."""
    return _of(directory, f"{to_file(name)}.json", _read_status, "--state-dir")


def read_intent(durable: Path, name: str) -> Intent | None:
    """The intent of one VM, for programs other than the daemon; makes nothing, takes any name.

    Raises PostcopydError when there is one, or may be one, and it cannot be read.
    """
    return _of(durable, f"{to_file(name)}.intent", _read_intent, "--durable-dir")


def _of(folder: Path, file: str, read: Callable[[Path], T], option: str) -> T | None:
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


_ROUND = 64
"""Each region of a page record is rounded up to a multiple of this many bytes (engine.c)."""


def _differ(record: BinaryIO, pages: int, states: bytes) -> bool:
    """Whether the next region of a page record lacks a page, or has one in another state."""
    left = pages
    while left and (some := record.read(min(left, 1 << 20))):
        left -= len(some)
        if some.translate(None, states):
            return True
    record.seek(-pages % _ROUND, os.SEEK_CUR)
    return left > 0


def _unlink(path: Path, or_else: str) -> None:
    try:
        path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass  # its folder is missing too
    except OSError as error:
        raise StateNotWritten(f"removing {path}: {error.strerror}; {or_else}") from None


def _make(folder: Path, option: str) -> None:
    """Makes a folder that is missing; it is on disk when this returns. Raises PostcopydError."""
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for each in missing:
            _sync(each.parent)
    except OSError as error:
        raise PostcopydError(
            f"making the folder {folder}: {error.strerror}; name another with {option}"
        ) from None


def _write(path: Path, record: dict[str, Any], *, sync: bool) -> None:
    """`_replace` with a record and its checksum."""
    body = json.dumps({"version": VERSION, **record}, sort_keys=True).encode()
    _replace(path, b"%08x %s\n" % (zlib.crc32(body), body), sync=sync)


def _replace(path: Path, data: bytes, *, sync: bool) -> None:
    """Replaces a file as a whole. Raises OSError; then either the old or the new one is there."""
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


def _read(path: Path, checked: Callable[[Any], T]) -> T:
    """Reads a record and checks its checksum and schema. Raises PostcopydError that names it."""
    try:
        checksum, _, body = path.read_bytes().rstrip(b"\n").partition(b" ")
        if checksum != b"%08x" % zlib.crc32(body):
            raise ValueError("its checksum is wrong")
        found = checked(json.loads(body))
        if (name := found.get("vm")) is not None and to_file(name) != path.stem:
            raise ValueError(f"it is about {name}")
        return found
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise PostcopydError(
            f"reading the record {path}: {why}; move it away when its VM is known to be in order"
        ) from None


def _read_record(path: Path) -> Record:
    return _read(path, schema.checked)


def _read_intent(path: Path) -> Intent:
    return _read(path, schema.checked_intent)


def _read_status(path: Path) -> Record:
    record = _read_record(path)
    if not {"role", "phase", "message"} <= record["status"].keys():
        raise PostcopydError(f"reading the record {path}: it does not say how its VM is")
    return record


def _each(
    folder: Path, kind: str, read: Callable[[Path], T]
) -> tuple[dict[str, T], dict[str, str]]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise PostcopydError(
            f"reading what is recorded in {folder}: {error.strerror}; mend that and try again"
        ) from None
    found: dict[str, T] = {}
    unreadable = {}
    for path in (folder / name for name in names if name.endswith(f".{kind}")):
        name = _name(path)
        try:
            record = read(path)
            found[name or record.get("vm", path.stem)] = record
        except PostcopydError as error:
            unreadable[name or path.stem] = str(error)
    return found, unreadable


def _all(read: tuple[dict[str, T], dict[str, str]]) -> dict[str, T]:
    found, unreadable = read
    if unreadable:
        raise PostcopydError(next(iter(unreadable.values())))
    return found
