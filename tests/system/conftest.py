# SPDX-License-Identifier: Apache-2.0
"""The daemons and the QEMUs that system tests speak to."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from guests import qemu as q
from needs import missing
from pair import Pair, open_pair
from qemu_lab import QEMUS, Lab


@pytest.fixture(scope="module")
def daemons() -> Iterator[Pair]:
    """Two for most tests of a module: what one migration leaves behind, others meet."""
    with open_pair() as pair:
        yield pair


@pytest.fixture
def pair(daemons: Pair) -> Iterator[Pair]:
    yield daemons
    daemons.end_guests()


@pytest.fixture
def new_pair() -> Iterator[Pair]:
    """For tests that kill daemons."""
    with open_pair() as pair:
        yield pair


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    for qemu in QEMUS:
        if shutil.which(qemu[0]) is None:
            missing(qemu[0])
    if os.geteuid() != 0:
        missing("root")
    folder = Path(tempfile.mkdtemp(prefix="pcq"))
    made = Lab(folder)
    try:
        yield made
    finally:
        for driver in made.drivers:
            await driver.aclose()
        for machine in made.machines:
            machine.end()
        shutil.rmtree(folder)


@pytest.fixture
def folder() -> Iterator[Path]:
    """On tmpfs, and not pytest's own: the name of a socket has to be short."""
    with tempfile.TemporaryDirectory(prefix="pc-", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def boot(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Kernel and initramfs of the verifying guest."""
    try:
        return q.boot(tmp_path_factory.mktemp("guest"))
    except q.MissingPartError as error:
        missing(f"a guest in QEMU: {error}")


@pytest.fixture(
    params=[
        pytest.param(number, id=f"qemu{number}", marks=[pytest.mark.long] if number else [])
        for number in range(len(QEMUS))
    ]
)
def qemu(request: pytest.FixtureRequest) -> int:
    return int(request.param)
