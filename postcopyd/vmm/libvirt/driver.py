# SPDX-License-Identifier: Apache-2.0
"""Drives a domain of libvirt: the QEMU in it is driven as any QEMU is, by libvirt's monitor.

The source:       libvirt is asked to stop and run the guest, so it knows; all else is vmm/qemu's.
The destination:  libvirt makes the domain by a restore of the source's XML, whose stream comes from
                  here (waiting.py). Until libvirt has returned, nobody can ask its QEMU anything.

Owns the restore, and the domain that it makes until the guest runs: one that is called off ends.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any, Self
from xml.etree import ElementTree

import trio

from postcopyd.errors import PostcopydError
from postcopyd.native.poison import poison
from postcopyd.vmm import Region, Role, Shape, VmmError, kill
from postcopyd.vmm.libvirt import calls, needs, waiting
from postcopyd.vmm.libvirt.monitor import LibvirtMonitor
from postcopyd.vmm.qemu import blocks as ram_blocks
from postcopyd.vmm.qemu import disk_files, ram, userfaultfd
from postcopyd.vmm.qemu.common import close_each, pidfd_of
from postcopyd.vmm.qemu.driver import QemuVmm
from postcopyd.vmm.qemu.settings import MOVED

CALLED_OFF_S = 3.0
"""How long the QEMU may take to end after libvirt has returned."""

TOLD = ("live", "autostart", "known", "host")
"""What the other host is told of a domain as it is here: of what the helper's `describe` says."""

MOST_DEFINITION = 16 << 10  # characters, as the interface has it
MOST_XML = 1 << 20  # bytes; libvirt's own limit is 10 times that


