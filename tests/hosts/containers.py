# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one machine: containers in which the distribution's systemd is process 1.

Each is a copy of this machine's `/` or of another Debian (an overlay, so nothing is written to it),
with a network namespace, a cgroup tree, /dev/shm and a journal of its own, and none of the services
that this machine has enabled. A veth pair joins them: host1 is 192.0.2.1, host2 192.0.2.2, and both
know the names. Knows nothing of postcopyd but how it is installed and gets its certificates.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import newest
import pytest
import trio
from needs import missing

REPOSITORY = Path(__file__).parents[2]
NAMES = ("host1", "host2")
PREFIX = "postcopyd-lab-"
PKI = "/etc/pki/postcopyd"
BOOT_S = 60.0
WAIT_S = 60.0
# Devices that a host has and a container is not given.
DEVICES = ("/dev/userfaultfd", "/dev/kvm", "/dev/net/tun")
# What a copy of this machine shall not have of it: its services, its journal, what a postcopyd that
# is installed on this machine has left.
FORGOTTEN = (
    "etc/systemd/system",
    "etc/fstab",
    "etc/postcopyd",
    "etc/pki/postcopyd",
    "var/log/journal",
    "var/lib/postcopyd",
)
# What no test needs and boots slowly.
MASKED = (
    "console-getty.service",
    "e2scrub_reap.service",
    "getty.target",
    "modprobe@.service",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-journal-flush.service",
    "systemd-logind.service",
    "systemd-modules-load.service",
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
)


@dataclass(frozen=True)
class Debian:
    """What both hosts are copies of."""

    root: Path

    def package(self) -> Path:
        """Of postcopyd, for it."""
        if self.root == newest.ROOT:
            return newest.package()
        packages = sorted((REPOSITORY / ".build/deb").glob("postcopyd_*.deb"))
        if not packages:
            missing("the Debian package of postcopyd: `make deb`")
        return packages[-1]


THIS, NEWEST = Debian(Path("/")), Debian(newest.ROOT)


class LabError(Exception):
    """The hosts could not be made; a sentence."""


