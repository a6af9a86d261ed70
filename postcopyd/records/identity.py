# SPDX-License-Identifier: Apache-2.0
"""Which daemon this is: what it tells its peers in `hello`, by which a source that comes back later
knows whether it asks the daemon that has its guest (source/granted.py).

Containers of one host have its boot in common, so within a boot it is the folder of records that
tells daemons apart.
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
    """Where it cannot be kept it is another one after each start: guests are not left alone for
    that, and a source only believes too little."""
    try:
        state = store.identity()
    except StateNotWritten as error:
        log.error("taken for another daemon after its next start", error=str(error))
        state = secrets.token_hex(16)
    return DaemonId(machine(), procfs.boot_id(), state)


def machine() -> str:
    """The same through restarts of this host; empty where it has no id.

    machine-id(5) is not for the network, so only what is made of it goes there. The id of the
    hardware is in it, because machines that were installed by a copied disk share the other.
    """
    if not (installed := _read(MACHINE_ID)):
        return ""
    return hmac.digest(installed, b"postcopyd " + _read(PRODUCT_UUID), "sha256").hex()[:32]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except OSError:
        return b""
