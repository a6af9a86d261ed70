# SPDX-License-Identifier: Apache-2.0
"""A keeper that cannot be made or ended costs a guest that has left nothing."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
import trio

from postcopyd.errors import PostcopydError
from postcopyd.model import MigrateRequest
from postcopyd.native import keeper
from postcopyd.native.keeper import Keeper
from postcopyd.source import drain, keeping
from postcopyd.vmm import Region, Shape

KEEPER = Keeper(1, 1, 0)
REFUSED = [errno.EMFILE, errno.EPERM]


def refuses(number: int) -> Any:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", REFUSED)
async def test_failures_are_told(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kernel refuses: an error of another kind would end the source's session, and
    the guest would wait for ever for pages that nobody sends."""
    monkeypatch.setattr(keeper, "_make", refuses(number))
    monkeypatch.setattr(keeper, "_end", refuses(number))
    with pytest.raises(PostcopydError):
        await keeper.make(1, allow_seccomp=True)
    with pytest.raises(PostcopydError, match="end it by hand"):
        await keeper.end(KEEPER, 1)


@pytest.fixture
def child() -> Iterator[Keeper]:
    """A process with the name of a keeper."""
    name = f"printf {keeper.NAME} > /proc/self/comm; echo; read line"
    with subprocess.Popen(
        ["sh", "-c", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield Keeper(process.pid, keeper.procfs.started(process.pid), 0)
        process.kill()


async def test_one_that_cannot_be_reached_has_not_ended(
    child: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For want of a descriptor, say: it would hold the guest's memory, and nobody would know."""
    with monkeypatch.context() as patch:
        patch.setattr(keeper.os, "pidfd_open", refuses(errno.EMFILE))
        with pytest.raises(PostcopydError, match="nothing left"):
            await keeper.end(child, 0)
    assert child.lives()
    await keeper.end(child, 0)
    with trio.fail_after(20):
        while child.lives():
            await trio.sleep(0.01)


class FakeVm:
    """What keeping.py uses of a VM, whose record cannot be written."""

    makes, forbids = False, True

    def __init__(self) -> None:
        self.name, self.attachment = "web1", None
        self.log = structlog.get_logger()
        self.about: dict[str, Any] = {"keeper": {"pid": 1, "started": 1, "page": 0}}
        self.driver: Any = self
        self.pid, self.finished = 1, [False]

    def record_soon(self, _: object) -> bool:
        return False

    async def finish(self, keep: bool) -> None:
        self.finished.append(True)

    async def leave(self) -> None:
        pass


async def test_one_that_stays_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VMM of a guest that was drained ends all the same, and memory goes on to follow."""
    monkeypatch.setattr(keeper, "_end", refuses(errno.EPERM))
    monkeypatch.setattr(keeper, "_make", lambda *_: KEEPER)
    vm: Any = FakeVm()
    assert "end it by hand" in str(await keeping.let_go(vm))
    assert "keeper" in vm.about  # so that it is tried again
    migration: Any = type("", (), {"vm": vm, "log": vm.log})()
    migration.request = MigrateRequest("host2")
    assert await drain.finish_vmm(migration) == ""
    assert vm.finished[-1]
    vm.about = {}
    regions = (Region("ram", 1, 4096, 0x1000, None, 0),)
    engine: Any = None
    await keeping.Keeping(vm, Shape("paused", 1, regions, {}, ()), engine).begin()


async def test_one_that_could_not_be_told_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends soon unless somebody tells it that it is needed; then that is said once an hour."""
    told = [False, True]
    monkeypatch.setattr(keeper, "hold", lambda _: told.pop(0))
    monkeypatch.setattr(Keeper, "lives", lambda _: True)
    vm: Any = FakeVm()
    engine: Any = type("", (), {"kept_by": lambda *_: None})()
    holds = keeping.Keeping(vm, Shape("paused", 1, (), {}, ()), engine)
    for left in (1, 0, 0):
        holds.hold()
        assert len(told) == left
