# SPDX-License-Identifier: Apache-2.0
"""What a daemon must know after its death: one small JSON record for each VM, and the page records.

`--state-dir` has

  NAME.json      the VM: its driver and socket, the epoch of its ownership, its last migration
  NAME.pages     destination: one byte for each page, written by the native engine (uffd_native.c)

A record is replaced as a whole by write and rename, so that a reader sees the old one or the new
one; its own checksum tells a torn one where the file system does not keep that promise. Nothing is
fsynced except the intent, which must outlive the host: it is written before the stop, outside the
blackout.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from postcopyd.errors import PostcopydError

VERSION = 1


class StateNotWritten(PostcopydError):
    """A record could not be written; what it was to say must not be acted on."""

    name = "StateNotWritten"


class Store:
    """The state directory. One daemon owns it; calls are short and synchronous."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PostcopydError(
                f"making the state directory {directory}: {error.strerror}; "
                f"name another with --state-dir"
            ) from None

    def save(self, name: str, record: dict[str, Any], *, durable: bool = False) -> None:
        """Replaces the record of a VM; `durable` also outlives the host. Raises PostcopydError."""
        body = json.dumps({"version": VERSION, **record}, sort_keys=True)
        path = self._path(name, "json")
        new = path.with_suffix(".new")
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                data = f"{zlib.crc32(body.encode()):08x} {body}\n".encode()
                if os.write(fd, data) != len(data):
                    raise OSError(28, "No space left on device")
                if durable:
                    os.fsync(fd)
            finally:
                os.close(fd)
            new.replace(path)
            if durable:
                folder = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except OSError as error:
            raise StateNotWritten(
                f"writing the record of {name} to {path}: {error.strerror}; "
                f"nothing was changed, make room there and try again"
            ) from None

    def load(self) -> dict[str, dict[str, Any]]:
        """All records by VM name. A torn or foreign file raises PostcopydError naming it."""
        records = {}
        for path in sorted(self.directory.glob("*.json")):
            try:
                checksum, _, body = path.read_bytes().rstrip(b"\n").partition(b" ")
                if int(checksum, 16) != zlib.crc32(body):
                    raise ValueError("its checksum is wrong")
                record = json.loads(body)
                if record["version"] != VERSION:
                    raise ValueError(f"it is of version {record['version']}")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise PostcopydError(
                    f"reading the record {path}: {error}; move it away when its VM is known to be "
                    f"in order"
                ) from None
            records[path.stem] = record
        return records

    def remove(self, name: str) -> None:
        self._path(name, "json").unlink(missing_ok=True)
        self.remove_pages(name)

    def open_pages(self, name: str) -> int:
        """A new, empty page record; the descriptor is the caller's."""
        path = self._path(name, "pages")
        try:
            path.unlink(missing_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateNotWritten(
                f"making the page record {path}: {error.strerror}; make room there"
            ) from None

    def remove_pages(self, name: str) -> None:
        self._path(name, "pages").unlink(missing_ok=True)

    def _path(self, name: str, kind: str) -> Path:
        return self.directory / f"{name}.{kind}"
