# SPDX-License-Identifier: Apache-2.0
"""A guest between two hosts with real systemd: the units, and what they must not do to a guest."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from containers import PKI, WAIT_S, Host, certificates, until
from guests import qemu as q
from qemus import QEMUS

pytestmark = pytest.mark.long

MIB = 1 << 20
VM = "web1"


class Machine:
    """One guest and the QEMUs that run it in turn, each on one of the hosts."""

    def __init__(
        self, hosts: tuple[Host, Host], guest: q.Guest, config: q.GuestConfig, user: str, ram: str
    ) -> None:
        self.hosts = hosts
        self.guest = guest
        self.config = config
        self.user = user
        self.ram = ram
        self.moves = 0
        self.clients: list[subprocess.Popen[str]] = []

    @property
    def here(self) -> Host:
        return self.hosts[self.moves % 2]

    @property
    def there(self) -> Host:
        return self.hosts[(self.moves + 1) % 2]

    async def launch(self, host: Host, *, incoming: bool) -> None:
        """A QEMU, in a scope of its own as libvirt has them, and attached."""
        name = f"{VM}-{self.moves}{'in' if incoming else ''}"
        run = ["systemd-run", "--quiet", "--scope", "--slice=machine.slice", f"--uid={self.user}"]
        program, *options = host.command([*run, "/usr/bin/qemu-system-x86_64"])
        qemu = dataclasses.replace(self.config.qemu, path=Path(program), options=tuple(options))
        ram = f"{self.ram}/{name}"
        config = dataclasses.replace(
            self.config, qemu=qemu, name=name, incoming=incoming, mem_paths=(ram,)
        )
        process = await self.guest.launch(config)
        await postcopyd(host, "attach", VM, "--qemu", str(process.qmp_path))

    async def prepare(self) -> None:
        """A QEMU waits at the other host, which knows nothing of this guest any more."""
        await in_thread(self.there.run, ["postcopyd", "detach", VM], check=False)
        await in_thread(self.there.run, f"rm -f {self.ram}/{VM}-*")
        await self.launch(self.there, incoming=True)

    def start(self, host: Host, command: list[str]) -> subprocess.Popen[str]:
        """A program that is heard, and gone at the end."""
        client = host.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.clients.append(client)
        return client

    async def moved(self) -> None:
        """Drained on both hosts; the guest has all of its memory, and had all the time."""
        await until_phase(self.here, "drained")
        await until_phase(self.there, "drained")
        self.moves += 1
        before = await self.guest.report()
        sweep = await self.guest.sweep()
        after = await self.guest.report(before)
        assert (sweep.bad, after.bad) == (0, 0), self.guest.bad


@asynccontextmanager
async def machine(
    hosts: tuple[Host, Host],
    boot: tuple[Path, Path],
    *,
    user: str = "nobody",
    ram: str = "/dev/shm",
    memory: int = 160 * MIB,
    **config: Any,
) -> AsyncIterator[Machine]:
    """A guest that runs at the first host, attached there; all of it is gone at the end."""
    folder = hosts[0].shared
    made = q.GuestConfig(
        qemu=QEMUS[0], kernel=boot[0], initramfs=boot[1], memory=memory, vcpus=1, **config
    )
    try:
        async with q.Guest.open(folder) as guest, AsyncExitStack() as stack:
            it = Machine(hosts, guest, made, user, ram)
            stack.callback(end, it.clients)
            await it.launch(it.here, incoming=False)
            await guest.ready()
            yield it
    finally:
        for host in hosts:
            for verb in ("resolve --kill", "detach"):
                host.run(f"timeout 10 postcopyd {verb} {VM}", check=False)
            host.run(f"rm -f {ram}/{VM}-*")


def end(clients: list[subprocess.Popen[str]]) -> None:
    for client in clients:
        client.kill()
        client.communicate()


async def in_thread(run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return await trio.to_thread.run_sync(lambda: run(*arguments, **options))


async def postcopyd(host: Host, *arguments: str) -> str:
    done: subprocess.CompletedProcess[str] = await in_thread(
        host.run, ["postcopyd", *arguments], seconds=WAIT_S
    )
    return done.stdout


async def status(host: Host) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await postcopyd(host, "status", VM, "--json"))
    return found


async def until_phase(host: Host, *phases: str) -> None:
    with trio.move_on_after(WAIT_S):
        while (now := await status(host))["phase"] not in phases:
            await trio.sleep(0.05)
        return
    pytest.fail(f"{host.name} is not {phases} but {now}; {host.journal('-u', 'postcopyd', '-n50')}")


def shows(host: Host, what: str, unit: str = "postcopyd.service") -> str:
    return host.says(["systemctl", "show", "--property", what, "--value", unit])


async def test_a_client_starts_the_service_by_its_socket(hosts: tuple[Host, Host]) -> None:
    """Nothing runs until somebody asks; then the daemon says itself that it is ready."""
    host = hosts[0]
    assert shows(host, "ActiveState") == "inactive"
    assert shows(host, "ActiveState", "postcopyd.socket") == "active"
    await postcopyd(host, "list")
    await until(lambda: shows(host, "ActiveState") == "active", "the service is active")
    assert shows(host, "StatusText") == "0 VMs"
    mode = host.says("stat -c '%a %U %G' /run/postcopyd/control /var/lib/postcopyd")
    assert mode.splitlines() == ["660 root postcopyd", "700 root root"]
    refused = host.run(["setpriv", "--reuid=nobody", "--clear-groups", "postcopyd", "list"],
                       check=False)  # fmt: skip
    assert "group postcopyd" in refused.stderr


async def test_a_guest_of_another_user_goes_there_and_back(
    hosts: tuple[Host, Host], boot: tuple[Path, Path]
) -> None:
    """QEMU as libvirt has it, unprivileged and sandboxed, in a scope of its own; the default mode
    there, postcopy back."""
    async with machine(hosts, boot) as it:
        for options in ([], ["--mode", "postcopy"]):
            await it.prepare()
            to = it.there.name
            assert "nothing stands in the way" in await postcopyd(it.here, "check", VM, "--to", to)
            result = await postcopyd(it.here, "migrate", VM, "--to", to, "--json", *options)
            assert json.loads(result.splitlines()[-1])["event"] == "completed"
            await it.moved()


async def test_a_sandboxed_qemu_that_is_killed_loses_nothing(
    hosts: tuple[Host, Host], boot: tuple[Path, Path]
) -> None:
    """The service may not suspend QEMU's seccomp filter, and the service that it asks may; so
    there is a keeper of its private memory, which is in the daemon's control group."""
    async with machine(hosts, boot, ram_kind="plain") as it:
        await it.prepare()
        await started(it, "12M")
        record = f"/run/postcopyd/state/{VM}.json"
        await until(lambda: '"keeper"' in it.here.says(f"cat {record}"), "a keeper on record")
        keeper = it.here.says("pgrep --exact postcopyd-keep")
        assert it.here.says(f"cat /proc/{keeper}/cgroup").endswith("/postcopyd.service")
        assert not it.here.says("systemctl list-units --all --quiet 'postcopyd-keeper@*'")
        qemu = it.here.says("pgrep --exact --uid nobody qemu-system-x86")
        it.here.run(f"kill -KILL {qemu}")
        assert (await status(it.there))["remaining"] > 16 * MIB
        await it.moved()
        await until(lambda: it.here.run("pgrep postcopyd-keep", check=False).returncode == 1,
                    "no keeper")  # fmt: skip


