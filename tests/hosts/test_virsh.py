# SPDX-License-Identifier: Apache-2.0
"""A domain moved by `virsh migrate`, then by `postcopyd migrate`: what libvirt has afterwards, on
both hosts, side by side. And what stands in the way of one, by the libvirt of a real host."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from containers import Host
from guests import modules
from needs import libvirt

from postcopyd.demo.initramfs import find_kernel

pytestmark = pytest.mark.long

VM = "web1"
UUID = str(uuid.uuid4())
CONSOLE = f"/var/log/libvirt/qemu/{VM}-console.log"

# libvirtd with its port open to the other host, a bridge, and a network that is on it.
SETUP = """
echo 'auth_tcp = "none"' >> /etc/libvirt/libvirtd.conf
echo 'host_uuid = "{uuid}"' >> /etc/libvirt/libvirtd.conf
mkdir -p /var/log/libvirt/qemu
ip link add br9 type bridge
ip link set br9 up
systemctl start libvirtd-tcp.socket virtlogd.socket
systemctl start libvirtd
virsh net-define /dev/stdin
virsh net-start lan
"""
NETWORK = "<network><name>lan</name><forward mode='bridge'/><bridge name='br9'/></network>"
DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>256</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{folder}/vmlinuz</kernel>
    <initrd>{folder}/initrd</initrd>
    <cmdline>console=ttyS0 quiet</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none'/>
      <source file='{folder}/disk'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='network'>
      <mac address='52:54:00:00:00:01'/><source network='lan'/><model type='virtio'/>
    </interface>
    <serial type='pty'><log file='/var/log/libvirt/qemu/web1-console.log'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  </devices>
</domain>
"""
OTHER = """
<domain type='qemu'>
  <name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>16</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
</domain>
"""
# Counts, and has the channel of its agent open.
INIT = """#!/bin/sh
PATH=/bin
busybox mount -t devtmpfs none /dev
for module in /modules/*; do busybox insmod $module; done
until [ -c /dev/vport*p1 ]; do busybox sleep 0.1; done
exec 3<>$(echo /dev/vport*p1)
n=0
while busybox sleep 0.2; do n=$((n + 1)); echo "counts $n"; done
"""
MODULES = ("virtio_pci", "virtio_console")


def boot(folder: Path) -> None:
    """Kernel and initrd of the guest, and a disk, where both hosts and any user can read them."""
    kernel = find_kernel()
    shutil.copy(kernel, folder / "vmlinuz")
    tree = folder / "tree"
    for part in ("bin", "dev", "modules"):
        (tree / part).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin")
    (tree / "bin/sh").symlink_to("busybox")
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    needed = modules.load_order(modules.folder_of(kernel.resolve()), MODULES)
    for number, content in enumerate(needed):
        (tree / f"modules/{number:02}").write_bytes(content)
    pack = "find . | cpio -o -H newc --quiet | gzip -1 > ../initrd"
    subprocess.run(["sh", "-c", pack], cwd=tree, check=True)
    (folder / "disk").write_bytes(bytes(16 << 20))
    for name in ("vmlinuz", "initrd", "disk"):
        (folder / name).chmod(0o666)


def said(host: Host, command: str) -> str:
    """What it prints, whether it succeeds or not."""
    done = host.run(command, check=False, seconds=120)
    return (done.stdout + done.stderr).strip()


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, f"it is not so after 60 s: {what}"
        time.sleep(0.1)


def listen(host: Host) -> None:
    """To the events of libvirt, from now on."""
    host.run(
        "systemctl stop events; systemd-run --quiet --unit=events"
        " sh -c 'exec virsh event --all --loop > /run/events 2>&1'"
    )
    until(lambda: "event --all" in said(host, "pgrep -a virsh"), "virsh to listen")


