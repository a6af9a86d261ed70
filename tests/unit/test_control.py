# SPDX-License-Identifier: Apache-2.0
"""The control socket: every method against a daemon without guests, and the socket itself."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import grp
import json
import os
import re
import socket
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from fake_daemon import FAULTS, FOUND_JSON, RESULT, FakeDaemon
from needs import package

from postcopyd.control import methods
from postcopyd.errors import PostcopydError
from postcopyd.model import MigrateRequest
from postcopyd.net import socket_file
from postcopyd.varlink import client as varlink_client

NAMES = ["NoSuchVm", "AlreadyAttached", "Busy", "NotMigrating", "AfterGrant", "Refused"]
NAMES += ["PeerUnreachable", "InvalidRequest", "NotPossible", "Internal"]


@contextlib.asynccontextmanager
async def serving(daemon: FakeDaemon, folder: Path) -> AsyncIterator[str]:
    path = str(folder / "control")
    async with trio.open_nursery() as nursery:
        await nursery.start(methods.serve, daemon, await socket_file.listen(path))
        try:
            yield path
        finally:
            nursery.cancel_scope.cancel()


async def ask(path: str, method: str, **parameters: Any) -> dict[str, Any]:
    def call() -> dict[str, Any]:
        with varlink_client.Client(path) as client:
            return client.call(f"io.postcopyd.{method}", **parameters)

    with trio.fail_after(10):
        return await trio.to_thread.run_sync(call)


async def refusal(path: str, method: str, **parameters: Any) -> tuple[str, dict[str, Any]]:
    with pytest.raises(varlink_client.ErrorReply) as caught:
        await ask(path, method, **parameters)
    return caught.value.name, caught.value.parameters


# The interface file.


def test_everything_in_the_interface_is_described() -> None:
    """Every method, type, error and field of the interface has a sentence in front of it."""
    shipped = methods.interface()
    assert [name for name, doc in shipped.docs.items() if not doc.endswith(".")] == []
    structs = {**shipped.types, **shipped.errors}
    for name, method in shipped.methods.items():
        structs |= {f"{name} in": method.input, f"{name} out": method.output}
    silent = [
        f"{name}.{field}"
        for name, struct in structs.items()
        for field in struct.fields
        if not struct.docs[field].endswith(".")
    ]
    assert silent == []


def test_the_errors_are_declared() -> None:
    """Each name that the daemon's errors use is declared with a sentence as its parameter."""
    errors = methods.interface().errors
    assert sorted(errors) == sorted(NAMES)
    assert {tuple(struct.fields) for struct in errors.values()} == {("message",)}


def test_the_documented_objects_match_the_interface() -> None:
    """A status with a result as they are promised to scripts is what the interface declares."""
    shipped = methods.interface()
    daemon = FakeDaemon("web1")
    daemon.put("web1", result=RESULT, faults=FAULTS, mode="postcopy", elapsedMs=1.5)
    for name in ("Status", "Watch", "Attach"):
        more = {"found": FOUND_JSON} if name == "Attach" else {}
        shipped.check(shipped.methods[name].output, {"status": daemon.vms["web1"], **more})
    checked = {"problems": [], "warnings": [], "found": FOUND_JSON}
    shipped.check(shipped.methods["Check"].output, checked)


def test_another_parser_reads_the_interface() -> None:
    """The parser of the `varlink` package finds the same members."""
    varlink = package("varlink")
    shipped = methods.interface()
    theirs = varlink.Interface(shipped.text).members
    assert list(theirs) == [name for name in shipped.docs if name]


# The methods.


