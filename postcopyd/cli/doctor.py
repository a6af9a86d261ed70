# SPDX-License-Identifier: Apache-2.0
"""`postcopyd doctor`: finds what this host lacks to migrate guests, and says how to mend it.

Owns one list of checks, each a small function that looks at one thing and says what it found. It
changes nothing on the host. It adopts only a child process of its own: this proves what the other
checks only make likely. It must not need a daemon, nor know of one.

Numbers are those of the kernel: linux/userfaultfd.h, linux/fs.h, asm/unistd_64.h,
linux/capability.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from json import dumps
from pathlib import Path
from typing import Final, Literal, NamedTuple

from postcopyd.errors import PostcopydError
from postcopyd.units import size

OK: Final = "ok"
LACKS: Final = "lacks"
NOTE: Final = "note"

DEVICE = "/dev/userfaultfd"
QEMU_PLACES = (Path("/usr/libexec"), Path("/usr/local/bin"), Path("/usr/bin"))
QEMU_NAMES = ("qemu-system-x86_64", "qemu-kvm", "kvm")
QEMU_OLDEST = (7, 2)
QEMU_TRIED = ("7.2", "10.0", "11.1")
KERNEL_OLDEST = (6, 1)
NOFILE = 4096
"""Descriptors that a daemon with some hundred guests may need; each guest needs a dozen."""

_USERFAULTFD = 323
_UFFDIO_API = 0xC018AA3F
_USERFAULTFD_IOC_NEW = 0xAA00
_UFFD_API = 0xAA


class Feature(NamedTuple):
    """A feature bit of userfaultfd: which kernel has it, whether migrating needs it, its use."""

    bit: int
    name: str
    since: str
    needed: bool
    use: str


FEATURES = (
    Feature(5, "MISSING_SHMEM", "4.11", True, "guest RAM in tmpfs or memfd"),
    Feature(4, "MISSING_HUGETLBFS", "4.11", False, "guest RAM in huge pages"),
    Feature(10, "MINOR_SHMEM", "5.14", False, "hybrid migration into tmpfs"),
    Feature(14, "POISON", "6.6", False, "`postcopyd resolve --poison`"),
    Feature(15, "WP_ASYNC", "6.7", False, "hybrid migration: seeing written pages"),
)


@dataclass(frozen=True)
class Check:
    """The result of one check. `mend` says what to do about it; empty if there is nothing."""

    what: str
    state: Literal["ok", "lacks", "note"]
    found: str
    mend: str = ""


def run(*, json: bool) -> int:
    """Prints all checks. Returns the exit status: 1 if this host lacks what migrating needs."""
    checks = diagnose()
    good = all(check.state != LACKS for check in checks)
    if json:
        print(dumps({"checks": [vars(check) for check in checks], "ok": good}))
    else:
        print(human(checks))
    return 0 if good else 1


def diagnose() -> list[Check]:
    """All checks in order. A check that cannot be made becomes a note; the others go on."""
    found: list[Check] = []
    for check in CHECKS:
        try:
            found.extend(check())
        except (OSError, ValueError, LookupError) as error:
            what = check.__name__.strip("_").replace("_", " ")
            found.append(Check(what, NOTE, f"could not be looked at: {error}"))
    return found


def human(checks: Sequence[Check]) -> str:
    """The checks as aligned lines, each with its mend below it, and a last line with the sum."""
    width = max(len(check.what) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:5}  {check.what:{width}}  {check.found}")
        if check.mend:
            lines.append(f"{'':5}  {'':{width}}  -> {check.mend}")
    lacking = [check.what for check in checks if check.state == LACKS]
    lines.append(
        f"This host lacks: {', '.join(lacking)}."
        if lacking
        else "This host can migrate guests, as source and as destination."
    )
    return "\n".join(lines)


# --- the kernel ----------------------------------------------------------------------------------


def _architecture() -> Iterator[Check]:
    machine = platform.machine()
    if machine == "x86_64":
        yield Check("architecture", OK, machine)
    else:
        yield Check("architecture", LACKS, machine, "use an x86-64 host: adoption knows no other")


def _kernel() -> Iterator[Check]:
    release = platform.release()
    numbers = re.match(r"(\d+)\.(\d+)", release)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if version >= KERNEL_OLDEST:
        yield Check("kernel", OK, release)
    else:
        yield Check("kernel", NOTE, release, "older than any this was tried with (6.1)")


def open_userfaultfd() -> tuple[int, str]:
    """A userfaultfd of this process, and how it was made. Raises OSError when neither way works."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_USERFAULTFD, flags)
    if fd >= 0:
        return fd, "system call"
    refused = ctypes.get_errno()
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        raise OSError(refused, os.strerror(refused)) from None
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, flags), DEVICE
    finally:
        os.close(device)