RESTART = ["systemctl", "restart", "postcopyd"]
KILL = ["systemctl", "kill", "-s", "KILL", "postcopyd"]


async def started(it: Machine, bandwidth: str = "24M") -> None:
    """A migration that has handed over and is far from its end."""
    command = ["postcopyd", "migrate", VM, "--to", it.there.name, "--mode", "postcopy"]
    client = it.start(it.here, [*command, "--bandwidth", bandwidth, "--json"])
    assert client.stdout
    said = []
    while line := await in_thread(client.stdout.readline):
        said.append(line)
        if json.loads(line).get("phase") == "postcopy":
            return
    pytest.fail(f"the migration came to nothing: {said}")


async def again(host: Host, command: list[str]) -> None:
    """Ends the daemon in this way, until another one serves."""
    before = shows(host, "MainPID")
    await in_thread(host.run, command)
    serves = ("active", "running")
    await until(
        lambda: (
            shows(host, "MainPID") not in ("0", before)
            and (shows(host, "ActiveState"), shows(host, "SubState")) == serves
        ),
        f"{host.name} has another daemon after {command}",
    )


# Stops the threads of a process that take faults, until that ends.
HOLD = """
import contextlib, ctypes, glob, os, sys
ptrace = ctypes.CDLL(None).ptrace
for comm in glob.glob(f"/proc/{sys.argv[1]}/task/*/comm"):
    if open(comm).read() == "pc-faults\\n":
        tid = int(comm.split("/")[4])
        assert ptrace(0x4206, tid, None, None) == 0  # PTRACE_SEIZE
        assert ptrace(0x4207, tid, None, None) == 0  # PTRACE_INTERRUPT
        print("held", flush=True)
with contextlib.suppress(ChildProcessError):
    while True:
        os.waitpid(-1, 0x40000000)  # __WALL
"""