@pytest.mark.trio
async def test_each_method_reaches_the_daemon(tmp_path: Path) -> None:
    """Parameters arrive in the daemon's terms, addresses with their port, defaults filled in."""
    daemon = FakeDaemon("web1")
    async with serving(daemon, tmp_path) as path:
        reply = await ask(path, "Attach", name="db", driver="qemu", socket="/run/db.qmp")
        assert reply["status"]["vm"] == "db"
        await ask(path, "Attach", name="web2", driver="libvirt")
        assert await ask(path, "Check", name="db", to="host2") == {
            "problems": [],
            "warnings": [],
            "found": FOUND_JSON,
        }
        assert await ask(path, "Migrate", name="db", to="[::1]:7") == {"migration": "m1"}
        more = {"mode": "postcopy", "bandwidth": 5, "precopyPasses": 0, "maxDowntimeMs": 30}
        await ask(path, "Migrate", name="web1", to="host2", keepSource=True, **more)
        domain = {"persistent": True, "undefineSource": True, "xml": "<domain/>"}
        await ask(path, "Migrate", name="web1", to="host2", **domain)
        await ask(path, "Check", name="web1", to="host2", xml="<domain/>")
        await ask(path, "Cancel", name="web1")
        await ask(path, "Recover", name="web1")
        await ask(path, "Recover", name="web1", to="host3:1")
        await ask(path, "Resolve", name="web1", decision="poison")
        await ask(path, "Detach", name="db")
        reply = await ask(path, "Status", name="web1")
        assert (reply["status"]["vm"], reply["status"]["phase"]) == ("web1", "precopy")
        assert [status["vm"] for status in (await ask(path, "List"))["vms"]] == ["web1", "web2"]
    assert daemon.asked == [
        ("attach", "db", "qemu", "/run/db.qmp"),
        ("attach", "web2", "libvirt", ""),
        ("check", "db", "host2:16525"),
        ("migrate", "db", MigrateRequest(to="[::1]:7")),
        ("migrate", "web1", MigrateRequest("host2:16525", "postcopy", 5, 0, 30, True)),
        (
            "migrate",
            "web1",
            MigrateRequest("host2:16525", persistent=True, undefine_source=True, xml="<domain/>"),
        ),
        ("check", "web1", "host2:16525", "<domain/>"),
        ("cancel", "web1"),
        ("recover", "web1", None),
        ("recover", "web1", "host3:1"),
        ("resolve", "web1", "poison"),
        ("detach", "db"),
    ]


@pytest.mark.trio
@pytest.mark.parametrize("name", NAMES)
async def test_the_daemons_errors_keep_their_name(tmp_path: Path, name: str) -> None:
    """An error of the daemon arrives with its name and its sentence, from a stream as well."""
    daemon = FakeDaemon("web1")
    daemon.fail = PostcopydError("cannot do it: say why", name)
    async with serving(daemon, tmp_path) as path:
        expected = (f"io.postcopyd.{name}", {"message": "cannot do it: say why"})
        assert await refusal(path, "Cancel", name="web1") == expected

        def watch() -> None:
            with varlink_client.Client(path) as client:
                next(client.stream("io.postcopyd.Watch", name="web1"))

        with pytest.raises(varlink_client.ErrorReply) as caught:
            await trio.to_thread.run_sync(watch)
        assert (caught.value.name, caught.value.parameters) == expected


