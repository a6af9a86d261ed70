# SPDX-License-Identifier: Apache-2.0
"""What the XML of a domain says of whether it can be moved, and of what it needs where it goes.

Reads XML and knows no libvirt: what has to be asked of one is asked by helper.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

from postcopyd.vmm import Disk

SHARING = {"vhostuser", "vhostvdpa", "vdpa", "virtiofs"}
"""Words of a device that is another process, which reads guest RAM."""

FILES = ("os/loader", "os/kernel", "os/initrd", "os/dtb")
"""Files of the host that no disk has. libvirt is asked for the emulator: it may have that in a
container of its own."""

LENDS = 8_002_000
"""Since this version libvirt's monitor takes a descriptor with a command."""


def refusals(name: str, described: dict[str, Any]) -> list[str]:
    """What of a domain would not arrive, or cannot be moved: sentences. `described` is the
    helper's."""
    return [f"The domain {name} {why}." for why in _refusals(described)]


def _refusals(described: dict[str, Any]) -> Iterator[str]:
    version = described["libvirt"]
    if version < LENDS:
        yield (
            f"is run by libvirt {version // 10**6}.{version // 1000 % 1000}, whose monitor cannot "
            f"be lent a file: upgrade it to 8.2 or later, or give QEMU a monitor of its own and "
            f"`postcopyd attach --qemu` that"
        )
    if described["job"]:
        yield (
            "has a job of libvirt that goes on (a save, a dump, a migration): see `virsh "
            "domjobinfo`, and wait for its end or `virsh domjobabort` it"
        )
    for what in ("snapshots", "checkpoints"):
        if described[what]:
            yield (
                f"has {described[what]} {what}, of which the other host's libvirt would not know: "
                f"delete them (`virsh {what[:-1]}-delete --metadata`)"
            )
    domain = read(described["live"])
    if domain.find("genid") is not None:
        yield (
            "has a <genid>, which libvirt changes when it makes a domain anew: take it out of "
            "the XML"
        )
    for device in domain.iterfind("devices/*"):
        kind = device.get("type", "")
        parts = [device, *device.iterfind("driver"), *device.iterfind("backend")]
        words = {part.get(key) for part in parts for key in ("type", "name")}
        if device.tag == "hostdev" or kind == "hostdev":
            kind = kind or device.get("mode", "")
            yield (
                f"has a device of this host (<{device.tag} type='{kind}'>), which stays here: "
                f"`virsh detach-device` it before, and attach one at the other host afterwards"
            )
        elif sharing := words & SHARING:
            yield (
                f"has a <{device.tag}> by {min(map(str, sharing))}, through which another process "
                f"reads guest RAM, and would find zeros in pages that have not arrived: detach it, "
                f"or use a device that QEMU emulates"
            )


def read(xml: str) -> ElementTree.Element:
    """Raises ElementTree.ParseError. A peer may have sent it: expat has limits of its own."""
    return ElementTree.fromstring(xml)  # noqa: S314


def moved(disks: Sequence[Disk], known: dict[str, Any]) -> list[Disk]:
    """The disks with the names that their files have in the changed XML of a domain, if there is
    one."""
    if not known["xml"]:
        return [*disks]
    before, after = _files(read(known["live"])), _files(read(known["xml"]))
    names = {
        old: new
        for disk in before.keys() & after.keys()
        for old, new in zip(before[disk], after[disk], strict=False)
        if new
    }
    return [
        replace(disk, files=tuple(replace(f, path=names.get(f.path, f.path)) for f in disk.files))
        for disk in disks
    ]


def _files(domain: ElementTree.Element) -> dict[str | None, list[str]]:
    """By its name in the guest, the files of a disk, from the top of its chain down."""
    return {
        target.get("dev"): [one.get("file") or one.get("dev") or "" for one in disk.iter("source")]
        for disk in domain.iterfind("devices/disk")
        for target in disk.iterfind("target")
    }


def needed(domain: ElementTree.Element) -> dict[str, Any]:
    """What a domain uses of its host, as the helper's `fits` takes it."""

    def named(path: str, key: str) -> list[str]:
        return sorted({name for one in domain.iterfind(path) if (name := one.get(key))})

    volumes = domain.iterfind("devices/disk[@type='volume']/source")
    return {
        "networks": named("devices/interface[@type='network']/source", "network"),
        "links": named("devices/interface[@type='bridge']/source", "bridge")
        + named("devices/interface[@type='direct']/source", "dev"),
        "volumes": [[one.get("pool", ""), one.get("volume", "")] for one in volumes],
        "files": [
            [path.rpartition("/")[2], file] for path in FILES if (file := domain.findtext(path))
        ],
    }
