# SPDX-License-Identifier: Apache-2.0
"""What the verifying guest boots from: a kernel of this host and our own init.

Owns finding the kernel and writing the initramfs (a gzipped "newc" cpio archive, see the kernel's
Documentation/driver-api/early-userspace/buffer-format.rst; by hand, as it is 20 lines and Python's
archive modules do not write it). It must not know about QEMU.
"""

from __future__ import annotations

import gzip
import importlib.resources
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from postcopyd.errors import PostcopydError


class MissingPartError(PostcopydError):
    """This host lacks something that the guest needs; the sentence says what and how to get it."""

    name = "DemoFailed"


def find_kernel() -> Path:
    """`$POSTCOPYD_KERNEL`, else the newest cloud kernel in /boot, else the newest of any kind.

    Raises `MissingPartError` where there is none that can be read.
    """
    if named := os.environ.get("POSTCOPYD_KERNEL"):
        candidates = [Path(named)]
    else:
        boot = Path("/boot")
        candidates = [
            image
            for pattern in ("vmlinuz-*-cloud-amd64", "vmlinuz-*")
            for image in sorted(boot.glob(pattern), key=_by_version, reverse=True)
        ]
    for image in candidates:
        if image.is_file() and os.access(image, os.R_OK):
            return image
    raise MissingPartError(
        "found no kernel to boot the guest with: install the Debian package "
        "linux-image-cloud-amd64, or name an x86-64 vmlinuz in $POSTCOPYD_KERNEL"
    )


def _by_version(image: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", image.name)]


def find_init() -> Path:
    """The guest's init, built beside this module.

    Raises `MissingPartError` where the package was built without it.
    """
    init = Path(str(importlib.resources.files(__package__).joinpath("guest-init")))
    if not init.is_file():
        raise MissingPartError(
            f"found no init for the guest at {init}: build the package with a C compiler and a "
            "static libc (the Debian package libc6-dev)"
        )
    return init


def write(path: Path, init: Path, modules: Iterable[bytes] = ()) -> None:
    """Write to `path` what makes a kernel run `init`, which loads `modules` in this order.

    The same input gives the same bytes, as both sides of a migration must boot the same.
    """
    archive = bytearray()
    for name in ("dev", "modules"):
        archive += _entry(name, stat.S_IFDIR | 0o755)
    # So that a message of a kernel that cannot go on has somewhere to go.
    archive += _entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive += _entry("init", stat.S_IFREG | 0o755, init.read_bytes())
    for number, content in enumerate(modules):
        archive += _entry(f"modules/{number:02}", stat.S_IFREG | 0o644, content)
    archive += _entry("TRAILER!!!", 0)
    # The fastest level: under emulation the guest inflates this more slowly than we write it.
    path.write_bytes(gzip.compress(bytes(archive), compresslevel=1, mtime=0))


def _entry(name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One file of a newc archive: 13 fields of 8 hex digits, the name, the content, each padded."""
    raw = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # inode (0: none shared), mode, uid, gid, links, mtime, size, device, rdevice, name, checksum
    fields = (0, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(raw), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _padded(header + raw) + _padded(content)


def _padded(block: bytes) -> bytes:
    return block + b"\0" * (-len(block) % 4)
