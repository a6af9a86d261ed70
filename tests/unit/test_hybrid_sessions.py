# SPDX-License-Identifier: Apache-2.0
"""Whether a guest can be lost or show an old page: every fault at every step that passes add to a
migration (test_sessions.py), and the others with a guest that was copied while it ran."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from fake_vmm import PAGE, PAGES, FakeVmm
from postcopyd._native import lib
from session_faults import (
    Clock,
    cancel,
    cut,
    cut_data,
    destination_says_error,
    error,
    grant,
    hanging,
    kill_both,
    kill_destination,
    kill_receiver,
    kill_sender,
    kill_source,
    last,
    migrated,
    no_room,
    refusing,
    silence,
    source_dies,
    source_says_error,
    stop_here,
    torn,
    world,
    wrong,
)
from session_world import LONG_S, Fault, Instead, World
from test_sessions import ANYWHERE

from postcopyd import protocol as p
from postcopyd.host import procfs
from postcopyd.source import passes
from postcopyd.source.engine import Look, SourceEngine
from postcopyd.vmm import VmmError

PASSES = [
    "source.track",
    "-> pass",
    "<- passed",
    "-> pass#2",
    "<- passed#2",
    "source.prepare",
    "-> handover",
    "source.save stopped",
    "-> stale",
    "-> stale#2",
    "-> deviceEnd",
]
"""What passes add to a migration, in order, among some that are there anyway."""

STILL = ["source.record intent", "source.still", "source.still done", "source.record held"]
"""What direct I/O adds before each pass."""

EMPTY = [bytes(24 * 4096), bytes(8 * 4096)]

LATER = [
    "<- loaded",
    "source.record granted",
    "destination.record owned",
    "destination.run",
    "<- ran",
    "<- progress",
    "destination.unregister",
    "<- drained",
]


@pytest.fixture
def clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A guest that writes some pages between the passes, of which there are two."""
    monkeypatch.setattr(passes, "SHORT_S", -1)
    look = SourceEngine.look
    looks: dict[SourceEngine, int] = {}

    async def look_and_write(engine: SourceEngine, how: Look = Look.ONLY) -> int:
        looks[engine] = looks.get(engine, 0) + 1
        if looks[engine] in (2, 4):  # behind a pass
            for vmm in FakeVmm.at.values():
                if vmm.role == "source" and vmm.state == "running":
                    vmm.write()
        return await look(engine, how)

    monkeypatch.setattr(SourceEngine, "look", look_and_write)
    return clock


async def hybrid(folder: Path, faults: dict[str, Fault], **options: Any) -> World:
    return await migrated(folder, faults, mode="hybrid", precopy_passes=2, **options)


async def test_clean(tmp_path: Path, clock: Clock) -> None:
    """All of it is passed, and the result says what was done."""
    made = await hybrid(tmp_path, {})
    assert set(PASSES) - set(made.went) == set()
    result = made.result
    assert result["mode"] == "hybrid"
    memory = result["memory"]
    # 10 pages of data, then the 5 that were written, one of them a hole before.
    assert [one["pages"] for one in result["passes"]] == [10, 5]
    assert [one["dirtyPages"] for one in result["passes"]] == [5, 5]
    assert memory["dirtyPages"] == 4 + 5
    assert memory["pushedPages"] + memory["urgentPages"] == 4
    assert result["handedOver"]
    assert "warning" not in result


@pytest.mark.parametrize("point", PASSES)
@pytest.mark.parametrize("fault", ANYWHERE, ids=lambda fault: fault.__name__)
async def test_anything_breaks_anywhere(
    fault: Fault, point: str, tmp_path: Path, clock: Clock
) -> None:
    """Whatever breaks between or under the daemons, at whatever step, no guest is lost."""
    made = await hybrid(tmp_path, {point: fault})
    if fault not in (cut_data, source_dies):
        assert made.source.vmm.state == "running" or made.source.phase == "drained"


@pytest.mark.parametrize("point", LATER)
@pytest.mark.parametrize(
    "fault", [cut, kill_source, kill_destination, kill_both], ids=lambda fault: fault.__name__
)
async def test_later_steps(fault: Fault, point: str, tmp_path: Path, clock: Clock) -> None:
    """After the passes a guest that was copied is lost no more than one that was not."""
    await hybrid(tmp_path, {point: fault})