def userfaultfd_features(fd: int) -> int:
    """All feature bits of the kernel; afterwards the descriptor can only be closed."""
    answer = bytearray(struct.pack("=QQQ", _UFFD_API, 0, 0))
    fcntl.ioctl(fd, _UFFDIO_API, answer)
    return int(struct.unpack("=QQQ", answer)[1])


def _userfaultfd() -> Iterator[Check]:
    try:
        fd, way = open_userfaultfd()
    except OSError as error:
        mend = "run as root, or give the daemon CAP_SYS_PTRACE"
        if error.errno == errno.ENOSYS:
            mend = "use a kernel built with CONFIG_USERFAULTFD"
        yield Check("userfaultfd", LACKS, error.strerror or str(error), mend)
        return
    try:
        bits = userfaultfd_features(fd)
    finally:
        os.close(fd)
    yield Check("userfaultfd", OK, f"made by {way}, features {bits:#x}")
    for feature in FEATURES:
        what = f"userfaultfd {feature.name}"
        if bits >> feature.bit & 1:
            yield Check(what, OK, feature.use)
        else:
            state: Literal["lacks", "note"] = LACKS if feature.needed else NOTE
            mend = f"use Linux {feature.since} or later for {feature.use}"
            yield Check(what, state, "the kernel does not have it", mend)


def _userfaultfd_device() -> Iterator[Check]:
    """Needed for VMMs that run as another user only: others make the system call."""
    what = DEVICE
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        mend = "use Linux 6.1 or later, or sysctl vm.unprivileged_userfaultfd=1, for such VMMs"
        yield Check(what, NOTE, "not there: VMMs of other users cannot be adopted with it", mend)
        return
    except OSError as error:
        mend = f"let the daemon open {DEVICE} (root, or a udev rule), for VMMs of other users"
        yield Check(what, NOTE, error.strerror or str(error), mend)
        return
    try:
        os.close(fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC))
        yield Check(what, OK, "usable, for VMMs that run as another user")
    finally:
        os.close(device)


def _unprivileged_userfaultfd() -> Iterator[Check]:
    what = "vm.unprivileged_userfaultfd"
    value = _read("/proc/sys/vm/unprivileged_userfaultfd")
    if value == "1":
        yield Check(what, OK, "1: a VMM of any user may be adopted by the system call")
    elif Path(DEVICE).exists():
        yield Check(what, OK, f"{value or 'not there'}: VMMs of other users get {DEVICE} lent")
    else:
        yield Check(
            what,
            NOTE,
            f"{value or 'not there'}: a VMM without CAP_SYS_PTRACE may not make a userfaultfd",
            f"sysctl {what}=1 for VMMs that do not run as root",
        )


def _tracking() -> Iterator[Check]:
    """Whether the kernel sees what a guest writes while it runs; tried on this process's memory."""
    from postcopyd.host import kernel

    what = "seeing written pages (tried)"
    if (why := kernel.why_no_passes()) is None:
        yield Check(what, OK, "hybrid migration: memory is copied while the guest runs")
        return
    mend = "update the kernel for hybrid migration, as source; postcopy does not need it"
    yield Check(what, NOTE, f"{why}: guests leave by postcopy alone, not hybrid", mend)


def _huge_page_zeros() -> Iterator[Check]:
    """Whether missing pages stay missing when the kernel makes huge pages; tried the same way."""
    from postcopyd.host import kernel

    what = "missing pages stay missing (tried)"
    if (why := kernel.why_zeros()) is None:
        yield Check(what, OK, "also where the kernel makes huge pages of shared memory")
        return
    found = f"{why}: a QEMU gets none while its guest's memory follows"
    mend = (
        "update the kernel, or let the guest RAM of other VMMs have no huge pages: they are refused"
    )
    yield Check(what, NOTE, found, mend)