class LibvirtVmm(QemuVmm):
    """One domain. `socket` is libvirt's URI, "#", and the domain's name."""

    kind = "libvirt"
    makes = True

    _restore: waiting.Restore | None = None  # while the domain waits
    _like: Shape | None = None  # of a domain that waits: the guest as its source describes it
    _adopted: Shape | None = None

    @property
    def _by_hand(self) -> str:
        return f"`virsh resume {self.name}`"

    @property
    def _uri(self) -> str:
        return self.socket.partition("#")[0]

    @classmethod
    async def connect(cls, name: str, socket: str) -> Self:
        """Takes libvirt's monitor of a domain that runs. Raises PostcopydError."""
        uri = socket.partition("#")[0]
        return await cls.opened(name, socket, LibvirtMonitor(uri, name))

    @classmethod
    async def known(cls, name: str, socket: str, pid: int) -> Self:
        uri = socket.partition("#")[0]
        return cls(name, socket, LibvirtMonitor(uri, name, pid), pid, pidfd_of(name, pid))

    # --- the source

    async def definition(self, persistent: bool | None = None, xml: str = "") -> str:
        """What another libvirt needs to make this domain. Raises PostcopydError, also for what of
        the domain would not arrive."""
        doing = f"looking at the domain {self.name}"
        described = await calls.ask(self._uri, doing, "describe", name=self.name)
        if found := needs.refusals(self.name, described):
            raise PostcopydError("; ".join(found), "Refused")
        if xml and not _is_of(self.name, xml):
            raise PostcopydError(
                f"what --xml gives is not the XML of the domain {self.name}: change what `virsh "
                f"dumpxml --migratable {self.name}` prints",
                "Refused",
            )
        if persistent is None:
            persistent = described["persistent"]
        kept = described["kept"] if persistent else ""
        text = json.dumps({**{key: described[key] for key in TOLD}, "kept": kept, "xml": xml})
        definition = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
        if len(definition) > MOST_DEFINITION:
            raise PostcopydError(
                f"the XML of the domain {self.name} is too long to be sent ({len(text)} bytes)",
                "Refused",
            )
        return definition

    async def finish(self, keep: bool) -> None:
        """Ends the domain, whose guest has gone, and its definition."""
        if keep:
            await super().finish(keep)
            return
        self._watch(on=False)
        self._ending = True
        try:
            await self.vacate(self.name, self.socket, self.pid, undefine=self.undefines)
        except PostcopydError:  # its definition stays, but at least it cannot be run as it is
            kill(self._pidfd, self.name, self.pid)
            raise
        await self._exit()

    @classmethod
    async def vacate(cls, name: str, socket: str, pid: int, *, undefine: bool) -> None:
        """As the interface says. libvirt takes 1 to 3 s for it."""
        await calls.ask(
            socket.partition("#")[0],
            f"ending the domain {name} here",
            "forget",
            name=name,
            pid=pid,
            undefine=undefine,
        )

    @classmethod
    async def remake(  # noqa: PLR0917 (as the interface has it)
        cls,
        name: str,
        socket: str,
        definition: str,
        like: Shape,
        fill: Callable[[Shape], Awaitable[list[Region]]],
        device: bytes,
    ) -> Self:
        """As for a guest that arrives; but all of its memory is there before it is loaded."""
        made = await cls.expect(name, socket, definition, like)

        async def stream() -> AsyncIterator[bytes]:
            yield device

        try:
            made.before = "paused" if like.state == "paused" else "running"
            with closing(await made.inspect("destination")) as shape:
                if shape.problems:
                    raise VmmError("; ".join(shape.problems))
                await made.discard(shape)
                if lost := await fill(shape):
                    await made._lose(lost)
                made._adopted = shape
                await made._qmp.open()
                await made.load(stream())
            await made._settings.guard(MOVED)
        except BaseException:
            with trio.CancelScope(shield=True):
                with suppress(PostcopydError):
                    await made.end()
                await made.aclose()
            raise
        return made

    async def _lose(self, pages: list[Region]) -> None:
        """Makes memory errors of pages. The kernel may have made huge pages of what is beside them,
        so they are emptied again. Raises PostcopydError."""
        what = f"{len(pages)} page{'s' if pages[1:] else ''} of the memory of {self.name} cannot"
        if any(page.fd is not None for page in pages):
            raise VmmError(
                f"{what} be read any more, and of memory errors in a file the kernel makes zeros "
                f"with its next huge page: the guest was not made anew; what was kept stays until "
                f"`postcopyd resolve {self.name} --kill`"
            )
        ours, number = await userfaultfd.create_alone(self.pid)
        try:
            await ram.empty(pages, self.pid)
            poison(ours, [(page.address, page.size) for page in pages])
        except OSError as error:
            raise VmmError(
                f"{what} be read any more, and no memory errors could be made of them "
                f"({error.strerror}; Linux 6.6 and later can): the guest would find zeros there, "
                f"and was not made anew; what was kept stays until `postcopyd resolve {self.name} "
                f"--kill`"
            ) from None
        finally:
            os.close(ours)
            with trio.CancelScope(shield=True):
                await userfaultfd.close(self.pid, [number])

    @classmethod
    async def define(cls, name: str, socket: str, definition: str) -> bool:
        uri = socket.partition("#")[0]
        if kept := _read(definition)["kept"]:
            await calls.ask(uri, f"defining the domain {name}", "define", name=name, xml=kept)
        return bool(kept)

    # --- the destination

    @classmethod
    async def foreseen(cls, name: str, socket: str, definition: str, like: Shape) -> Shape:
        uri = socket.partition("#")[0]
        known, domain = _domain(name, definition)
        found: list[str] = await calls.ask(
            uri,
            f"looking whether the domain {name} can be made here",
            "fits",
            name=name,
            uuid=domain.findtext("uuid", ""),
            live=known["live"],
            known=known["known"],
            host=known["host"],
            **needs.needed(domain),
        )
        disks, unseen = await disk_files.to_be_opened(needs.moved(like.disks, known))
        return replace(like, disks=tuple(disks), problems=(*found, *unseen))

    @classmethod
    async def expect(cls, name: str, socket: str, definition: str, like: Shape) -> Self:
        uri = socket.partition("#")[0]
        known, _ = _domain(name, definition)
        like = replace(like, disks=tuple(needs.moved(like.disks, known)))
        restore = waiting.Restore(name, uri)
        try:
            pid = await restore.begin(known["live"], known["xml"], like)
            made = cls(name, socket, LibvirtMonitor(uri, name, pid), pid, pidfd_of(name, pid))
        except BaseException:
            await restore.call_off()
            raise
        made._restore, made._like = restore, like
        return made

    async def _inspect_waiting(self) -> Shape:
        assert self._like is not None
        like = self._like
        regions, problems = await waiting.regions(like, self.pid)
        try:
            disks = await disk_files.as_named(like.disks, self.pid)
        except BaseException:
            close_each(region.fd for region in regions)
            raise
        return replace(
            like,
            state="incoming",
            pid=self.pid,
            regions=tuple(regions),
            problems=tuple(problems),
            disks=tuple(disks),
        )

    async def inspect(self, role: Role) -> Shape:
        return await (super().inspect(role) if self._restore is None else self._inspect_waiting())

    async def outline(self) -> str:
        return "" if self._restore is not None else await super().outline()

    async def adopt(self, shape: Shape) -> list[int]:
        self._adopted = shape
        await self._qmp.open()  # what is asked by it would wait for libvirt, until `load`
        return await super().adopt(shape)

    async def _waits(self) -> None:
        if self._restore is None:
            raise VmmError(f"The domain {self.name} does not wait for a guest any more.")

    async def _make_ready(self) -> None:
        """libvirt has started it so that it does not run by itself, and has set what it needs."""

    async def _new_userfaultfd(self) -> tuple[int, int]:
        return await userfaultfd.create_alone(self.pid)

    async def load(self, receive: AsyncIterable[bytes]) -> None:
        """Gives libvirt the stream; returns once libvirt has the guest there, paused, and its RAM
        was found where it was adopted."""
        restore, adopted = self._restore, self._adopted
        if restore is None or adopted is None:
            raise VmmError(f"The domain {self.name} does not wait for a guest any more.")
        with self._qmp.events("RESUME") as events:
            await restore.feed(receive)
            self._restore = None
            await self._monitor.learn_version()
            elsewhere = waiting.not_where_it_was(adopted, await ram_blocks.blocks(self._qmp))
            if elsewhere is not None:
                raise VmmError(
                    f"Guest RAM '{elsewhere}' of the domain {self.name} is not where it was taken "
                    f"to be: tell those who make postcopyd."
                )
            await self._must_have_disks()
            if events.take() is not None:
                raise VmmError(
                    f"Somebody ran the domain {self.name} before its guest was granted to this "
                    f"host: leave it alone, and migrate again."
                )

    @property
    def _monitor(self) -> LibvirtMonitor:
        assert isinstance(self._qmp, LibvirtMonitor)
        return self._qmp

    async def _restore_settings(self) -> None:
        if self._restore is None:
            await super()._restore_settings()

    async def keep(self, definition: str) -> None:
        known = _read(definition)
        if known["kept"]:
            await calls.ask(
                self._uri,
                f"defining the domain {self.name}",
                "keep",
                name=self.name,
                xml="" if known["xml"] else known["kept"],
                autostart=known["autostart"],
            )

    # --- both

    async def end(self) -> None:
        """Ends the QEMU, and so the domain. If libvirt has the whole stream, at once: the disks may
        have been taken, for which the source waits, and libvirt may be what does not answer. Else
        libvirt ends it, when the stream is called off."""
        self._ending = True
        if self._restore is not None and not self._restore.whole:
            await self._call_off()
            with trio.move_on_after(CALLED_OFF_S):
                await self._exit()
        kill(self._pidfd, self.name, self.pid)
        await self._exit()
        await self._call_off()

    async def _call_off(self) -> None:
        restore, self._restore = self._restore, None
        if restore is not None:
            await restore.call_off()

    async def aclose(self) -> None:
        await self._call_off()
        await super().aclose()


