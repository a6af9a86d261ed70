# SPDX-License-Identifier: Apache-2.0
"""The one call that begins a keeper, a `clone` in the VMM, and who makes it.

A seccomp filter of the VMM may forbid it: then it would end the VMM. The kernel leaves a filter out
for a tracer that has CAP_SYS_ADMIN and no filter itself, for as long as that lives. A daemon may be
killed at any time, so another process does it, which nothing ends in the middle: systemd starts one
for each connection to SOCKET (postcopyd-keeper@.service), for a daemon under its unit, which may
not; any other daemon starts its own.

On a SOCK_SEQPACKET socket each sends one message: the daemon [PAGE, UNTIL] with a pidfd of the VMM,
as a number could come to name another process; then the other process a `Begun`, and it ends. If
the daemon has ended meanwhile, nobody knows of that keeper, and it ends at UNTIL. Each owns its end
of the socket and its pidfd.

The other process loads no trio: a VMM that is killed before it has a keeper loses memory.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import NamedTuple

from postcopyd._native import ffi, lib
from postcopyd.errors import PostcopydError
from postcopyd.host import procfs
from postcopyd.names import plain

NAME = "postcopyd-keep"
"""Of the keeper."""

SOCKET = "/run/postcopyd/keeper"
"""Of systemd/postcopyd-keeper.socket."""

PAGE = 4096
TIMEOUT_MS = 5000  # for a thread of the VMM to stop
REQUEST_S, ANSWER_S = 10.0, 30.0
MESSAGE = 4096
CAP_SYS_ADMIN = 21


class Begun(NamedTuple):
    """What `adopt_keeper` has returned, see adopt.h."""

    failed: int
    number: int
    sentence: str


class Unclear(PostcopydError):
    """A keeper may still begin, so nobody may take away its page. It ends by itself."""

    name = "NotAdopted"


class _Refused(Exception):
    """A request that the other process does not do; a clause."""


def begin(vmm: int, page: int, until: int) -> int:
    """Begins a keeper of a VMM's memory. Returns its number in the VMM's PID namespace. Raises
    PostcopydError and OSError; then nothing has begun, if it is not Unclear."""
    filtered = procfs.status(vmm).get("Seccomp") != "0"
    begun = _asked(vmm, page, until) if filtered else _clone(vmm, page, until)
    if begun.failed == -errno.EINPROGRESS:
        raise Unclear(begun.sentence)
    if begun.failed:
        raise PostcopydError(begun.sentence, "NotAdopted")
    if begun.number < 0:
        raise PostcopydError(
            f"making a keeper of process {vmm}: clone in it failed: {os.strerror(-begun.number)}",
            "NotAdopted",
        )
    return begun.number


def _clone(vmm: int, page: int, until: int) -> Begun:
    error, result = ffi.new("struct adopt_error *"), ffi.new("long *")
    failed = lib.adopt_keeper(vmm, page, NAME.encode(), until, TIMEOUT_MS, result, error)
    return Begun(failed, result[0], ffi.string(error.text).decode(errors="replace"))


# --- the daemon's side


def _asked(vmm: int, page: int, until: int) -> Begun:
    pidfd = os.pidfd_open(vmm)
    try:
        with _other(vmm) as other:
            other.settimeout(ANSWER_S)
            try:
                socket.send_fds(other, [json.dumps([page, until]).encode()], [pidfd])
                if not (answer := other.recv(MESSAGE)):
                    raise ValueError("it has ended")
                failed, number, sentence = json.loads(answer)
                return Begun(int(failed), int(number), plain(sentence))
            except (OSError, ValueError, TypeError) as error:
                raise Unclear(
                    f"making a keeper of process {vmm}: the process that suspends its seccomp "
                    f"filter gave no answer: {error}; see `journalctl -u 'postcopyd-keeper@*'`"
                ) from None
    finally:
        os.close(pidfd)


@contextmanager
def _other(vmm: int) -> Iterator[socket.socket]:
    """A process that may suspend the filter, and waits for a request."""
    ours = procfs.status("self")
    filtered = ours.get("Seccomp") != "0"
    mighty = int(ours.get("CapEff", "0"), 16) >> CAP_SYS_ADMIN & 1
    if mighty and not filtered:
        with _started() as other:
            yield other
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.settimeout(ANSWER_S)
        try:
            other.connect(SOCKET)
        except OSError as error:
            which = (
                "that has one itself, as under systemd," if filtered else "without CAP_SYS_ADMIN"
            )
            raise PostcopydError(
                f"making a keeper of process {vmm}: it has a seccomp filter, which a daemon "
                f"{which} may not suspend, and nobody answers at {SOCKET} ({error.strerror}): "
                f"start postcopyd-keeper.socket for the next guest",
                "NotAdopted",
            ) from None
        yield other


@contextmanager
def _started() -> Iterator[socket.socket]:
    program = f"import sys; sys.path[:0] = {sys.path}; from {__name__} import main; main()"
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with its:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", program],
                stdin=its.fileno(), stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        yield ours
        with suppress(subprocess.TimeoutExpired):  # it has answered; Python reaps it later
            process.wait(ANSWER_S)


# --- the other process


def main() -> int:
    """Answers one request on its standard input. Returns its exit status."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        asker = socket.socket(fileno=os.dup(0))
    except OSError:
        print("this is for systemd: see postcopyd-keeper@.service", file=sys.stderr)
        return 2
    with asker:
        asker.settimeout(REQUEST_S)
        try:
            begun = _answer(asker)
        except (_Refused, OSError) as error:
            begun = Begun(-errno.EINVAL, 0, f"making a keeper: refused, as {error}")
        if begun.failed:
            print(begun.sentence, file=sys.stderr)
        with suppress(OSError):  # who asked has ended, and so will the keeper
            asker.send(json.dumps(begun).encode())
    return int(begun.failed != 0)