# --- what the daemon may do ----------------------------------------------------------------------

CAPABILITIES = (
    (19, "CAP_SYS_PTRACE", True, "adopting VMMs of other users, and root's"),
    (1, "CAP_DAC_OVERRIDE", False, "reaching QMP sockets and RAM files of other users"),
    (5, "CAP_KILL", False, "ending VMMs of other users"),
)


def _capabilities() -> Iterator[Check]:
    line = re.search(r"^CapEff:\s*(\w+)", _read("/proc/self/status"), re.MULTILINE)
    have = int(line[1], 16) if line else 0
    for bit, name, needed, use in CAPABILITIES:
        if have >> bit & 1:
            yield Check(name, OK, use)
        else:
            mend = "run `postcopyd doctor` as the daemon runs: as root, or with this capability"
            yield Check(name, LACKS if needed else NOTE, f"not there: {use}", mend)


def _ptrace_scope() -> Iterator[Check]:
    what = "kernel.yama.ptrace_scope"
    value = _read("/proc/sys/kernel/yama/ptrace_scope")
    if not value:
        yield Check(what, OK, "no Yama in this kernel")
    elif value == "3":
        mend = "boot without kernel.yama.ptrace_scope=3: it cannot be lowered in a running kernel"
        yield Check(what, LACKS, "3: no process may adopt another", mend)
    else:
        yield Check(what, OK, f"{value}: the daemon may adopt, with CAP_SYS_PTRACE")


def _adoption() -> Iterator[Check]:
    """The proof: adopts a child, which does not cooperate, as it would adopt a VMM."""
    import trio

    from postcopyd.native import adoption

    what = "adoption (tried)"
    child = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL)

    async def adopt() -> int:
        # Wait until it is `sleep`: before that it is a copy of this process.
        while Path(f"/proc/{child.pid}/comm").read_text().strip() != "sleep":
            await trio.sleep(0.001)
        ours, number = await adoption.create_userfaultfd(child.pid, allow_seccomp=True)
        try:
            bits = userfaultfd_features(ours)
        finally:
            os.close(ours)
        await adoption.close_in(child.pid, number, allow_seccomp=True)
        return bits

    try:
        trio.run(adopt)
        if child.poll() is not None:
            raise PostcopydError(f"the child ended (status {child.returncode})")
        yield Check(what, OK, "a child made a userfaultfd, lent it and went on")
    except (PostcopydError, OSError) as error:
        mend = "mend what is missing above, or see what AppArmor, SELinux or a container forbids"
        why = getattr(error, "strerror", None) or str(error)
        yield Check(what, LACKS, why, mend)
    finally:
        child.kill()
        child.wait()


def _other_processes() -> Iterator[Check]:
    """Tries pidfd_getfd and /proc/PID/mem of a child. Between unrelated processes the rules are
    those of ptrace."""
    child = subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        pidfd = os.pidfd_open(child.pid)
        taken = libc.syscall(438, pidfd, 0, 0)
        problem = ctypes.get_errno()
        os.close(pidfd)
        if taken >= 0:
            os.close(taken)
        yield _call("pidfd_getfd", taken >= 0, problem, "taking the userfaultfd of a VMM", LACKS)
        address = int(_read(f"/proc/{child.pid}/maps").partition("-")[0], 16)
        problem = 0
        try:
            with open(f"/proc/{child.pid}/mem", "rb", buffering=0) as memory:
                os.pread(memory.fileno(), 16, address)
        except OSError as error:
            problem = error.errno or 0
        use = "reading guest RAM that is no file"
        yield _call("/proc/PID/mem", not problem, problem, use, NOTE)
    finally:
        child.kill()
        child.communicate()


def _call(
    what: str, works: bool, problem: int, use: str, otherwise: Literal["lacks", "note"]
) -> Check:
    if works:
        return Check(what, OK, use)
    mend = (
        f"allow {what} (seccomp filter of the unit or container, security module, CAP_SYS_PTRACE)"
    )
    return Check(what, otherwise, f"{os.strerror(problem)}: {use}", mend)