def _read(definition: str) -> dict[str, Any]:
    """The inverse of `definition`. Raises VmmError for what a peer may send instead."""
    try:
        unpacking = zlib.decompressobj()
        text = unpacking.decompress(base64.b64decode(definition, validate=True), 3 * MOST_XML)
        known = json.loads(text)
        texts = {key: known[key] for key in ("live", "kept", "xml", "host")}
        flags = {key: known[key] is True for key in ("autostart", "known")}
        if all(isinstance(text, str) for text in texts.values()):
            return texts | flags
    except (ValueError, zlib.error, KeyError, TypeError, RecursionError):
        pass
    raise VmmError("the source sent something else than the definition of a domain")


def _domain(name: str, definition: str) -> tuple[dict[str, Any], ElementTree.Element]:
    """What the source says of its domain, and the XML of the one that is to be made here. Raises
    VmmError."""
    known = _read(definition)
    told = [known[key] for key in ("xml", "live", "kept") if known[key]]
    if not known["live"] or not all(_is_of(name, xml) for xml in told):
        raise VmmError(f"the source sent the definition of another domain than {name}")
    return known, needs.read(told[0])


def _is_of(name: str, xml: str) -> bool:
    """Whether this is the XML of the domain of this name."""
    try:
        return needs.read(xml).findtext("name") == name
    except ElementTree.ParseError:
        return False