@dataclass
class Left:
    """What one host has of the domain. Numbers that libvirt gives each domain anew are N."""

    listed: str
    state: str
    info: dict[str, str]
    live: str
    kept: str
    events: list[str]
    files: set[str]
    console: str

    @classmethod
    def at(cls, host: Host, before: set[str]) -> Left:
        info = (line.partition(":") for line in said(host, f"virsh dominfo {VM}").splitlines())
        events = re.findall(r"event '(.*)' for domain '.*?': ?(.*)", said(host, "cat /run/events"))
        return cls(
            said(host, "virsh list --all --name"),
            said(host, f"virsh domstate {VM} --reason"),
            {key: value.strip() for key, _, value in info if key not in ("Id", "CPU time")},
            anew(said(host, f"virsh dumpxml {VM}")),
            anew(said(host, f"virsh dumpxml --inactive {VM}")),
            [about or kind for kind, about in events if kind in ("lifecycle", "job-completed")],
            files(host) - before,
            said(host, f"cat {CONSOLE}"),
        )


def anew(text: str) -> str:
    port = "(?<=/ports/)[0-9a-f-]{36}|(?<= portid=')[0-9a-f-]{36}"
    numbers = rf"{port}|domain-\d+-{VM}|id='\d+'(?=>\n  <name>)|/dev/pts/\d+|vnet\d+"
    return re.sub(numbers, "N", text)


def files(host: Host) -> set[str]:
    """But those that libvirt has without any domain."""
    found = "find /var/lib/libvirt /run/libvirt ! -type d ! -name 'virt*-sock*'"
    return set(anew(said(host, found)).splitlines())


MOVES = {
    "virsh": f"virsh migrate --live --persistent --undefinesource --unsafe {VM}"
    f" qemu+tcp://host2/system",
    "postcopyd": f"postcopyd migrate {VM} --to host2",
}


@pytest.fixture(scope="module")
def moved(hosts: tuple[Host, Host]) -> dict[str, tuple[Left, Left]]:
    """What was left at host1 and host2 after each. The domain runs at host2 in the end."""
    libvirt()
    folder = hosts[0].shared
    boot(folder)
    for host in hosts:
        host.run(SETUP.format(uuid=uuid.uuid4()), stdin=NETWORK)
    hosts[0].run("cat > domain", stdin=DOMAIN.format(name=VM, uuid=UUID, folder=folder))
    found = {}
    for how, command in MOVES.items():
        for host in hosts:
            said(host, f"virsh destroy {VM}; virsh undefine {VM}; rm {CONSOLE}")
        before = [files(host) for host in hosts]
        hosts[0].run(f"virsh define domain; virsh autostart {VM}; virsh start {VM}")
        until(lambda: "counts 3" in said(hosts[0], f"cat {CONSOLE}"), "the guest to run")
        for host in hosts:
            listen(host)
        hosts[0].run(command, seconds=200)
        until(lambda: "Stopped" in said(hosts[0], "cat /run/events"), "the end at the source")
        until(lambda: "Defined" in said(hosts[1], "cat /run/events"), "the definition")
        hosts[1].run(f"tail -n 0 --follow {CONSOLE} | grep -m 1 counts")  # the guest goes on
        found[how] = (Left.at(hosts[0], before[0]), Left.at(hosts[1], before[1]))
    return found


def test_what_both_leave(moved: dict[str, tuple[Left, Left]]) -> None:
    """Nothing at the source; at the destination the domain as it was. What differs is here too, and
    in docs/LIBVIRT.md: reasons, events, autostart, and what libvirt notes of its monitor."""
    (their_source, theirs), (our_source, ours) = moved["virsh"], moved["postcopyd"]
    for source in (their_source, our_source):
        assert source.listed == ""
        assert "failed to get domain" in source.state
        assert source.files == set()
    assert theirs.listed == ours.listed == VM
    assert theirs.live == ours.live
    assert "state='connected'" in ours.live
    assert theirs.kept == ours.kept
    assert theirs.files == ours.files
    for one, two in moved.values():
        counted = list(map(int, re.findall(r"counts (\d+)", one.console + two.console)))
        assert counted == list(range(1, len(counted) + 1))

    assert theirs.state == "running (migrated)"
    assert ours.state == "running (unpaused)"
    assert theirs.info.pop("Autostart") == "disable"
    assert ours.info.pop("Autostart") == "enable"
    assert "custom monitor" in ours.info.pop("Messages")
    assert theirs.info == ours.info
    assert their_source.events == ["Suspended Migrated", "Stopped Migrated", "job-completed"]
    assert our_source.events == [
        "Suspended Paused",  # for a moment, to see what the guest writes
        "Resumed Unpaused",
        "Suspended Paused",
        "Undefined Removed",
        "Shutdown Finished after host request",
        "Stopped Destroyed",
    ]
    assert theirs.events == ["Started Migrated", "Defined Added", "Resumed Migrated"]
    assert ours.events == [
        "Started Restored",
        "Suspended Restored",
        "Resumed Unpaused",
        "Defined Added",
    ]


