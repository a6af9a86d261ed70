# SPDX-License-Identifier: Apache-2.0
"""What must be equal on both hosts for a guest of QEMU, and what forbids moving it.

Owns the questions to QEMU and the sentences; RAM is `ram.py`'s. QEMU's versions may differ: what
matters is the versioned machine type, which promises the same devices. Only asks; changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from postcopyd.host import procfs
from postcopyd.names import plain
from postcopyd.vmm.qemu import settings, state
from postcopyd.vmm.qemu.answers import (
    Capability,
    Cpu,
    CpuWord,
    Kvm,
    MemoryDevice,
    Migration,
    Parameters,
    Property,
    Text,
)
from postcopyd.vmm.qemu.qmp import Qmp, QmpRefused
from postcopyd.vmm.qemu.ram import Backend

T = TypeVar("T")

# Capabilities that may be on where a guest arrives: the others want another stream than ours.
HARMLESS = {
    "x-ignore-shared",
    "events",
    "pause-before-switchover",
    "late-block-activate",
    "auto-converge",
    "dirty-bitmaps",
    "validate-uuid",
    "zero-blocks",
    "release-ram",
}
# Bits that follow from the number of vCPUs: HTT and CMP_LEGACY, by (leaf, subleaf or -1, register).
# Newer versions show them among the features, older ones add them when the guest asks.
FROM_TOPOLOGY = {(1, -1, "EDX"): 1 << 28, (0x80000001, -1, "ECX"): 1 << 1}


# Properties that give a device's place on its bus: SCSI, IDE, virtio-serial, audio, ISA; of a CPU.
POSITION = (
    "channel", "scsi-id", "lun", "unit", "nr", "cad", "iobase",
    "socket-id", "die-id", "core-id", "thread-id",
)  # fmt: skip
# USB devices have no such property.
USB_PORT = re.compile(
    r" *Device \S+, Port (?P<port>[\d.]+), Speed [^,]*, Product (?P<is>.*?)(, ID: (?P<id>\S+))?"
)


@dataclass(frozen=True)
class Device:
    """One device that the command line or a hot plug made."""

    id: str  # "" when it was given none
    kind: str  # QOM type
    bus: str  # last part of the bus's path: the same in all versions
    address: int | None  # PCI slot << 3 | function
    path: str
    position: str = ""  # on that bus, if it has no PCI address

    @property
    def place(self) -> str:
        if self.address is None:
            return self.bus or "no bus"
        return f"{self.bus} {self.address >> 3:02x}.{self.address & 7}"


async def devices(qmp: Qmp) -> AsyncIterator[Device]:
    """All devices that are not part of the machine type.

    From QOM, because `query-pci` shows what is behind a bridge only after the firmware has run.
    """
    for container in ("peripheral", "peripheral-anon"):
        listed = await qmp.ask(list[Property], "qom-list", {"path": f"/machine/{container}"})
        for entry in listed:
            if not entry.type.startswith("child<"):
                continue
            path = f"/machine/{container}/{entry.name}"
            bus = await _get(qmp, path, "parent_bus", str, "")
            address = await _get(qmp, path, "addr")
            yield Device(
                entry.name if container == "peripheral" else "",
                entry.type.removeprefix("child<").removesuffix(">"),
                bus.rpartition("/")[2],
                address if isinstance(address, int) and address >= 0 else None,
                path,
                await _position(qmp, path),
            )


async def _position(qmp: Qmp, path: str) -> str:
    try:
        known = {entry.name for entry in await qmp.ask(list[Property], "qom-list", {"path": path})}
    except QmpRefused:  # the device has gone
        return ""
    found = {key: await _get(qmp, path, key) for key in POSITION if key in known}
    return ",".join(
        f"{key}={value}" for key, value in found.items() if isinstance(value, int) and value >= 0
    )


async def places(qmp: Qmp, present: list[Device]) -> dict[str, str]:
    """The places of devices without a PCI address, by names for people. A device's state is loaded
    by its place; QEMU numbers devices without one in the order in which they came."""
    ids = {device.id for device in present}
    found: dict[str, str] = {}
    nameless: dict[str, list[str]] = {}
    for line in (await _text(qmp, "x-query-usb")).splitlines():
        if (port := USB_PORT.fullmatch(line)) is not None and port["id"] in ids:
            found[f"device {port['id']}"] = f"port={port['port']}"
        elif port is not None:  # also a hub that QEMU has put in between
            nameless.setdefault("USB without a name", []).append(
                f"port={port['port']} ({port['is']})"
            )
    for device in present:
        if device.position and device.id:
            found[f"device {device.id}"] = device.position
        elif device.position:
            kind = f"{device.kind} without a name at {device.bus}"
            nameless.setdefault(kind, []).append(device.position)
    return found | {kind: " and ".join(sorted(at)) for kind, at in nameless.items()}


async def facts(qmp: Qmp, backends: list[Backend], present: list[Device]) -> dict[str, str]:
    """What must be equal on both hosts, each as text for people."""
    cpus = await qmp.ask(list[Cpu], "query-cpus-fast")
    smp = await _get(qmp, "/machine", "smp", dict[str, int], {})
    memory = await _get(qmp, "/machine", "memory", dict[str, Any], {})
    plugged = await qmp.ask(list[MemoryDevice], "query-memory-devices")
    kvm = (await qmp.ask(Kvm, "query-kvm")).enabled
    topology = ", ".join(
        f"{smp[key]} {key}"
        for key in sorted(smp)
        if key not in ("cpus", "maxcpus") and smp[key] != 1
    )
    found = {
        "machine": str(await _get(qmp, "/machine", "type")).removesuffix("-machine"),
        "accelerator": "KVM" if kvm else "TCG",
        "CPU": await _cpu(qmp, cpus[0].qom_path if cpus else ""),
        "vCPUs": f"{len(cpus)} of at most {smp.get('maxcpus', len(cpus))}, {topology or 'flat'}",
        "RAM": ", ".join(f"{backend.id} of {backend.size} bytes" for backend in backends),
        "memory layout": ", ".join(
            [f"{key} {memory[key]}" for key in sorted(memory)]
            + [f"below 4 GiB at most {await _get(qmp, '/machine', 'max-ram-below-4g')}"]
        ),
    }
    if numa := _digestible(await _text(qmp, "x-query-numa")):
        found["NUMA"] = numa
    for module in plugged:
        data = module.data
        found[f"memory device {data.id}"] = (
            f"{module.type} of {data.size} bytes at {data.addr:#x}, slot {data.slot}"
        )
    nameless: dict[str, list[str]] = {}
    for device in present:
        if device.id:
            found[f"device {device.id}"] = f"{device.kind} at {device.place}"
        else:
            nameless.setdefault(device.place, []).append(device.kind)
    for place, kinds in nameless.items():
        found[f"devices at {place}"] = ", ".join(sorted(kinds))
    return found


async def refusals(
    qmp: Qmp, pid: int, role: str, run_state: str, present: list[Device]
) -> list[str]:
    """Why this guest cannot be migrated in this role, RAM aside: sentences."""
    migration = await qmp.ask(Migration, "query-migrate")
    under_way = migration.status
    problems = []
    if role == "source":
        if run_state == "inmigrate":
            problems.append("QEMU waits for an incoming migration: it has no guest to give away.")
        elif run_state == "postmigrate":
            problems.append(
                "The guest was stopped by an earlier migration (run state postmigrate): if it runs "
                "nowhere else, send QMP `cont` and try again."
            )
        elif run_state == "suspended" and qmp.version < state.SLEEPS:
            problems.append(
                "The guest sleeps (S3), and would not sleep on where it arrives, with QEMU before "
                "9.0: wake it by QMP `system_wakeup`, then try again."
            )
        elif run_state not in _MOVABLE:
            problems.append(
                f"The guest is neither running nor paused (run state {run_state}): "
                f"{state.WORDS.get(run_state, 'look at it')}; then try again."
            )
    elif run_state != "inmigrate":
        problems.append(
            f"QEMU does not wait for a guest (run state {run_state}): start it anew with "
            f"-incoming defer."
        )
    elif _incoming(pid) not in (None, "defer") or under_way != "none":
        problems.append(
            "QEMU has been told already where its guest comes from: start it anew with "
            "-incoming defer."
        )
    if role == "source" and not migration.over:
        problems.append(
            f"QEMU is migrating or saving this guest already ({under_way}): wait for its end, or "
            f"cancel it: QMP `migrate_cancel`, and with libvirt `virsh domjobabort`."
        )
    for reason in migration.blocked_reasons:
        problems.append(
            f"QEMU says that this guest cannot be migrated: {plain(reason).rstrip('.')}."
        )
    problems += [problem async for problem in _settings(qmp, role, run_state)]
    problems += [problem async for problem in _devices(qmp, present)]
    return problems


_MOVABLE = state.PAUSED | state.STOPPED_BY_ITSELF | {"running", "suspended"}


async def _settings(qmp: Qmp, role: str, run_state: str) -> AsyncIterator[str]:
    parameters = await qmp.ask(Parameters, "query-migrate-parameters")
    if parameters.tls_creds and parameters.tls_creds not in settings.GUARDS:
        yield "QEMU's migration parameter tls-creds is set: set it to an empty string."
    if role == "source":
        if parameters.tls_creds == settings.MOVED and run_state in state.PAUSED:
            yield (
                "postcopyd has moved this guest, and this is what it left behind (--keep-source): "
                "end it, or if the guest runs nowhere else send QMP `cont`."
            )
        return
    if parameters.mode != "normal":
        yield f"QEMU's migration mode is {parameters.mode}: set it to normal."
    for one in sorted(
        await qmp.ask(list[Capability], "query-migrate-capabilities"), key=lambda c: c.capability
    ):
        if one.state and one.capability not in HARMLESS:
            yield (
                f"QEMU's migration capability {one.capability} is on: switch it off with QMP "
                f"`migrate-set-capabilities`."
            )


async def _devices(qmp: Qmp, present: list[Device]) -> AsyncIterator[str]:
    for device in present:
        name = f"Device '{device.id or device.path}' ({device.kind})"
        if device.kind.startswith("vfio"):
            yield f"{name} pins the guest's RAM: unplug it before the migration."
        elif device.kind.startswith(("vhost-user", "vhost-vdpa")):
            yield (
                f"{name} lets another process read guest RAM, which would find zeros in pages that "
                f"have not arrived: unplug it, or use a device that QEMU emulates."
            )
        elif await _get(qmp, device.path, "failover") is True:
            yield (
                f"{name} has a stand-in for a failover, of which it would not be told: unplug it, "
                f"or start both QEMUs with failover=off."
            )
        elif await _get(qmp, device.path, "free-page-reporting") is True:
            yield (
                f"{name} reports free pages, which come and go unseen: start both QEMUs with "
                f"free-page-reporting=off."
            )
    for plugged in await qmp.ask(list[MemoryDevice], "query-memory-devices"):
        if plugged.type != "dimm":
            yield (
                f"Memory device '{plugged.data.id}' ({plugged.type}) discards or "
                f"persists pages unseen: unplug it, or use a pc-dimm."
            )


def _incoming(pid: int) -> str | None:
    """The argument of -incoming on the command line ("defer"); None if it cannot be told."""
    words = procfs.arguments(pid)
    for option, value in pairwise(words):
        if option in ("-incoming", "--incoming"):
            return value
    return None


async def _cpu(qmp: Qmp, path: str) -> str:
    """The CPU's type, and a digest of all CPUID bits that are set."""
    features = []
    for word in await _get(qmp, path, "feature-words", list[CpuWord], []):
        leaf = (word.cpuid_input_eax, word.cpuid_input_ecx, word.cpuid_register)
        # Later versions know more words; a word that is zero says nothing.
        if bits := word.features & ~FROM_TOPOLOGY.get(leaf, 0):
            features.append((*leaf, bits))
    features.sort()
    other = [
        await _get(qmp, path, key)
        for key in (
            "vendor",
            "family",
            "model",
            "stepping",
            "model-id",
            "level",
            "xlevel",
            "phys-bits",
        )
    ]
    digest = hashlib.sha256(json.dumps([features, other]).encode()).hexdigest()[:12]
    return f"{str(await _get(qmp, path, 'type')).removesuffix('-cpu')}, CPUID {digest}"


async def _get(
    qmp: Qmp, path: str, key: str, kind: type[T] | Any = Any, default: T | Any = None
) -> T | Any:
    """A QOM property; the default if the object has none of this name."""
    try:
        return await qmp.ask(kind, "qom-get", {"path": path, "property": key})
    except QmpRefused:
        return default


async def _text(qmp: Qmp, command: str) -> str:
    """The answer of a command for people; "" if QEMU does not have the command."""
    try:
        return (await qmp.ask(Text, command)).human_readable_text
    except QmpRefused:
        return ""


def _digestible(text: str) -> str:
    """QEMU's text for people in one line."""
    return "; ".join(line.strip() for line in text.splitlines())