@pytest.mark.trio
@pytest.mark.parametrize(
    ("method", "parameters", "says"),
    [
        ("Attach", {"name": "../x", "driver": "qemu", "socket": "/s"}, "'../x'"),
        ("Attach", {"name": "-x", "driver": "qemu", "socket": "/s"}, "'-x'"),
        ("Attach", {"name": "", "driver": "qemu", "socket": "/s"}, "name"),
        ("Attach", {"name": "x" * 256, "driver": "qemu", "socket": "/s"}, "255 bytes"),
        ("Attach", {"name": "x\n", "driver": "qemu", "socket": "/s"}, "invisible characters"),
        ("Attach", {"name": "..", "driver": "qemu", "socket": "/s"}, "path"),
        ("Attach", {"name": "x", "driver": "qemu", "socket": "s"}, "absolute"),
        ("Attach", {"name": "x", "driver": "process"}, "absolute"),
        ("Attach", {"name": "x", "driver": "libvirt", "socket": "/s"}, "no socket"),
        ("Migrate", {"name": "x", "to": "::1"}, "brackets"),
        ("Migrate", {"name": "x", "to": "h:0"}, "HOST:PORT"),
        ("Migrate", {"name": "x", "to": "h", "bandwidth": 0}, "bandwidth"),
        ("Migrate", {"name": "x", "to": "h", "maxDowntimeMs": -1}, "maxDowntimeMs"),
        ("Migrate", {"name": "x", "to": "h", "precopyPasses": -1}, "precopyPasses"),
        ("Check", {"name": "x", "to": ""}, "HOST"),
        ("Recover", {"name": "x", "to": "h:99999"}, "HOST:PORT"),
    ],
)
async def test_requests_without_sense_never_reach_the_daemon(
    tmp_path: Path, method: str, parameters: dict[str, Any], says: str
) -> None:
    """A well-formed request that makes no sense is refused with a sentence on what to say."""
    daemon = FakeDaemon("x")
    async with serving(daemon, tmp_path) as path:
        name, given = await refusal(path, method, **parameters)
        assert name == "io.postcopyd.InvalidRequest"
        assert says in given["message"]
    assert daemon.asked == []


@pytest.mark.trio
async def test_a_client_that_goes_changes_nothing(tmp_path: Path) -> None:
    """An attach goes on to its end when the client that asked for it disconnects."""
    daemon = FakeDaemon()
    daemon.hold = trio.Event()
    async with serving(daemon, tmp_path) as path:
        stream = await trio.open_unix_socket(path)
        call = {"name": "web1", "driver": "process", "socket": "/s"}
        message = {"method": "io.postcopyd.Attach", "parameters": call}
        await stream.send_all(json.dumps(message).encode() + b"\0")
        await trio.testing.wait_all_tasks_blocked()
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        daemon.hold.set()
        await trio.testing.wait_all_tasks_blocked()
        assert daemon.asked == [("attach", "web1", "process", "/s")]


WATCH = b'{"method":"io.postcopyd.Watch","more":true,"parameters":{"name":"web1"}}\0'


@pytest.mark.trio
async def test_watch_gives_the_state_and_then_each_change(tmp_path: Path) -> None:
    """A watcher that reads gets the present state first and then every change, until it goes."""
    daemon = FakeDaemon("web1")
    async with serving(daemon, tmp_path) as path:
        stream = await trio.open_unix_socket(path)
        await stream.send_all(WATCH)
        for remaining in range(3):
            with trio.fail_after(5):
                data = await stream.receive_some()
            reply = json.loads(data[:-1])
            assert reply["continues"] is True
            assert reply["parameters"]["status"]["remaining"] == remaining
            daemon.put("web1", remaining=remaining + 1)
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert daemon.watchers == 0


@pytest.mark.trio
async def test_a_slow_watcher_gets_the_newest_state(tmp_path: Path) -> None:
    """A watcher that reads nothing is owed what the socket held and the newest state, no more."""
    daemon = FakeDaemon("web1")
    async with serving(daemon, tmp_path) as path:
        stream = await trio.open_unix_socket(path)
        await stream.send_all(WATCH)
        with trio.fail_after(5):
            await daemon.watched.wait()
        for remaining in range(2000):
            daemon.put("web1", remaining=remaining, message="x" * 8192)
            await trio.testing.wait_all_tasks_blocked()
        seen, buffer = [], b""
        with trio.fail_after(5):
            while not seen or seen[-1] < 1999:
                buffer += await stream.receive_some()
                *whole, buffer = buffer.split(b"\0")
                seen += [json.loads(m)["parameters"]["status"]["remaining"] for m in whole]
        assert seen == sorted(seen)
        assert len(seen) < 200
        await stream.aclose()


