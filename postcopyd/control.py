# SPDX-License-Identifier: Apache-2.0
"""The control socket: the methods of `io.postcopyd` bound to the daemon.

Owns what a request means before the daemon sees it (defaults, addresses, names), how the daemon's
errors look on the wire, and the socket in the file system. Must not know how a migration works, nor
how Varlink frames its messages.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import grp
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Container, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, Protocol

import trio

from postcopyd import __version__, names, varlink
from postcopyd.config import parse_address
from postcopyd.errors import PostcopydError, shortage
from postcopyd.varlink_idl import Interface, parse_interface

INTERFACE = "io.postcopyd"
GROUP = "postcopyd"
# How long another daemon may take to open its socket in the same folder; it takes milliseconds.
_LOCK_SECONDS = 5.0

Status = dict[str, Any]
Decision = Literal["wait", "poison", "kill", "take_back"]


@dataclass(frozen=True)
class MigrateRequest:
    """A migration as asked for: `to` is HOST:PORT, `bandwidth` in bytes per second."""

    to: str
    mode: Literal["hybrid", "postcopy", "precopy"] = "hybrid"
    bandwidth: int | None = None
    precopy_passes: int | None = None
    max_downtime_ms: float | None = None
    keep_source: bool = False
    unsafe: bool = False


class Daemon(Protocol):
    """What the control socket needs of the daemon. All methods may raise PostcopydError.

    From the moment that `migrate` returns an id, status and watch show that migration. `watch`
    gives the state as it is when the next one is asked for: a slow reader misses those between,
    and nothing is queued for it. It ends when the VM is let go, if at all.
    """

    async def attach(
        self, name: str, driver: Literal["qemu", "process"], socket: str
    ) -> Status: ...
    async def detach(self, name: str) -> None: ...
    async def check(self, name: str, to: str, unsafe: bool) -> tuple[list[str], list[str]]: ...
    async def migrate(self, name: str, request: MigrateRequest) -> str: ...
    async def cancel(self, name: str) -> None: ...
    async def recover(self, name: str, to: str | None) -> None: ...
    async def resolve(self, name: str, decision: Decision) -> None: ...
    def status(self, name: str) -> Status: ...
    def watch(self, name: str) -> AbstractAsyncContextManager[AsyncIterator[Status]]: ...

    # Last, because inside the class it hides the builtin from the annotations above.
    def list(self) -> list[Status]: ...


@functools.cache
def interface() -> Interface:
    """The interface file that is shipped."""
    text = resources.files("postcopyd").joinpath(f"{INTERFACE}.varlink").read_text("utf-8")
    return parse_interface(text)


class Control:
    """The methods of the interface, each named as there in small letters."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def attach(self, call: varlink.Call) -> Mapping[str, Any]:
        name, path = call.parameters["name"], call.parameters["socket"]
        if why := names.problem(name):
            raise _invalid(f"cannot attach a VM as {name!r:.80}: {why}")
        if not os.path.isabs(path) or "\0" in path:
            raise _invalid(f"cannot attach {name}: {path!r} has to be an absolute path")
        status = await self._daemon.attach(name, call.parameters["driver"], path)
        return {"status": status}

    async def detach(self, call: varlink.Call) -> None:
        await self._daemon.detach(call.parameters["name"])

    async def check(self, call: varlink.Call) -> Mapping[str, Any]:
        to = str(parse_address(call.parameters["to"]))
        name, unsafe = call.parameters["name"], call.parameters.get("unsafe", False)
        problems, warnings = await self._daemon.check(name, to, unsafe)
        return {"problems": problems, "warnings": warnings}

    async def migrate(self, call: varlink.Call) -> Mapping[str, Any]:
        given = call.parameters
        request = MigrateRequest(
            to=str(parse_address(given["to"])),
            mode=given.get("mode", "hybrid"),
            bandwidth=given.get("bandwidth"),
            precopy_passes=given.get("precopyPasses"),
            max_downtime_ms=given.get("maxDowntimeMs"),
            keep_source=given.get("keepSource", False),
            unsafe=given.get("unsafe", False),
        )
        for key in ("bandwidth", "maxDowntimeMs"):
            if given.get(key, 1) <= 0:
                raise _invalid(f"{key} {given[key]} makes no sense: leave it out for no limit")
        if given.get("precopyPasses", 0) < 0:
            raise _invalid(f"precopyPasses {given['precopyPasses']} makes no sense")
        return {"migration": await self._daemon.migrate(given["name"], request)}

    async def cancel(self, call: varlink.Call) -> None:
        await self._daemon.cancel(call.parameters["name"])

    async def recover(self, call: varlink.Call) -> None:
        to = call.parameters.get("to")
        to = str(parse_address(to)) if to is not None else None
        await self._daemon.recover(call.parameters["name"], to)

    async def resolve(self, call: varlink.Call) -> None:
        await self._daemon.resolve(call.parameters["name"], call.parameters["decision"])

    async def list(self, call: varlink.Call) -> Mapping[str, Any]:
        return {"vms": sorted(self._daemon.list(), key=lambda status: str(status["vm"]))}

    async def status(self, call: varlink.Call) -> Mapping[str, Any]:
        return {"status": self._daemon.status(call.parameters["name"])}

    async def watch(self, call: varlink.Call) -> None:
        name = call.parameters["name"]
        async with self._daemon.watch(name) as states:
            # The next state is asked for once the client has taken the last one.
            async for state in states:
                await call.send({"status": state})
        raise PostcopydError(f"{name} is not attached any more", "NoSuchVm")