async def test_the_daemons_end_in_the_middle(
    hosts: tuple[Host, Host], boot: tuple[Path, Path]
) -> None:
    """Restarted, killed, and ended by the watchdog, while most of the guest's memory is still at
    the other host: it arrives whole each time, and VMMs are never signalled."""
    async with machine(hosts, boot) as it:
        for first, second in ((RESTART, KILL), (KILL, RESTART)):
            await it.prepare()
            await started(it)
            await shown_arriving(it)
            await again(it.here, first)
            assert (await status(it.there))["remaining"] > 16 * MIB
            await again(it.there, second)
            await it.moved()

        await it.prepare()
        with watchdog_of(it.there, 4):
            await started(it, "12M")  # or it is done before anybody has noticed
            daemon = shows(it.there, "MainPID")
            holder = it.start(it.there, ["python3", "-c", HOLD, daemon])
            assert holder.stdout
            assert await in_thread(holder.stdout.readline) == "held\n"
            await until(lambda: shows(it.there, "MainPID") not in ("0", daemon), "another daemon")
            await it.moved()
        assert "Watchdog timeout" in it.here.journal("--unit=postcopyd")


async def shown_arriving(it: Machine) -> None:
    """What `systemctl status` shows of it."""
    text = f"1 VM; {VM} arriving from {it.here.name} ({it.here.address}): postcopy, "
    await until(lambda: shows(it.there, "StatusText").startswith(text), text)


@contextmanager
def watchdog_of(host: Host, seconds: int) -> Iterator[None]:
    folder = "/run/systemd/system/postcopyd.service.d"
    host.run(f"mkdir {folder}; printf '[Service]\nWatchdogSec={seconds}\n' > {folder}/test.conf")
    host.run("systemctl daemon-reload; systemctl restart postcopyd")
    yield
    host.run(f"rm -r {folder}; systemctl daemon-reload; systemctl restart postcopyd")


async def test_what_a_hook_has_started_outlives_the_daemon(hosts: tuple[Host, Host]) -> None:
    """The daemon's kill path is the daemon. (That of `systemctl kill` without --kill-whom=main is
    all that is in the service's group: hooks had better start VMMs by systemd-run.)"""
    host = hosts[0]
    await postcopyd(host, "list")
    group = "/sys/fs/cgroup$(systemctl show --property ControlGroup --value postcopyd)"
    child = host.start(f"echo $$ > {group}/cgroup.procs && exec sleep 1000")
    try:
        inside = f"grep -c . {group}/cgroup.procs"
        await until(lambda: host.says(inside) == "2", "the child is in the service's group")
        for command in (RESTART, [*KILL, "--kill-whom=main"]):
            await again(host, command)
            assert host.says(inside) == "2"
    finally:
        child.kill()
        child.wait()


async def test_certificates_are_read_again(hosts: tuple[Host, Host]) -> None:
    """`systemctl reload`: the same process, which says that it has done so; what it cannot use it
    leaves, and says so too."""
    host = hosts[0]
    await postcopyd(host, "list")
    daemon = shows(host, "MainPID")

    async def reloaded(said: str) -> None:
        host.run(["systemctl", "reload", "postcopyd"])
        of_it = ["--unit=postcopyd", f"_PID={daemon}"]
        await until(lambda: said in host.journal(*of_it), said)
        await until(lambda: shows(host, "SubState") == "running", "the service runs")

    kept = f"{PKI}/server-cert.pem"
    host.run(f"mv {kept} /root/kept")
    await reloaded("certificates not reloaded")
    host.run(f"mv /root/kept {kept}")
    certificates(*hosts)
    await reloaded("certificates reloaded")
    hosts[1].run(["systemctl", "reload-or-restart", "postcopyd"])
    assert shows(host, "MainPID") == daemon


async def test_a_wrong_configuration_is_said_and_tried_again(hosts: tuple[Host, Host]) -> None:
    """The service does not start, says why, and starts by itself once that is mended."""
    host = hosts[0]
    wrong = "/etc/postcopyd/postcopyd.toml.d/wrong.toml"
    host.run(f"mkdir -p /etc/postcopyd/postcopyd.toml.d; echo 'tlss = 1' > {wrong}")
    try:
        assert host.run(["systemctl", "restart", "postcopyd"], check=False).returncode
        assert "tlss" in host.journal("--unit=postcopyd", "--lines=20")
        await until(lambda: int(shows(host, "NRestarts")) >= 2, "the service is tried again")
    finally:
        host.run(["rm", wrong])
    await until(lambda: shows(host, "ActiveState") == "active", "the service serves again")
    assert shows(host, "ActiveState", "postcopyd.socket") == "active"
