# SPDX-License-Identifier: Apache-2.0
"""What the driver for libvirt's domains knows without a libvirt."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from postcopyd import protocol as p
from postcopyd.errors import PostcopydError
from postcopyd.host import procfs
from postcopyd.model import MigrateRequest
from postcopyd.vmm import Region, Shape, VmmError
from postcopyd.vmm.libvirt import calls, driver, waiting
from postcopyd.vmm.qemu.blocks import Block

MIB = 1 << 20


@pytest.mark.parametrize("length", [10, 5000, MIB - 94, MIB - 93, MIB - 92, MIB + 5])
def test_a_header_ends_at_a_whole_mib(restoring: dict[str, Any], length: int) -> None:
    """libvirt 12 reads in whole MiB, and the XML has to end by a NUL."""
    head = restoring["header"](b"x" * length)
    assert len(head) % MIB == 0
    assert len(head) - 92 - length <= MIB
    magic, version, text, ran, compressed, cookie = struct.unpack_from("<16s5I", head)
    assert (magic, version, ran, compressed, cookie) == (b"LibvirtQemudSave", 2, 0, 0, 0)
    assert text == len(head) - 92
    assert head[92:].rstrip(b"\0") == b"x" * length
    assert head[-1:] == b"\0"


class Fifo:
    """A FIFO that is fed by a helper, to a reader that takes all of it."""

    def __init__(self, folder: Path, restoring: dict[str, Any], pieces: list[bytes | None]) -> None:
        path = folder / "fifo"
        os.mkfifo(path)
        both = os.open(path, os.O_RDWR)
        ours = os.open(path, os.O_WRONLY)
        restore = object.__new__(restoring["Restore"])
        restore._folder, restore._name = str(folder / "its own"), ""
        restore._piece = iter(pieces).__next__
        restore._returned = threading.Event()
        restore._channel, daemon = socket.socketpair()
        feeding = threading.Thread(target=restore._feed, args=(both, ours, b"head"))
        with path.open("rb") as reader:
            feeding.start()
            self.read = reader.read()
        feeding.join()
        restore._channel.close()
        daemon.close()


@pytest.mark.parametrize("who", ["libvirt", "the daemon"])
def test_a_header_that_nobody_reads(restoring: dict[str, Any], tmp_path: Path, who: str) -> None:
    """libvirt has refused, or the daemon has gone: the helper does not wait for a reader."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    both = os.open(path, os.O_RDWR)
    restore = object.__new__(restoring["Restore"])
    restore._folder, restore._piece = str(tmp_path / "its own"), lambda: None
    restore._name = ""
    restore._returned = threading.Event()
    restore._channel, daemon = socket.socketpair()
    with restore._channel, daemon:
        restore._returned.set() if who == "libvirt" else daemon.close()
        restore._feed(both, os.open(path, os.O_WRONLY), b"head")


def test_a_stream_that_ends_early_ends_in_rubbish(
    restoring: dict[str, Any], tmp_path: Path
) -> None:
    """libvirt would wait for ever for one that only ends."""
    assert Fifo(tmp_path, restoring, [b"one", b"two", b""]).read == b"headonetwo"
    (tmp_path / "fifo").unlink()
    assert Fifo(tmp_path, restoring, [b"one", None]).read == b"headone" + restoring["RUBBISH"]


class Binding:
    """In place of libvirt's: the connection is lost once, in the middle of a command."""

    def __init__(self, helper: dict[str, Any]) -> None:
        self.lost, self.heard = True, list[str]()
        monitor = self.monitor = object.__new__(helper["Monitor"])
        monitor._libvirt = monitor._domain = self
        monitor._open = lambda: None
        told = helper["libvirt_qemu"]
        told.qemuMonitorCommand = self.command
        self.error = helper["libvirt"].libvirtError

    def command(self, _domain: Any, text: str, _flags: int) -> str:
        self.heard.append(json.loads(text)["execute"])
        if self.lost:
            raise self.error
        return '{"return": {}}'

    def isAlive(self) -> bool:
        was, self.lost = self.lost, False
        return not was

    def isActive(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("command", "heard"), [("query-migrate", 2), ("xen-save-devices-state", 1)]
)
def test_what_is_said_again_when_libvirt_was_lost(
    helper: dict[str, Any], command: str, heard: int
) -> None:
    """QEMU before 10 would abort at a second save, and the guest be lost: that one fails."""
    binding = Binding(helper)
    answers: list[Any] = []
    binding.monitor._say = answers.append
    binding.monitor._take({"execute": command, "id": 1}, [])
    assert binding.heard == [command] * heard
    assert [("error" in answer, answer["id"]) for answer in answers] == [(heard == 1, 1)]


