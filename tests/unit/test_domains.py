# SPDX-License-Identifier: Apache-2.0
"""VMMs that are made for an arrival: they end with it, unless the guest is this host's."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import trio
from structlog.testing import capture_logs

from postcopyd import protocol as p
from postcopyd.config.options import ServeOptions
from postcopyd.daemon import domains, registry
from postcopyd.daemon.accepting import Acceptor
from postcopyd.daemon.domains import Domains
from postcopyd.daemon.registry import Registry
from postcopyd.errors import PostcopydError
from postcopyd.model import MigrateRequest
from postcopyd.records.store import Store
from postcopyd.sessions import alike
from postcopyd.sessions.shared import Shared
from postcopyd.vmm import Disk, DiskFile, VmmTimeout
from postcopyd.vmm.libvirt import calls

OFFER = p.Offer(
    migration="m1",
    vm="web1",
    driver="made",
    regions=[p.RegionOffer("ram", 256, 4096)],
    facts={"machine": "q35"},
    connections=1,
    epoch=1,
    definition="a domain",
)


class Made:
    """A driver whose VMM is a process that sleeps."""

    makes, kind = True, "made"
    farewell = None
    problems: ClassVar[list[str]] = []
    disks: ClassVar[tuple[Disk, ...]] = ()
    made: ClassVar[list[Made]] = []

    def __init__(self, name: str, socket: str) -> None:
        self.name, self.socket = name, socket
        self.process = subprocess.Popen(["sleep", "100"])
        self.pid = self.process.pid
        self.closed = False

    @classmethod
    async def foreseen(cls, name: str, socket: str, definition: str, like: Any) -> Any:
        return replace(like, problems=cls.problems, disks=cls.disks)

    @classmethod
    async def expect(cls, name: str, socket: str, definition: str, like: Any) -> Made:
        assert (definition, like.facts) == ("a domain", {"machine": "q35"})
        cls.made.append(cls(name, socket))
        await trio.lowlevel.checkpoint()
        return cls.made[-1]

    async def gone(self) -> None:
        while self.process.poll() is None:
            await trio.sleep(0.01)

    async def end(self) -> None:
        self.process.kill()
        self.process.wait()

    async def aclose(self) -> None:
        self.closed = True
        await trio.lowlevel.checkpoint()


class Channel:
    peer = "host1"

    def __init__(self) -> None:
        self.ended = trio.Event()

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        yield

    async def receive(self) -> None:
        await self.ended.wait()


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Made]]:
    monkeypatch.setitem(registry.DRIVERS, "made", Made)  # type: ignore[arg-type]
    monkeypatch.setattr(domains.calls, "here", bool)
    monkeypatch.setattr(domains.calls, "lacks", lambda uri: "" if uri else "no libvirt here")
    monkeypatch.setattr(Made, "made", [])
    monkeypatch.setattr(Made, "problems", [])
    yield Made
    for one in Made.made:
        one.process.kill()
        one.process.wait()


@asynccontextmanager
async def daemon(folder: Path, libvirt: str = calls.SYSTEM) -> AsyncIterator[Registry]:
    async with trio.open_nursery() as nursery:
        yield Registry(Shared(Store(folder), libvirt=libvirt), nursery)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("ownership", ["held", "arriving", "loading", "declined"])
async def test_it_ends_with_an_arrival_that_is_called_off(
    kind: type[Made], tmp_path: Path, ownership: Any
) -> None:
    async with daemon(tmp_path) as vms:
        with pytest.raises(ZeroDivisionError):
            async with Domains(vms).expected(Channel(), OFFER) as vm:  # type: ignore[arg-type]
                assert vms.vms == {"web1": vm}
                vm.record(ownership)
                raise ZeroDivisionError
        (made,) = kind.made
        assert made.process.poll() is not None
        assert made.closed
        assert vm.driver is None


async def test_an_older_migration_says_nothing_of_this_one(
    kind: type[Made], tmp_path: Path
) -> None:
    """The guest was here before, or left from here: the VM is known, and drained."""
    async with daemon(tmp_path) as vms:
        for _ in range(2):
            async with Domains(vms).expected(Channel(), OFFER) as vm:  # type: ignore[arg-type]
                vm.conclude(migration="m0", phase="drained")
            assert kind.made[-1].process.poll() is not None


async def test_it_stays_once_the_guest_is_this_hosts(kind: type[Made], tmp_path: Path) -> None:
    async with daemon(tmp_path) as vms:
        async with Domains(vms).expected(Channel(), OFFER) as vm:  # type: ignore[arg-type]
            vm.record("owned")
        assert kind.made[0].process.poll() is None
        assert vm.driver is kind.made[0]  # type: ignore[comparison-overlap]


async def test_a_libvirt_that_does_not_answer(
    kind: type[Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the daemon knows by itself is told all the same; of a name that only libvirt can know,
    why it cannot be known."""

    async def silent(*_: Any, **__: Any) -> Any:
        raise PostcopydError("libvirt has not answered")

    monkeypatch.setattr(domains.calls, "ask", silent)
    monkeypatch.setattr(domains, "certainly_ended", lambda _: True)
    async with daemon(tmp_path) as vms:
        assert await Domains(vms).shown() == []
        with pytest.raises(PostcopydError, match="not answered"):
            await Domains(vms).find("web1")
        vms.vms["web1"] = vms.known("web1")
        await Domains(vms).find("web1")


