# SPDX-License-Identifier: Apache-2.0
"""A QEMU that its guest has taken over, or that is stuck, says what it likes or nothing. The driver
raises errors with names and sentences and within its time, and no task that others need ends."""

from __future__ import annotations

import copy
import errno
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from postcopyd.errors import PostcopydError
from postcopyd.host import procfs
from postcopyd.vmm import Region, VmmError, VmmGone, VmmProtocolError, VmmTimeout
from postcopyd.vmm.qemu import common, qmp, ram, savevm, userfaultfd
from postcopyd.vmm.qemu.blocks import Block, blocks
from postcopyd.vmm.qemu.driver import QemuVmm
from postcopyd.vmm.qemu.qmp import Qmp, QmpClosed, QmpProtocolError

VERSION = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}
GREETING = {"QMP": {"version": VERSION, "capabilities": []}}
ANSWERS: dict[str, Any] = {
    "query-cpus-fast": [{"thread-id": os.getpid(), "qom-path": "/machine/cpu"}],
    "query-status": {"running": True, "status": "running"},
    "query-migrate": {},
    "query-migrate-parameters": {"max-bandwidth": 1 << 27, "tls-creds": ""},
    "query-migrate-capabilities": [{"capability": "x-ignore-shared", "state": False}],
    "query-memdev": [{"id": "ram0", "size": 1 << 20, "share": True}],
    "x-query-ramblock": {
        "human-readable-text": "Block Name PSize Offset Used Total HVA RO\n"
        "ram0 4 KiB 0x0 0x100000 0x100000 0x1000 rw\n"
    },
    "add-fd": {"fdset-id": 2, "fd": 4},
    "qom-list": [{"name": "disk0", "type": "child<virtio-blk-pci>"}],
    "qom-get": lambda asked: PROPERTIES.get(asked["property"], "x"),
    "query-memory-devices": [{"type": "dimm", "data": {"id": "d", "size": 1, "addr": 1}}],
    "query-kvm": {"enabled": False},
    "query-block": [
        {
            "device": "",
            "qdev": "/machine/peripheral/vd0",
            "inserted": {"node-name": "n", "ro": False, "image": {"virtual-size": 1}},
        }
    ],
    "query-named-block-nodes": [
        {"node-name": "n", "drv": "nbd", "file": "nbd://h/e", "image": {"virtual-size": 1}}
    ],
    "x-debug-query-block-graph": {
        "nodes": [{"id": 1, "type": "block-driver", "name": "n"}],
        "edges": [{"parent": 7, "child": 1, "name": "root"}],
    },
    "query-jobs": [{"id": "j", "type": "backup", "status": "concluded"}],
    "query-fdsets": [{"fdset-id": 1, "fds": [{"fd": 3}]}],
    "x-query-numa": {"human-readable-text": "0 nodes\n"},
}
"""Of a QEMU that is in order; everything else is answered with an empty dictionary."""
PROPERTIES: dict[str, Any] = {
    "readonly": False,
    "smp": {"cpus": 1},
    "memory": {"size": 1},
    "feature-words": [{"cpuid-input-eax": 1, "cpuid-register": "EDX", "features": 1}],
    "free-page-reporting": False,
}
NO_ANSWER = object()


