# SPDX-License-Identifier: Apache-2.0
"""The process driver against VMMs that break the rules: a named error, soon, and nothing kept."""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Never

import pytest
import trio
import trio.testing
from process_driver import QUICK, driver, pieces_of, save_all

from postcopyd.errors import PostcopydError
from postcopyd.vmm import Declined, VmmError, VmmGone, VmmProtocolError, VmmTimeout
from postcopyd.vmm.process.driver import ProcessVmm

pytestmark = pytest.mark.trio


class Liar(threading.Thread):
    """A VMM that answers each request with what it was given; in a process of its own right."""

    def __init__(self, path: Path, answers: dict[str, object]) -> None:
        super().__init__(daemon=True)
        self.path, self.answers = path, answers
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(8)
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                with client, contextlib.suppress(OSError):
                    self.serve(client)

    def serve(self, client: socket.socket) -> None:
        buffer = b""
        while True:
            data, fds, _, _ = socket.recv_fds(client, 4096, 1)
            if not data:
                return
            buffer += data
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                answer = self.answers.get(line.split()[0].decode(), b"ok\n")
                try:
                    told: object = answer(client, fds) if callable(answer) else answer
                    assert isinstance(told, bytes)
                    client.sendall(told)
                finally:
                    while fds:
                        os.close(fds.pop())

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.join(10)
        self.listener.close()


@pytest.fixture
def lie(tmp_path: Path) -> Iterator[Callable[[dict[str, object]], str]]:
    liars: list[Liar] = []

    def start_one(answers: dict[str, object]) -> str:
        liars.append(Liar(tmp_path / f"liar{len(liars)}.sock", HONEST | answers))
        return str(liars[-1].path)

    yield start_one
    for liar in liars:
        liar.close()


HONEST: dict[str, object] = {"hello": b"ok vmm=liar state=paused\n"}
REGION = b"region name=ram0 address=0x10000 size=4096 page=4096 backing=anonymous offset=0\n"


