# SPDX-License-Identifier: Apache-2.0
"""The part of helper.py that has libvirt make a domain which waits for its guest: a restore from a
FIFO. helper.py runs this file: it too imports nothing but libvirt's binding and Python's library.

Owns the FIFO and its folder. Where libvirt has a hook, that may ask whether the domain that starts
is the one which is made here (docs/HOOKS.md): its XML names the folder then, which is locked until
libvirt has returned. Nobody else can know that name, and the domain forgets it.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import select
import shutil
import socket
import struct
import tempfile
import termios
import threading
from contextlib import suppress
from typing import Any
from xml.etree import ElementTree

import libvirt

FEED_S = 1.0
"""How long what is fed may take to end once libvirt has returned."""

LOOK_MS = 1

ROOM = "/run/postcopyd"
"""For FIFOs, each in a folder of its own."""

HOOKS = ("/etc/libvirt/hooks/qemu", "/etc/libvirt/hooks/qemu.d")
MARK = "urn:postcopyd:making"
"""The namespace of what the XML has for libvirt's hook, as `may-run` reads it (cli/verbs.py)."""

MIB = 1 << 20
MAGIC = b"LibvirtQemudSave"
TWICE = 11_003_000
"""Since this version libvirt opens what it restores from twice."""

RUBBISH = b"\0" * 4096
"""Ends a load that waits: no stream of QEMU's begins or goes on so."""


class Restore:
    """A domain that libvirt makes by a restore, of what comes from the daemon: in pieces, each
    after its length (u32, big endian). The first is the XML, the second the XML to take instead, or
    empty; then comes the stream, whose end is an empty one.
    Without that end, the load is ended by rubbish: libvirt would wait for ever for a stream that
    just ends. Answers with one JSON object once libvirt's call has returned."""

    def __init__(self, connection: libvirt.virConnect, channel: socket.socket) -> None:
        self._libvirt = connection
        self._channel, self._pieces = channel, channel.makefile("rb")
        self._returned = threading.Event()
        self._name = ""  # of a domain that is marked

    def serve(self) -> None:
        os.makedirs(ROOM, 0o755, exist_ok=True)
        self._folder = tempfile.mkdtemp(prefix=f"{secrets.token_hex(16)}-", dir=ROOM)
        lock = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            fifo = os.path.join(self._folder, "stream")
            os.mkfifo(fifo, 0o600)
            self._serve(fifo)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(lock)

    def _serve(self, fifo: str) -> None:
        xml, self._changed = self._piece(), self._piece()
        if not xml or self._changed is None:
            return
        if self._changed and (reason := self._refused(xml, self._changed.decode())):
            self._answer({"error": reason})
            return
        if any(map(os.path.exists, HOOKS)):
            made, folder = self._changed or xml, os.path.basename(self._folder)
            self._name = ElementTree.fromstring(made).findtext("name", "")  # noqa: S314
            self._changed = marked(made, folder)
        both = os.open(fifo, os.O_RDWR | os.O_CLOEXEC)  # so nobody waits to open it
        ours = os.open(fifo, os.O_WRONLY | os.O_CLOEXEC)
        threading.Thread(target=self._restore, args=(fifo,), daemon=True).start()
        times = 2 if self._libvirt.getLibVersion() >= TWICE else 1
        head = header(xml) * times
        feeding = threading.Thread(target=self._feed, args=(both, ours, head), daemon=True)
        feeding.start()
        self._returned.wait()
        feeding.join(FEED_S)

    def _refused(self, xml: bytes, changed: str) -> str:
        """Why libvirt finds another machine in the changed XML; empty if it does not. Of a FIFO
        libvirt 12.8 says so only once that has ended, so it is asked of a file before."""
        image = os.path.join(self._folder, "image")
        with open(image, "wb") as file:
            file.write(header(xml))
        try:
            self._libvirt.saveImageDefineXML(image, changed, libvirt.VIR_DOMAIN_SAVE_PAUSED)
        except libvirt.libvirtError as error:
            return str(error)
        finally:
            os.unlink(image)
        return ""

    def _restore(self, fifo: str) -> None:
        answer: dict[str, Any] = {"return": {}}
        try:
            changed = (self._changed or b"").decode() or None
            self._libvirt.restoreFlags(fifo, changed, libvirt.VIR_DOMAIN_SAVE_PAUSED)
            if self._name:
                self._forget()
        except libvirt.libvirtError as error:
            answer = {"error": str(error)}
        self._answer(answer)
        self._returned.set()

    def _answer(self, answer: dict[str, Any]) -> None:
        with suppress(OSError):  # the daemon has gone
            self._channel.sendall(json.dumps(answer).encode() + b"\n")

    def _forget(self) -> None:
        """Takes the mark out of the domain. One that stays does no harm."""
        kind, live = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_LIVE
        with suppress(libvirt.libvirtError):
            domain = self._libvirt.lookupByName(self._name)
            domain.setMetadata(kind, None, None, MARK, live)

    def _feed(self, both: int, fifo: int, head: bytes) -> None:
        """`both` ends are open until libvirt has read the header, so has opened it for good.
        Nothing tells when a FIFO is empty: it is looked at, until libvirt or the daemon gives up.
        """
        daemon = select.poll()
        daemon.register(self._channel, select.POLLRDHUP)
        whole = False
        try:
            write(fifo, head)
            while unread(both) and not self._returned.is_set() and not daemon.poll(LOOK_MS):
                pass
            os.close(both)
            if not self._name:  # no hook asks for it
                shutil.rmtree(self._folder, ignore_errors=True)
            while (piece := self._piece()) is not None:
                if not piece:
                    whole = True
                    break
                write(fifo, piece)
            if not whole:
                write(fifo, RUBBISH)
        except OSError:  # libvirt has closed its end
            pass
        finally:
            os.close(fifo)

    def _piece(self) -> bytes | None:
        """The next piece; None if the daemon has gone."""
        try:
            (length,) = struct.unpack(">I", self._pieces.read(4))
            piece = self._pieces.read(length)
            return piece if len(piece) == length else None
        except (struct.error, OSError):
            return None


def marked(xml: bytes, folder: str) -> bytes:
    """The XML of a domain, with the folder in its metadata."""
    mark = f"<postcopyd:making xmlns:postcopyd='{MARK}' in='{folder}'/>".encode()
    if b"<metadata>" in xml:
        return xml.replace(b"<metadata>", b"<metadata>" + mark, 1)
    alone = b"<metadata>" + mark + b"</metadata>"
    if b"<metadata/>" in xml:  # as libvirt leaves it where a mark was taken out
        return xml.replace(b"<metadata/>", alone, 1)
    return xml.replace(b"</name>", b"</name>" + alone, 1)


def unread(fifo: int) -> bool:
    return fcntl.ioctl(fifo, termios.FIONREAD, bytes(4)) != bytes(4)


def write(fifo: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fifo, view) :]


def header(xml: bytes) -> bytes:
    """What a file that libvirt restores from has before QEMU's stream (qemu_saveimage.h): no
    cookie, raw, and not running. Filled up to whole MiB, in which libvirt reads."""
    room = -(92 + len(xml) + 1) % MIB + 1
    text = xml + bytes(room)
    return MAGIC + struct.pack("<5I", 2, len(text), 0, 0, 0) + bytes(56) + text