@pytest.mark.trio
async def test_watch_ends_when_the_vm_is_let_go(tmp_path: Path) -> None:
    """A watcher of a VM that the daemon lets go of is told so."""
    daemon = FakeDaemon("web1")
    async with serving(daemon, tmp_path) as path:
        stream = await trio.open_unix_socket(path)
        await stream.send_all(WATCH)
        with trio.fail_after(5):
            await stream.receive_some()
            await daemon.detach("web1")
            reply = json.loads((await stream.receive_some())[:-1])
        assert reply["error"] == "io.postcopyd.NoSuchVm"
        assert "web1" in reply["parameters"]["message"]
        await stream.aclose()


@pytest.mark.trio
async def test_errors_outside_the_interface_become_one_inside(tmp_path: Path) -> None:
    """An error with a name of the daemon's own arrives as NotPossible, with its sentence."""
    daemon = FakeDaemon("web1")
    daemon.fail = PostcopydError("QEMU is gone: start it", "VmmGone")
    async with serving(daemon, tmp_path) as path:
        expected = ("io.postcopyd.NotPossible", {"message": "QEMU is gone: start it"})
        assert await refusal(path, "Cancel", name="web1") == expected


# Other people's clients.


@pytest.mark.trio
async def test_the_varlink_package_drives_it(tmp_path: Path) -> None:
    """The `varlink` package introspects, calls, watches and gets errors."""
    varlink = package("varlink")
    daemon = FakeDaemon("web1")
    async with serving(daemon, tmp_path) as path:

        def drive() -> None:
            with varlink.Client.new_with_address(f"unix:{path}") as client:
                assert "io.postcopyd" in client.get_interfaces()
                with client.open("io.postcopyd", namespaced=False) as vms:
                    assert vms.Migrate("web1", "host2") == {"migration": "m1"}
                    with pytest.raises(varlink.VarlinkError) as caught:
                        vms.Status("none")
                    assert caught.value.error() == "io.postcopyd.NoSuchVm"
                with client.open("io.postcopyd", namespaced=False) as vms:
                    state = next(vms.Watch("web1", _more=True))
                    assert state["status"]["migration"] == "m1"

        with trio.fail_after(20):
            await trio.to_thread.run_sync(drive)


@pytest.mark.trio
async def test_the_asyncvarlink_package_drives_it(tmp_path: Path) -> None:
    """The `asyncvarlink` package pipelines calls and watches."""
    asyncvarlink = package("asyncvarlink")
    daemon = FakeDaemon("web1")

    async def drive(path: str) -> None:
        call = asyncvarlink.VarlinkMethodCall
        transport, protocol = await asyncvarlink.connect_unix_varlink(
            asyncvarlink.VarlinkClientProtocol, path
        )
        try:
            check = call("io.postcopyd.Check", {"name": "web1", "to": "host2"})
            status = call("io.postcopyd.Status", {"name": "web1"})
            replies = await asyncio.gather(protocol.call(check), protocol.call(status))
            assert replies[0][0].parameters["problems"] == []
            assert replies[1][0].parameters["status"]["vm"] == "web1"
            watch = call("io.postcopyd.Watch", {"name": "web1"}, more=True)
            follow = protocol.call_more(watch)
            reply, _ = await anext(follow)
            assert (reply.continues, reply.parameters["status"]["vm"]) == (True, "web1")
        finally:
            transport.close()
            await asyncio.sleep(0)

    async with serving(daemon, tmp_path) as path:
        failures: list[BaseException] = []

        def run() -> None:
            try:
                asyncio.run(drive(path))
            except BaseException as error:
                failures.append(error)

        # A thread of its own: asyncio and trio must not see each other.
        thread = threading.Thread(target=run)
        thread.start()
        with trio.fail_after(20):
            await trio.to_thread.run_sync(thread.join)
        if failures:
            raise failures[0]


# The socket.


