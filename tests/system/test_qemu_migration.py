# SPDX-License-Identifier: Apache-2.0
"""Real QEMU guests that prove their memory, moved by two real daemons."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import os
import signal
import statistics
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from guests import qemu as q
from needs import missing
from pair import status_until
from qemu_pair import MIB, VM, own_monitor, qemu_pair
from qemus import EACH_QEMU, QEMUS

from postcopyd.errors import PostcopydError

# `make test` goes from the oldest to the newest, `make test-long` from each to each newer one.
NEWER = [
    pytest.param(*pair, id="-".join(map(str, pair)), marks=[pytest.mark.long] if number else [])
    for number, pair in enumerate(
        sorted(itertools.combinations(QEMUS, 2), key=lambda pair: pair != (QEMUS[0], QEMUS[-1]))
    )
]


@pytest.mark.long
async def test_a_guest_of_1_gib_moves_there_and_back_ten_times(
    folder: Path, boot: tuple[Path, Path], record_property: Any
) -> None:
    """The main job: no bad page in ten moves of a guest that writes and checks 512 MiB."""
    work = q.Workload(test_mb=512)
    async with qemu_pair(folder, boot, qemu=QEMUS[-1], memory=1024 * MIB, workload=work) as it:
        await it.boot()
        results = []
        for _ in range(10):
            await it.wait_for_it()
            results.append(await it.move())
        downtimes = sorted(result["downtimeMs"] for result in results)
        print("downtime ms:", downtimes, "parts", [r["downtimePartsMs"] for r in results])
        record_property("median downtime ms", statistics.median(downtimes))
        memory = results[-1]["memory"]
        assert (
            memory["pages"] == memory["zeroPages"] + memory["pushedPages"] + memory["urgentPages"]
        )
        assert memory["totalBytes"] == 1024 * MIB
        assert [report.bad for report in it.guest.reports if report.bad] == []


@EACH_QEMU
async def test_an_unprivileged_sandboxed_qemu_moves(
    folder: Path, boot: tuple[Path, Path], qemu: q.QemuBinary
) -> None:
    """QEMU as libvirt runs it, as another user and without the privilege to make a userfaultfd."""
    folder.chmod(0o777)
    async with qemu_pair(folder, boot, qemu=qemu, memory=256 * MIB, user="nobody") as it:
        await it.boot()
        await it.wait_for_it()
        await it.move()


@EACH_QEMU
async def test_two_vcpus_with_disk_and_network_in_use(
    folder: Path, boot: tuple[Path, Path], qemu: q.QemuBinary
) -> None:
    """Disk and network go on through the move, and the guest finds nothing wrong with either."""
    image = folder / "disk"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    async with qemu_pair(folder, boot, qemu=qemu, memory=512 * MIB, vcpus=2, disk=image) as it:
        echo = await it.guest.echo()
        it.config = dataclasses.replace(it.config, net_port=echo.port)
        await it.boot()
        await it.wait_for_it()
        await it.move()
        after = await it.guest.report()
        later = await it.guest.report(after)
        while later.disk_ops <= after.disk_ops or later.net_received <= after.net_received:
            later = await it.guest.report(later)
        await it.check()
        assert echo.duplicates == 0


@pytest.mark.long
async def test_two_numa_backends(folder: Path, boot: tuple[Path, Path]) -> None:
    """Each memory backend is a region of its own, with a userfaultfd of its own."""
    async with qemu_pair(folder, boot, qemu=QEMUS[-1], memory=512 * MIB, backends=2) as it:
        await it.boot()
        await it.wait_for_it()
        await it.move()


@pytest.mark.parametrize(("old", "new"), NEWER or [(None, None)])
async def test_between_two_versions_of_qemu(
    folder: Path, boot: tuple[Path, Path], old: q.QemuBinary, new: q.QemuBinary
) -> None:
    """A guest of a versioned machine type moves to a newer QEMU."""
    if old is None:
        missing("a second version of QEMU: name both in $POSTCOPYD_QEMU, as `make test` does")
    config = {"machine": "pc-q35-7.2", "memory": 256 * MIB, "qemu": old}
    async with qemu_pair(folder, boot, **config) as it:
        await it.boot()
        await it.wait_for_it(qemu=new)
        await it.move()


@EACH_QEMU
async def test_a_disk_locked_at_the_destination_leaves_the_guest_at_the_source(
    folder: Path, boot: tuple[Path, Path], qemu: q.QemuBinary
) -> None:
    """When `cont` is refused no vCPU has run: declined, and the guest goes on where it was."""
    image, other = folder / "disk", folder / "other-disk"
    for path in (image, other):
        with path.open("wb") as file:
            file.truncate(16 * MIB)
    async with qemu_pair(folder, boot, qemu=qemu, memory=256 * MIB, disk=image) as it:
        await it.boot()
        lock = os.open(other, os.O_RDWR)
        # QEMU's locks (block/file-posix.c): byte 100 + n is held by who uses permission n, byte
        # 200 + n by who forbids it to others; this third process forbids all of them.
        for byte in range(200, 204):
            fcntl.fcntl(
                lock, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, byte, 1, 0)
            )
        destination = await it.wait_for_it(disk=other)
        before = await it.guest.report()
        # Another file as if it was the same one, so that this guest's own lock is not in the way.
        result = await it.here.migrate(VM, it.there, mode="postcopy", unsafe=True)
        assert result["event"] == "failed"
        assert "lock" in result["error"]
        assert (await it.here.status(VM))["phase"] == "failed"
        after = await it.guest.report()
        while after.operations <= before.operations or after.qemu != "qemu0":
            after = await it.guest.report(after)
        await it.check()
        with trio.fail_after(10):
            assert await destination.wait() is not None
        os.close(lock)
        # And a second attempt, with a new destination, works.
        again = await it.guest.launch(dataclasses.replace(it.config, name="again", incoming=True))
        await it.there.attach(VM, "qemu", again.qmp_path)
        await it.move()


async def test_check_names_what_differs_and_touches_nothing(
    folder: Path, boot: tuple[Path, Path]
) -> None:
    """Another machine type at the destination is found before anything happens."""
    async with qemu_pair(folder, boot, qemu=QEMUS[-1], memory=256 * MIB, vcpus=1) as it:
        await it.boot()
        await it.wait_for_it(machine="pc", vcpus=2)
        problems = (await it.here.call("Check", name=VM, to=it.there.address))["problems"]
        assert any("machine" in problem for problem in problems), json.dumps(problems)
        status = await it.here.status(VM)
        assert status["phase"] == "idle"
        await it.check()


@EACH_QEMU
async def test_pages_given_up_end_an_emulated_guest(
    folder: Path, boot: tuple[Path, Path], qemu: q.QemuBinary
) -> None:
    """TCG hands no memory error on to its guest: QEMU ends at the first, and no page is zeros."""
    async with qemu_pair(folder, boot, qemu=qemu, memory=256 * MIB) as it:
        await it.boot()
        arriving = await it.wait_for_it()
        await it.begin("postcopy", 4 * MIB)
        it.here.end(signal.SIGKILL)
        await status_until(it.there, VM, lambda status: status["phase"] == "paused")
        with suppress(PostcopydError):  # it may end a moment after the last page was poisoned
            await it.there.call("Resolve", name=VM, decision="poison")
        with trio.fail_after(30):
            assert await arriving.wait() == -signal.SIGBUS
        assert it.guest.bad == []


@EACH_QEMU
@pytest.mark.parametrize("end", ["cancel", "destination", "source"])
async def test_a_guest_that_somebody_else_moves_meanwhile(
    folder: Path, boot: tuple[Path, Path], qemu: q.QemuBinary, end: str
) -> None:
    """By QEMU's own `migrate`, in the middle of a pass: it may run at a third host now. Whatever
    ends our migration then, the guest is not run here again, and the message says why."""
    monitor = folder / "second"
    async with qemu_pair(folder, boot, qemu=qemu, memory=256 * MIB) as it:
        it.config = dataclasses.replace(it.config, second_qmp=monitor)
        await it.boot()
        await it.wait_for_it(second_qmp=folder / "third")
        await it.begin("precopy", 4 * MIB)
        async with trio.open_nursery() as nursery, own_monitor(monitor) as qmp:
            await qmp.execute(
                "migrate-set-parameters", {"max-bandwidth": 1 << 40, "downtime-limit": 100_000}
            )
            elsewhere = Path(f"{folder}/elsewhere")  # the guest's QEMU may start no programs
            listener = trio.socket.socket(trio.socket.AF_UNIX)
            await listener.bind(str(elsewhere))
            listener.listen()
            nursery.start_soon(_swallow, listener)
            await qmp.execute("migrate", {"uri": f"unix:{elsewhere}"})
            with trio.fail_after(60):
                while (await qmp.execute("query-migrate")).get("status") != "completed":
                    await trio.sleep(0.02)
            if end == "cancel":
                with suppress(PostcopydError):  # it may have been seen already
                    await it.here.call("Cancel", name=VM)
            else:
                (it.there if end == "destination" else it.here).end(signal.SIGTERM)
            with trio.fail_after(60):
                while end != "source" and (await it.here.status(VM))["phase"] != "failed":
                    await trio.sleep(0.02)
            if end == "source":
                await trio.sleep(1)  # for a mistake to show
            else:
                message = (await it.here.status(VM))["message"]
                assert "was left here as it was found: somebody else" in message
            assert (await qmp.execute("query-status"))["status"] == "postmigrate"


async def _swallow(listener: trio.socket.SocketType) -> None:
    """A third host, as far as QEMU can tell."""
    with listener:
        stream, _ = await listener.accept()
        with stream:
            while await stream.recv(1 << 20):
                pass