@pytest.mark.parametrize("point", [point for point in PASSES if point[:2] in ("->", "<-")])
@pytest.mark.parametrize(
    "fault",
    [error, wrong, torn, last, grant, kill_sender, kill_receiver],
    ids=lambda fault: fault.__name__,
)
async def test_another_message(fault: Fault, point: str, tmp_path: Path, clock: Clock) -> None:
    """Whatever arrives instead of a message, and then nothing, the guest runs at the source."""
    made = await hybrid(tmp_path, {point: fault})
    if fault is not kill_receiver:  # who may have gone on meanwhile
        assert made.source.vmm.state == "running"


@pytest.mark.parametrize(
    "message",
    [p.Pass(9), p.Pass(11), p.Pass(2**63 - 1)],
    ids=["fewer", "more", "many more"],
)
async def test_passes_are_counted(message: p.Pass, tmp_path: Path, clock: Clock) -> None:
    """A source that has sent other pages than it says is refused, or waits until it cancels."""

    def other(made: World, point: str) -> Instead:
        made.later(made.cancel)
        passed = made.destination.engine.stats
        return Instead(message, when=lambda: passed.passed_pages == 10)

    async with world(tmp_path, {"-> pass": other}) as made:
        await made.migrate(mode="hybrid")
        await made.check()
        assert made.source.vmm.state == "running"
        assert made.destination.vmm.memory() == EMPTY


@pytest.mark.parametrize(
    "message",
    [
        p.Stale(2, 0, 8, b"\xff"),
        p.Stale(0, 24, 8, b"\xff"),
        p.Stale(0, 0, 2**19, bytes(2**16)),
        p.Stale(0, 2**63 - 1, 8, b"\xff"),
        p.Stale(0, 0, 8, b"\xff\xff"),
    ],
    ids=["region", "beyond", "too many", "far beyond", "bits"],
)
async def test_stale_pages_that_are_not(message: p.Stale, tmp_path: Path, clock: Clock) -> None:
    """Pages that the guest has not are refused, and it runs on at the source."""
    made = await hybrid(tmp_path, {"-> stale": lambda made, point: Instead(message)})
    assert made.source.vmm.state == "running"


@pytest.mark.parametrize("point", [*PASSES[:6], "source.save"])
async def test_cancel(point: str, tmp_path: Path, clock: Clock) -> None:
    """A cancel in any pass: the guest never stops here, and there nothing is left of it."""
    async with world(tmp_path, {point: cancel}) as made:
        await made.migrate(mode="hybrid", precopy_passes=2)
        await made.check()
        assert made.result["event"] == "cancelled"
        assert not made.source.vmm.registered()  # its writes are not seen any more
        if point != "source.save":
            assert made.destination.vmm.state == "incoming"
            assert made.destination.vmm.memory() == EMPTY


async def test_again_after_a_pass(tmp_path: Path, clock: Clock) -> None:
    """The next attempt after one that failed in a pass goes well."""
    async with world(tmp_path, {"<- passed": cut, "-> pass#2": cut}) as made:
        for phase in ("failed", "failed", "drained"):
            await made.migrate(mode="hybrid", precopy_passes=2)
            await made.check()
            assert made.destination.phase == phase
            assert not made.source.vmm.registered()


@pytest.mark.parametrize(
    "point",
    ["<- passed", "<- passed#2", "source.prepare", "-> handover",
     "source.save", "source.save stopped", "-> stale", "-> stale#2", "-> deviceEnd"],
)  # fmt: skip
async def test_the_world_stops(point: str, tmp_path: Path, clock: Clock) -> None:
    """At every step of the passes: a page that would not be named as old is the same, byte by byte,
    on both hosts."""
    compared = []

    def compare(made: World, point: str) -> None:
        engine = made.source.engine
        engine.must(lib.pc_source_look(engine.handle, lib.PC_LOOK_ONLY), "looking")
        here, there = made.source.vmm.memory(), made.destination.vmm.memory()
        for region, pages in enumerate(PAGES):
            bits = engine.stale(region, 0, pages) or bytes(pages)
            for page in range(pages):
                old = bits[page // 8] >> page % 8 & 1
                at = slice(page * PAGE, (page + 1) * PAGE)
                if not old:
                    assert here[region][at] == there[region][at], (region, page)
                compared.append(old)

    await hybrid(tmp_path, {point: compare})
    assert len(compared) == sum(PAGES)
    assert sum(compared) < sum(PAGES) / 2


# --- recovery ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "point", ["-> resume", "<- ready#2", "<- ran#2", "<- have", "<- serving#2", "<- drained"]
)
@pytest.mark.parametrize(
    "fault", [cut, silence, kill_source, kill_destination, kill_both], ids=lambda f: f.__name__
)
async def test_recovery(fault: Fault, point: str, tmp_path: Path, clock: Clock) -> None:
    """What came in passes counts as there, also for a daemon that was started again."""
    made = await hybrid(tmp_path, {"<- progress": cut, point: fault})
    assert made.destination.phase == "drained"