def _invalid(sentence: str) -> PostcopydError:
    return PostcopydError(sentence, "InvalidRequest")


def _on_the_wire(handler: varlink.Handler, declared: Container[str]) -> varlink.Handler:
    async def handle(call: varlink.Call) -> Mapping[str, Any] | None:
        try:
            return await handler(call)
        except* (PostcopydError, OSError) as group:
            found: BaseException = group
            while isinstance(found, BaseExceptionGroup):
                found = found.exceptions[0]
        error = shortage(found) or found
        if not isinstance(error, PostcopydError):
            raise error
        # Names that only matter inside the daemon are no part of the interface.
        name = error.name if error.name in declared else "NotPossible"
        raise varlink.VarlinkError(f"{INTERFACE}.{name}", {"message": str(error)})

    return handle


def service(daemon: Daemon) -> varlink.Service:
    """The Varlink service over a daemon."""
    shipped = interface()
    control = Control(daemon)
    handlers = {
        f"{INTERFACE}.{name}": _on_the_wire(getattr(control, name.lower()), shipped.errors)
        for name in shipped.methods
    }
    streaming = [f"{INTERFACE}.Watch"]
    asking = [f"{INTERFACE}.{name}" for name in ("Check", "List", "Status", "Watch")]
    return varlink.Service(
        [shipped],
        handlers,
        product="postcopyd",
        version=__version__,
        streaming=streaming,
        asking=asking,
    )


def listen(
    path: str, group: str = GROUP, *, what: str = "control socket", option: str = "--control"
) -> socket.socket:
    """A socket that listens at `path`, mode 0660, for `group` where the host has one.

    Makes the folder, and takes the place of a socket that nobody answers on. Raises PostcopydError
    when somebody does, when something else is there, or when the folder cannot be written.
    """
    what = f"cannot open the {what} {path}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        folder = os.path.dirname(os.path.abspath(path))
        os.makedirs(folder, exist_ok=True)
        with _locked(folder):
            _make_way(path)
            # Nobody can connect between bind and listen, so owner and mode are never too wide.
            listener.bind(path)
            os.chmod(path, 0o660)
            with contextlib.suppress(KeyError, PermissionError):
                os.chown(path, -1, grp.getgrnam(group).gr_gid)
            listener.listen(varlink.MAX_CONNECTIONS)
    except PostcopydError as error:
        listener.close()
        raise PostcopydError(f"{what}: {error}") from None
    except OSError as error:
        listener.close()
        why = error.strerror or str(error)
        raise PostcopydError(f"{what}: {why}; say another with {option}") from error
    return listener


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Two daemons that start together must not both take a stale socket for theirs."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise PostcopydError(f"another process holds a lock on {folder}") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _make_way(path: str) -> None:
    try:
        entry = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(entry.st_mode):
        raise PostcopydError("something that is no socket is there; remove it or say another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        failed = probe.connect_ex(path)
    # Anything but a refusal, a full backlog for one, means that somebody owns it.
    if failed != errno.ECONNREFUSED:
        raise PostcopydError("a daemon answers there already; stop it or say another path")
    os.unlink(path)


async def serve(
    daemon: Daemon,
    listener: socket.socket,
    *,
    task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the control socket until cancelled; `listener` is from `listen()` or from systemd.

    The socket's name stays in the file system: its next owner finds that nobody answers.
    """
    await varlink.serve(listener, service(daemon), task_status=task_status)
