# SPDX-License-Identifier: Apache-2.0
"""A daemon that knows nothing of a guest: its word counts only where it is the one that the guest
was granted to, or where that one's machine has restarted. Any other would have a guest run twice.
Partly in the world of two fake hosts."""

from __future__ import annotations

import errno
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import trio
from msgspec.structs import replace
from session_faults import Clock, goes_down, world
from session_world import Instead, World

from postcopyd import protocol as p
from postcopyd.errors import PostcopydError
from postcopyd.net.codec import parse_message
from postcopyd.records import identity, store
from postcopyd.records.store import Store
from postcopyd.source.granted import Granted

THERE = p.DaemonId("machine of destination", "boot of destination", "-")
OTHERS = {
    "another host": p.DaemonId("machine of another", "boot of another", "-"),
    "another --state-dir": THERE,
    "a container beside it": replace(THERE, machine="machine of a container"),
    "a machine without an id": p.DaemonId("", "boot of another", "-"),
    "an older daemon": None,
}


async def answers_instead(made: World, which: p.DaemonId | None, folder: Path) -> Path:
    """Another daemon answers where the destination's did, with records of its own; whose folder
    that was."""
    there = made.destination
    before, there._folder, there.which = there._folder, folder, which
    there.kill()
    made.down = False
    await trio.sleep(60)
    assert there.up
    return before


async def not_taken_back(made: World) -> str:
    """Nobody has the source run its guest; what a person is told who tries."""
    with pytest.raises(PostcopydError, match="not known to be dead") as caught:
        await made.source.daemon.resolve("web1", "take_back")
    assert (made.source.vmm.state, made.source.recorded()) == ("stopped", "granted")
    assert made.destination.vmm.state == "running"
    assert made.guest.broken == []
    return str(caught.value)


# --- whose word counts ---------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("kind", OTHERS)
async def test_another_daemon(kind: str, restarts: bool, tmp_path: Path, clock: Clock) -> None:
    """A daemon that was not granted the guest knows nothing of it, and nobody takes it back for
    that, also not after a restart of the source; once the right one answers, it goes on."""
    async with world(tmp_path, {"<- progress": goes_down}) as made, made.migrating():
        await made.paused_there()
        right = await answers_instead(made, OTHERS[kind], tmp_path / "another")
        if restarts:
            made.source.kill()
            await trio.sleep(60)
        told = made.source.vm.status.message
        assert "knows nothing of web1 does not say that web1 runs nowhere" in told
        assert ("start that with the --state-dir" in told) is (kind == "another --state-dir")
        assert "was granted to the postcopyd of" in await not_taken_back(made)
        await answers_instead(made, THERE, right)
        await made.settled()
        await made.check()
        made.check_over()
        assert made.source.phase == "drained"


async def test_its_machine_has_restarted(tmp_path: Path, clock: Clock) -> None:
    """After a restart of its machine nothing is left of the guest there, and its records are gone
    with it: a person may take it back."""
    async with world(tmp_path, {"<- progress": goes_down}) as made, made.migrating():
        await made.paused_there()
        made.guest.given_up = True
        made.destination.vmm.die()
        await answers_instead(made, replace(THERE, boot="the next"), tmp_path / "empty")
        assert "no VM web1 is attached" in made.source.vm.status.message
        await made.source.daemon.resolve("web1", "take_back")
        assert (made.source.vmm.state, made.source.recorded()) == ("running", "held")


async def test_its_record_was_removed(tmp_path: Path, clock: Clock) -> None:
    """The daemon that was granted, by its folder of records, is believed that it knows nothing."""
    async with world(tmp_path, {"<- progress": goes_down}) as made, made.migrating():
        await made.paused_there()
        made.guest.given_up = True
        made.destination.vmm.die()
        made.destination.store.remove("web1")
        await answers_instead(made, THERE, made.destination._folder)
        await made.source.daemon.resolve("web1", "take_back")
        assert (made.source.vmm.state, made.source.recorded()) == ("running", "held")


@pytest.mark.parametrize("older", ["its hello", "the record"])
async def test_older_versions(older: str, tmp_path: Path, clock: Clock) -> None:
    """Of a destination that did not say which daemon it is, and of a migration that an older
    version has begun, nobody can tell: a person's word counts, as it did."""

    def silent(made: World, point: str) -> Instead:
        return Instead(p.Hello(p.VERSION))

    faults: dict[str, Any] = {"<- progress": goes_down}
    if older == "its hello":
        faults["<- hello"] = silent
    async with world(tmp_path, faults) as made, made.migrating():
        await made.paused_there()
        if older == "the record":
            without_granted(made, made.source.store.directory / "web1.json")
            made.source.kill()
        made.guest.given_up = True
        made.destination.vmm.die()
        await answers_instead(made, THERE, tmp_path / "another")
        await made.source.daemon.resolve("web1", "take_back")
        assert (made.source.vmm.state, made.source.recorded()) == ("running", "held")


