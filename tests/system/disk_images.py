# SPDX-License-Identifier: Apache-2.0
"""Images for tests of disks, made without qemu-img."""

from __future__ import annotations

import struct
from pathlib import Path

MIB = 1 << 20
CLUSTER = 1 << 16


def raw(path: Path, content: bytes = b"", size: int = MIB) -> Path:
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def qcow2(path: Path, backing: str = "", size: int = MIB) -> Path:
    """An empty image of version 2 (docs/interop/qcow2.txt of QEMU): a cluster each for the header,
    the refcount table, its one block and the L1 table. The backing file is a raw one."""
    name = backing.encode()
    extension = struct.pack(">II8sII", 0xE2792ACA, 3, b"raw", 0, 0) if name else bytes(8)
    at = 72 + len(extension)
    header = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb", 2, at if name else 0, len(name), 16, size, 0, 1, 3 * CLUSTER, CLUSTER, 1, 0, 0,
    )  # fmt: skip
    clusters = [
        header + extension + name,
        struct.pack(">Q", 2 * CLUSTER),
        struct.pack(">4H", 1, 1, 1, 1),
        b"",
    ]
    path.write_bytes(b"".join(cluster.ljust(CLUSTER, b"\0") for cluster in clusters))
    return path