class Monitor:
    """What a QEMU says. `answers` may be changed at any time; `aside` comes before each answer."""

    def __init__(self) -> None:
        self.answers = copy.deepcopy(ANSWERS)
        self.aside = b""
        self.pretty = False
        self.heard: list[str] = []

    def line(self, message: Any) -> bytes:
        text = json.dumps(message, indent=4 if self.pretty else None)
        return text.replace("\n", "\r\n").encode() + b"\r\n"

    async def serve(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.send_all(self.line(GREETING))
            buffer = b""
            async for data in stream:
                *lines, buffer = (buffer + bytes(data)).split(b"\n")
                for line in lines:
                    asked = json.loads(line)
                    self.heard.append(asked["execute"])
                    answer = self.answers.get(asked["execute"], {})
                    if callable(answer):
                        answer = answer(asked["arguments"])
                    if answer is not NO_ANSWER:
                        said = self.line({"return": answer, "id": asked["id"]})
                        await stream.send_all(self.aside + said)


@asynccontextmanager
async def lying(folder: Path) -> AsyncIterator[tuple[Monitor, str]]:
    path, made = str(folder / "qmp"), Monitor()
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(path)
    listener.listen(8)
    async with trio.open_nursery() as nursery:
        serve = trio.serve_listeners
        nursery.start_soon(serve, made.serve, [trio.SocketListener(listener)])
        yield made, path
        nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def _no_userfaultfds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VMM is this process, and keeps what it has."""
    monkeypatch.setattr(userfaultfd, "numbers", lambda pid: [])


async def looked_at(vmm: QemuVmm) -> None:
    (await vmm.inspect("source")).close()


async def held(vmm: QemuVmm) -> None:
    async with vmm.still():
        pass


async def adopted(vmm: QemuVmm) -> None:
    shape = await vmm.inspect("destination")
    try:
        for fd in await vmm.adopt(shape):
            os.close(fd)
    finally:
        shape.close()


async def saved(vmm: QemuVmm) -> None:
    async def send(data: bytes) -> None: ...

    await vmm.save(send, lambda: None)


async def loaded(vmm: QemuVmm) -> None:
    pieces, state = trio.open_memory_channel[bytes](1)
    pieces.send_nowait(b"state")
    pieces.close()
    with state:
        await vmm.load(state)


STEPS: list[Callable[[QemuVmm], Awaitable[object]]] = [
    looked_at,
    lambda vmm: vmm.prepare(),
    held,
    saved,
    lambda vmm: vmm.rollback(),
    adopted,
    loaded,
    lambda vmm: vmm.run(),
    lambda vmm: vmm.release(),
]
NAMES = ["inspect", "prepare", "still", "save", "rollback"]
NAMES += ["adopt", "load", "run", "release"]
JUNK = [None, 7, "x", [], {}, [None], [[]], {"status": 7}, [{"type": {}}], {"status": "\u202e"}]


@pytest.mark.parametrize("look", [looked_at, lambda vmm: vmm.track(), lambda vmm: vmm.adopted()])
async def test_a_qemu_that_ends_while_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[QemuVmm], Awaitable[object]]
) -> None:
    monkeypatch.setattr(userfaultfd, "numbers", procfs.descriptors)
    process = subprocess.Popen(["true"])
    process.wait()
    async with lying(tmp_path) as (_, path):
        vmm = await QemuVmm.connect("web1", path)
        vmm.pid = process.pid
        try:
            with pytest.raises(VmmGone, match=f"process {process.pid} has ended"):
                await look(vmm)
        finally:
            await vmm.aclose()


def test_regions_that_cannot_all_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor of guest RAM is kept, above all where descriptors lack."""
    opened = os.open("/dev/null", os.O_RDONLY)

    def region(backend: ram.Backend, pid: int, mappings: list[procfs.Mapping]) -> Region:
        if backend.id == "ram1":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return Region(backend.id, 1, 4096, 0, opened, 0)

    monkeypatch.setattr(ram, "_region", region)
    backends = [
        ram.Backend(name, "memory-backend-file", 4096, False, Block(name, 4096, 4096, 0))
        for name in ("ram0", "ram1")
    ]
    with pytest.raises(OSError, match="Too many open files"):
        ram.regions(backends, os.getpid())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened)


