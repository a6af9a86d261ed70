# SPDX-License-Identifier: Apache-2.0
"""A domain of libvirt between two hosts with real systemd, with the filter that libvirt gives it.

What domains may do is tests/system/test_libvirt.py's matter.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from containers import Host, until
from guests import qemu as q
from needs import libvirt
from qemus import QEMUS

sys.path.append(str(Path(__file__).parent.parent / "system"))
from libvirt_hosts import DOMAIN, SERIAL, VM, LibvirtGuest

pytestmark = pytest.mark.long

MIB = 1 << 20
TOML = "/etc/postcopyd/postcopyd.toml.d"


class Side:
    """A host, as the guest is heard there."""

    def __init__(self, host: Host) -> None:
        self.name, self.qemu = host.name, host.init
        self.root = Path(f"/proc/{host.init}/root")


@pytest.fixture
async def guest(hosts: tuple[Host, Host], boot: tuple[Path, Path]) -> AsyncIterator[LibvirtGuest]:
    """It runs in a domain of host1's libvirt, which nobody has prepared."""
    libvirt()
    folder, (kernel, initramfs) = hosts[0].shared, boot
    disk = folder / "disk"
    disk.write_bytes(bytes(16 * MIB))
    disk.chmod(0o666)
    config = q.GuestConfig(
        qemu=QEMUS[0], kernel=kernel, initramfs=initramfs, memory=160 * MIB, disk=disk
    )
    words = " ".join(config.kernel_arguments())
    xml = DOMAIN.format(
        kind="qemu", name=VM, memory=160, kernel=kernel, initramfs=initramfs, cmdline=words,
        disk=disk, serial=SERIAL, more="",
    )  # fmt: skip
    for host in hosts:
        host.run("systemctl start libvirtd")
        host.run(f"cat > {TOML}/libvirt.toml", stdin='libvirt = "qemu:///system"\n')
        host.run("systemctl restart postcopyd")
    hosts[0].run("cat > /root/web1.xml", stdin=xml)
    hosts[0].run("virsh define /root/web1.xml; virsh start web1")
    try:
        async with LibvirtGuest.open(folder) as made:
            await made.follow(Side(hosts[0]))
            await made.ready()
            yield made
    finally:
        for host in hosts:
            host.run(f"virsh destroy {VM}; virsh undefine {VM}", check=False)
            host.run(f"rm {TOML}/libvirt.toml; systemctl restart postcopyd")


async def moves(here: Host, there: Host, bandwidth: str) -> subprocess.Popen[str]:
    """A migration that has handed over, and its client."""
    command = ["postcopyd", "migrate", VM, "--to", there.name, "--mode", "postcopy"]
    client = here.start([*command, "--bandwidth", bandwidth, "--json"], stdout=subprocess.PIPE)
    assert client.stdout is not None
    said = []
    while line := await trio.to_thread.run_sync(client.stdout.readline):
        said.append(line)
        if json.loads(line).get("phase") == "postcopy":
            return client
    pytest.fail(f"the migration came to nothing: {said}")


async def arrived(client: subprocess.Popen[str], guest: LibvirtGuest, there: Host) -> None:
    """With every page."""
    said, _ = await trio.to_thread.run_sync(client.communicate)
    result: dict[str, Any] = json.loads(said.splitlines()[-1])
    assert result["event"] == "completed", result
    assert result["memory"]["lostPages"] == 0
    await guest.follow(Side(there))
    before = await guest.report()
    sweep = await guest.sweep()
    after = await guest.report(before)
    assert (sweep.bad, after.bad, after.disk_bad) == (0, 0, 0), guest.bad


async def test_it_is_gone_while_its_memory_follows(
    hosts: tuple[Host, Host], guest: LibvirtGuest
) -> None:
    """Nothing at the source can run it a second time, by the units of the package as they are.
    Without the one that makes keepers it stays there, paused, and the log says why."""
    here, there = hosts
    said = here.says("tr '\\0' ' ' < /proc/$(cat /run/libvirt/qemu/web1.pid)/cmdline")
    assert "spawn=deny" in said
    client = await moves(here, there, "6M")
    await until(lambda: VM not in here.says("virsh list --all"), "the domain is gone")
    status = json.loads(here.says(f"postcopyd status {VM} --json"))
    assert status["phase"] == "postcopy", status
    assert status["remaining"] > 8 * MIB
    keeper = here.says("pgrep --exact postcopyd-keep")
    assert here.says(f"cat /proc/{keeper}/cgroup").endswith("/postcopyd.service")
    await arrived(client, guest, there)
    assert here.run("pgrep postcopyd-keep", check=False).returncode == 1

    there.run("systemctl mask --now postcopyd-keeper.socket")
    client = await moves(there, here, "12M")
    await until(
        lambda: "start postcopyd-keeper.socket for the next guest"
        in there.journal("--unit=postcopyd", "--lines=50"), "the log says that there is no keeper",
    )  # fmt: skip
    assert "paused" in there.says(f"virsh domstate {VM}")
    await arrived(client, guest, here)
    assert there.run(["virsh", "domstate", VM], check=False).returncode
