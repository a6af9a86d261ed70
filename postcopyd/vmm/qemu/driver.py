# SPDX-License-Identifier: Apache-2.0
"""Drives an unmodified QEMU by QMP: inspect, save, roll back; adopt, load, run.

QEMU moves its device state by its own migration stream, through a socket pair of which postcopyd
holds the other end; capability `x-ignore-shared` keeps guest RAM out of it. This module knows
QEMU's states and what leads from one to the other. It knows nothing of peers, pages or ownership.
It keeps nothing that QEMU could not be asked again after a restart of the daemon, except the
settings it found (without them the defaults are put back) and whether the guest ran.

The source:       running --migrate--> (STOP) finish-migrate --> postmigrate --cont--> running
The destination:  inmigrate --stop, migrate-incoming--> paused --cont--> running

Others may stop, move and save the guest by QEMU's own means. A guard that this driver leaves in
QEMU (`settings`, `state`) tells what this driver did from what they did; it undoes only its own.

`pause-before-switchover` is not used: the stop would last 1.5 ms longer (QEMU waits 1 ms for stray
wake-ups of its semaphore), cancelling in that moment hangs QEMU 7.2, and it protects nothing, as
the source can still go back by `cont` after `completed`.
"""

from __future__ import annotations

from postcopyd.vmm.qemu.destination import Arriving
from postcopyd.vmm.qemu.source import Leaving


class QemuVmm(Leaving, Arriving):
    """One QEMU, driven through its QMP socket."""