class Host:
    """One of the two. All commands run as root, where not said otherwise, with a clean
    environment, in a shell when given as a string."""

    def __init__(self, name: str, root: Path, shared: Path, init: int) -> None:
        self.name = name
        self.address = f"192.0.2.{NAMES.index(name) + 1}"
        self.root = root
        """Its `/` from outside, without what is mounted on it."""
        self.shared = shared
        """A folder that both hosts and this process have, by the same name."""
        self.init = init
        """Its process 1, as this process numbers it."""

    def command(self, command: str | list[str]) -> list[str]:
        """What runs `command` in this host, for whoever starts processes in a way of his own."""
        if isinstance(command, str):
            command = ["/bin/bash", "-c", command]
        clean = ["/usr/bin/env", "-i", "LANG=C.UTF-8", "HOME=/root", "SHELL=/bin/bash"]
        clean += ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
        return ["/usr/bin/nsenter", f"--target={self.init}", "--all", "--", *clean, *command]

    def start(self, command: str | list[str], **how: object) -> subprocess.Popen[str]:
        """Whoever starts it ends it; with the host it ends in any case."""
        return subprocess.Popen(self.command(command), text=True, **how)

    def run(
        self,
        command: str | list[str],
        *,
        check: bool = True,
        stdin: str = "",
        seconds: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """Its output and status. Raises AssertionError with all that it said when it fails."""
        done = subprocess.run(
            self.command(command), input=stdin, capture_output=True, text=True, timeout=seconds
        )
        if check and done.returncode:
            said = f"{done.stdout}{done.stderr}".strip()
            raise AssertionError(f"{self.name}: {command!r}: {done.returncode}: {said}")
        return done

    def says(self, command: str | list[str]) -> str:
        return self.run(command).stdout.strip()

    def install(self, package: Path) -> None:
        """A Debian package, as a user would who has copied it here."""
        copy = self.root / "root" / package.name
        shutil.copy(package, copy)
        self.run(["dpkg", "--install", f"/root/{package.name}"], seconds=120)

    def journal(self, *arguments: str) -> str:
        return self.says(["journalctl", "--no-pager", "--quiet", *arguments])


@contextmanager
def open_lab(debian: Debian = THIS) -> Iterator[tuple[Host, Host]]:
    """Both hosts, booted. Root only. At the end nothing is left of them, whatever happened; what
    a killed process has left is removed by the next one. Raises LabError."""
    if os.geteuid() != 0:
        raise LabError("only root can make containers")
    _sweep()
    name = f"{PREFIX}{os.getpid()}"
    folder = Path("/run", name)
    with ExitStack() as stack:
        stack.callback(_remove, name)
        folder.mkdir()
        _must("mount", "-t", "tmpfs", "-o", "mode=755", name, folder)
        shared = folder / "shared"
        shared.mkdir()
        shared.chmod(0o777)  # QEMUs of other users have their sockets there
        for host in NAMES:
            _must("ip", "netns", "add", f"{name}-{host}")
            _must("ip", "-n", f"{name}-{host}", "link", "set", "lo", "up")
        one, two = (f"{name}-{host}" for host in NAMES)
        _must("ip", "-n", one, "link", "add", "eth0", "type", "veth",
              "peer", "name", "eth0", "netns", two)  # fmt: skip
        for number, space in enumerate((one, two), 1):
            _must("ip", "-n", space, "address", "add", f"192.0.2.{number}/24", "dev", "eth0")
            _must("ip", "-n", space, "link", "set", "eth0", "up")
        started = [(host, *_boot(stack, name, folder, host, debian.root)) for host in NAMES]
        hosts = [_booted(folder, *each) for each in started]
        yield hosts[0], hosts[1]


def _boot(
    stack: ExitStack, name: str, folder: Path, host: str, copied: Path
) -> tuple[subprocess.Popen[bytes], Path]:
    place = folder / host
    root = place / "root"
    for part in ("upper", "work", "root"):
        (place / part).mkdir(parents=True)
    layers = f"lowerdir={copied},upperdir={place}/upper,workdir={place}/work"
    _must("mount", "-t", "overlay", f"{name}-{host}", "-o", layers, root)
    for path in FORGOTTEN:
        if (root / path).is_dir():
            shutil.rmtree(root / path)
        else:
            (root / path).unlink(missing_ok=True)
    system = root / "etc/systemd/system"
    system.mkdir()
    for unit in MASKED:
        (system / unit).symlink_to("/dev/null")
    (system / "default.target").symlink_to("/lib/systemd/system/multi-user.target")
    for file, text in {
        "hostname": f"{host}\n",
        "hosts": "127.0.0.1 localhost\n::1 localhost\n192.0.2.1 host1\n192.0.2.2 host2\n",
        "machine-id": f"{uuid.uuid4().hex}\n",
    }.items():
        (root / "etc" / file).unlink(missing_ok=True)
        (root / "etc" / file).write_text(text)
    # Installing a package has it index all manuals of this machine, for ten seconds.
    (root / "usr/bin/mandb").unlink(missing_ok=True)
    (root / "usr/bin/mandb").symlink_to("/bin/true")
    if (root / "var/lib/dpkg/info/postcopyd.list").exists():
        _must("chroot", root, "dpkg", "--purge", "postcopyd")

    groups = [mount / f"{name}-{host}" for mount in _cgroup_mounts()]
    for group in groups:
        group.mkdir()
    arguments = [
        *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot"),
        *("--link-journal=no", "--resolv-conf=off", "--timezone=off", "--console=passive"),
        *(f"--directory={root}", f"--machine={host}"),
        f"--network-namespace-path=/run/netns/{name}-{host}",
        # As on a host: all that this process may, seccomp filters of nobody but the units.
        "--capability=all",
        *(f"--bind={device}" for device in DEVICES if Path(device).exists()),
        f"--bind={folder / 'shared'}",
        f"--bind-ro={REPOSITORY}",
    ]
    enter = "".join(f"echo $$ > {shlex.quote(f'{group}/cgroup.procs')}; " for group in groups)
    environment = {
        "PATH": os.environ["PATH"],
        "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
        "SYSTEMD_SECCOMP": "0",
        # More than one container of a name at a time: each test run has its own.
        "SYSTEMD_NSPAWN_LOCK": "0",
    }
    with (place / "console").open("wb") as console:
        process = subprocess.Popen(
            # The container ends with this process, even when that is killed.
            ["sh", "-c", f'{enter}exec setpriv --pdeathsig KILL "$@"', "sh", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            env=environment,
            start_new_session=True,
        )
    stack.callback(_end, process)
    return process, place / "console"


def _booted(folder: Path, name: str, process: subprocess.Popen[bytes], console: Path) -> Host:
    """Waits until systemd says so."""
    deadline = time.monotonic() + BOOT_S
    while process.poll() is None and time.monotonic() < deadline:
        init = _child(process.pid)
        if init and Path(f"/proc/{init}/root/run/systemd/private").exists():
            host = Host(name, folder / name / "root", folder / "shared", init)
            state = host.run(["systemctl", "is-system-running", "--wait"], check=False)
            if state.stdout.strip() in ("running", "degraded"):
                return host
        time.sleep(0.05)
    raise LabError(f"{name} has not booted: {console.read_text(errors='replace')[-2000:]}")


def _child(pid: int) -> int:
    """The only child of a process, 0 while there is none."""
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else 0
    return 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """At once: all of a process namespace ends with its process 1."""
    init = _child(process.pid)
    with suppress(ProcessLookupError):
        os.kill(init or process.pid, signal.SIGKILL)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _cgroup_mounts() -> list[Path]:
    """Where systemd keeps its groups: cgroup2, and beside version 1 also the named hierarchy."""
    mounts = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, kind, options, *_ = line.split()
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(",")):
            mounts.append(Path(path))
    return mounts


def _remove(name: str) -> None:
    """What is not a process."""
    folder = Path("/run", name)
    for host in NAMES:
        subprocess.run(["ip", "netns", "delete", f"{name}-{host}"], stderr=subprocess.DEVNULL)
        for group in (mount / f"{name}-{host}" for mount in _cgroup_mounts()):
            _remove_group(group)
        subprocess.run(["umount", "--lazy", folder / host / "root"], stderr=subprocess.DEVNULL)
    subprocess.run(["umount", "--lazy", folder], stderr=subprocess.DEVNULL)
    with suppress(FileNotFoundError):
        folder.rmdir()


def _remove_group(group: Path) -> None:
    """With what may still be in it (Linux 5.14 and later)."""
    with suppress(OSError):
        (group / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + 5  # until the last process has been reaped
    for path, _, _ in os.walk(group, topdown=False):
        while os.path.exists(path):
            try:
                os.rmdir(path)
            except OSError:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.02)


async def until(holds: Callable[[], bool], what: str) -> None:
    """Returns when it is so, as a command on a host tells."""
    with trio.move_on_after(WAIT_S):
        while not await trio.to_thread.run_sync(holds):
            await trio.sleep(0.05)
        return
    pytest.fail(f"it is not so after {WAIT_S:.0f} s: {what}")


def certificates(one: Host, two: Host) -> None:
    """New ones for both, by a CA that the first host has."""
    for host, folder in ((one, PKI), (two, "/root/two")):
        names = ["--host", host.name, "--host", host.address]
        one.run(["postcopyd", "certs", "--dir", folder, "--ca", "/root/ca", *names])
    for file in one.says("ls /root/two").splitlines():
        two.run(f"umask 077 && cat > {PKI}/{file}", stdin=one.run(f"cat /root/two/{file}").stdout)


def _sweep() -> None:
    """What killed processes have left."""
    places = [Path("/run"), Path("/run/netns"), *_cgroup_mounts()]
    found = {path.name.split("-")[2] for place in places for path in place.glob(f"{PREFIX}*")}
    for pid in found:
        if not Path("/proc", pid).exists():
            _remove(f"{PREFIX}{pid}")


def _must(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"{shlex.join(map(str, command))}: {done.stderr.strip()}")
