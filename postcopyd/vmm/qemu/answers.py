# SPDX-License-Identifier: Apache-2.0
"""The form of QEMU's answers, as far as the driver reads them: one type for each question.

`Qmp.ask` checks an answer against its type before anything indexes into it, so a QEMU that its
guest has taken over may say what it likes. Fields that a version of QEMU may leave out have a
default here. The monitor's limit on messages also limits sizes.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

OVER = {
    "none",
    "completed",
    "cancelled",
    "failed",
}  # states of query-migrate in which nothing goes on


class Status(Struct):
    """query-status."""

    running: bool
    status: str


class Migration(Struct, rename="kebab"):
    """query-migrate: the migration that goes on, or the last one."""

    status: str = "none"
    error_desc: str = ""
    blocked_reasons: list[str] = []

    @property
    def over(self) -> bool:
        return self.status in OVER


class Parameters(Struct, rename="kebab"):
    """query-migrate-parameters."""

    max_bandwidth: int
    tls_creds: str | None = None
    mode: str = "normal"
    announce_initial: int = 50
    announce_max: int = 550
    announce_rounds: int = 5
    announce_step: int = 100


class Capability(Struct):
    """One of query-migrate-capabilities."""

    capability: str
    state: bool


class FdSet(Struct, rename="kebab"):
    """One of query-fdsets, or what add-fd answers."""

    fdset_id: int
    fds: list[FdSetEntry] = []


class FdSetEntry(Struct):
    """One descriptor of an fdset."""

    opaque: str = ""


class Cpu(Struct, rename="kebab"):
    """One of query-cpus-fast."""

    thread_id: int
    qom_path: str = ""


class Kvm(Struct):
    """query-kvm."""

    enabled: bool


class Memdev(Struct):
    """One of query-memdev."""

    size: Annotated[int, Meta(gt=0, lt=1 << 56)]  # bytes
    id: str = ""
    share: bool = False


class Property(Struct):
    """One of qom-list."""

    name: str
    type: str


class Text(Struct, rename="kebab"):
    """The answer of commands for people."""

    human_readable_text: str = ""


class Plugged(Struct):
    """What query-memory-devices tells of one device; kinds of devices have different fields."""

    id: str = ""
    size: int = 0
    addr: int = 0
    slot: int | None = None


class MemoryDevice(Struct):
    """One of query-memory-devices."""

    type: str
    data: Plugged


class CpuWord(Struct, rename="kebab"):
    """One word of CPUID, from a CPU's property feature-words."""

    cpuid_input_eax: int
    cpuid_register: str
    features: int
    cpuid_input_ecx: int = -1
