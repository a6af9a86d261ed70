# SPDX-License-Identifier: Apache-2.0
"""Adoption, on targets that notice damage (tests/native/adoptee.c) and on a real QEMU."""

from __future__ import annotations

import array
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from errno import EACCES, EBUSY, EINVAL, ENOEXEC, EPERM, ESRCH
from pathlib import Path
from typing import Any

import pytest
from needs import missing

from postcopyd.host import procfs
from postcopyd.native import adoption

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "tests" / "native"
HEADERS = ROOT / "postcopyd" / "native"
ADOPT = sorted(HEADERS.glob("adopt*.c"))
FLAGS = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-pthread", "-DADOPT_TEST"]

SYS_CLOSE, SYS_IOCTL, SYS_GETPID, SYS_USERFAULTFD = 3, 16, 39, 323
SYS_MMAP, SYS_WAIT4, SYS_CLOCK_NANOSLEEP = 9, 61, 230
USERFAULTFD_IOC_NEW = 0xAA00
FLAGS_NEW = os.O_CLOEXEC | os.O_NONBLOCK

Json = dict[str, Any]


def wait_for(condition: Callable[[], Any], seconds: float = 5.0) -> Any:
    """Return what `condition` returns once it is true; AssertionError when it never is."""
    end = time.monotonic() + seconds
    while not (got := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
    return got


def state(pid: int) -> str:
    """The letter that /proc has for a process's state."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def userfaultfds(pid: int) -> list[int]:
    """The numbers of a process's userfaultfds."""
    found = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            if "[userfaultfd]" in os.readlink(entry.path):
                found.append(int(entry.name))
    return found


class Programs:
    """The two C programs, and what was started from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def build(self, name: str, *sources: Path, flags: tuple[str, ...] = ("-O2",)) -> Path:
        target = self.folder / name
        if not target.exists():
            include = f"-I{HEADERS}"
            subprocess.run(["cc", *FLAGS, *flags, include, "-o", target, *sources], check=True)
        return target

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.started.append(process)
        return process

    def stop(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    with suppress(BrokenPipeError):
                        pipe.close()
        self.started.clear()

    def adopt_program(self, *words: object, program: str = "adopt_test") -> tuple[int, Json]:
        """Run adopt_test; its exit status and its result, {} if it was killed."""
        done = subprocess.run(
            [self.folder / program, *map(str, words)],
            stdout=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.returncode, json.loads(done.stdout) if done.stdout else {}

    def call(self, *words: object) -> Json:
        return self.adopt_program(*words)[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    if os.uname().machine != "x86_64":
        missing("adoption on this architecture")
    if os.geteuid():
        missing("root")
    if not shutil.which("cc"):
        missing("cc")
    programs = Programs(tmp_path_factory.mktemp("adopt"))
    programs.build("adoptee", NATIVE / "adoptee.c")
    programs.build("adopt_test", NATIVE / "adopt_test.c", *ADOPT)
    return programs


@pytest.fixture
def programs(built: Programs) -> Iterator[Programs]:
    yield built
    built.stop()


class Adoptee:
    """A running adoptee; its end is checked too."""

    def __init__(self, programs: Programs, *kind: str) -> None:
        self.process = programs.start(programs.folder / "adoptee", *kind)
        self.pid = self.process.pid
        self.greeting = self.read()
        self.tids: dict[str, int] = self.greeting.get("tids", {})

    def read(self) -> Json:
        assert self.process.stdout
        got: Json = json.loads(self.process.stdout.readline() or "{}")
        return got

    def check(self) -> Json:
        """What it says of itself after two more laps of each of its threads."""
        assert self.process.stdin
        self.process.stdin.write("check\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> int:
        """Let it end by itself; its exit status."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait(10)


def assert_unharmed(before: Json, after: Json, late_us: int) -> None:
    assert after["bad"] == 0
    assert after["fds"] == before["fds"]
    assert after["worstLateUs"] < late_us


def test_a_thousand_adoptions_leave_every_kind_of_thread_as_it_was(programs: Programs) -> None:
    """Nobody sees EINTR, a late or early timeout, a lost signal, another mask or register."""
    adoptee = Adoptee(programs)
    before = adoptee.check()
    status, result = programs.adopt_program(adoptee.pid, "cycle", 1000, *adoptee.tids.values())
    assert (status, result["code"], result["done"]) == (0, 0, 1000), result
    after = adoptee.check()
    assert_unharmed(before, after, late_us=1_000_000)
    assert after["eintr"] == 0
    assert adoptee.end() == 0


def test_adoption_is_clean_under_sanitizers(programs: Programs) -> None:
    """The address and undefined-behaviour sanitizers find nothing in 65 adoptions."""
    sources = [NATIVE / "adopt_test.c", *ADOPT]
    flags = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    programs.build("adopt_asan", *sources, flags=flags)
    adoptee = Adoptee(programs)
    words = (adoptee.pid, "cycle", 65, *adoptee.tids.values())
    status, result = programs.adopt_program(*words, program="adopt_asan")
    assert (status, result["done"]) == (0, 65), result
    assert adoptee.check()["bad"] == 0


def count_ptrace_calls(programs: Programs, pid: int, *options: object) -> int:
    """How many ptrace calls one adoption takes, by doing one."""
    result = programs.call(*options, pid, "call", SYS_GETPID)
    assert result["result"] == pid, result
    return int(result["ptraceCalls"])


def test_a_tracer_killed_at_any_ptrace_call_leaves_the_target_unharmed(programs: Programs) -> None:
    """SIGKILL before and after each call, in each kind of thread; adoptable again afterwards.

    epoll_wait and sigwaitinfo return EINTR at any stop (signal(7)), so a tracer that dies before
    it could prevent that leaves one behind. So does one that dies in a thread whose wait was
    interrupted before; descriptors are therefore closed through the main thread only.
    """
    adoptee = Adoptee(programs)
    before = adoptee.check()
    main = ("--tid", adoptee.pid, adoptee.pid, "call")
    calls = count_ptrace_calls(programs, adoptee.pid, "--tid", adoptee.pid)
    assert calls > 10
    made, kills = [], 0
    for when in ("before", "after"):
        for number in range(1, calls + 1):
            for kind, tid in adoptee.tids.items():
                words = ("--tid", tid, f"--die-{when}", number, adoptee.pid, "call")
                status, result = programs.adopt_program(*words, SYS_USERFAULTFD, FLAGS_NEW)
                # A thread that was stopped by chance takes a ptrace call more or less.
                if status != -signal.SIGKILL:
                    assert result["code"] == 0, (kind, when, number, result)
                kills += status == -signal.SIGKILL
            now = adoptee.check()
            assert now["bad"] == 0, (when, number)
            fds = userfaultfds(adoptee.pid)
            made.append(len(fds))
            for fd in fds:
                assert programs.call(*main, SYS_CLOSE, fd)["result"] == 0
    after = adoptee.check()
    assert_unharmed(before, after, late_us=2_000_000)
    assert after["eintr"] <= kills
    assert kills > 2 * (calls - 1) * len(adoptee.tids)
    assert made[0] == 0, "killed before the first call, and yet a descriptor was made"
    assert made[-1] == len(adoptee.tids), "killed after the last call, and a descriptor is missing"
    assert adoptee.end() == 0


def children(pid: int) -> list[int]:
    """Of all threads of a process, zombies too."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


class Kept:
    """An adoptee that gets keepers, one after the other."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self.adoptee = Adoptee(programs)
        self.main = ("--tid", self.adoptee.pid, self.adoptee.pid)
        memory = (0, 4096, 3, 0x22, 2**64 - 1, 0)  # read and write, private, anonymous
        self.page = programs.call(*self.main, "call", SYS_MMAP, *memory)["result"]

    def make(self, *options: object, until: int | None = None) -> tuple[int, Json]:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        words = (self.adoptee.pid, "keep", self.page, until or round(now) + 60)
        return self.programs.adopt_program(*options, *words)

    def asleep(self) -> int:
        """The one keeper there is, once it has done what it has to do."""
        (pid,) = children(self.adoptee.pid)
        call = Path(f"/proc/{pid}/syscall")
        wait_for(lambda: call.read_text().startswith(f"{SYS_CLOCK_NANOSLEEP} "))
        assert Path(f"/proc/{pid}/comm").read_text() == "a-keeper\n"
        assert os.listdir(f"/proc/{pid}/fd") == []
        return pid

    def end(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: state(pid) == "Z")
        wait = (pid, 0, 0x40000000, 0)  # __WALL
        assert self.programs.call(*self.main, "call", SYS_WAIT4, *wait)["result"] == pid


def test_a_keeper_has_the_memory_and_nothing_else(programs: Programs) -> None:
    """It outlives the process, of which nothing is left but that; then it ends when it is time."""
    kept = Kept(programs)
    before = kept.adoptee.check()
    status, result = kept.make()
    assert (status, result["code"]) == (0, 0), result
    pid = kept.asleep()
    assert pid == result["result"]
    assert len(os.listdir(f"/proc/{kept.adoptee.pid}/fd")) >= 3
    assert_unharmed(before, kept.adoptee.check(), late_us=2_000_000)
    for number in {*range(1, 65)} - {signal.SIGKILL, signal.SIGSTOP, 32, 33}:
        os.kill(pid, number)
    kept.end(pid)
    assert children(kept.adoptee.pid) == []
    soon = round(time.clock_gettime(time.CLOCK_BOOTTIME)) + 2
    assert kept.make(until=soon)[0] == 0
    pid = kept.asleep()
    kept.adoptee.process.kill()
    kept.adoptee.process.wait()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        assert os.pread(memory.fileno(), 9, kept.page) == b"a-keeper\0"
        wait_for(lambda: os.pread(memory.fileno(), 9, kept.page) == b"")
    assert time.clock_gettime(time.CLOCK_BOOTTIME) >= soon


def test_a_tracer_killed_at_any_call_leaves_no_half_keeper(programs: Programs) -> None:
    """There is a whole one or none, and the process is unharmed."""
    kept = Kept(programs)
    before = kept.adoptee.check()
    calls, made = kept.make(*kept.main[:2])[1]["ptraceCalls"], []
    kept.end(kept.asleep())
    for when in ("before", "after"):
        for number in range(1, calls + 1):
            kept.make(*kept.main[:2], f"--die-{when}", number)
            assert kept.adoptee.check()["bad"] == 0, (when, number)
            made.append(len(children(kept.adoptee.pid)))
            if made[-1]:
                kept.end(kept.asleep())
    assert (made[0], made[-1]) == (0, 1)
    assert_unharmed(before, kept.adoptee.check(), late_us=2_000_000)
    assert kept.adoptee.end() == 0


def assert_refused(result: Json, code: int, *words: str) -> None:
    assert result["code"] == -code, result
    for word in words:
        assert word in result["error"], result


def assert_adoptable(programs: Programs, adoptee: Adoptee, *options: object) -> None:
    """The refusal was only a refusal: it works now, and the target ends well."""
    count_ptrace_calls(programs, adoptee.pid, *options)
    assert adoptee.end() == 0


def test_a_traced_process_is_refused_with_its_tracer_named(programs: Programs) -> None:
    """Somebody's debugger is there first; when it is gone, adoption works."""
    adoptee = Adoptee(programs, "plain")
    tracer = programs.start(programs.folder / "adopt_test", str(adoptee.pid), "hold")
    assert tracer.stdout
    assert "holding" in tracer.stdout.readline()
    result = programs.call(adoptee.pid, "call", SYS_GETPID)
    assert_refused(result, EBUSY, f"process {tracer.pid} (adopt_test) is tracing it", "end that")
    tracer.kill()
    tracer.wait()
    assert_adoptable(programs, adoptee)


def test_a_process_that_is_gone_is_refused(programs: Programs) -> None:
    """No such process, a zombie, and a thread's number each have their own sentence."""
    adoptee = Adoptee(programs)
    word = ("call", SYS_GETPID)
    assert_refused(programs.call(adoptee.tids["spin"], *word), EINVAL, f"process {adoptee.pid};")
    adoptee.process.kill()
    wait_for(lambda: state(adoptee.pid) == "Z")
    assert_refused(programs.call(adoptee.pid, *word), ESRCH, "zombie", "start the VMM again")
    adoptee.process.wait()
    assert_refused(programs.call(adoptee.pid, *word), ESRCH, "there is none")


def test_a_seccomp_filter_is_refused_unless_allowed(programs: Programs) -> None:
    """A deny-list that lets the call pass does not prevent adoption once the caller vouches."""
    adoptee = Adoptee(programs, "seccomp-other")
    result = programs.call(adoptee.pid, "call", SYS_GETPID)
    assert_refused(result, EACCES, "seccomp filter", "hand over its userfaultfd")
    assert_adoptable(programs, adoptee, "--allow-seccomp")


def test_a_seccomp_filter_that_refuses_the_call_does_no_harm(programs: Programs) -> None:
    """An errno is a result; a SIGSYS is taken back before it kills, and reported."""
    word = ("call", SYS_USERFAULTFD, FLAGS_NEW)
    for kind in ("seccomp-errno", "seccomp-trap"):
        adoptee = Adoptee(programs, kind)
        result = programs.call("--allow-seccomp", adoptee.pid, *word)
        if kind == "seccomp-errno":
            assert (result["code"], result["result"]) == (0, -EPERM)
        else:
            assert_refused(result, EACCES, f"refuses system call {SYS_USERFAULTFD}")
        assert_adoptable(programs, adoptee, "--allow-seccomp")


def test_a_thread_that_handles_its_own_system_calls_is_left_alone(programs: Programs) -> None:
    """Our call in it would be a signal that kills: another thread makes it, or none."""
    adoptee = Adoptee(programs, "dispatch")
    result = programs.call("--timeout", 200, adoptee.pid, "call", SYS_GETPID)
    assert_refused(result, EBUSY, "PR_SET_SYSCALL_USER_DISPATCH", "hand over its userfaultfd")
    assert_refused(programs.call("--timeout", 200, adoptee.pid, "call", SYS_GETPID), EBUSY)
    assert_adoptable(programs, Adoptee(programs, "dispatch-one"))


def test_a_stopped_process_is_adopted_and_stays_stopped(programs: Programs) -> None:
    """After SIGSTOP it remains in state T, even if the tracer dies, until SIGCONT."""
    adoptee = Adoptee(programs, "plain")
    os.kill(adoptee.pid, signal.SIGSTOP)
    wait_for(lambda: state(adoptee.pid) == "T")
    calls = count_ptrace_calls(programs, adoptee.pid)
    wait_for(lambda: state(adoptee.pid) == "T")
    for number in range(1, calls + 1):
        programs.adopt_program("--die-after", number, adoptee.pid, "call", SYS_GETPID)
        wait_for(lambda: state(adoptee.pid) == "T")
    os.kill(adoptee.pid, signal.SIGCONT)
    wait_for(lambda: state(adoptee.pid) == "S")
    assert_adoptable(programs, adoptee)


def test_a_process_that_is_stopped_and_continued_meanwhile_is_adopted(programs: Programs) -> None:
    """SIGSTOP and SIGCONT at any moment of it are respected, and the call is made once."""
    adoptee = Adoptee(programs)
    before = adoptee.check()
    words = [str(adoptee.pid), "cycle", "100", *map(str, adoptee.tids.values())]
    adopter = programs.start(programs.folder / "adopt_test", *words)
    while adopter.poll() is None:
        os.kill(adoptee.pid, signal.SIGSTOP)
        time.sleep(0.003)
        os.kill(adoptee.pid, signal.SIGCONT)
        time.sleep(0.003)
    assert adopter.stdout
    assert json.loads(adopter.stdout.readline())["done"] == 100
    assert_unharmed(before, adoptee.check(), late_us=2_000_000)
    assert adoptee.end() == 0


def test_an_uninterruptible_process_is_refused_in_time(programs: Programs) -> None:
    """A thread in state D is left alone, or given up at the limit without being kept traced."""
    adoptee = Adoptee(programs, "vfork")
    wait_for(lambda: state(adoptee.pid) == "D")
    word = (adoptee.pid, "call", SYS_GETPID)
    result = programs.call("--timeout", 200, *word)
    assert_refused(result, EBUSY, "uninterruptible sleep for 200 ms", "try again")
    assert result["ptraceCalls"] == 0
    result = programs.call("--timeout", 200, "--tid", adoptee.pid, *word)
    assert_refused(result, EBUSY, "does not stop", "try again")
    assert 200_000 <= result["us"] < 1_000_000
    assert "TracerPid:\t0\n" in Path(f"/proc/{adoptee.pid}/status").read_text()
    assert adoptee.end() == 0


def test_a_thread_that_waits_for_a_page_is_adopted(programs: Programs) -> None:
    """Behind a userfaultfd too a thread can make the call; then it waits for its page again."""
    adoptee = Adoptee(programs, "fault")
    tid = adoptee.greeting["tids"]["fault"]
    wait_for(lambda: state(tid) == "S")
    calls = count_ptrace_calls(programs, adoptee.pid, "--tid", tid)
    for number in range(1, calls + 1):
        words = ("--tid", tid, "--die-after", number, adoptee.pid, "call", SYS_GETPID)
        programs.adopt_program(*words)
    assert_adoptable(programs, adoptee, "--tid", tid)


def test_a_thread_without_room_for_a_frame_is_refused(programs: Programs) -> None:
    """Nothing is written beyond the mapping that the stack pointer is in."""
    adoptee = Adoptee(programs, "small-stack")
    # It is on that stack once it is in read(2), the system call 0; it says that it is ready before.
    deadline = time.monotonic() + 10
    while not Path(f"/proc/{adoptee.pid}/syscall").read_text().startswith("0 "):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    result = programs.call("--timeout", 200, adoptee.pid, "call", SYS_GETPID)
    assert_refused(result, EBUSY, "no room for a signal frame", "larger stacks")
    assert adoptee.end() == 0


def test_adoption_without_privilege_is_refused_with_what_is_lacking(programs: Programs) -> None:
    """The sentence names CAP_SYS_PTRACE."""
    adoptee = Adoptee(programs, "plain")
    result = programs.call("--nobody", adoptee.pid, "call", SYS_GETPID)
    assert_refused(result, EPERM, "CAP_SYS_PTRACE", "run postcopyd as its unit does")
    assert_adoptable(programs, adoptee)


def test_a_32_bit_process_is_refused(programs: Programs) -> None:
    """Its registers and signal frames are others."""
    source = programs.folder / "pause32.s"
    source.write_text(".globl _start\n_start: mov $29,%eax\n int $0x80\n jmp _start\n")
    target = programs.folder / "pause32"
    command = ["cc", "-m32", "-nostdlib", "-static", "-o", target, source]
    if subprocess.run(command, check=False).returncode:
        missing("a compiler for 32-bit programs")
    try:
        process = programs.start(target)
    except OSError:
        missing("a kernel that runs 32-bit programs")
    wait_for(lambda: os.readlink(f"/proc/{process.pid}/exe") == str(target))
    result = programs.call(process.pid, "call", SYS_GETPID)
    assert_refused(result, ENOEXEC, "not a 64-bit program", "use a 64-bit VMM")


def cgroup2() -> Path | None:
    """Where the cgroup2 hierarchy is mounted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, folder, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(folder)
    return None


def test_a_frozen_process_is_refused_and_nothing_is_done(programs: Programs) -> None:
    """A process in a frozen cgroup stops for us, but makes no call; it gets itself back."""
    root = cgroup2()
    group = root / f"postcopyd-test-{os.getpid()}" if root else Path("/nonexistent/group")
    try:
        group.mkdir()
    except OSError:
        missing("a writable cgroup2 hierarchy")
    try:
        adoptee = Adoptee(programs, "plain")
        (group / "cgroup.procs").write_text(str(adoptee.pid))
        (group / "cgroup.freeze").write_text("1")
        wait_for(lambda: "frozen 1" in (group / "cgroup.events").read_text())
        word = (adoptee.pid, "call", SYS_USERFAULTFD, FLAGS_NEW)
        result = programs.call("--timeout", 200, *word)
        assert_refused(result, EBUSY, "nothing was done", "thaw it")
        (group / "cgroup.freeze").write_text("0")
        wait_for(lambda: "frozen 0" in (group / "cgroup.events").read_text())
        assert userfaultfds(adoptee.pid) == []
        assert_adoptable(programs, adoptee)
    finally:
        programs.stop()
        wait_for(lambda: "populated 0" in (group / "cgroup.events").read_text())
        group.rmdir()


# ---- QEMU ----


class Qemu:
    """A QEMU and its monitor."""

    def __init__(self, programs: Programs, folder: Path, *options: str) -> None:
        self.ram = folder / "ram"
        listener = folder / "qmp"
        self.process = programs.start(
            "qemu-system-x86_64", "-nodefaults", "-display", "none",
            "-machine", "q35,accel=tcg,memory-backend=ram", "-m", "64M",
            "-object", f"memory-backend-file,id=ram,size=64M,share=on,mem-path={self.ram}",
            "-qmp", f"unix:{listener},server=on,wait=off", *options,
        )  # fmt: skip
        self.pid = self.process.pid
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        wait_for(listener.exists, 20)
        wait_for(lambda: self.socket.connect_ex(str(listener)) == 0, 20)
        self.lines = self.socket.makefile("r")
        self.lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, execute: str, *fds: int, **arguments: object) -> Any:
        """One QMP command, with file descriptors; what it returns."""
        message = json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n"
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([message], rights)
        while True:
            answer = json.loads(self.lines.readline())
            if "event" not in answer:
                return answer["return"]

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


@pytest.fixture
def start_qemu(programs: Programs, tmp_path: Path) -> Iterator[Callable[..., Qemu]]:
    if not shutil.which("qemu-system-x86_64"):
        missing("qemu-system-x86_64")
    started: list[Qemu] = []

    def start(*options: str) -> Qemu:
        started.append(Qemu(programs, tmp_path, *options))
        return started[-1]

    yield start
    for qemu in started:
        qemu.close()


SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@pytest.mark.parametrize("options", [("-S",), (), ("-S", "-sandbox", SANDBOX)],
                         ids=["stopped", "running", "sandboxed"])  # fmt: skip
def test_qemu_is_adopted(
    programs: Programs, start_qemu: Callable[..., Qemu], options: tuple[str, ...]
) -> None:
    """A userfaultfd is made in it, answers UFFDIO_API here, is closed in it; QMP answers."""
    qemu = start_qemu(*options)
    allow = ["--allow-seccomp"] if "-sandbox" in options else []
    if allow:
        refused = programs.call(qemu.pid, "call", SYS_USERFAULTFD, FLAGS_NEW)
        assert_refused(refused, EACCES, "deny-list")
    before = len(os.listdir(f"/proc/{qemu.pid}/fd"))
    vcpu = qemu.ask("query-cpus-fast")[0]["thread-id"]
    for tids in ([], [qemu.pid, vcpu]):
        _, result = programs.adopt_program(*allow, qemu.pid, "cycle", 20, *tids)
        assert (result["code"], result["done"]) == (0, 20), result
    assert len(os.listdir(f"/proc/{qemu.pid}/fd")) == before
    assert qemu.ask("query-status")["running"] == ("-S" not in options)


def test_qemu_survives_a_tracer_killed_at_any_ptrace_call(
    programs: Programs, start_qemu: Callable[..., Qemu]
) -> None:
    """In its main thread and in its running vCPU; QMP answers each time."""
    qemu = start_qemu()
    vcpu = qemu.ask("query-cpus-fast")[0]["thread-id"]
    for tid in (qemu.pid, vcpu):
        calls = count_ptrace_calls(programs, qemu.pid, "--tid", tid)
        for number in range(1, calls + 1):
            for when in ("before", "after"):
                words = ("--tid", tid, f"--die-{when}", number, qemu.pid, "call", SYS_GETPID)
                programs.adopt_program(*words)
                assert qemu.ask("query-status")["running"]
    assert qemu.process.poll() is None


def test_qemu_without_privilege_is_adopted_through_the_device(
    programs: Programs, start_qemu: Callable[..., Qemu]
) -> None:
    """Its system call yields -EPERM, which is a result; USERFAULTFD_IOC_NEW on a handed-over
    /dev/userfaultfd yields a descriptor."""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        missing("vm.unprivileged_userfaultfd=0")
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        missing("/dev/userfaultfd")
    qemu = start_qemu("-S", "-runas", "nobody")
    result = programs.call(qemu.pid, "call", SYS_USERFAULTFD, FLAGS_NEW)
    assert (result["code"], result["result"]) == (0, -EPERM)
    qemu.ask("getfd", device, fdname="uffd")
    os.close(device)
    inside = [
        int(entry.name)
        for entry in os.scandir(f"/proc/{qemu.pid}/fd")
        if os.readlink(entry.path) == "/dev/userfaultfd"
    ]
    word = (qemu.pid, "call", SYS_IOCTL, inside[0], USERFAULTFD_IOC_NEW, FLAGS_NEW)
    made = programs.call(*word)
    assert made["code"] == 0
    assert userfaultfds(qemu.pid) == [made["result"]]
    assert programs.call(qemu.pid, "call", SYS_CLOSE, made["result"])["result"] == 0
    assert userfaultfds(qemu.pid) == []
    qemu.ask("closefd", fdname="uffd")
    assert qemu.ask("query-status")["running"] is False


async def test_a_process_is_lent_a_descriptor(tmp_path: Path) -> None:
    """By its own hands, which are empty afterwards but for that."""
    if os.geteuid():
        missing("root")
    file = tmp_path / "file"
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(["cat"], stdin=pipe, stdout=pipe, bufsize=0) as process,
        file.open("w") as lent,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"-")
        assert process.stdout.read(1) == b"-"  # so all of it has been loaded
        before = procfs.descriptors(process.pid), len(list(procfs.mappings(process.pid)))
        number = await adoption.lend(process.pid, lent.fileno())
        now = procfs.descriptors(process.pid)
        assert now.pop(number) == str(file)
        assert (now, len(list(procfs.mappings(process.pid)))) == before
        process.kill()