def _answer(asker: socket.socket) -> Begun:
    """Does what is asked, if it is a keeper's page in a process with a filter, and nothing else.
    Raises _Refused and OSError."""
    credentials = asker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, user, _ = struct.unpack("iII", credentials)
    if user != os.geteuid():
        raise _Refused(f"process {pid}, which asks, belongs to another user ({user})")
    text, descriptors, _, _ = socket.recv_fds(asker, MESSAGE, 1)
    try:
        page, until = map(int, json.loads(text))
        (pidfd,) = descriptors
    except (ValueError, TypeError):
        raise _Refused("the request is none") from None
    with closing(_Process(pidfd)) as vmm:
        number = vmm.number()
        if procfs.status(number).get("Seccomp") != "2":
            raise _Refused(f"process {number} has no seccomp filter, or has ended")
        if not _is_free(number, page):
            raise _Refused(f"{page:#x} is no page of process {number} for it")
        vmm.number()  # so that all this was of the same process
        return _clone(number, page, until)


class _Process:
    """Of a pidfd, which it owns."""

    def __init__(self, pidfd: int) -> None:
        self._pidfd = pidfd

    def number(self) -> int:
        """Raises _Refused when it has ended, and OSError."""
        with open(f"/proc/self/fdinfo/{self._pidfd}") as lines:
            fields = dict(line.partition(":")[::2] for line in lines)
        if "Pid" not in fields:
            raise _Refused("what names the process is no pidfd")
        waits = select.poll()
        waits.register(self._pidfd, select.POLLIN)
        found = int(fields["Pid"])
        if found <= 0 or waits.poll(0):
            raise _Refused("the process has ended")
        return found

    def close(self) -> None:
        os.close(self._pidfd)


def _is_free(pid: int, page: int) -> bool:
    """Whether it is what `mmap` has just made there, so that nothing is overwritten."""
    for mapping in procfs.mappings(pid):
        if mapping.start <= page and page + PAGE <= mapping.end:
            if mapping.shared or not mapping.writable or mapping.file != (0, 0):
                return False
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                return os.pread(memory.fileno(), PAGE, page) == bytes(PAGE)
    return False