async def test_older_record_learns_who_has_it(tmp_path: Path, clock: Clock) -> None:
    """A migration that an older version has begun: once its destination has gone on with it, no
    other daemon's word counts any more."""
    faults = {"<- progress": goes_down, "<- progress#2": goes_down}
    async with world(tmp_path, faults) as made, made.migrating():
        await made.paused_there()
        without_granted(made, made.source.store.directory / "web1.json")
        made.source.kill()
        await trio.sleep(60)
        made.down = False
        with trio.fail_after(100):
            while not made.went["<- progress#2"]:
                await trio.sleep(0.1)
        await made.paused_there()
        await answers_instead(made, OTHERS["another host"], tmp_path / "another")
        await not_taken_back(made)
        made.guest.given_up = True


def without_granted(made: World, path: Path) -> None:
    """As a version wrote it that did not know which daemon it speaks with."""
    record = json.loads(path.read_bytes().partition(b" ")[2])
    del record["about"]["granted"]
    body = json.dumps(record, sort_keys=True).encode()
    path.write_bytes(b"%08x %s\n" % (zlib.crc32(body), body))


@pytest.mark.parametrize("knows", [True, False])
async def test_a_wrong_address_that_is_silent(knows: bool, tmp_path: Path, clock: Clock) -> None:
    """Nobody answers at the address that a person has said, and the destination is alive where it
    always was: it is not taken for dead."""
    faults: dict[str, Any] = {"<- progress": goes_down}
    if not knows:
        faults["<- hello"] = lambda made, point: Instead(p.Hello(p.VERSION))
    async with world(tmp_path, faults) as made, made.migrating():
        await made.paused_there()
        await made.source.daemon.recover("web1", "127.0.0.1:9")
        await trio.sleep(60)
        made.down = False
        assert f"`postcopyd recover web1 --to {made.to}` asks it there" in await not_taken_back(
            made
        )
        await made.source.daemon.recover("web1", made.to)
        await made.settled()
        await made.check()
        made.check_over()


async def test_a_source_that_has_restarted_is_told(tmp_path: Path, clock: Clock) -> None:
    """A host that has nothing but the intent shows what another daemon says, and that it is one."""
    async with world(tmp_path, {"<- progress": goes_down}) as made, made.migrating():
        await made.paused_there()
        there, source = made.destination, made.source
        intent = source.store.intents()["web1"]
        assert intent["granted"]["at"] == made.to
        source.store._path("web1", "json").unlink()
        source.vmm.die()
        source.kill()
        there._folder, there.which = tmp_path / "another", OTHERS["another host"]
        there.kill()
        made.guest.given_up = True
        made.down = False
        await trio.sleep(10)
        await there.daemon.attach("web1", "process", there.vmm.socket)
        await trio.sleep(30)
        message = source.vm.status.message
        assert "says: it knows web1, and not of this move (and web1 was granted to" in message


def test_would_know() -> None:
    """Within a boot the folder of records tells, as containers share the boot; from then on the
    machine."""
    granted = Granted("host2", "host2", p.DaemonId("m", "b", "s"))

    def knows(machine: str, boot: str, state: str) -> bool:
        return granted.would_know(Granted("x", "x", p.DaemonId(machine, boot, state)))

    assert knows("m", "b", "s")
    assert knows("another container's", "b", "s")
    assert not knows("m", "b", "another")
    assert knows("m", "the next", "s")
    assert knows("m", "the next", "another")
    assert not knows("another", "another", "s")
    unnamed = Granted("host2", "host2", p.DaemonId("", "b", "s"))
    assert not unnamed.would_know(Granted("x", "x", p.DaemonId("", "another", "s")))


# --- what a daemon says of itself ----------------------------------------------------------------


def test_made_once(tmp_path: Path) -> None:
    """The same at each start with the same folder, another in another one."""
    first = identity.here(Store(tmp_path / "a"))
    assert identity.here(Store(tmp_path / "a")) == first
    other = identity.here(Store(tmp_path / "b"))
    assert (other.machine, other.boot) == (first.machine, first.boot)
    assert other.state != first.state


def test_a_torn_one_is_made_anew(tmp_path: Path) -> None:
    """What cannot be read is replaced."""
    made = Store(tmp_path)
    (tmp_path / "daemon-id").write_bytes(b"")
    assert made.identity() == made.identity() != ""


def test_one_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full keeps no daemon from starting; it is another one each time."""
    made = Store(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "_replace", full)
    assert identity.here(made).state != identity.here(made).state


def test_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the machine's id and the hardware's; neither goes over the network, and who has no id
    says none."""
    installed, hardware = tmp_path / "machine-id", tmp_path / "product_uuid"
    monkeypatch.setattr(identity, "MACHINE_ID", installed)
    monkeypatch.setattr(identity, "PRODUCT_UUID", hardware)
    assert identity.machine() == ""
    installed.write_text("0123456789abcdef0123456789abcdef\n")
    alone = identity.machine()
    assert len(alone) == 32
    assert "0123456789" not in alone
    hardware.write_text("a copy of this disk runs on other hardware\n")
    assert identity.machine() not in ("", alone)
    installed.write_text("")  # as in an image for containers
    assert identity.machine() == ""


def test_hello_of_an_older_daemon() -> None:
    """A hello without it is one; with it, one that an older daemon reads."""
    assert parse_message({"type": "hello", "version": 1}).daemon is None
    known = parse_message({"type": "hello", "version": 1, "daemon": {
        "machine": "", "boot": "b", "state": "s", "more": 1}})  # fmt: skip
    assert isinstance(known, p.Hello)
    assert known.daemon == p.DaemonId("", "b", "s")
