# SPDX-License-Identifier: Apache-2.0
"""What the daemon and the process that may suspend a VMM's seccomp filter say to each other, and
what each makes of the other's end. The call itself is tests/system/test_keeper.py's matter."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from postcopyd.errors import PostcopydError
from postcopyd.native import cloning, keeper
from postcopyd.native.cloning import Begun

# A process as a VMM is: with a seccomp filter, if it is told so, which allows all. It has a page of
# zeros and one that has something.
VMM = """
import ctypes, mmap, struct, sys
pages = mmap.mmap(-1, 3 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
pages[4096] = 1
start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
if sys.argv[1:]:
    allow = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 1, ctypes.addressof(allow)))
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int] + 4 * [ctypes.c_ulong]
    assert prctl(38, 1, 0, 0, 0) == prctl(22, 2, ctypes.addressof(program), 0, 0) == 0
print(start, flush=True)
sys.stdin.read()
"""


class FakeVmm:
    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", VMM, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.page = int(self.process.stdout.readline())
        self.pid = self.process.pid

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def vmm() -> Iterator[FakeVmm]:
    made = FakeVmm("filtered")
    yield made
    made.close()


# --- the daemon's side


@pytest.fixture
def under_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process has a filter, as it sees itself, and asks at this socket."""
    real = cloning.procfs.status

    def status(pid: int | str) -> dict[str, str]:
        return {**real(pid), **({"Seccomp": "2"} if pid == "self" else {})}

    monkeypatch.setattr(cloning.procfs, "status", status)
    monkeypatch.setattr(cloning, "SOCKET", str(tmp_path / "keeper"))
    return tmp_path / "keeper"


def served(path: Path, answer: Callable[[socket.socket], None]) -> threading.Thread:
    """One connection; a thread that ends with it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_nobody_to_ask(vmm: FakeVmm, under_systemd: Path) -> None:
    """No such unit, or a socket that nobody has any more: it is said, and nothing is done."""
    for why in ("No such file", "refused"):
        with pytest.raises(PostcopydError, match=f"{why}.*start postcopyd-keeper.socket") as caught:
            cloning.begin(vmm.pid, vmm.page, 0)
        assert not isinstance(caught.value, cloning.Unclear)
        if not under_systemd.exists():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
                left.bind(str(under_systemd))


def test_nothing_known_of_itself(
    vmm: FakeVmm, under_systemd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For want of a descriptor, say: an error as any other."""
    monkeypatch.setattr(cloning.procfs, "status", lambda pid: {})
    with pytest.raises(PostcopydError, match="may not suspend"):
        cloning.begin(vmm.pid, vmm.page, 0)


def test_what_is_asked(vmm: FakeVmm, under_systemd: Path) -> None:
    """The process is named by a pidfd of it."""
    asked: list[Any] = []

    def answer(connection: socket.socket) -> None:
        text, (pidfd,), _, _ = socket.recv_fds(connection, 100, 1)
        asked.extend((json.loads(text), cloning._Process(pidfd).number()))
        os.close(pidfd)
        connection.send(b'[0, 77, ""]')

    thread = served(under_systemd, answer)
    assert cloning.begin(vmm.pid, vmm.page, 1234) == 77
    thread.join()
    assert asked == [[vmm.page, 1234], vmm.pid]


@pytest.mark.parametrize(
    ("answer", "unclear"),
    [
        (None, True),
        (b"{", True),
        (b"[0, 1]", True),
        (b'[0, "x", ""]', True),
        (b"\xff", True),
        (json.dumps([-errno.EINPROGRESS, 0, "late"]).encode(), True),
        (json.dumps([-errno.EACCES, 0, "refused\x1b"]).encode(), False),
        (json.dumps([0, -errno.EAGAIN, ""]).encode(), False),
    ],
)
def test_what_comes_of_an_answer(
    vmm: FakeVmm, under_systemd: Path, answer: bytes | None, unclear: bool
) -> None:
    """An error each time, and a plain one only when nothing can begin any more."""

    def say(connection: socket.socket) -> None:
        connection.recv(100)
        if answer is not None:
            connection.send(answer)

    thread = served(under_systemd, say)
    with pytest.raises(PostcopydError) as caught:
        cloning.begin(vmm.pid, vmm.page, 0)
    thread.join()
    assert isinstance(caught.value, cloning.Unclear) == unclear
    assert caught.value.name == "NotAdopted"
    assert ("gave no answer: it has ended" in str(caught.value)) == (answer is None)


def test_an_answer_that_does_not_come(
    vmm: FakeVmm, under_systemd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloning, "ANSWER_S", 0.05)
    over = threading.Event()
    thread = served(under_systemd, lambda _: over.wait() and None)
    with pytest.raises(cloning.Unclear, match="timed out"):
        cloning.begin(vmm.pid, vmm.page, 0)
    over.set()
    thread.join()