def test_a_qemu_that_is_older_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """libvirt has left the file of a QEMU that ended, and its number is another QEMU's now: that
    one's memory must not be emptied."""
    began = {1: 100, 2: 99}
    restore = waiting.Restore("web1", "")
    monkeypatch.setattr(restore, "_process", type("", (), {"pid": 1}))
    monkeypatch.setattr(waiting.procfs, "started", began.__getitem__)
    monkeypatch.setattr(waiting, "process_of", lambda name: 2)
    monkeypatch.setattr(waiting, "places", lambda like, pid: [[0x1000]])

    async def started() -> int:
        with trio.move_on_after(0.05):
            return await restore._started(shape(4 * MIB))
        return 0

    assert trio.run(started) == 0
    began[2] = 100
    assert trio.run(started) == 2


async def test_a_long_question_is_asked_whole() -> None:
    ours, theirs = socket.socketpair()
    question = b"x" * (4 * MIB)
    heard = bytearray()

    def hear() -> None:
        while data := theirs.recv(1 << 16):
            heard.extend(data)

    hearing = threading.Thread(target=hear)
    hearing.start()
    with theirs:
        with trio.socket.from_stdlib_socket(ours) as channel:
            await calls.send_all(channel, question)
        await trio.to_thread.run_sync(hearing.join)
    assert heard == question


def defined(**changes: Any) -> str:
    xml = "<domain><name>web1</name><uuid>u</uuid></domain>"
    told = {"live": xml, "kept": xml, "xml": "", "host": "", "autostart": True, "known": True}
    text = json.dumps(told | changes)
    return base64.b64encode(zlib.compress(text.encode())).decode()


def test_a_definition_is_of_the_vm_that_is_offered() -> None:
    for told in (defined(), defined(kept="")):
        assert driver._domain("web1", told)[1].findtext("uuid") == "u"


@pytest.mark.parametrize(
    "told",
    [
        "",
        "!",
        base64.b64encode(b"no zlib").decode(),
        base64.b64encode(zlib.compress(b"[]")).decode(),
        base64.b64encode(zlib.compress(b"[" * 100_000)).decode(),
        base64.b64encode(zlib.compress(b" " * (30 << 20) + b"{}")).decode(),
        defined(live=3),
        defined(live=""),
        defined(live="<domain>"),
        defined(live="<domain><name>web2</name></domain>"),
        defined(kept="<domain><name>web2</name></domain>"),
        defined(xml="<domain><name>web2</name></domain>"),
    ],
)
def test_what_a_peer_may_send_instead(told: str) -> None:
    """Above all the definition of another domain than the one that it may move."""
    with pytest.raises(VmmError):
        driver._domain("web1", told)


def test_the_changed_xml_says_what_is_needed() -> None:
    changed = "<domain><name>web1</name><uuid>u</uuid><devices/></domain>"
    known, domain = driver._domain("web1", defined(xml=changed))
    assert known["xml"] == changed
    assert domain.find("devices") is not None


