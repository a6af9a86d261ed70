# SPDX-License-Identifier: Apache-2.0
"""Opens a unix socket in the file system: where no other process has one, never open too wide."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import socket
import stat
from collections.abc import AsyncIterator

import trio

from postcopyd.errors import PostcopydError

GROUP = "postcopyd"
BACKLOG = 64
# How long another daemon may take to open its socket in the same folder; it takes milliseconds.
_LOCK_SECONDS = 5.0


async def listen(
    path: str, group: str = GROUP, *, what: str = "control socket", option: str = "--control"
) -> socket.socket:
    """A socket that listens at `path`, mode 0660, for `group` if the host has it.

    Makes the folder, and replaces a socket that nobody answers on. Raises PostcopydError when
    somebody answers, when something else is there, or when the folder cannot be written.
    """
    what = f"cannot open the {what} {path}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        folder = os.path.dirname(os.path.abspath(path))
        os.makedirs(folder, exist_ok=True)
        async with _locked(folder):
            _make_way(path)
            # Nobody can connect between bind and listen, so owner and mode are never too wide.
            listener.bind(path)
            os.chmod(path, 0o660)
            with contextlib.suppress(KeyError, PermissionError):
                os.chown(path, -1, grp.getgrnam(group).gr_gid)
            listener.listen(BACKLOG)
    except BaseException as error:
        listener.close()
        if isinstance(error, PostcopydError):
            raise PostcopydError(f"{what}: {error}") from None
        if isinstance(error, OSError):
            why = error.strerror or str(error)
            raise PostcopydError(f"{what}: {why}; choose another with {option}") from error
        raise
    return listener


@contextlib.asynccontextmanager
async def _locked(folder: str) -> AsyncIterator[None]:
    """Locks the folder, so that two daemons that start together do not both take a stale socket."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = trio.current_time() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if trio.current_time() > deadline:
                    raise PostcopydError(
                        f"another process keeps a lock on {folder}, `lslocks` shows which: end it, "
                        f"or name another path"
                    ) from None
            await trio.sleep(0.01)  # other guests of this daemon may be waiting
        yield
    finally:
        os.close(fd)


def _make_way(path: str) -> None:
    try:
        entry = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(entry.st_mode):
        raise PostcopydError(
            "something that is not a socket is there; remove it or name another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        failed = probe.connect_ex(path)
    # Anything but a refusal (a full backlog, for one) means that a process has the socket.
    if failed != errno.ECONNREFUSED:
        raise PostcopydError("a daemon answers there already; stop it or name another path")
    os.unlink(path)
