# SPDX-License-Identifier: Apache-2.0
"""A guest between two hosts with real systemd: the units, and what they must not do to a guest."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from lab import Host
from needs import missing

from postcopyd.demo import qemu_guest as q

MIB = 1 << 20
VM = "web1"
WAIT_S = 60.0


@pytest.fixture(scope="session")
def boot(hosts: tuple[Host, Host]) -> tuple[Path, Path]:
    """Kernel and initramfs of the verifying guest, where both hosts and any user can read them."""
    kernel = q.find_kernel()
    if kernel is None or not q.find_qemu():
        missing("QEMU and a guest kernel: qemu-system-x86 and linux-image-cloud-amd64")
    folder = hosts[0].shared
    q.write_initramfs(folder / "initramfs", kernel, q.find_init())
    shutil.copy(kernel.image, folder / "vmlinuz")
    for file in ("initramfs", "vmlinuz"):
        (folder / file).chmod(0o644)
    return folder / "vmlinuz", folder / "initramfs"


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
    memory: int = 192 * MIB,
    **config: Any,
) -> AsyncIterator[Machine]:
    """A guest that runs at the first host, attached there; all of it is gone at the end."""
    folder = hosts[0].shared
    made = q.GuestConfig(
        qemu=q.find_qemu()[0], kernel=boot[0], initramfs=boot[1], memory=memory, vcpus=1, **config
    )
    try:
        async with q.open_guest(folder) as guest:
            it = Machine(hosts, guest, made, user, ram)
            await it.launch(it.here, incoming=False)
            await guest.ready()
            yield it
    finally:
        for host in hosts:
            host.run(["postcopyd", "resolve", VM, "--kill"], check=False)
            host.run(["postcopyd", "detach", VM], check=False)
            host.run(f"rm -f {ram}/{VM}-*")


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


async def until(holds: Callable[[], bool], what: str) -> None:
    with trio.move_on_after(WAIT_S):
        while not await in_thread(holds):
            await trio.sleep(0.05)
        return
    pytest.fail(f"it is not so after {WAIT_S:.0f} s: {what}")


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


RESTART = ["systemctl", "restart", "postcopyd"]
KILL = ["systemctl", "kill", "-s", "KILL", "postcopyd"]


async def started(it: Machine, *options: str) -> tuple[subprocess.Popen[str], list[dict[str, Any]]]:
    """A migration that has handed over and is far from its end."""
    slow = ["--mode", "postcopy", "--bandwidth", "24M", "--json"]
    command = ["postcopyd", "migrate", VM, "--to", it.there.name, *slow, *options]
    client = it.here.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert client.stdout
    said = []
    while line := await in_thread(client.stdout.readline):
        said.append(line)
        if json.loads(line).get("phase") == "postcopy":
            return client, said
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


async def test_the_daemons_are_restarted_and_killed_in_the_middle(
    hosts: tuple[Host, Host], boot: tuple[Path, Path]
) -> None:
    """On either host, while most of the guest's memory is still at the other: the guest arrives
    whole each time, and its VMM is never signalled."""
    async with machine(hosts, boot) as it:
        for command in (RESTART, KILL):
            for victim in ("here", "there"):
                await it.prepare()
                client, _ = await started(it)
                arriving = f"1 VM; {VM} arriving from {it.here.name} ({it.here.address}): postcopy,"
                there = it.there
                await until(lambda: shows(there, "StatusText").startswith(arriving), arriving)  # noqa: B023
                assert (await status(it.there))["remaining"] > 16 * MIB
                await again(getattr(it, victim), command)
                await it.moved()
                await in_thread(client.communicate, timeout=WAIT_S)