@pytest.mark.parametrize("unclear", [True, False])
def test_the_page_stays_where_a_keeper_may_still_begin(
    unclear: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would begin on memory that the VMM has taken for something else. And one that nobody has
    on record ends soon."""
    calls = []
    kind = cloning.Unclear if unclear else PostcopydError

    def begin(vmm: int, page: int, until: int) -> int:
        assert until - time.clock_gettime(time.CLOCK_BOOTTIME) < 3600 < keeper.LEASE_S
        raise kind("no")

    monkeypatch.setattr(keeper, "children", lambda vmm: iter(()))
    monkeypatch.setattr(keeper, "call", lambda vmm, name, *_: calls.append(name) or 4096)
    monkeypatch.setattr(cloning, "begin", begin)
    with pytest.raises(kind, match="no"):
        keeper._make(1, True)
    assert calls == (["mmap"] if unclear else ["mmap", "munmap"])


def test_a_filter_that_nobody_knows(vmm: FakeVmm, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a list of what it allows, and would end the VMM: nothing is done there."""
    monkeypatch.setattr(keeper, "call", None)
    with pytest.raises(PostcopydError, match="may end it for that"):
        keeper._make(vmm.pid, False)


# --- the other process


@pytest.fixture
def clones(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    made: list[tuple[int, int, int]] = []

    def clone(vmm: int, page: int, until: int) -> Begun:
        made.append((vmm, page, until))
        return Begun(0, 5, "")

    monkeypatch.setattr(cloning, "_clone", clone)
    return made


def answered(text: bytes, *descriptors: int) -> Begun:
    """What the other process, played by this one, makes of a request."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, its:
        socket.send_fds(ours, [text], descriptors)
        return cloning._answer(its)


def request(vmm: FakeVmm, page: int) -> Begun:
    pidfd = os.pidfd_open(vmm.pid)
    try:
        return answered(json.dumps([page, 99]).encode(), pidfd)
    finally:
        os.close(pidfd)


def test_one_that_is_made(vmm: FakeVmm, clones: list[Any]) -> None:
    assert request(vmm, vmm.page) == Begun(0, 5, "")
    assert clones == [(vmm.pid, vmm.page, 99)]


def test_only_a_page_that_is_free(vmm: FakeVmm, clones: list[Any]) -> None:
    """Nothing of the process is overwritten: neither what has something, nor what is no memory of
    its own."""
    code = next(one for one in cloning.procfs.mappings(vmm.pid) if one.file != (0, 0))
    for page in (vmm.page + 4096, vmm.page + 1, code.start, 0, -1, 1 << 70):
        with pytest.raises(cloning._Refused, match="no page of process"):
            request(vmm, page)
    assert clones == []


def test_only_a_process_that_needs_it(vmm: FakeVmm, clones: list[Any]) -> None:
    """It has a filter, it lives, and it is a process."""
    plain = FakeVmm()
    with pytest.raises(cloning._Refused, match="no seccomp filter"):
        request(plain, plain.page)
    plain.close()
    pidfd = os.pidfd_open(vmm.pid)
    vmm.process.kill()
    vmm.process.wait()
    for descriptor in (pidfd, os.open("/dev/null", os.O_RDONLY)):
        with pytest.raises(cloning._Refused, match=r"has ended|no pidfd"):
            answered(b"[4096, 1]", descriptor)
        os.close(descriptor)
    assert clones == []


def test_only_a_request(vmm: FakeVmm, clones: list[Any]) -> None:
    pidfd = os.pidfd_open(vmm.pid)
    for text in (b"", b"x", b"[1]", b"[1, 2, 3]", b"7", b'["x", 1]', b"\xff"):
        with pytest.raises(cloning._Refused, match="the request is none"):
            answered(text, pidfd)
    os.close(pidfd)
    with pytest.raises(cloning._Refused, match="the request is none"):
        answered(b"[4096, 1]")
    assert clones == []


def test_only_its_own_user(
    vmm: FakeVmm, clones: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is root under systemd, whatever the mode of the socket is."""
    monkeypatch.setattr(cloning.os, "geteuid", lambda: 12345)
    with pytest.raises(cloning._Refused, match="belongs to another user"):
        request(vmm, vmm.page)
    assert clones == []


def run_main(stdin: Any) -> subprocess.Popen[str]:
    program = "import sys; from postcopyd.cli.main import main; sys.exit(main(['keeper']))"
    return subprocess.Popen(
        [sys.executable, "-I", "-c", program], stdin=stdin, stderr=subprocess.PIPE, text=True
    )


def test_the_program() -> None:
    """It says what it has refused, to who asks and to the journal, and ends; also when nobody
    hears that any more, and at once when it is started by hand."""
    for heard in (True, False):
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, its:
            started = run_main(its.fileno())
            its.close()
            ours.send(b"nonsense")
            if heard:
                failed, _, sentence = json.loads(ours.recv(4096))
                assert (failed, "the request is none" in sentence) == (-errno.EINVAL, True)
            ours.close()
            _, said = started.communicate(timeout=60)
        assert (started.returncode, "the request is none" in said) == (1, True)
    by_hand = run_main(subprocess.DEVNULL)
    _, said = by_hand.communicate(timeout=60)
    assert (by_hand.returncode, "postcopyd-keeper@.service" in said) == (2, True)
