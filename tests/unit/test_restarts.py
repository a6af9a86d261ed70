# SPDX-License-Identifier: Apache-2.0
"""What a daemon that is started again does where something is not as it should be: a VMM that
answers late, a disk that was full, a copy that was kept. In the world of two fake hosts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import trio
from fake_vmm import FakeDriver
from session_faults import (
    Clock,
    full,
    goes_down,
    kill_both,
    kill_destination,
    kill_here,
    kill_source,
    world,
)
from session_world import Fault, FullStore, ToldEngine, World

from postcopyd.daemon import restart
from postcopyd.daemon.registry import SELDOM_S
from postcopyd.errors import PostcopydError
from postcopyd.records.store import StateNotWritten, Store
from postcopyd.vmm import Role, VmmTimeout


def answers_late(monkeypatch: pytest.MonkeyPatch, role: Role, name: str, times: int) -> None:
    """The VMM of this role, at this step of its driver, does not answer so often from now on."""
    real, left = getattr(FakeDriver, name), times

    async def step(driver: FakeDriver, *args: Any) -> Any:
        nonlocal left
        driver.life.check()
        if driver.vmm.role == role and left:
            left -= 1
            await trio.sleep(10)
            raise VmmTimeout("The VMM of web1 did not answer for 10 s")
        return await real(driver, *args)

    monkeypatch.setattr(FakeDriver, name, step)


# --- what passes with time is tried again --------------------------------------------------------

LATE: dict[str, tuple[str, Fault, Role, str]] = {
    "granted": ("<- progress", kill_source, "source", "inspect"),
    "granted, drained": ("source.finish", kill_here, "source", "finish"),
    "intent": ("source.save stopped", kill_here, "source", "rollback"),
    "arriving": ("<- serving", kill_destination, "destination", "release"),
    "loading": ("destination.load", kill_here, "destination", "end"),
    "owned": ("<- progress", kill_destination, "destination", "adopted"),
}


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("kind", LATE)
async def test_a_vmm_that_answers_late(
    kind: str, times: int, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each kind of restart a VMM that does not answer at first is asked again, and all ends as
    if it had."""
    point, fault, role, step = LATE[kind]

    def slows(made: World, reached: str) -> Any:
        answers_late(monkeypatch, role, step, times)
        return fault(made, reached)

    async with world(tmp_path, {point: slows}) as made:
        async with made.migrating():
            await trio.sleep(300)
        assert any(entry["event"] == "VM not restored" for entry in made.logs)
        await made.check()
        made.check_over()


