# SPDX-License-Identifier: Apache-2.0
"""Two hosts with a libvirt each, on this machine: mount namespaces with folders of their own.

Owns libvirt's daemons and all that they have started, and ends both. The domain's XML says nothing
of postcopyd.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import trio
from guests import qemu as q

from postcopyd.demo import qemu_guest as demo
from postcopyd.demo.hosts import Host
from postcopyd.host import procfs
from postcopyd.native import keeper

VM = "web1"
SERIAL = f"/run/{VM}.serial"
WORKLOAD = q.Workload(disk_rate=20)
LIBVIRT = Path("/run/libvirt")

# A namespace whose folders of libvirt are in $1, but for what libvirt has found out of QEMU, which
# takes it 8 s: that is in $2. It stays until it is killed. With the layers of another Debian in $3
# it has that one's files instead of this machine's.
NAMESPACE = """
set -e
mount --make-rprivate /
mount -t tmpfs none /run
if [ "$3" ]; then
  mkdir /run/upper /run/work /run/root
  mount -t overlay none -o "lowerdir=$3,upperdir=/run/upper,workdir=/run/work" /run/root
  cd /run/root
  for part in dev proc sys tmp; do mount --rbind /$part $part; done
  pivot_root . mnt
  umount -l /mnt
  mount -t tmpfs none /run
fi
mkdir -p /run/lock "$1/lib/qemu" "$1/log/qemu" "$1/etc/qemu"
for part in lib log; do mount --bind "$1/$part" /var/$part/libvirt; done
mount --bind "$2" /var/cache/libvirt
mount --bind "$1/etc" /etc/libvirt
chown libvirt-qemu "$1/lib/qemu"
printf 'security_driver = "none"\\ncgroup_controllers = []\\n' > /etc/libvirt/qemu.conf
printf 'memory_backing_dir = "/run/ram"\\n' >> /etc/libvirt/qemu.conf
mkdir -m 755 /run/ram
printf 'host_uuid = "%s"\\n' $(cat /proc/sys/kernel/random/uuid) > /etc/libvirt/libvirtd.conf
virtlogd -d
libvirtd -d
exec sleep infinity
"""

DOMAIN = """
<domain type='{kind}'>
  <name>{name}</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>2</vcpu>{more}
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initramfs}</initrd><cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none'/>
      <source file='{disk}'/><target dev='vda' bus='virtio'/>
    </disk>
    <serial type='unix'><source mode='bind' path='{serial}'/></serial>
  </devices>
