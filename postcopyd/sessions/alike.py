# SPDX-License-Identifier: Apache-2.0
"""Compares two VMMs, which must be the same to a guest, and one VMM with what it was. No I/O.

Owns what is compared and the sentences for what differs. A source offers what it found. The
destination compares that with its own VMM (`differences`), and the source compares what it finds
later with what it has offered (`changes`). Drivers look at the VMMs.

Disks must have the same content, or the guest would read another disk, or miss what it wrote. No
host can see that by itself. What both hosts know of a file decides (`DiskFile.ids`). If that says
nothing, its storage decides, as with libvirt: a file system or server that other hosts have too
counts as the same. With `unsafe` a person vouches for it. How QEMU caches does not matter here:
since 3.0 it drops what the host has cached of an image before its guest runs (`drop-cache` of
-blockdev).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from postcopyd import protocol as p
from postcopyd.vmm import Disk, DiskFile, Region, Shape

INSIST = "or use --unsafe if you know that both hosts have the same there"

NONE = "none"


def offered(disks: Sequence[Disk]) -> list[p.DiskOffer]:
    """Disks in the form that an offer has."""
    return [
        p.DiskOffer(
            name=p.fact(disk.name),
            chain=p.fact(disk.chain),
            files=[
                p.DiskFileOffer(p.fact(f.path), f.where, f.shared, f.writable, f.ids)
                for f in disk.files
            ],
        )
        for disk in disks
    ]


def differences(here: Shape, kind: str, offer: p.Offer) -> list[str]:
    """What differs between the VMM in the offer and the one of this kind that waits here."""
    ours = [(r.name, r.pages, r.page_size) for r in here.regions]
    theirs = [(r.name, r.pages, r.page_size) for r in offer.regions]
    problems = []
    if offer.driver != kind:
        problems.append(
            f"the VMM here is driven as {kind}, the source's as {offer.driver}: attach the same "
            f"kind on both hosts"
        )
    elif ours != theirs:
        problems.append(
            f"guest RAM differs: here {_regions(ours)}, at the source {_regions(theirs)}; "
            f"start the destination with the same memory backends"
        )
    facts = {key: p.fact(value) for key, value in here.facts.items()}
    for key, mine, other in _unequal(facts, offer.facts):
        problems.append(
            f"{key} differs: {mine} here, {other} at the source; start the destination as the "
            f"source was started"
        )
    places = {key: p.fact(value) for key, value in here.places.items()}
    for key, mine, other in _moved(places, offer.places):
        problems.append(
            f"{key} is at {mine} here, at {other} at the source; start the destination with "
            f"{other} for it"
        )
    return [*problems, *_disks(offered(here.disks), offer)]


def changes(was: Shape, now: Shape) -> list[str]:
    """What has changed in a VMM since it was offered."""
    news = [*now.problems]
    news += [one for one in (now.direct_io, now.untracked) if one and one not in _writes(was)]
    if [_where(region) for region in was.regions] != [_where(region) for region in now.regions]:
        news.append("its RAM is not what it was")
    for key, old, new in _unequal(was.facts, now.facts):
        news.append(_change(key, old, new))
    news += [f"{key} was at {old}, is at {new}" for key, old, new in _moved(was.places, now.places)]
    before, after = ({d.name: d for d in shape.disks} for shape in (was, now))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            old, new = _disk(before.get(name)), _disk(after.get(name))
            news.append(_change(f"disk {name}", old, new))
    return news


def _change(what: str, before: str, after: str) -> str:
    if before == NONE:
        return f"{what} is new ({after})"
    return f"{what} is gone ({before})" if after == NONE else f"{what} was {before}, is {after}"


def _writes(shape: Shape) -> tuple[str | None, str | None]:
    return shape.direct_io, shape.untracked


def _disks(ours: list[p.DiskOffer], offer: p.Offer) -> Iterator[str]:
    if offer.disks is None:
        if ours:
            yield (
                "the postcopyd at the source is too old to say what its disks are: upgrade it "
                "first, or nobody can see that they are the same as here"
            )
        return
    here, there = ({disk.name: disk for disk in disks} for disks in (ours, offer.disks))
    chains = ({name: disk.chain for name, disk in disks.items()} for disks in (here, there))
    for name, mine, other in _unequal(*chains):
        yield (
            f"disk {name} differs: {mine} here, {other} at the source; start the destination "
            f"with the disks that the source has now"
        )
    for name in sorted(here.keys() & there.keys()):
        if not offer.unsafe and here[name].chain == there[name].chain:
            yield from _files(name, here[name].files, there[name].files)


def _files(disk: str, ours: list[p.DiskFileOffer], theirs: list[p.DiskFileOffer]) -> Iterator[str]:
    if len(ours) != len(theirs):
        yield (
            f"disk {disk} is made of {len(ours)} files here and of {len(theirs)} at the source: "
            f"start the destination with the same, {INSIST}"
        )
        return
    for mine, other in zip(ours, theirs, strict=True):
        same = same_file(mine, other)
        if same is None and mine.writable and not (mine.shared and other.shared):
            yield (
                f"disk {disk} is on local storage, {_file(mine)} here and {_file(other)} at the "
                f"source, where each host has its own files: put it on storage that both hosts "
                f"share, {INSIST}"
            )
        elif same is False:
            yield (
                f"disk {disk} is another file here, {_file(mine)}, than {_file(other)} at the "
                f"source: start the destination with the same, {INSIST}"
            )


def same_file(mine: p.DiskFileOffer, other: p.DiskFileOffer) -> bool | None:
    """Whether two hosts have the same file, or the same content of a file that nobody writes to.
    None if nothing that both know of it tells."""
    kinds = mine.ids.keys() & other.ids.keys()
    if any(mine.ids[kind] == other.ids[kind] for kind in kinds):
        return True
    return False if kinds else None


def _unequal(ours: dict[str, str], theirs: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            yield key, ours.get(key, NONE), theirs.get(key, NONE)


def _moved(ours: dict[str, str], theirs: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Only what both name: facts tell what either side lacks, and older daemons name no places."""
    for key in sorted(ours.keys() & theirs.keys()):
        if ours[key] != theirs[key]:
            yield key, ours[key], theirs[key]


def _file(file: DiskFile | p.DiskFileOffer) -> str:
    return f"{file.path} ({file.where})"


def _disk(disk: Disk | None) -> str:
    if disk is None:
        return NONE
    return ", ".join([disk.chain, *(_file(file) for file in disk.files)])


def _where(region: Region) -> tuple[object, ...]:
    return (region.name, region.pages, region.page_size, region.address, region.offset)


def _regions(regions: list[tuple[str, int, int]]) -> str:
    return ", ".join(
        f"{name} {pages * size >> 20} MiB ({size >> 10} KiB pages)" for name, pages, size in regions
    )
