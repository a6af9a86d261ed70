# SPDX-License-Identifier: Apache-2.0
"""Two hosts to try documents on: namespaces of this machine, joined by a veth, without systemd.

Each has its own name, network, /run and /dev/shm, and a layer over /etc and /var: commands run as
printed and leave nothing behind. Owns those and the shell of each; knows no document.
"""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from needs import missing

# As a host's own processes see it; the pid namespace is this machine's, so that one can see them.
SETUP = """
hostname {name}
mount -t tmpfs postcopyd-tests /mnt
cd /mnt
for folder in etc var; do
  mkdir $folder $folder.work
  mount -t overlay -o lowerdir=/$folder,upperdir=$folder,workdir=$folder.work none /$folder
done
for folder in /run /dev/shm; do mount -t tmpfs postcopyd-tests $folder; done
mkdir /run/lock /mnt/home
ip link set lo up
printf '127.0.0.1 localhost\\n192.0.2.1 host1\\n192.0.2.2 host2\\n' > /etc/hosts
"""

DONE = "\x01done"
HOME = "mnt/home"


class Shell:
    """A shell that stays, so that what a command sets is there for the next one."""

    def __init__(self, argv: list[str]) -> None:
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, command: str, seconds: float = 60) -> tuple[int, str]:
        """Exit status and what was printed on either stream. Raises TimeoutError."""
        assert self.process.stdin is not None and self.process.stdout is not None
        line = f"{{ {command}\n}} </dev/null; printf '{DONE} %s\\n' $?\n"
        self.process.stdin.write(line.encode())
        self.process.stdin.flush()
        said = b""
        deadline = time.monotonic() + seconds
        while not said.endswith(b"\n") or DONE.encode() not in said:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError(f"{command!r} takes more than {seconds} s: {said.decode()}")
            more = os.read(self.process.stdout.fileno(), 65536)
            if not more:
                raise AssertionError(f"the shell ended in {command!r}: {said.decode()}")
            said += more
        text, _, status = said.decode(errors="replace").partition(DONE)
        return int(status), text

    def end(self) -> None:
        with self.process:
            self.process.kill()


def scp(text: str, home: str, here: Path, roots: Mapping[str, Path]) -> tuple[int, str]:
    """What scp(1) would do between hosts where nobody is there to log in. `here` and `roots`, by
    name, are the `/` of hosts as this process reaches them, `home` is below that."""
    *files, to = [word for word in shlex.split(text)[1:] if not word.startswith("-")]
    name, _, folder = to.partition(":")
    for pattern in files:
        found = list((here / home).glob(pattern))
        if not found:
            return 1, f"scp: {pattern}: No such file or directory\n"
        for file in found:
            shutil.copy(file, roots[name] / (folder.lstrip("/") or home) / file.name)
    return 0, ""


class Host:
    """One of the two; `path` comes first in its shell's PATH."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        keeps = ["unshare", "--mount", "--net", "--uts", "--ipc", "--propagation", "private"]
        self.process = subprocess.Popen([*keeps, "sleep", "infinity"], start_new_session=True)
        self.inside = ["nsenter", "-t", str(self.process.pid), "-m", "-n", "-u", "-i"]
        self.pid = self.process.pid
        while os.readlink(f"/proc/{self.pid}/ns/ipc") == os.readlink("/proc/self/ns/ipc"):
            time.sleep(0.01)  # the last of them that unshare(2) makes; and all in one call
        self.shell = Shell([*self.inside, "bash"])
        self.root = Path(f"/proc/{self.pid}/root")
        status, said = self.shell.run(SETUP.format(name=name))
        if status:
            missing(f"namespaces with overlayfs, to be {name}: {said}")
        self.shell.run(f"export PATH={path}:$PATH; HOME=/{HOME}; cd")

    def end(self) -> None:
        """Ends all that runs in here, with the namespaces."""
        self.shell.end()
        self.process.send_signal(signal.SIGSTOP)  # so that its number stays its own
        mine = os.readlink(f"/proc/{self.pid}/ns/net")
        while found := list(_within(mine, self.pid)):
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        with self.process:
            self.process.kill()


def _within(namespace: str, besides: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if os.readlink(entry / "ns/net") == namespace and int(entry.name) != besides:
                yield int(entry.name)


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """host1 and host2, 192.0.2.1 and 192.0.2.2, which reach each other and nothing else."""
    if os.geteuid() != 0:
        missing("root")
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            missing(program)
    hosts: list[Host] = []
    try:
        for name in ("host1", "host2"):
            hosts.append(Host(name, Path(sys.executable).parent))
        ends = [["name", "lan", "netns", str(host.pid)] for host in hosts]
        veth = ["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]]
        subprocess.run(veth, check=True)
        for number, host in enumerate(hosts, 1):
            host.shell.run(f"ip address add 192.0.2.{number}/24 dev lan && ip link set lan up")
        yield hosts
    finally:
        for host in hosts:
            host.end()