async def test_guest_ram_is_not_found_again(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the file that pages were staged in nothing is placed: the guest waits, it does not
    see what the file has of before."""

    def kill(made: World, point: str) -> None:
        monkeypatch.setattr(procfs, "mappings", lambda pid: [])
        kill_destination(made, point)

    made = await hybrid(tmp_path, {"<- progress": kill}, patience=40, sticks=True)
    assert made.destination.phase == "paused"
    assert "does not map the file of guest RAM ram0" in made.destination.vm.status.message


# --- direct I/O ----------------------------------------------------------------------------------


async def direct(folder: Path, faults: dict[str, Fault]) -> World:
    async with world(folder, faults) as made:
        made.source.vmm.direct_io = "its disk is read by direct I/O"
        await made.migrate(mode="hybrid", precopy_passes=2)
        assert all(made.went[point] for point in faults)
        await made.check()
        made.check_over()
    return made


async def test_direct_io(tmp_path: Path, clock: Clock) -> None:
    """Pages are armed only while the guest is still; all that was written since is named."""
    made = await direct(tmp_path, {})
    assert made.went[STILL[1]] == made.went[STILL[2]] > 0  # on a busy machine one was long enough
    assert made.result["tracking"]["stoppedMs"] > 0


@pytest.mark.parametrize("point", STILL)
@pytest.mark.parametrize(
    "fault",
    [*ANYWHERE, cancel, source_says_error, destination_says_error],
    ids=lambda fault: fault.__name__,
)
async def test_still_breaks(fault: Fault, point: str, tmp_path: Path, clock: Clock) -> None:
    """Whatever happens around a guest that was stopped for a moment, it runs again."""
    made = await direct(tmp_path, {point: fault})
    if fault is not source_dies:
        assert made.source.vmm.state == "running" or made.source.phase == "drained"


@pytest.mark.parametrize("error", [VmmError("it does not run"), RuntimeError("a bug")])
async def test_still_leaves_the_guest_stopped(
    error: Exception, tmp_path: Path, clock: Clock
) -> None:
    """A guest that was not run again after a moment is run by what undoes the migration."""
    made = await direct(tmp_path, {"source.still over": refusing(error)})
    assert made.source.vmm.state == "running"
    assert made.source.phase == "failed"


async def test_a_guest_that_is_paused_meanwhile(tmp_path: Path, clock: Clock) -> None:
    """Whether the guest is to run is as it was last seen, not as it was at the beginning."""

    def pause(made: World, point: str) -> None:
        made.source.vmm.state = made.before = "paused"
        made.guest.stop("source")

    made = await hybrid(tmp_path, {"-> pass": pause, "source.save stopped": kill_source})
    assert made.guest.runs == set()
    assert made.source.vmm.state == "paused"


@pytest.mark.parametrize(
    "news",
    [{"problems": ("it has a new device",)}, {"direct_io": "a disk was plugged"}],
    ids=lambda news: next(iter(news)),
)
async def test_what_writes_changes_meanwhile(
    news: dict[str, object], tmp_path: Path, clock: Clock
) -> None:
    """A guest that something new writes to was not copied for certain: it stays."""

    def plug(made: World, point: str) -> None:
        for name, value in news.items():
            setattr(made.source.vmm, name, value)

    made = await hybrid(tmp_path, {"<- serving": plug})
    assert made.source.vmm.state == "running"
    assert "has changed while it was copied" in made.source.vm.status.message


@pytest.mark.parametrize("point", ["source.record intent", "source.record held"])
async def test_still_is_not_recorded(point: str, tmp_path: Path, clock: Clock) -> None:
    """A guest whose stop cannot be recorded is not stopped for a pass."""
    made = await direct(tmp_path, {point: no_room})
    assert made.source.vmm.state == "running"


# --- tracking that cannot be ---------------------------------------------------------------------


@pytest.mark.parametrize("fault", [refusing(VmmError("no userfaultfd"))])
async def test_hybrid_without_tracking(fault: Fault, tmp_path: Path, clock: Clock) -> None:
    """Where writes cannot be seen the guest is moved by postcopy alone, and that is said."""
    made = await hybrid(tmp_path, {"source.track": fault})
    result = made.result
    assert result["event"] == "completed"
    assert result["passes"] == []
    assert "no userfaultfd" in result["warning"]


async def test_hybrid_on_a_kernel_that_misses_writes(
    kernel_says: Callable[..., None], tmp_path: Path, clock: Clock
) -> None:
    """Nor is a kernel relied on that does not show all that is written: the VMM is not touched."""
    kernel_says(written=lib.PC_MISSES_ZAPPED)
    made = await hybrid(tmp_path, {})
    assert "source.track" not in made.went
    result = made.result
    assert result["event"] == "completed"
    assert result["passes"] == []
    assert "a guest wrote and that were swapped out since" in result["warning"]


@pytest.mark.parametrize("written", [0, lib.PC_MISSES_TABLES])
async def test_check_says_that_there_would_be_no_passes(
    kernel_says: Callable[..., None], written: int, tmp_path: Path, clock: Clock
) -> None:
    """It is no problem, and an operator may want to know."""
    kernel_says(written=written)
    async with world(tmp_path, {}) as made, made.network() as port:
        said = await made.source.daemon.check("web1", f"127.0.0.1:{port}")
        await trio.sleep(1)
    assert said.problems == []
    assert len(said.warnings) == bool(written)
    for one in said.warnings:
        assert "postcopy alone" in one and "huge page that was split" in one


async def test_precopy_without_tracking(tmp_path: Path, clock: Clock) -> None:
    """Where writes cannot be seen there is no precopy."""
    faults = {"source.track": refusing(VmmError("no userfaultfd"))}
    made = await migrated(tmp_path, faults, mode="precopy")
    assert made.source.vmm.state == "running"
    assert "--mode postcopy" in made.source.vm.status.message


@pytest.mark.parametrize("then", [cancel, cut, silence, stop_here], ids=lambda then: then.__name__)
async def test_driver_hangs(then: Fault, tmp_path: Path, clock: Clock) -> None:
    """A driver that hangs while it makes a userfaultfd is left by whatever ends the migration."""
    sticks = then in (cut, silence)  # nobody has been called yet
    patience = 40 if sticks else LONG_S
    faults = {"source.track": hanging(then)}
    made = await hybrid(tmp_path, faults, patience=patience, sticks=sticks)
    assert made.source.vmm.state == "running"


# --- precopy -------------------------------------------------------------------------------------


async def test_precopy(tmp_path: Path, clock: Clock) -> None:
    """All of the memory is there before the guest is: nothing is asked for."""
    made = await migrated(tmp_path, {}, mode="precopy", max_downtime_ms=1e6)
    memory = made.result["memory"]
    assert (memory["urgentPages"], memory["pushedPages"]) == (0, 4)
    assert made.went["-> stale"]


async def test_precopy_does_not_converge(tmp_path: Path, clock: Clock) -> None:
    """A guest that is not handed over runs on, and it is said why."""
    made = await migrated(tmp_path, {}, mode="precopy", max_downtime_ms=1e-9, precopy_passes=1)
    assert made.source.vmm.state == "running"
    assert "does not converge" in made.source.vm.status.message


@pytest.mark.parametrize("point", ["-> deviceEnd", "<- loaded", "-> grant", "<- ran"])
@pytest.mark.parametrize(
    "fault", [cut, cut_data, kill_source, kill_destination], ids=lambda fault: fault.__name__
)
async def test_precopy_breaks(fault: Fault, point: str, tmp_path: Path, clock: Clock) -> None:
    """What breaks between the stop and the run loses no guest."""
    await migrated(tmp_path, {point: fault}, mode="precopy", max_downtime_ms=1e6)