async def test_the_socket_is_for_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is made, the mode is 0660, the group is set where it exists."""
    path = tmp_path / "a" / "b" / "control"
    # Root may give it to any group, others to their own only.
    wanted = 1 if os.geteuid() == 0 else os.getegid()
    with await socket_file.listen(str(path), grp.getgrgid(wanted).gr_name):
        entry = path.stat()
        assert stat.S_IMODE(entry.st_mode) == 0o660
        assert entry.st_gid == wanted
    path.unlink()
    with await socket_file.listen(str(path), "no-such-group"):
        assert path.stat().st_gid == os.getegid()


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    """A socket that nobody listens on any more is no obstacle."""
    path = str(tmp_path / "control")
    (await socket_file.listen(path)).close()
    with await socket_file.listen(path), varlink_client.Client(path):
        pass


async def test_a_live_socket_is_left_alone(tmp_path: Path) -> None:
    """Where another daemon listens the second one is refused, and the first goes on."""
    path = str(tmp_path / "control")
    with await socket_file.listen(path), varlink_client.Client(path):
        with pytest.raises(PostcopydError, match=re.escape(path) + ".*answers there already"):
            await socket_file.listen(path)
        varlink_client.Client(path).close()


async def test_a_full_socket_is_live(tmp_path: Path) -> None:
    """A daemon too busy to accept is not taken for a dead one."""
    path = str(tmp_path / "control")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(path)
        listener.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect_ex(path)
        with pytest.raises(PostcopydError, match="answers there already"):
            await socket_file.listen(path)


async def test_a_file_is_not_taken_for_a_socket(tmp_path: Path) -> None:
    """What is not a socket is never removed."""
    path = tmp_path / "control"
    path.write_text("precious")
    with pytest.raises(PostcopydError, match="not a socket"):
        await socket_file.listen(str(path))
    assert path.read_text() == "precious"


@pytest.mark.parametrize("path", ["/proc/x/control", "/" + "x" * 200])
async def test_an_impossible_path_is_refused(path: str) -> None:
    """A path that cannot be made is refused with a sentence that names it and the way out."""
    with pytest.raises(PostcopydError, match=f"{path}.*--control"):
        await socket_file.listen(path)


async def test_one_of_many_gets_a_stale_socket(tmp_path: Path) -> None:
    """Of daemons that start at the same moment exactly one takes over a stale socket."""
    path = str(tmp_path / "control")
    (await socket_file.listen(path)).close()
    won: list[socket.socket] = []
    refused: list[PostcopydError] = []
    start = threading.Barrier(8)

    def begin() -> None:
        start.wait()
        try:
            won.append(trio.run(socket_file.listen, path))
        except PostcopydError as error:
            refused.append(error)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 7)
    won[0].close()


async def test_a_socket_is_replaced_under_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between finding a socket stale and listening on its successor no other daemon may look."""
    held: list[bool] = []
    make_way = socket_file._make_way

    def look(path: str) -> None:
        folder = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.append(False)
        except BlockingIOError:
            held.append(True)
        finally:
            os.close(folder)
        make_way(path)

    monkeypatch.setattr(socket_file, "_make_way", look)
    (await socket_file.listen(str(tmp_path / "control"))).close()
    assert held == [True]


async def test_waiting_for_the_lock_holds_nobody_up(tmp_path: Path, autojump_clock: Any) -> None:
    """A daemon that waits for its turn in a folder serves its guests meanwhile; one that waits in
    vain says for whom, and what to do."""
    path, folder = str(tmp_path / "control"), os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(PostcopydError, match=r"keeps a lock on .*`lslocks`.*name another path"):
        await socket_file.listen(path)

    async def listens() -> None:
        with await socket_file.listen(path):
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listens)
        await trio.sleep(1)
        assert not os.path.exists(path)
        os.close(folder)
        await trio.sleep(1)
        assert os.path.exists(path)


@pytest.mark.trio
async def test_a_socket_from_outside_is_served(tmp_path: Path) -> None:
    """A listening socket that another program made, as systemd does, serves as well."""
    daemon = FakeDaemon("web1")
    path = str(tmp_path / "activated")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    async with trio.open_nursery() as nursery:
        await nursery.start(methods.serve, daemon, listener)
        assert len((await ask(path, "List"))["vms"]) == 1
        nursery.cancel_scope.cancel()