</domain>
"""


@dataclass(frozen=True)
class Version:
    """A libvirt to test with: this machine's, or with `layers` that of another Debian, which has
    postcopyd installed."""

    cache: Path
    layers: str = ""


class LibvirtHost(Host):
    """One namespace with its libvirt, and a daemon in it."""

    def __init__(self, folder: Path, name: str, version: Version) -> None:
        super().__init__(folder, name, ("--libvirt", "qemu:///system"))
        self._libvirt = folder / name
        self._libvirt.mkdir()
        self._namespace = subprocess.Popen(
            [*("unshare", "-m", "sh", "-c", NAMESPACE, "sh"), self._libvirt, *astuple(version)],
            start_new_session=True,
        )
        self.root = Path(f"/proc/{self._namespace.pid}/root")
        mounts = f"--mount=/proc/{self._namespace.pid}/ns/mnt"
        self.by = ("nsenter", mounts, f"--wd={'/' if version.layers else self.site}")
        if version.layers:
            self.program = ("/usr/bin/postcopyd",)

    def run(self, *command: str, timeout: float = 60) -> str:
        """A command on this host; what it prints, whether it succeeds or not."""
        done = subprocess.run(
            [*self.by, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        return done.stdout.strip()

    def virsh(self, *words: str) -> str:
        return self.run("virsh", *words)

    async def has_libvirt(self) -> None:
        deadline = time.monotonic() + 30
        while "Name" not in self.virsh("list"):
            assert time.monotonic() < deadline, self.virsh("list")
            await trio.sleep(0.1)

    @property
    def domstate(self) -> str:
        """Of the domain, by libvirt's word; empty if there is none."""
        said = self.virsh("domstate", VM)
        return "" if "failed to get domain" in said else said

    def pid_of(self, name: str) -> int:
        """Of libvirtd, virtlogd, or "libvirt/qemu/NAME", by its file in /run; 0 if there is none.
        A libvirtd that has crashed leaves the file of a QEMU that ended meanwhile."""
        with suppress(OSError, ValueError):
            pid = int((self.root / f"run/{name}.pid").read_text())
            os.kill(pid, 0)
            return pid
        return 0

    @property
    def qemu(self) -> int:
        return self.pid_of(f"libvirt/qemu/{VM}")

    def kill_libvirt(self) -> None:
        """As a crash would."""
        pid = self.pid_of("libvirtd")
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)

    def hang_libvirt(self, number: int = signal.SIGSTOP) -> None:
        os.kill(self.pid_of("libvirtd"), number)

    def start_libvirt(self) -> None:
        """If it does not run."""
        self.run("libvirtd", "-d")

    def leftovers(self) -> list[str]:
        """What nobody uses any more: FIFOs of restores, device states."""
        room = self.root / "run/postcopyd"
        found = os.listdir(room) if room.exists() else []
        return found + [file.name for file in self.state.glob("*.device")]

    def keepers(self) -> list[int]:
        """Processes that keep the memory of a QEMU of either host: they have its command line."""
        return [
            pid
            for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
            if procfs.command(pid) == keeper.NAME
            and str(self._libvirt.parent) in " ".join(procfs.arguments(pid))
        ]

    def close(self) -> None:
        self.end()
        for name in (f"libvirt/qemu/{VM}", "libvirtd", "virtlogd"):
            if pid := self.pid_of(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._namespace.kill()
        self._namespace.wait()


class Elsewhere:
    """The process of a QEMU that libvirt has started."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, 0

    def poll(self) -> int | None:
        return None if Path(f"/proc/{self.pid}").exists() else 0


class LibvirtGuest(q.Guest):
    """The verifying guest, in whatever QEMU libvirt runs it in."""

    async def follow(self, host: LibvirtHost) -> None:
        """Hears it at this host, from now on."""
        path = host.root / SERIAL.lstrip("/")
        process: Any = Elsewhere(host.qemu)
        log = Path(os.devnull)
        config: Any = q.GuestConfig(
            qemu=demo.find_qemus()[0], kernel=log, initramfs=log, name=host.name
        )
        there = q.QemuProcess(config, log, path, log, process)
        self._qemus = [one for one in self._qemus if one.serial is not None]
        self._qemus.append(there)
        there.serial = await demo._connect(there)
        self._nursery.start_soon(self._hear, there)

    async def _hear(self, there: q.QemuProcess) -> None:
        serial = there.serial
        assert serial is not None
        with serial:
            await self._follow(there, serial)


class LibvirtPair:
    def __init__(self, hosts: list[LibvirtHost], guest: LibvirtGuest) -> None:
        self.hosts, self.guest, self.moves = hosts, guest, 0

    @property
    def here(self) -> LibvirtHost:
        return self.hosts[self.moves % 2]

    @property
    def there(self) -> LibvirtHost:
        return self.hosts[(self.moves + 1) % 2]

    async def move(self, **options: Any) -> dict[str, Any]:
        """Moves the guest, which checks all of its memory there. Returns the result."""
        result = await self.here.migrate(VM, self.there, **options)
        assert result["event"] == "completed", result
        self.moves += 1
        await self.guest.follow(self.here)
        await self.check()
        return result

    async def check(self) -> None:
        """It works where it is, and every page of it is right, and was all the time."""
        before = await self.guest.report()
        after = await self.guest.report(before)
        while after.operations <= before.operations:
            after = await self.guest.report(after)
        sweep = await self.guest.sweep()
        assert (sweep.bad, after.bad, after.disk_bad) == (0, 0, 0), self.guest.bad


@asynccontextmanager
async def libvirt_pair(
    folder: Path,
    boot: tuple[Path, Path],
    version: Version,
    *,
    memory: int = 256,
    more: str = "",
    workload: q.Workload = WORKLOAD,
    kind: str = "qemu",
) -> AsyncIterator[LibvirtPair]:
    """Two hosts, each with libvirt and a daemon, and a domain that runs at the first; its XML has
    `more`."""
    folder.chmod(0o755)
    kernel, initramfs = boot
    disk = folder / "disk"
    disk.write_bytes(bytes(16 << 20))
    disk.chmod(0o666)
    initrd = shutil.copy(initramfs, folder / "initrd")
    vmlinuz = shutil.copy(kernel, folder / "vmlinuz")
    config = q.GuestConfig(
        qemu=demo.find_qemus()[0],
        kernel=kernel,
        initramfs=initramfs,
        memory=memory << 20,
        disk=disk,
        workload=workload,
    )
    hosts: list[LibvirtHost] = []
    try:
        for name in ("host1", "host2"):
            hosts.append(LibvirtHost(folder, name, version))
        for host in hosts:
            await host.has_libvirt()
            await host.start()
        xml = folder / "web1.xml"
        xml.write_text(
            DOMAIN.format(
                kind=kind,
                name=VM,
                memory=memory,
                kernel=vmlinuz,
                initramfs=initrd,
                cmdline=" ".join(config.kernel_arguments()),
                disk=disk,
                serial=SERIAL,
                more=more,
            )
        )
        async with LibvirtGuest.open(folder) as guest:
            pair = LibvirtPair(hosts, guest)
            assert "defined" in hosts[0].virsh("define", str(xml))
            assert "started" in (said := hosts[0].virsh("start", VM)), said
            await guest.follow(hosts[0])
            await guest.ready()
            yield pair
    finally:
        for host in hosts:
            host.close()
