# SPDX-License-Identifier: Apache-2.0
"""Drives an unmodified QEMU by QMP: inspect, save, roll back; adopt, load, run.

QEMU saves the state of its devices into a file in memory (`xen-save-devices-state`, which has no
RAM in it). An ordinary incoming stream is made of that (savevm.py), which the waiting QEMU loads
through a socket pair of which postcopyd holds the other end. Guest RAM of any kind is left to the
engine. This module knows QEMU's states and what leads from one to the other. It knows nothing of
peers, pages or ownership. It keeps nothing that QEMU could not be asked again after a restart of
the daemon, except the settings it found (without them the defaults are put back) and whether the
guest ran.

The source:       running --stop--> (STOP) paused --save--> paused --cont--> running
The destination:  inmigrate --stop, migrate-incoming--> paused --cont--> running

Others may stop, move and save the guest by QEMU's own means. A guard that this driver leaves in
QEMU (`settings`, `state`) tells what this driver did from what they did; it undoes only its own.

QEMU's own `migrate` is not used: it would send all RAM that is not in a shared, named file, and
would leave the guest in a run state (postmigrate) from which nothing but running leads on.
"""

from __future__ import annotations

from postcopyd.vmm.qemu.destination import Arriving
from postcopyd.vmm.qemu.source import Leaving


class QemuVmm(Leaving, Arriving):
    """One QEMU, driven through its QMP socket."""
