# SPDX-License-Identifier: Apache-2.0
"""Which daemon this is. It tells its peers in `hello`, so that a source that comes back later knows
whether it asks the daemon that has its guest (source/granted.py).

Containers of one host share its boot, so within a boot the folder of records tells daemons apart.
"""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path

import structlog

from postcopyd.host import procfs
from postcopyd.protocol import DaemonId
from postcopyd.records.store import StateNotWritten, Store

MACHINE_ID = Path("/etc/machine-id")
PRODUCT_UUID = Path("/sys/class/dmi/id/product_uuid")


log = structlog.get_logger()


def here(store: Store) -> DaemonId:
    """Which daemon this is. If that cannot be kept, it is another one after each start: guests are
    not left alone for that, and the only effect is that a source believes this daemon too little.
    """
    try:
        state = store.identity()
    except StateNotWritten as error:
        log.error("taken for another daemon after its next start", error=str(error))
        state = secrets.token_hex(16)
    return DaemonId(machine(), procfs.boot_id(), state)


def machine() -> str:
    """An id of this machine that restarts do not change; empty if it has none.

    machine-id(5) must not go over the network, so only a digest of it does. The id of the hardware
    goes into the digest, because machines that were installed from a copied disk share machine-id.
    """
    if not (installed := _read(MACHINE_ID)):
        return ""
    return hmac.digest(installed, b"postcopyd " + _read(PRODUCT_UUID), "sha256").hex()[:32]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except OSError:
        return b""