async def test_a_late_vmm_is_not_called_ended(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that asks a destination whose VMM has loaded the guest, and is not reached again
    yet, has its guest back only once that VMM has ended."""
    connect = FakeDriver.connect.__func__
    late = False

    async def slow(cls: Any, name: str, socket: str) -> Any:
        if late and made.destination.vmm.socket == socket:
            raise VmmTimeout("The VMM of web1 did not answer for 10 s")
        return await connect(cls, name, socket)

    def slows(made: World, point: str) -> None:
        nonlocal late
        late = True
        kill_destination(made, point)

    monkeypatch.setattr(FakeDriver, "connect", classmethod(slow))
    async with world(tmp_path, {"-> grant": slows}) as made, made.migrating():
        await trio.sleep(60)
        assert (made.destination.vmm.state, made.destination.recorded()) == ("loaded", "loading")
        assert (made.source.vmm.state, made.source.recorded()) == ("stopped", "granted")
        late = False
        with trio.fail_after(200):
            await made.settled()
        assert (made.destination.vmm.state, made.destination.recorded()) == ("ended", "declined")
        assert (made.source.vmm.state, made.source.recorded()) == ("running", "held")
        assert made.guest.broken == []


async def test_a_whole_guest_that_has_not_run_is_run(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest whose pages are all here when the daemon is started, and of which it is not known
    whether it runs, is run by its source's asking: that it is drained would leave it stopped."""
    settle = ToldEngine.settle

    def whole(engine: ToldEngine) -> None:
        settle(engine)
        while not engine.complete:
            time.sleep(0.001)

    monkeypatch.setattr(ToldEngine, "settle", whole)
    faults: dict[str, Fault] = {"destination.run": kill_destination}
    async with world(tmp_path, faults) as made:
        await made.migrate(mode="precopy", max_downtime_ms=1e6)
        await made.check()
        made.check_over()
        assert made.destination.vmm.state == "running"


async def test_a_held_guest_is_attached_later(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is the VMM of a guest that is in no migration, and what is shown of it is as before."""
    connect = FakeDriver.connect.__func__
    left = 3

    async def slow(cls: Any, name: str, socket: str) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise VmmTimeout("The VMM of web1 did not answer for 10 s")
        return await connect(cls, name, socket)

    async with world(tmp_path, {}) as made:
        before = made.source.vm.status
        monkeypatch.setattr(FakeDriver, "connect", classmethod(slow))
        made.source.kill()
        await trio.sleep(2)
        assert "did not answer" in made.source.vm.status.message
        await trio.sleep(100)
        assert made.source.vm.driver is not None
        assert made.source.vm.status == before


async def test_recover_asks_a_late_vmm_at_once(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`recover` says nothing untrue of a VMM that answers late, and has it asked at once, and the
    destination at the address that is given, also after another restart."""

    def slows(made: World, point: str) -> None:
        answers_late(monkeypatch, "source", "inspect", 12)
        kill_source(made, point)

    async with world(tmp_path, {"<- progress": slows}) as made:
        async with made.migrating():
            await trio.sleep(300)
            assert made.source.phase == "paused"
            made.down = True
            await made.source.daemon.recover("web1", "127.0.0.1:9")
            assert made.source.vm.status.peer == "127.0.0.1:9"
            assert made.source.store.intents()["web1"]["peer"] == "127.0.0.1:9"
            await asks_again(made)
            made.source.kill()
            await asks_again(made)
            assert made.source.vm.status.peer == "127.0.0.1:9"
            assert made.source.session.migration.peer.to == "127.0.0.1:9"
            made.down = False
            await made.source.daemon.recover("web1", made.to)
            with trio.fail_after(1000):
                await made.settled()
        made.check_over()


async def asks_again(made: World) -> None:
    """The source's daemon has its VMM, and asks where the guest is."""
    with trio.fail_after(1000):
        while made.source.session is None or made.source.session._recovery is None:
            await trio.sleep(0.1)
    await trio.sleep(1)


async def test_recover_while_it_is_taken_up(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address that a person gives is used, whatever goes on while it is written to disk."""
    redirect = Store.redirect_intent

    def slows(made: World, point: str) -> None:
        answers_late(monkeypatch, "source", "inspect", 4)
        kill_source(made, point)

    async def taken_up() -> None:
        made.source.daemon.restore.__self__.again(made.source.vm).set()
        await asks_again(made)

    def slow(store: Store, name: str, peer: str) -> None:
        redirect(store, name, peer)
        trio.from_thread.run(taken_up)

    async with world(tmp_path, {"<- progress": slows}) as made:
        async with made.migrating():
            monkeypatch.setattr(Store, "redirect_intent", slow)
            with trio.fail_after(1000):
                while sum(entry["event"] == "VM not restored" for entry in made.logs) < 1:
                    await trio.sleep(1)
            made.down = True
            await made.source.daemon.recover("web1", "127.0.0.1:9")
            assert made.source.session.migration.peer.to == "127.0.0.1:9"
            made.down = False
            monkeypatch.undo()
            await made.source.daemon.recover("web1", made.to)
            with trio.fail_after(1000):
                await made.settled()
        made.check_over()


async def test_a_bug_once_it_is_done(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that a restart has run again is in no migration, also where a bug follows that: who
    has to decide about it could only end it."""

    async def then_broken(*args: Any) -> None:
        await restart.run_again(*args)
        raise ValueError("a bug")

    rows = [row._replace(do=then_broken) if row.do is restart.run_again else row
            for row in restart.FOUND]  # fmt: skip
    monkeypatch.setattr(restart, "FOUND", rows)
    async with world(tmp_path, {"source.save stopped": kill_here}) as made:
        async with made.migrating():
            await trio.sleep(100)
        assert any(entry["event"] == "VM not restored" for entry in made.logs)
        assert made.source.vmm.state == "running"
        assert (made.source.recorded(), made.source.phase) == ("held", "failed")
        await made.source.daemon.detach("web1")


async def test_a_person_decides_while_it_is_tried(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that was given up is not taken up again, when its VMM answers at last."""

    def slows(made: World, point: str) -> None:
        answers_late(monkeypatch, "destination", "adopted", 8)
        kill_destination(made, point)

    async with world(tmp_path, {"<- progress": slows}) as made, made.migrating():
        await trio.sleep(13)
        made.guest.given_up = True
        await made.destination.daemon.resolve("web1", "kill")
        await trio.sleep(1000)
        assert made.destination.phase == "failed"
        assert made.destination.recorded() == "declined"
        assert made.destination.vmm.state == "ended"


# --- a copy that is kept -------------------------------------------------------------------------


async def test_a_kept_source_outlives_restarts(tmp_path: Path, clock: Clock) -> None:
    """With --keep-source the VMM stays, stopped and attached, however often the daemon is started;
    and when it ends, that is noticed."""
    async with world(tmp_path, {}) as made:
        await made.migrate(keep_source=True)
        told = made.source.vm.status.message
        for _ in range(3):
            made.source.kill()
            await trio.sleep(10)
            assert made.source.up
            assert made.source.vm.driver is not None
            assert (made.source.phase, made.source.vm.status.message) == ("drained", told)
        made.source.vmm.die()
        await trio.sleep(10)
        assert made.source.up
        assert made.source.vm.driver is None


async def test_what_the_guest_did_is_not_forgotten(tmp_path: Path, clock: Clock) -> None:
    """A guest that ran before the handover is run when it is taken back, however often the daemon
    was started meanwhile; its VMM, which is stopped, is not asked."""
    faults: dict[str, Fault] = {"<- progress": kill_source, "<- progress#2": goes_down}
    async with world(tmp_path, faults) as made, made.migrating():
        for _ in range(3):
            await trio.sleep(20)
            assert made.source.store.load()["web1"]["about"]["run"]
            made.source.kill()
        made.kill("destination")
        made.destination._again = False
        made.guest.given_up = True
        made.destination.vmm.die()
        await trio.sleep(20)
        await made.source.daemon.resolve("web1", "take_back")
        assert made.source.vmm.state == "running"


# --- a disk that is full -------------------------------------------------------------------------


@pytest.mark.parametrize("killed", [False, True])
async def test_source_is_full_at_drained(killed: bool, tmp_path: Path, clock: Clock) -> None:
    """By the record from before the VMM here is needed still: it goes once that it is not is on
    record, and a daemon that is started meanwhile finds out by it, without a person."""
    async with world(tmp_path, {"source.record granted#3": full}) as made, made.migrating():
        await trio.sleep(SELDOM_S)
        assert (made.source.phase, made.source.vmm.state) == ("drained", "stopped")
        assert "until that is on record" in made.source.vm.status.message
        assert made.result["event"] == "completed"
        if killed:
            made.source.kill()
            await trio.sleep(SELDOM_S)
        made.source.store.full = False
        with trio.fail_after(10 * SELDOM_S):
            while made.source.vmm.state != "ended" or made.source.vm.unwritten:
                await trio.sleep(1)
        assert made.source.phase == "drained"
        assert made.source.recorded() == "granted"
        assert "until that is on record" not in made.source.vm.status.message
        assert made.guest.broken == []


async def test_full_while_the_daemon_ends(tmp_path: Path, clock: Clock) -> None:
    """A session that ends last of all, and cannot write its record, leaves that to the next
    daemon."""
    async with world(tmp_path, {}) as made:
        vm = made.destination.vm
    vm.owing()


async def test_full_at_drained(tmp_path: Path, clock: Clock) -> None:
    """A record that cannot be written at drained is written when it can be; until then nothing
    goes that a daemon that is started needs to see that the guest is whole."""
    async with world(tmp_path, {"destination.record held": full}) as made:
        await made.migrate()
        assert made.destination.phase == "drained"
        assert made.destination.recorded() == "owned"
        made.destination.store.full = False
        await trio.sleep(2 * SELDOM_S)
        assert made.destination.recorded() == "held"
        await made.check()
        made.check_over()
        assert not made.destination.vmm.registered()
        assert made.destination.vmm.uffd < 0
        assert not (made.destination.store.directory / "web1.pages").exists()


@pytest.mark.parametrize("left", ["both", "record", "userfaultfd", "neither"])
async def test_full_at_drained_then_a_restart(left: str, tmp_path: Path, clock: Clock) -> None:
    """After it a guest that is whole is drained: also where an older version has taken away what
    shows that."""
    async with world(tmp_path, {"destination.record held": full}) as made:
        await made.migrate()
        pages = made.destination.store.directory / "web1.pages"
        kept = pages.read_bytes()
        made.destination.kill()
        if left in ("record", "neither"):
            made.destination.vmm.let_go()
        if left in ("userfaultfd", "neither"):
            pages.unlink()
        await trio.sleep(100)
        if left == "userfaultfd":  # which alone prove nothing
            assert "the page record of web1 is gone" in made.destination.vm.status.message
            pages.write_bytes(kept)  # for the next attempt
            await trio.sleep(2 * SELDOM_S)
        assert made.destination.vm.status.message == "web1 is here, with all of its memory"
        assert made.destination.recorded() == "held"
        assert made.destination.vmm.state == "running"
        assert made.destination.vmm.memory() == made.source.vmm.memory()


async def test_userfaultfds_that_are_gone(tmp_path: Path, clock: Clock) -> None:
    """A guest that lacks pages, and whose userfaultfds somebody has closed, is not called whole."""

    def closed(made: World, point: str) -> None:
        made.destination.vmm.let_go()
        kill_both(made, point)

    async with world(tmp_path, {"<- progress": closed}) as made, made.migrating():
        await trio.sleep(60)
        assert made.destination.phase == "paused"
        assert "do not trust its guest" in made.destination.vm.status.message
        assert made.source.phase == "paused"


@pytest.mark.parametrize("role", ["source", "destination"])
async def test_full_when_called_off(role: Role, tmp_path: Path, clock: Clock) -> None:
    """What could not be recorded of a migration that went back is, once there is room."""
    word, before = ("held", "intent") if role == "source" else ("declined", "loading")

    def at_its_end(made: World, point: str) -> None:
        made.faults[f"{role}.record {word}"] = full
        made.cancel()

    async with world(tmp_path, {"source.save sent": at_its_end}) as made:
        await made.migrate()
        assert made.hosts[role].recorded() == before
        made.hosts[role].store.full = False
        await trio.sleep(2 * SELDOM_S)
        assert made.hosts[role].recorded() == word


@pytest.mark.parametrize("point", ["source.save stopped", "<- progress"])
@pytest.mark.parametrize("older", [False, True])
async def test_a_guest_stopped_by_a_version_that_left_no_mark(
    older: bool, point: str, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a guest was stopped by us the record says, of such a version alone. That is settled
    once: from then on others may have a hand on it."""
    save, marked = FullStore.save, 0

    def unmarked(store: FullStore, name: str, record: Any, **options: Any) -> None:
        about = {key: value for key, value in record["about"].items() if key != "marked"}
        save(store, name, {**record, "about": about}, **options)

    async def mark(driver: FakeDriver) -> None:
        nonlocal marked
        marked += 1

    def upgraded(made: World, point: str) -> None:
        monkeypatch.setattr(FullStore, "save", save)
        kill_source(made, point)

    monkeypatch.setattr(FakeDriver, "mark", mark)
    if older:
        monkeypatch.setattr(FullStore, "save", unmarked)
    async with world(tmp_path, {point: upgraded}) as made:
        async with made.migrating():
            await trio.sleep(60)
        await made.check()
    assert marked == older


async def test_a_void_intent_and_the_next_one(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An intent that could not be removed is removed later, but not the one of the next migration,
    which has taken its place by then."""
    forget = FullStore.forget_intent

    def fails(store: FullStore, name: str) -> None:
        raise StateNotWritten("removing it: Read-only file system")

    async def in_time(made: World, point: str) -> None:
        monkeypatch.setattr(FullStore, "forget_intent", forget)
        await trio.sleep(2 * SELDOM_S)

    def cancelled(made: World, point: str) -> None:
        monkeypatch.setattr(FullStore, "forget_intent", fails)
        made.cancel()

    faults: dict[str, Fault] = {"source.prepare": cancelled, "source.save": in_time}
    async with world(tmp_path, faults) as made:
        await made.migrate()
        assert made.source.vm.void
        assert made.source.phase == "failed"
        await made.migrate()
        assert made.source.phase == "drained"
        assert "web1" in made.source.store.intents()


# --- attach and detach ---------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
async def test_attach_races_detach(
    again: bool, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VM that is detached while it is attached anew is attached, and whoever watches it sees it;
    one that was attached again meanwhile is not attached twice."""
    connect = FakeDriver.connect.__func__

    async def slow(cls: Any, name: str, socket: str) -> Any:
        await trio.sleep(2)
        return await connect(cls, name, socket)

    async with world(tmp_path, {}) as made:
        running = made.source.daemon
        await made.source.vm.leave()  # as when its VMM has ended
        monkeypatch.setattr(FakeDriver, "connect", classmethod(slow))
        refused = []

        async def attach() -> None:
            try:
                await running.attach("web1", "process", made.source.vmm.socket)
            except PostcopydError as error:
                refused.append(error.name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(attach)
            await trio.sleep(1)
            await running.detach("web1")
            if again:
                nursery.start_soon(attach)
        assert refused == ["AlreadyAttached"] * again
        assert made.source.vm.driver is not None
        assert made.source.store.load()["web1"]["ownership"] == "held"
        async with running.watch("web1") as states:
            with trio.move_on_after(5) as watching:
                async for _ in states:
                    pass
        assert watching.cancelled_caught


async def test_attach_once_the_vmm_has_ended(tmp_path: Path, clock: Clock) -> None:
    """Who has seen a VMM end may attach the next one, though the daemon has not seen it yet."""
    async with world(tmp_path, {}) as made:
        vm, vmm = made.source.vm, made.source.vmm
        assert vm.attachment is not None
        vm.attachment = vm.attachment._replace(started=0)
        assert vm.attachment.ended()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.source.daemon.attach, "web1", "process", vmm.socket)
            await trio.sleep(1)
            assert vm.driver is not None
            vmm.gone.set()
        assert not vm.attachment.ended()


async def test_one_vmm_has_one_name(tmp_path: Path, clock: Clock) -> None:
    """A second name for a VMM is refused, by the same socket and by another one; when the first is
    detached it may be had."""
    async with world(tmp_path, {}) as made:
        running, vmm = made.source.daemon, made.source.vmm
        vmm.at["/fake/second"] = vmm
        for socket in (vmm.socket, "/fake/second"):
            with pytest.raises(PostcopydError, match="is attached already as web1") as caught:
                await running.attach("web2", "process", socket)
            assert caught.value.name == "AlreadyAttached"
        assert [*running.vms] == ["web1"]
        await running.detach("web1")
        await running.attach("web2", "process", "/fake/second")
        await running.detach("web2")
        await running.attach("web1", "process", vmm.socket)
        del vmm.at["/fake/second"]


async def test_one_vmm_has_one_daemon(tmp_path: Path, clock: Clock) -> None:
    """A VMM that one daemon has is refused to another with folders of its own."""
    async with world(tmp_path, {}) as made:
        with pytest.raises(PostcopydError, match="one VMM has one"):
            await made.destination.daemon.attach("web2", "process", made.source.vmm.socket)
        await made.source.daemon.detach("web1")
        await made.destination.daemon.attach("web2", "process", made.source.vmm.socket)
        await made.destination.daemon.detach("web2")
        await made.source.daemon.attach("web1", "process", made.source.vmm.socket)