# --- what guests need ----------------------------------------------------------------------------


def qemus() -> dict[Path, str]:
    """The QEMUs of this host by real path, with their versions ("" if one does not say)."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(":") if folder]
    found = {}
    for path in (folder / name for folder in (*folders, *QEMU_PLACES) for name in QEMU_NAMES):
        if os.access(path, os.X_OK) and path.is_file() and path.resolve() not in found:
            done = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=10, check=False
            )
            version = re.search(r"version (\d+\.\d+(?:\.\d+)?)", done.stdout)
            found[path.resolve()] = version[1] if version else ""
    return found


def _qemu() -> Iterator[Check]:
    found = qemus()
    if not found:
        mend = "install qemu-system-x86 (QEMU 7.2 or later), unless you bring another VMM"
        yield Check("QEMU", NOTE, "none on the PATH nor in /usr/libexec", mend)
    for path, version in found.items():
        numbers = tuple(int(number) for number in version.split(".")[:2]) if version else (0, 0)
        text = f"{path} {version or 'of no known version'}"
        if numbers < QEMU_OLDEST:
            yield Check("QEMU", NOTE, text, "use QEMU 7.2 or later")
        elif version.startswith(QEMU_TRIED):
            yield Check("QEMU", OK, f"{text}, a version that was tried")
        else:
            *tried, last = QEMU_TRIED
            yield Check("QEMU", OK, f"{text} (tried were {', '.join(tried)} and {last})")


def _kvm() -> Iterator[Check]:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        yield Check("/dev/kvm", OK, "usable")
    else:
        mend = "load kvm_intel or kvm_amd, or see its permissions; guests under TCG do not need it"
        yield Check("/dev/kvm", NOTE, "not there, or not for this user", mend)


def _memory() -> Iterator[Check]:
    fields = dict(re.findall(r"^(\w+):\s+(\d+)", _read("/proc/meminfo"), re.MULTILINE))
    available = int(fields["MemAvailable"]) << 10
    yield Check("memory", OK, f"{size(available)} available for guests that arrive")
    try:
        shm = os.statvfs("/dev/shm")
    except OSError:
        mend = "mount a tmpfs there, if guest RAM shall be in files there"
        yield Check("/dev/shm", NOTE, "not there", mend)
    else:
        whole, free = shm.f_blocks * shm.f_frsize, shm.f_bavail * shm.f_frsize
        found = f"{size(free)} free of {size(whole)}"
        if whole < 1 << 30:
            mend = "mount -o remount,size=... /dev/shm, if guest RAM shall be there"
            yield Check("/dev/shm", NOTE, found, mend)
        else:
            yield Check("/dev/shm", OK, found)
    total, free_pages = int(fields.get("HugePages_Total", 0)), fields.get("HugePages_Free", "0")
    each = size(int(fields.get("Hugepagesize", 0)) << 10)
    found = f"{free_pages} of {total} of {each} free" if total else "none; guests do not need them"
    yield Check("huge pages", OK, found)


def _descriptors() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= NOFILE:
        yield Check("open files", OK, f"limit {soft}, at most {hard}")
    else:
        mend = f"LimitNOFILE={NOFILE} in the unit, or ulimit -n, for many guests at a time"
        yield Check("open files", NOTE, f"limit {soft}, at most {hard}", mend)


def _install() -> Iterator[Check]:
    versions = []
    for name in ("postcopyd", "trio", "msgpack", "msgspec", "cffi"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} ?")
    yield Check("this install", OK, f"Python {sys.version.split()[0]}, {', '.join(versions)}")


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    _architecture,
    _kernel,
    _userfaultfd,
    _userfaultfd_device,
    _unprivileged_userfaultfd,
    _tracking,
    _huge_page_zeros,
    _capabilities,
    _ptrace_scope,
    _other_processes,
    _adoption,
    _qemu,
    _kvm,
    _memory,
    _descriptors,
    _install,
)


def _read(path: str) -> str:
    """A small file of the kernel, empty when it is not there."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""