async def test_a_list_does_not_wait_again_for_a_libvirt_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    """Nor says each time why there are no domains in it. One that refuses is asked each time."""
    asked: list[float] = []
    said = VmmTimeout("libvirt has not answered")

    async def silent(*_: Any, connect: float, **__: Any) -> Any:
        asked.append(connect)
        await trio.sleep(calls.LOOK_S)
        raise said

    monkeypatch.setattr(domains.calls, "ask", silent)
    monkeypatch.setattr(domains.calls, "lacks", lambda _: "")
    with capture_logs() as log:
        async with daemon(tmp_path) as vms:
            here = Domains(vms)
            began = trio.current_time()
            for _ in range(3):
                assert await here.shown() == []
            assert trio.current_time() - began == pytest.approx(calls.LOOK_S)
            await trio.sleep(domains.SILENT_S)
            said = PostcopydError("libvirt refuses")
            for _ in range(3):
                assert await here.shown() == []
    assert asked == [0, 0, 0, 0]  # nor waits for its daemon to be there
    assert [one["error"] for one in log] == ["libvirt has not answered", "libvirt refuses"]


@pytest.mark.parametrize("there", [False, True], ids=["", "without its binding"])
async def test_a_host_without_libvirt_does_not_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """No log line, no process; who names a domain hears what is missing."""

    def started(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(calls, "start", started)
    monkeypatch.setattr(calls, "_python", lambda: "")
    monkeypatch.setattr(calls, "LIBVIRT", (str(tmp_path),) if there else ("/nowhere",))
    with capture_logs() as log:
        async with daemon(tmp_path, str(ServeOptions().libvirt_uri)) as vms:
            here = Domains(vms)
            assert await here.shown() == []
            vms.vms["web2"] = vms.known("web2")
            await here.find("web2")
            refused = pytest.raises(PostcopydError, match="python3-libvirt")
            with refused if there else nullcontext() as raised:
                await here.find("web1")
            assert raised is None or raised.value.name == "NoSuchVm"
    assert log == []


async def test_nothing_is_made_for_what_does_not_fit(kind: type[Made], tmp_path: Path) -> None:
    kind.problems = ["another domain has that name"]
    async with daemon(tmp_path) as vms:
        with pytest.raises(PostcopydError, match="another domain"):
            async with Domains(vms).expected(Channel(), OFFER):  # type: ignore[arg-type]
                pass
    async with daemon(tmp_path, libvirt="") as vms:
        with pytest.raises(PostcopydError, match="no libvirt"):
            await Domains(vms).unfit(OFFER)
        with pytest.raises(PostcopydError, match="no libvirt"):
            Domains(vms).socket("web1")
        assert await Domains(vms).shown() == []
        await Domains(vms).find("web1")
        assert vms.vms == {}
    assert kind.made == []


async def test_disks_are_compared_before_anything_is_made(
    kind: type[Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of this host's own is not the one that has the same name at the source."""

    def disk(inode: str) -> Disk:
        ids = {"kernel a": inode}
        return Disk("vda", "raw", (DiskFile("/srv/disk", "ext4", False, True, ids),))

    offer = msgspec.structs.replace(OFFER, disks=alike.offered([disk("1")]))
    async with daemon(tmp_path) as vms:
        monkeypatch.setattr(Made, "disks", (disk("1"),))
        assert await Domains(vms).unfit(offer) == []
        monkeypatch.setattr(Made, "disks", (disk("2"),))
        (problem,) = await Domains(vms).unfit(offer)
        assert "disk vda is another file here" in problem
        assert await Domains(vms).unfit(msgspec.structs.replace(offer, unsafe=True)) == []


@pytest.mark.parametrize(
    ("pages", "page_size", "lacks"),
    [(256, 4096, ""), (1 << 40, 4096, "the host has"), (1 << 20, 2 << 20, "pool of 2 MiB pages")],
)
async def test_check_looks_for_room(
    kind: type[Made], tmp_path: Path, pages: int, page_size: int, lacks: str
) -> None:
    """Also before there is a VMM, whose groups and files cannot be known."""
    sent = []

    class Asking(Channel):
        names = ()

        async def send(self, answer: p.Checked) -> None:
            sent.extend(answer.problems)

    regions = [p.RegionOffer("ram", pages, page_size)]
    offer = msgspec.structs.replace(OFFER, check=True, regions=regions)
    async with daemon(tmp_path) as vms:
        none: Any = None
        asking: Any = Asking()
        acceptor = Acceptor(vms.shared, vms.vms, none, none, Domains(vms))
        await acceptor._take_offer(asking, offer)
    assert len(sent) == bool(lacks)
    assert lacks in "".join(sent)
    assert kind.made == []


@pytest.mark.parametrize("option", ["persistent", "undefine_source", "xml"])
def test_what_only_domains_have_is_refused_for_others(option: str) -> None:
    kind: Any = type("", (), {"makes": False})
    vm: Any = type("", (), {"name": "web1", "attached": lambda _: kind})()
    given: dict[str, Any] = {option: True}
    registry._must_have(vm, MigrateRequest("host2"))
    with pytest.raises(PostcopydError, match=r"web1 is not moved as a domain.*: leave them out"):
        registry._must_have(vm, MigrateRequest("host2", **given))
    kind.makes = True
    registry._must_have(vm, MigrateRequest("host2", **given))


@pytest.mark.parametrize(
    ("definition", "one_of"), [("", {"control", "send"}), ("a domain", {"send"})]
)
async def test_who_may_ask_whether_a_guest_fits(definition: str, one_of: set[str]) -> None:
    """To say what a domain lacks, libvirt runs the emulator that its XML names."""
    asked = []

    class Tls:
        def allow(self, _: Any, *may: str) -> None:
            asked.append(set(may))
            raise PostcopydError("may not")

    none: Any = None
    shared: Any = type("", (), {"tls": Tls()})()
    acceptor = Acceptor(shared, {}, none, none, none)
    channel: Any = type("", (), {"names": ("host1",)})
    with pytest.raises(PostcopydError, match="may not"):
        offer = msgspec.structs.replace(OFFER, check=True, definition=definition)
        await acceptor._take_offer(channel, offer)
    assert asked == [one_of]


async def test_a_source_that_takes_its_offer_back_ends_the_making(
    kind: type[Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: Any) -> Any:
        await trio.sleep_forever()

    monkeypatch.setattr(kind, "expect", never)
    channel = Channel()
    channel.ended.set()
    async with daemon(tmp_path) as vms:
        with pytest.raises(PostcopydError, match="took its offer back"):
            async with Domains(vms).expected(channel, OFFER):  # type: ignore[arg-type]
                pass
        assert vms.vms == {}
