# SPDX-License-Identifier: Apache-2.0
"""The control socket: the methods of `io.postcopyd` bound to the daemon.

Owns what a request means before the daemon sees it (defaults, addresses, names), and how the
daemon's errors look on the wire. Must not know how a migration works, nor how Varlink frames its
messages.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import AsyncIterator, Container, Mapping
from contextlib import AbstractAsyncContextManager
from importlib import resources
from typing import Any, Protocol

import trio
from msgspec import to_builtins

from postcopyd import __version__, names
from postcopyd.config.options import parse_address
from postcopyd.errors import PostcopydError, shortage
from postcopyd.model import Checked, Decision, DriverName, Found, MigrateRequest, Status
from postcopyd.varlink import server
from postcopyd.varlink.idl import Interface, parse_interface

INTERFACE = "io.postcopyd"


class Daemon(Protocol):
    """What the control socket needs of the daemon. All methods may raise PostcopydError.

    From the moment that `migrate` returns an id, status and watch show that migration. `watch`
    gives the state at the time when the next one is asked for: nothing is queued for a slow reader,
    which misses the states between. It ends when the VM is let go, if at all.
    """

    async def attach(
        self, name: str, driver: DriverName, socket: str
    ) -> tuple[Status, Found | None]: ...
    async def detach(self, name: str) -> None: ...
    async def check(self, name: str, to: str, unsafe: bool, xml: str) -> Checked: ...
    async def migrate(self, name: str, request: MigrateRequest) -> str: ...
    async def cancel(self, name: str) -> None: ...
    async def recover(self, name: str, to: str | None) -> None: ...
    async def resolve(self, name: str, decision: Decision) -> None: ...
    def status(self, name: str) -> Status: ...
    async def unattached(self) -> list[Status]: ...
    def watch(self, name: str) -> AbstractAsyncContextManager[AsyncIterator[Status]]: ...

    # Last, because inside the class it hides the builtin from the annotations above.
    def list(self) -> list[Status]: ...


@functools.cache
def interface() -> Interface:
    """The interface file that is shipped."""
    text = resources.files("postcopyd.control").joinpath(f"{INTERFACE}.varlink").read_text("utf-8")
    return parse_interface(text)


class Control:
    """The methods of the interface, with their names in small letters."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def attach(self, call: server.Call) -> Mapping[str, Any]:
        name, driver = call.parameters["name"], call.parameters["driver"]
        path = call.parameters.get("socket", "")
        if why := names.problem(name):
            raise _invalid(f"cannot attach a VM as {name!r:.80}: {why}")
        if driver == "libvirt" and path:
            raise _invalid(f"cannot attach {name}: a domain of libvirt has no socket to name")
        if driver != "libvirt" and (not os.path.isabs(path) or "\0" in path):
            raise _invalid(f"cannot attach {name}: {path!r} has to be an absolute path")
        status, found = await self._daemon.attach(name, driver, path)
        return {"status": to_builtins(status), **({"found": to_builtins(found)} if found else {})}

    async def detach(self, call: server.Call) -> None:
        await self._daemon.detach(call.parameters["name"])

    async def check(self, call: server.Call) -> Mapping[str, Any]:
        to = str(parse_address(call.parameters["to"]))
        given = call.parameters
        unsafe, xml = given.get("unsafe", False), given.get("xml", "")
        checked: Mapping[str, Any] = to_builtins(
            await self._daemon.check(given["name"], to, unsafe, xml)
        )
        return checked

    async def migrate(self, call: server.Call) -> Mapping[str, Any]:
        given = call.parameters
        request = MigrateRequest(
            to=str(parse_address(given["to"])),
            mode=given.get("mode", "hybrid"),
            bandwidth=given.get("bandwidth"),
            precopy_passes=given.get("precopyPasses"),
            max_downtime_ms=given.get("maxDowntimeMs"),
            keep_source=given.get("keepSource", False),
            unsafe=given.get("unsafe", False),
            persistent=given.get("persistent", False),
            undefine_source=given.get("undefineSource", False),
            xml=given.get("xml", ""),
        )
        for key in ("bandwidth", "maxDowntimeMs"):
            if given.get(key, 1) <= 0:
                raise _invalid(f"{key} {given[key]} makes no sense: leave it out for no limit")
        if given.get("precopyPasses", 0) < 0:
            raise _invalid(f"precopyPasses {given['precopyPasses']} makes no sense")
        return {"migration": await self._daemon.migrate(given["name"], request)}

    async def cancel(self, call: server.Call) -> None:
        await self._daemon.cancel(call.parameters["name"])

    async def recover(self, call: server.Call) -> None:
        to = call.parameters.get("to")
        to = str(parse_address(to)) if to is not None else None
        await self._daemon.recover(call.parameters["name"], to)

    async def resolve(self, call: server.Call) -> None:
        await self._daemon.resolve(call.parameters["name"], call.parameters["decision"])

    async def list(self, call: server.Call) -> Mapping[str, Any]:
        more = await self._daemon.unattached() if call.parameters.get("domains") else []
        return {"vms": to_builtins([*self._daemon.list(), *more])}

    async def status(self, call: server.Call) -> Mapping[str, Any]:
        name = call.parameters["name"]
        try:
            status = self._daemon.status(name)
        except PostcopydError:
            found = [one for one in await self._daemon.unattached() if one.vm == name]
            if not found:
                raise
            (status,) = found
        return {"status": to_builtins(status)}

    async def watch(self, call: server.Call) -> None:
        name = call.parameters["name"]
        async with self._daemon.watch(name) as states:
            # The next state is read once the client has taken the last one.
            async for state in states:
                await call.send({"status": to_builtins(state)})
        raise PostcopydError(f"{name} is not attached any more", "NoSuchVm")


def _invalid(sentence: str) -> PostcopydError:
    return PostcopydError(sentence, "InvalidRequest")


def _on_the_wire(handler: server.Handler, declared: Container[str]) -> server.Handler:
    async def handle(call: server.Call) -> Mapping[str, Any] | None:
        try:
            return await handler(call)
        except* (PostcopydError, OSError) as group:
            found: BaseException = group
            while isinstance(found, BaseExceptionGroup):
                found = found.exceptions[0]
        error = shortage(found) or found
        if not isinstance(error, PostcopydError):
            raise error
        # Names of errors that only matter inside the daemon are not in the interface.
        name = error.name if error.name in declared else "NotPossible"
        raise server.VarlinkError(f"{INTERFACE}.{name}", {"message": str(error)})

    return handle


def service(daemon: Daemon) -> server.Service:
    """The Varlink service over a daemon."""
    shipped = interface()
    control = Control(daemon)
    handlers = {
        f"{INTERFACE}.{name}": _on_the_wire(getattr(control, name.lower()), shipped.errors)
        for name in shipped.methods
    }
    streaming = [f"{INTERFACE}.Watch"]
    asking = [f"{INTERFACE}.{name}" for name in ("Check", "List", "Status", "Watch")]
    return server.Service(
        [shipped],
        handlers,
        product="postcopyd",
        version=__version__,
        streaming=streaming,
        asking=asking,
    )


async def serve(
    daemon: Daemon,
    listener: socket.socket,
    *,
    task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves the control socket until cancelled; `listener` is from socket_file.py or systemd.

    The socket's name stays in the file system: its next owner finds that nobody answers.
    """
    await server.serve(listener, service(daemon), task_status=task_status)
