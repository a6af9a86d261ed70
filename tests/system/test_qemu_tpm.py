# SPDX-License-Identifier: Apache-2.0
"""A guest with a TPM, whose state QEMU asks of swtpm and gives to the other host's."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
from needs import missing
from qemu_lab import Lab, inspected
from test_qemu_driver import saved


@pytest.fixture
def chips(tmp_path: Path) -> Iterator[list[Path]]:
    """The control sockets of two, each with a state of its own."""
    if shutil.which("swtpm") is None:
        missing("the Debian package swtpm")
    with ExitStack() as running:
        sockets = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            sockets.append(tmp_path / f"{name}.sock")
            command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={tmp_path / name}"]
            command += ["--ctrl", f"type=unixio,path={sockets[-1]}", "--flags", "startup-clear"]
            process = subprocess.Popen(command)
            running.callback(process.wait)
            running.callback(process.kill)
        yield sockets


@pytest.mark.long
async def test_a_tpm_crosses(lab: Lab, qemu: int, chips: list[Path]) -> None:
    """With its secrets; after a rollback it is there still, and after a reset at the other host."""
    with trio.fail_after(10):
        while not all(chip.exists() for chip in chips):
            await trio.sleep(0.02)
    machines = []
    for chip, more in zip(chips, ([], ["-incoming", "defer"]), strict=True):
        tpm = ["-chardev", f"socket,id=t0,path={chip}", "-tpmdev", "emulator,id=tpm0,chardev=t0"]
        machines.append(lab.start(qemu, *tpm, "-device", "tpm-crb,tpmdev=tpm0", *more))
    a, b = [await lab.drive(machine) for machine in machines]
    await trio.sleep(1)  # the firmware measures what it starts
    assert unlike(chips) > 256
    async with inspected(a, "source") as ours, inspected(b, "destination") as theirs:
        assert (ours.problems, theirs.problems) == ((), ())
        assert ours.facts == theirs.facts
    await saved(a, b)
    assert await a.rollback() == ""
    assert await machines[0].state() == "running"
    tape = await saved(a, b)
    lab.copy_ram()
    with trio.fail_after(20):
        await b.load(tape.play())
        await b.run()
        await b.release()
    await a.end()
    assert await machines[1].state() == "running"
    await machines[1].ask("system_reset")  # which asks the chip again
    await trio.sleep(1)
    assert await machines[1].state() == "running", machines[1].log.read_text()
    assert unlike(chips) < 64  # a clock, a counter


def unlike(chips: list[Path]) -> int:
    """In how many bytes what they keep differs: all but a few hundred are secrets of their own."""
    states = [(chip.parent / chip.stem / "tpm2-00.permall").read_bytes() for chip in chips]
    return sum(x != y for x, y in zip(*states, strict=True))