@pytest.mark.parametrize(
    ("asked", "was", "there"),
    [
        (MigrateRequest("h"), True, True),
        (MigrateRequest("h"), False, False),
        (MigrateRequest("h", persistent=True), False, True),
        (MigrateRequest("h", undefine_source=True), True, False),
        (MigrateRequest("h", persistent=True, undefine_source=True), True, True),
    ],
)
async def test_what_is_persistent_there(
    asked: MigrateRequest, was: bool, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was, unless something else is asked for; then only what is asked for is done."""
    xml = "<domain><name>web1</name></domain>"
    described = {"live": xml, "kept": xml, "persistent": was, "autostart": was}
    rest = {"known": True, "host": "", "libvirt": 9_000_000, "job": False}

    async def ask(*_: Any, **__: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return described | rest | {"snapshots": 0, "checkpoints": 0}

    monkeypatch.setattr(calls, "ask", ask)
    domain = object.__new__(driver.LibvirtVmm)
    domain.name, domain.socket = "web1", "qemu:///system#web1"
    told = driver._read(await domain.definition(asked.persists, asked.xml))
    assert (told["kept"] != "", told["xml"]) == (there, "")
    assert driver._read(await domain.definition(None, xml))["xml"] == xml
    for other in ("no XML", "<domain><name>web2</name></domain>"):
        with pytest.raises(PostcopydError, match="dumpxml --migratable"):
            await domain.definition(None, other)
    assert asked.undefines == (asked.undefine_source or not asked.persistent)


def test_a_large_definition_fits() -> None:
    devices = "".join(f"<disk type='file'><source file='/srv/{n:05}'/></disk>" for n in range(500))
    assert len(defined(live=f"<domain><name>web1</name>{devices}</domain>")) < p.MAX_STRING


def shape(*sizes: int, address: int = 0) -> Shape:
    regions = [
        Region(f"ram{number}", size >> 12, 4096, address, None, 0)
        for number, size in enumerate(sizes)
    ]
    return Shape("running", 0, tuple(regions), {}, ())


SMAPS = (
    "{0:x}-{1:x} rw-p 00000000 00:00 0\nSize:               4096 kB\nVmFlags: rd wr mr mw me {2}\n"
)


def found_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *parts: tuple[int, int, str], heap: bytes = b""
) -> Callable[..., list[list[int]]]:
    (tmp_path / "smaps").write_text(
        "".join(SMAPS.format(at, at + size, flags) for at, size, flags in parts)
    )
    (tmp_path / "mem").write_bytes(heap)
    mapping = procfs.Mapping(0, len(heap), False, True, 0, (0, 0), "[heap]")
    monkeypatch.setattr(waiting.procfs, "mappings", lambda pid: [mapping])

    def opened(path: str, *how: Any, **more: Any) -> Any:
        return open(tmp_path / Path(path).name, *how, **more)

    monkeypatch.setitem(waiting.__dict__, "open", opened)
    return lambda like: waiting.places(like, 1)


def test_ram_is_found_by_size_and_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TCG's buffer has the same size, and is no RAM; nor is what was mapped and not advised of."""
    places = found_in(
        monkeypatch,
        tmp_path,
        (0x10000000, 4 * MIB, "ac dd ex hg"),
        (0x20000000, 4 * MIB, "ac"),
        (0x30000000, 4 * MIB, "dc ac dd hg mg"),
        (0x40000000, 8 * MIB, "sh dd"),
    )
    assert places(shape(4 * MIB, 8 * MIB)) == [[0x30000000], [0x40000000]]
    assert places(shape(16 * MIB)) == [[]]


def block(name: str, address: int, size: int) -> bytes:
    """As QEMU has it in its heap."""
    return struct.pack("<6Q", 7, address, 0, 0, size, size) + bytes(12) + name.encode() + b"\0"


def test_parts_of_one_size_are_told_apart_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the blocks that QEMU has in its heap; names alone, and blocks of others, are none. Until
    all blocks are there, QEMU is not ready."""
    one, two, other = 0x10000000, 0x20000000, 0x30000000
    parts = [(at, 4 * MIB, "dc ac dd") for at in (one, two, other)]
    heap = [
        b"ram0\0" * 20,
        block("ram0", two, 4 * MIB),
        block("ram0", other, 8 * MIB),
        block("/objects/ram1", one, 4 * MIB),
        block("vga.vram", other, 4 * MIB),
    ]
    places = found_in(monkeypatch, tmp_path, *parts, heap=b"".join(heap))
    assert places(shape(4 * MIB, 4 * MIB)) == [[two], [one]]
    places = found_in(monkeypatch, tmp_path, *parts, heap=b"".join(heap[:3]))
    assert places(shape(4 * MIB, 4 * MIB)) == [[two], []]


def test_ram_elsewhere_is_seen() -> None:
    like = shape(4 * MIB, address=0x1000)
    there = Block("ram0", 4 * MIB, 4 * MIB, 0x1000)
    assert waiting.not_where_it_was(like, [there]) is None
    for other in (
        Block("ram0", 4 * MIB, 4 * MIB, 0x2000),
        Block("ram0", 4 * MIB, 8 * MIB, 0x1000),
        Block("ram0", 4 * MIB, 4 * MIB, None),
        Block("ram1", 4 * MIB, 4 * MIB, 0x1000),
    ):
        assert waiting.not_where_it_was(like, [other]) == "ram0"


def test_a_host_without_libvirt_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its daemon's socket and its binding are looked for, wherever the daemon's Python is."""
    monkeypatch.setattr(calls, "LIBVIRT", ("/nowhere/libvirt-sock",))
    monkeypatch.setattr(calls, "BINDING", str(tmp_path / "lib*/libvirt.py"))
    monkeypatch.setattr(calls.importlib.util, "find_spec", lambda _: None)
    assert not calls.here(calls.SYSTEM)
    assert not calls.here("")
    assert calls.here("qemu:///session")
    assert "is switched off" in calls.lacks("")
    assert "no /nowhere/libvirt-sock" in calls.lacks(calls.SYSTEM)
    assert "binding for Python" in calls.lacks("qemu:///session")
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64/libvirt.py").touch()
    assert calls.lacks("qemu:///session") == ""


async def test_a_binding_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library is missing, say: an answer, and no traceback in the daemon's log."""
    monkeypatch.setattr(calls, "_python", lambda: sys.executable)
    with pytest.raises(PostcopydError, match="its binding for Python: No module named 'libvirt'"):
        await calls.ask(calls.SYSTEM, "looking for domains", "running")