def many_fds(client: socket.socket, fds: list[int]) -> bytes:
    rights = array.array("i", [client.fileno()] * 100)
    client.sendmsg([b"ok\n"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    return b""


def not_a_userfaultfd(client: socket.socket, fds: list[int]) -> bytes:
    socket.send_fds(client, [b"ok\n"], [client.fileno()])
    return b""


def hang_up(client: socket.socket, fds: list[int]) -> bytes:
    client.shutdown(socket.SHUT_RDWR)
    return b""


def endless(client: socket.socket, fds: list[int]) -> bytes:
    with contextlib.suppress(OSError):
        while True:
            os.write(fds[0], bytes(65536))
    return b""


def write_twelve(client: socket.socket, fds: list[int]) -> bytes:
    os.write(fds[0], bytes(12))
    os.close(fds.pop())
    return b"ok bytes=13\n"


def hold(client: socket.socket, fds: list[int]) -> bytes:
    client.recv(1)  # until the driver gives up
    return b""


LIES = [
    ({"hello": b""}, "connect", VmmTimeout),
    ({"hello": hang_up}, "connect", VmmGone),
    ({"hello": b"error this VMM speaks postcopyd 7 only\n"}, "connect", VmmError),
    ({"hello": b"ok\n"}, "connect", VmmProtocolError),
    ({"hello": b"ok vmm=liar state=flying\n"}, "connect", VmmProtocolError),
    ({"hello": b"x" * 5000}, "connect", VmmProtocolError),
    ({"hello": b"\xff\x00\n"}, "connect", VmmProtocolError),
    ({"hello": b"more\n" * 300}, "connect", VmmProtocolError),
    ({"hello": many_fds}, "connect", VmmProtocolError),
    ({"facts": b"fact cpu a\nfact cpu b\nok\n"}, "inspect", VmmProtocolError),
    ({"facts": b"fact vmm other\nok\n"}, "inspect", VmmProtocolError),
    (
        {"facts": b"".join(b"fact f%d 1\n" % i for i in range(65)) + b"ok\n"},
        "inspect",
        VmmProtocolError,
    ),
    ({"regions": b"ok\n"}, "inspect", VmmProtocolError),
    ({"regions": b"region\nok\n"}, "inspect", VmmProtocolError),
    ({"regions": REGION * 2 + b"ok\n"}, "inspect", VmmProtocolError),
    ({"regions": REGION + REGION.replace(b"ram0", b"ram1") + b"ok\n"}, "inspect", VmmProtocolError),
    (
        {"regions": REGION.replace(b"=4096 page", b"=4097 page") + b"ok\n"},
        "inspect",
        VmmProtocolError,
    ),
    (
        {"regions": REGION.replace(b"=4096 page", b"=-1 page") + b"ok\n"},
        "inspect",
        VmmProtocolError,
    ),
    ({"regions": REGION.replace(b"anonymous", b"file") + b"ok\n"}, "inspect", VmmProtocolError),
    ({"stop": b"error I will not\n"}, "save", VmmError),
    ({"stop": b"extra\nok\n"}, "save", VmmProtocolError),
    ({"save": endless}, "save", VmmProtocolError),
    ({"save": write_twelve}, "save", VmmProtocolError),
    ({"save": hold}, "save", VmmTimeout),
    ({"save": hang_up}, "save", VmmGone),
    ({"load": hold}, "load", VmmTimeout),
    ({"load": b"ok bytes=3\n"}, "load", VmmProtocolError),
    ({"load": b"ok\n"}, "load", VmmProtocolError),
    ({"load": b"ok bytes=99999999999999999999\n"}, "load", VmmProtocolError),
    ({"userfaultfd": b"ok\n"}, "adopted", VmmProtocolError),
    ({"userfaultfd": not_a_userfaultfd}, "adopted", VmmProtocolError),
    ({"userfaultfd": b"error no permission\n"}, "adopted", VmmError),
    ({"run": b"error the disk is locked elsewhere\n"}, "run", Declined),
    ({"run": hang_up}, "run", VmmGone),
    ({"run": b""}, "run", VmmTimeout),
]


@pytest.mark.parametrize(("answers", "what", "error"), LIES)
async def test_a_vmm_that_breaks_the_rules_gets_a_named_error_in_bounded_time(
    lie: Callable[[dict[str, object]], str],
    answers: dict[str, object],
    what: str,
    error: type[PostcopydError],
) -> None:
    """Each lie, silence or flood ends with its error, in one sentence, and no descriptor kept."""
    path = lie(answers)
    with trio.fail_after(10), pytest.raises(PostcopydError) as caught:
        async with driver(path, QUICK) as vmm:
            before = len(os.listdir("/proc/self/fd"))
            try:
                match what:
                    case "inspect":
                        await vmm.inspect("source")
                    case "save":
                        await save_all(vmm)
                    case "load":
                        await vmm.load(pieces_of(bytes(4 << 20), 1 << 20))
                    case "adopted":
                        await vmm.adopted()
                    case "run":
                        await vmm.run()
            finally:
                vmm._drop()
                leaked = len(os.listdir("/proc/self/fd")) - before
                assert leaked <= 0 or await no_more_than(before)
    assert error is type(caught.value)
    assert "web1" in str(caught.value) and "\n" not in str(caught.value)


async def no_more_than(count: int) -> bool:
    """The liar's own ends of a connection close a moment later."""
    with trio.fail_after(5):
        while len(os.listdir("/proc/self/fd")) > count:
            await trio.sleep(0.01)
    return True


async def test_regions_that_are_not_mapped_as_said_are_a_problem(
    lie: Callable[[dict[str, object]], str],
) -> None:
    """What the VMM says of its RAM is held against the kernel's list of its mappings."""

    def send_file(client: socket.socket, fds: list[int]) -> bytes:
        file = os.memfd_create("ram")
        os.ftruncate(file, 4096)
        socket.send_fds(client, [REGION.replace(b"anonymous", b"file") + b"ok\n"], [file])
        os.close(file)
        return b""

    for answer in (REGION + b"ok\n", send_file):
        async with driver(lie({"regions": answer}), QUICK) as vmm:
            shape = await vmm.inspect("source")
            assert "region ram0 has nothing mapped at 0x10000" in shape.problems[0]
            shape.close()


async def test_discard_that_left_pages_behind_is_found_out(
    lie: Callable[[dict[str, object]], str],
) -> None:
    """Pages that are still there would never fault and be stale: adopt refuses them."""
    memory = ctypes.create_string_buffer(b"x" * 3 * 4096)
    address = (ctypes.addressof(memory) + 4095) & ~4095
    text = REGION.replace(b"0x10000", hex(address).encode()) + b"ok\n"
    hello = b"ok vmm=liar state=incoming\n"
    async with driver(lie({"regions": text, "hello": hello}), QUICK) as vmm:
        shape = await vmm.inspect("destination")
        with pytest.raises(VmmProtocolError, match="ram0 still has pages after discard"):
            await vmm.adopt(shape)


async def test_nobody_there_is_said_quickly(tmp_path: Path) -> None:
    """A path without a socket, one without a listener, and one too long are each one sentence."""
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(stale))
    for path in (tmp_path / "none.sock", stale, tmp_path / ("x" * 200)):
        with trio.fail_after(2), pytest.raises(VmmGone, match="start the VMM"):
            await ProcessVmm.connect("web1", str(path))


async def test_a_vmm_that_never_accepts_is_given_up(tmp_path: Path) -> None:
    """A full queue and a silent listener both end in the time for hello."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "deaf.sock"))
        listener.listen(0)
        for _ in range(3):
            with trio.fail_after(5), pytest.raises(VmmTimeout, match="did not answer"):
                await ProcessVmm.connect("web1", str(tmp_path / "deaf.sock"), QUICK)


async def test_a_vmm_that_goes_on_after_its_last_word(
    lie: Callable[[dict[str, object]], str],
) -> None:
    """It has not ended by that, and its end is a crash."""
    async with driver(lie({"hello": b"ended so it says\nok vmm=liar state=paused\n"})) as vmm:
        assert vmm._ended is None


async def test_a_stop_is_waited_for_by_who_has_to_undo_it(
    lie: Callable[[dict[str, object]], str],
) -> None:
    """The cancelled save of a guest whose disks take long to stop: rollback finds it stopped."""
    asked, may_stop, state = threading.Event(), threading.Event(), ["running"]

    def stop(client: socket.socket, fds: list[int]) -> bytes:
        asked.set()
        may_stop.wait(10)
        state[0] = "paused"
        return b"ok\n"

    def run(client: socket.socket, fds: list[int]) -> bytes:
        state[0] = "running"
        return b"ok\n"

    def hello(client: socket.socket, fds: list[int]) -> bytes:
        return b"ok vmm=liar state=%s\n" % state[0].encode()

    async with driver(lie({"hello": hello, "stop": stop, "run": run})) as vmm:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(save_all, vmm)
            await trio.to_thread.run_sync(asked.wait)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.testing.wait_all_tasks_blocked()
            assert nursery.child_tasks, "the stop was left to come when it likes"
            may_stop.set()
        assert "" == await vmm.rollback()
    assert state == ["running"]


async def test_a_stop_that_comes_after_who_has_to_undo_it(
    lie: Callable[[dict[str, object]], str],
) -> None:
    """One that hangs holds a cancel up for a moment only. While it lasts the VMM turns others away,
    and its guest runs after that, whatever the VMM says it does."""
    turned_away, asked, said = [0], threading.Event(), []

    def stop(client: socket.socket, fds: list[int]) -> bytes:
        asked.set()
        return b""

    def hello(client: socket.socket, fds: list[int]) -> bytes:
        if asked.is_set() and turned_away[0] < 2:
            turned_away[0] += 1
            return b"error another client drives this guest\n"
        return b"ok vmm=liar state=running\n"

    def run(client: socket.socket, fds: list[int]) -> bytes:
        said.append("run")
        return b"ok\n"

    patient = replace(QUICK, answer=30)
    async with driver(lie({"hello": hello, "stop": stop, "run": run}), patient) as vmm:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(save_all, vmm)
                await trio.to_thread.run_sync(asked.wait)
                nursery.cancel_scope.cancel()
            assert "" == await vmm.rollback()
            assert said == ["run"]
            assert "" == await vmm.rollback()
    assert said == ["run"]
    assert turned_away == [2]


@pytest.mark.parametrize("how", ["not delivered", "refused"])
async def test_a_stop_that_is_not_ours_stays(
    how: str, lie: Callable[[dict[str, object]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our stop did not come through, and then somebody else has paused the guest."""
    state, said = ["running"], []

    def hello(client: socket.socket, fds: list[int]) -> bytes:
        return b"ok vmm=liar state=%s\n" % state[0].encode()

    def run(client: socket.socket, fds: list[int]) -> bytes:
        said.append("run")
        return b"ok\n"

    answers: dict[str, object] = {"hello": hello, "stop": b"error it waits\n", "run": run}
    async with driver(lie(answers)) as vmm:
        if how == "not delivered":

            async def dial() -> Never:
                raise VmmGone("the socket is gone")

            async def stop() -> None:
                vmm._drop()
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(vmm, "_dial", dial)
                    await ProcessVmm._stop(vmm)

            monkeypatch.setattr(vmm, "_stop", stop)
        for hold in (save_all, held):
            state[0] = "running"
            with pytest.raises((VmmError, VmmGone)):
                await hold(vmm)
            state[0] = "paused"
            left = await vmm.rollback()
            assert left == ("it is paused, by somebody else" if hold is save_all else "")
    assert said == []


async def held(vmm: ProcessVmm) -> None:
    async with vmm.still():
        pass


async def test_a_guest_that_others_run_while_it_is_held_still(
    lie: Callable[[dict[str, object]], str],
) -> None:
    """What was done meanwhile is worth nothing, and the caller is told so."""

    def hello(client: socket.socket, fds: list[int]) -> bytes:
        return b"ok vmm=liar state=running\n"

    async with driver(lie({"hello": hello})) as vmm:
        with pytest.raises(VmmError, match="was run by someone else"):
            await held(vmm)