def test_what_stands_in_the_way(
    hosts: tuple[Host, Host], moved: dict[str, tuple[Left, Left]]
) -> None:
    """Each is named by `check`, and refused by `migrate`, before anything is touched: libvirt tells
    of no event."""
    there, here = hosts
    listen(here)

    def refused(because: str, begun: str = "") -> None:
        for command, why in (("check", because), ("migrate", begun or because)):
            words = said(here, f"postcopyd {command} {VM} --to host1")
            assert why in words, words

    assert "nothing stands in the way" in said(here, f"postcopyd check {VM} --to host1")
    there.run("virsh net-destroy lan")
    refused("the network lan of libvirt here is not active: `virsh net-start lan` here")
    there.run("virsh net-undefine lan")
    refused("libvirt here has no network lan")
    there.run("virsh net-define /dev/stdin; virsh net-start lan", stdin=NETWORK)

    there.run("virsh define /dev/stdin", stdin=OTHER.format(name=VM, uuid=uuid.uuid4()))
    refused("libvirt here has another domain with that name, web1")
    there.run(f"virsh undefine {VM}; virsh define /dev/stdin",
              stdin=OTHER.format(name=VM, uuid=UUID))  # fmt: skip
    there.run(f"virsh start --paused {VM}")
    refused("the domain web1 runs here already, or waits")
    there.run(f"virsh managedsave {VM}")
    refused("libvirt here has a managed save image of web1")
    there.run(f"virsh managedsave-remove {VM}; virsh undefine {VM}")

    # Nobody reads what is dumped, so it goes on for as long as it is wanted.
    here.run("mkfifo /run/dump; systemd-run --quiet --unit=reader sh -c 'sleep 1000 < /run/dump'")
    here.run(f"systemd-run --quiet --unit=dump virsh dump --live {VM} /run/dump")
    until(lambda: "Unbounded" in said(here, f"virsh domjobinfo {VM}"), "the dump to go on")
    refused("has a job of libvirt that goes on", "QEMU is migrating or saving this guest already")
    here.run(f"virsh domjobabort {VM}; systemctl stop reader")
    until(lambda: "None" in said(here, f"virsh domjobinfo {VM}"), "the dump to end")

    assert "lifecycle" not in said(here, "cat /run/events")
    assert said(here, f"virsh domstate {VM}") == "running"
    assert "nothing stands in the way" in said(here, f"postcopyd check {VM} --to host1")


def test_the_hook_knows_who_comes_back(
    hosts: tuple[Host, Host], moved: dict[str, tuple[Left, Left]]
) -> None:
    """It refuses the domain at the host that the guest has left, and lets the one start there that
    waits for the guest. Nothing of that stays in the domain."""
    there, here = hosts
    there.run(
        "cp /usr/share/doc/postcopyd/examples/libvirt-hook /etc/libvirt/hooks/qemu;"
        "chmod +x /etc/libvirt/hooks/qemu; systemctl restart libvirtd"
    )
    start = f"virsh create --paused domain; virsh start --paused {VM}"
    assert said(there, start).count("do not start web1 here") >= 1
    assert VM not in said(there, "virsh list --all")
    here.run(f"postcopyd migrate {VM} --to host1", seconds=200)
    assert said(there, f"virsh domstate {VM}") == "running"
    for kind in ("", "--inactive"):
        xml = said(there, f"virsh dumpxml {kind} {VM}")
        assert "</domain>" in xml
        assert "making" not in xml
    assert "-" not in said(there, "ls /run/postcopyd")
