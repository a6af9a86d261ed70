# SPDX-License-Identifier: Apache-2.0
"""What people and programs ask for and see: requests, status, results. Imports nothing of this
package. In JSON names are in camelCase, as io.postcopyd.varlink has them; what is None is absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

DriverName = Literal["qemu", "libvirt", "process"]
"""Those of `Attach` in io.postcopyd.varlink."""
Decision = Literal["wait", "poison", "kill", "take_back"]


@dataclass(frozen=True)
class MigrateRequest:
    """A migration as asked for: `to` is HOST:PORT, `bandwidth` in bytes per second. The last three
    are for domains of libvirt; `xml` is the domain's as it is to be there, empty for as it is."""

    to: str
    mode: Literal["hybrid", "postcopy", "precopy"] = "hybrid"
    bandwidth: int | None = None
    precopy_passes: int | None = None
    max_downtime_ms: float | None = None
    keep_source: bool = False
    unsafe: bool = False
    persistent: bool = False
    undefine_source: bool = False
    xml: str = ""

    @property
    def persists(self) -> bool | None:
        """Whether the domain is to be persistent there; None: if it is here."""
        return self.persistent if self.persistent or self.undefine_source else None

    @property
    def undefines(self) -> bool:
        """Whether a persistent domain is to be undefined here."""
        return self.undefine_source or not self.persistent

    @property
    def for_a_domain(self) -> bool:
        """Whether something is asked for that only domains of libvirt have."""
        return bool(self.persistent or self.undefine_source or self.xml)


class Memory(msgspec.Struct, frozen=True, rename="camel"):
    """The guest's pages, by how they crossed. `page_size` is that of its first region; a page that
    crossed twice is a `duplicate` one at the destination."""

    total_bytes: int
    page_size: int  # bytes
    pages: int
    zero_pages: int
    precopy_pages: int
    dirty_pages: int
    pushed_pages: int
    urgent_pages: int
    duplicate_pages: int
    lost_pages: int | msgspec.UnsetType = msgspec.UNSET  # older records have none


class Faults(msgspec.Struct, frozen=True, rename="camel"):
    """Faults of the guest at the destination, from fault to placed. `histogram_us` maps the lower
    bound of each log2 bucket to its count."""

    count: int
    p50_us: float
    p99_us: float
    max_us: float
    histogram_us: dict[str, int]


class Ram(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """One region of guest RAM as its VMM has it."""

    name: str
    kind: str  # a word of vmm.Kind
    bytes: int
    page_size: int  # bytes
    path: str | None = None  # of a file


class Found(msgspec.Struct, frozen=True, rename="camel"):
    """A VMM as it was found, by what decides how its guest is moved."""

    ram: tuple[Ram, ...]
    device_state: str
    """How it goes, in words of the driver."""


class Checked(msgspec.Struct, frozen=True):
    """What a check has found: sentences, and the VMM here."""

    problems: list[str]
    warnings: list[str]
    found: Found


class Pass(msgspec.Struct, frozen=True, rename="camel"):
    """One pass: `dirty_pages` are those that the guest has written meanwhile."""

    pages: int
    bytes: int
    ms: float
    bytes_per_second: int
    dirty_pages: int
    dirty_pages_per_second: int


class PhaseTime(msgspec.Struct, frozen=True):
    """How long a migration was in one phase, in all."""

    phase: str
    ms: float


class Result(msgspec.Struct, rename="camel", omit_defaults=True, kw_only=True):
    """How a migration ended, or that it is paused. What was measured is None where it could not be
    had."""

    event: Literal["completed", "failed", "cancelled", "paused", "ended"]
    vm: str
    migration: str
    peer: str | None = None
    mode: str | None = None
    downtime_ms: float | None = None  # from the stop to the word that it runs there
    downtime_parts_ms: dict[str, float] | None = None  # save, load, run
    total_ms: float | None = None
    brownout_ms: float | None = None  # from the resume to the last page
    memory: Memory | None = None
    faults: Faults | None = None
    transferred_bytes: int | None = None
    bytes_per_second: int | None = None
    recoveries: int | None = None
    phases: list[PhaseTime] | None = None
    passes: list[Pass] | None = None
    handed_over: str | None = None  # why, after passes
    tracking: dict[str, float] | None = None  # what passes cost the guest
    warning: str | None = None
    error: str | None = None


class Status(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """What one VM does here, and how its last migration ended. Until it has been in one `role`,
    `migration` and `peer` are empty."""

    vm: str
    role: Literal["", "source", "destination"]
    phase: Literal["idle", "precopy", "handover", "postcopy", "paused", "drained", "failed"]
    migration: str
    """Its id, the same on both hosts."""
    peer: str
    """The other host: HOST:PORT at the source, `NAME (ADDRESS)` at the destination."""
    message: str
    """One sentence for people."""
    remaining: int | None = None
    """Bytes of guest RAM that the destination lacks."""
    mode: str | None = None
    total_bytes: int | None = None
    """Of guest RAM."""
    transferred_bytes: int | None = None
    """On data connections, so far."""
    bytes_per_second: int | None = None
    """The same, in the last second or so."""
    elapsed_ms: float | None = None
    """Since the migration was asked for."""
    downtime_ms: float | None = None
    """How long the guest was stopped for the handover, from when it runs again."""
    faults: Faults | None = None
    """So far."""
    passes: list[Pass] | None = None
    """Those that are over."""
    result: Result | None = None
    """Once the migration is over, or while it is paused for long."""

    def lasting(self) -> Status:
        """Without what is only progress: what stays when a migration is over, and is recorded."""
        return msgspec.structs.replace(
            self,
            total_bytes=None,
            transferred_bytes=None,
            bytes_per_second=None,
            elapsed_ms=None,
            downtime_ms=None,
            faults=None,
            passes=None,
        )