async def test_a_qemu_that_may_not_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(pidfd: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(signal, "pidfd_send_signal", refused)
    monkeypatch.setattr(common, "QUIT_SECONDS", 0.1)
    async with lying(tmp_path) as (_, path):
        vmm = await QemuVmm.connect("web1", path)
        try:
            with pytest.raises(VmmError, match="may not kill it; kill it as root"):
                await vmm.end()
        finally:
            await vmm.aclose()


@pytest.mark.parametrize("command", [*ANSWERS, "getfd", "stop", "cont", "migrate"])
async def test_answers_of_other_kinds(tmp_path: Path, command: str) -> None:
    """Whatever one question is answered with, each step ends well, or by an error with its name."""
    async with lying(tmp_path) as (monitor, path):
        for junk in JUNK if command in ANSWERS else JUNK[:2]:
            vmm = await QemuVmm.connect("web1", path)
            monitor.answers[command] = junk
            try:
                for step in STEPS:
                    # An event that is waited for never comes; what was asked has been answered.
                    with trio.move_on_after(0.01 if step in (saved, loaded) else 5) as patience:
                        with suppress(PostcopydError):
                            await step(vmm)
                    assert step in (saved, loaded) or not patience.cancelled_caught, step
            finally:
                monitor.answers = dict(ANSWERS)
                await vmm.aclose()


@pytest.mark.parametrize("number", [[], {}, None, True, 1.0, "1", [1], -1, 1 << 70], ids=json.dumps)
async def test_answers_with_other_numbers(tmp_path: Path, number: Any) -> None:
    """They are nobody's; who reads them, for whomever, goes on."""
    async with lying(tmp_path) as (monitor, path):
        vmm = await QemuVmm.connect("web1", path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vmm.gone)
            monitor.aside = monitor.line({"return": "nobody's", "id": number})
            await vmm.prepare()
            assert vmm.before == "running"
            nursery.cancel_scope.cancel()
        await vmm.aclose()


@pytest.mark.parametrize(
    "aside",
    [
        b'{"event": []}\r\n',
        b'{"event": "MIGRATION", "data": [1]}\r\n',
        b'{"event": "MIGRATION", "data": {"status": {}}}\r\n',
        b'{"event": "STOP", "data": null}\r\n',
        b'{"error": 7, "id": 99999}\r\n',
        b'{"QMP": 5}\r\n',
        b"{}\r\n\r\n",
    ],
    ids=repr,
)
async def test_events_of_other_kinds(tmp_path: Path, aside: bytes) -> None:
    async with lying(tmp_path) as (monitor, path):
        vmm = await QemuVmm.connect("web1", path)
        monitor.aside = aside
        for step in STEPS:
            with trio.move_on_after(0.2 if step in (saved, loaded) else 5):
                with suppress(PostcopydError):
                    await step(vmm)
        await vmm.aclose()


async def test_more_events_than_are_taken(tmp_path: Path) -> None:
    """Neither their number nor their size fills this host's memory; who waits is told."""
    for aside in (
        b'{"event": "RESUME"}\r\n' * 2000,
        b'{"event": "RESUME", "data": {"text": "%s"}}\r\n' % (b"x" * 200_000) * 2,
    ):
        folder = tmp_path / str(len(aside))
        folder.mkdir()
        async with lying(folder) as (monitor, path):
            client = Qmp(path)
            await client.open()
            with client.events("RESUME"):
                monitor.aside = aside
                with pytest.raises(PostcopydError, match="too many events"):
                    for _ in range(3):
                        await client.execute("query-status")
            client.close()


async def test_text_that_is_none(tmp_path: Path) -> None:
    """Half a character would break whoever writes it down later."""
    async with lying(tmp_path) as (monitor, path):
        vmm = await QemuVmm.connect("web1", path)
        monitor.answers["query-status"] = {"running": True, "status": "\ud800"}
        with pytest.raises(VmmProtocolError):
            await vmm.prepare()
        await vmm.aclose()


async def test_a_greeting_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for greeting in ({"QMP": []}, {"QMP": {"version": {"qemu": {"major": "10"}}}}):
        monkeypatch.setitem(globals(), "GREETING", greeting)
        folder = tmp_path / str(len(str(greeting)))
        folder.mkdir()
        async with lying(folder) as (_, path):
            with pytest.raises(QmpProtocolError, match="greeting"):
                await Qmp(path).open()


async def test_a_pretty_monitor(tmp_path: Path) -> None:
    """`-qmp-pretty` writes a message over many lines."""
    async with lying(tmp_path) as (monitor, path):
        monitor.pretty = True
        monitor.aside = monitor.line({"event": "RESUME", "data": {"a": {}, "b": [{}, "}\n{"]}})
        vmm = await QemuVmm.connect("web1", path)
        assert vmm._qmp.version == (10, 0, 2)
        await looked_at(vmm)
        await vmm.prepare()
        await vmm.aclose()


async def test_a_message_over_many_lines_has_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "MAX_MESSAGE_BYTES", 100_000)
    async with lying(tmp_path) as (monitor, path):
        client = Qmp(path)
        await client.open()
        monitor.aside = b"{\r\n" + b"    1,\r\n" * 20_000
        with pytest.raises(QmpProtocolError, match="of over"):
            await client.execute("query-status")
        client.close()


async def test_a_thread_of_another_process(tmp_path: Path) -> None:
    """Which process a QEMU is, whose memory is written to and who may be ended, is not for it to
    say: one that names another's thread is refused."""
    async with lying(tmp_path) as (monitor, path):
        for thread in (1, os.getppid(), 0, -1, 1 << 40):
            monitor.answers["query-cpus-fast"] = [{"thread-id": thread}]
            with pytest.raises(VmmError, match=f"Process {os.getpid()} .* thread {thread}:"):
                await QemuVmm.connect("web1", path)
        monitor.answers["query-cpus-fast"] = []  # it says nothing, and is what it is
        vmm = await QemuVmm.connect("web1", path)
        assert vmm.pid == os.getpid()
        await vmm.aclose()


async def test_another_process_at_the_socket(tmp_path: Path) -> None:
    """A daemon that is started again tells nothing to a QEMU that has come to have the socket of
    the one that it knows."""
    async with lying(tmp_path) as (monitor, path):
        vmm = await QemuVmm.known("web1", path, os.getppid())
        with pytest.raises(VmmGone, match=f"Process {os.getpid()} answers"):
            await vmm.rollback()
        assert not monitor.heard
        await vmm.aclose()


# ---- a QEMU that is stuck


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
async def test_a_stuck_qemu_is_given_up(
    step: Callable[[QemuVmm], Awaitable[object]],
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Each step ends within its time, `run` aside: it may wait for a page of the guest's."""
    async with lying(tmp_path) as (monitor, path):
        vmm = await QemuVmm.connect("web1", path)
        for command in [*ANSWERS, "migrate-set-capabilities", "migrate-set-parameters", "getfd",
                        "stop", "migrate", "migrate-incoming", "cont"]:  # fmt: skip
            monitor.answers[command] = NO_ANSWER
        if NAMES[STEPS.index(step)] == "run":
            with trio.move_on_after(1000) as patience:
                await step(vmm)
            assert patience.cancelled_caught
        else:
            with trio.fail_after(60), pytest.raises(VmmTimeout, match="did not answer"):
                await step(vmm)
        await vmm.aclose()


async def test_order_of_a_save(tmp_path: Path) -> None:
    """QEMU would end in the save of a guest that cannot be moved, or that others move. So the guest
    is stopped under the guard first, and it is looked for both once nothing can begin any more."""
    async with lying(tmp_path) as (monitor, path):
        vmm = await QemuVmm.connect("web1", path)
        await vmm.prepare()
        monitor.heard.clear()
        monitor.answers["query-migrate"] = {"blocked-reasons": ["it has an nvme"]}
        with pytest.raises(VmmError, match="it has an nvme"):
            await saved(vmm)
        await vmm.aclose()
    last = monitor.heard[-4:]
    assert last == ["migrate-set-parameters", "stop", "query-migrate", "x-query-ramblock"]
    assert "xen-save-devices-state" not in monitor.heard


async def test_what_stays_behind(tmp_path: Path) -> None:
    """It is said and forbids nothing: bitmaps with a name that no image has, clients of SPICE."""
    async with lying(tmp_path) as (monitor, path):
        vmm = await QemuVmm.connect("web1", path)
        bitmaps = [{"name": name, "persistent": name == "kept"} for name in ("kept", "lost", "")]
        monitor.answers["query-named-block-nodes"][0]["dirty-bitmaps"] = bitmaps
        monitor.answers["query-spice"] = {"enabled": True, "channels": [{"host": "h"}]}
        shape = await vmm.inspect("source")
        shape.close()
        await vmm.aclose()
    bitmap, spice = shape.stays
    assert "'lost' of block node 'n'" in bitmap
    assert "SPICE" in spice


async def test_what_forbids_a_move_as_the_guest_is_saved(tmp_path: Path) -> None:
    """It came between the look and the save, which QEMU has survived: the guest goes on here."""
    async with lying(tmp_path) as (monitor, path):
        vmm = await QemuVmm.connect("web1", path)

        def save(asked: object) -> object:
            monitor.answers["query-migrate"] = {"blocked-reasons": ["a folder is mounted"]}
            assert vmm._file is not None
            os.write(vmm._file, savevm.BEGIN + bytes([savevm.EOF]))
            return {}

        monitor.answers["xen-save-devices-state"] = save
        monitor.aside = monitor.line({"event": "STOP"})
        await vmm.outline()
        await saved(vmm)
        with pytest.raises(VmmError, match="a folder is mounted"):
            await vmm.outline()
        await vmm.aclose()


async def test_who_waits_for_a_greeting_keeps_nobody_waiting(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The task that reads the monitor of a QEMU that was stuck when the daemon started may wait for
    ever, and others give up in their time."""
    path = str(tmp_path / "qmp")
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(path)
    listener.listen(8)  # and takes nobody
    with listener:
        vmm = await QemuVmm.known("web1", path, os.getpid())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vmm.gone)
            await trio.testing.wait_all_tasks_blocked(0.01)
            with trio.fail_after(30), pytest.raises(PostcopydError, match="no greeting"):
                await vmm.release()
            nursery.cancel_scope.cancel()
        await vmm.aclose()


async def test_closed_while_it_is_read(tmp_path: Path) -> None:
    """`gone` reads the monitor when `aclose` comes; nothing is raised into the daemon's task."""
    async with lying(tmp_path) as (_, path):
        vmm = await QemuVmm.connect("web1", path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vmm.gone)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await vmm.aclose()
            await trio.testing.wait_all_tasks_blocked(0.01)
            with pytest.raises(QmpClosed):
                await vmm.prepare()
            nursery.cancel_scope.cancel()


async def test_firmware_that_leaves_one_of_its_places(tmp_path: Path) -> None:
    """Before 8.0 memory is found by where the guest has it. The firmware of a PC is in two places,
    and puts RAM over one of them between two of our questions."""

    def human(asked: dict[str, str]) -> str:
        if asked["command-line"] == "info mtree -f":
            return (
                'FlatView #1\n AS "memory", root: system\n'
                "  00000000000e0000-00000000000fffff (prio 1, rom): pc.bios @0000000000020000\n"
                "  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios\n"
            )
        low = asked["command-line"].endswith(" 0xe0000")
        name, address = ("pc.ram", 0x7FE0E0000) if low else ("pc.bios", 0x7FFFC0000)
        return f"Host virtual address for 0x0 ({name}) is {address:#x}\n"

    async with lying(tmp_path) as (monitor, path):
        monitor.answers["human-monitor-command"] = human
        monitor.answers["x-query-ramblock"] = {
            "human-readable-text": "Block Name PSize Offset Used Total\n"
            "pc.bios 4 KiB 0x0 0x40000 0x40000\n"
        }
        asking = Qmp(path)
        try:
            assert await blocks(asking) == [Block("pc.bios", 0x40000, 0x40000, 0x7FFFC0000)]
        finally:
            asking.close()
