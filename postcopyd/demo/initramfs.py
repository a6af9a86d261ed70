# SPDX-License-Identifier: Apache-2.0
"""What the verifying guest boots from: a kernel of this host, its modules, and our own init.

Owns finding the kernel and writing the initramfs (a gzipped "newc" cpio archive, see the kernel's
Documentation/driver-api/early-userspace/buffer-format.rst; by hand, as it is 20 lines and Python's
archive modules do not write it). It must not know about QEMU.
"""

from __future__ import annotations

import gzip
import importlib.resources
import lzma
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from postcopyd.errors import PostcopydError

MISSING_KERNEL = (
    "found no kernel to boot the guest with: install the Debian package linux-image-cloud-amd64, "
    "or name an x86-64 vmlinuz in $POSTCOPYD_KERNEL"
)

# For a disk, a network card and a balloon; Debian's kernels have all of these as modules.
GUEST_MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon")


class MissingPartError(PostcopydError):
    """This host lacks something that the guest needs; the sentence says what and how to get it."""


@dataclass(frozen=True)
class Kernel:
    """A bootable kernel and the folder of the modules that belong to it."""

    image: Path
    modules: Path


def find_kernel() -> Kernel | None:
    """`$POSTCOPYD_KERNEL`, else the newest cloud kernel in /boot, else the newest of any kind.

    Returns None when there is none that can be read; `MISSING_KERNEL` is the sentence for that.
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
            return Kernel(image, _modules_of(image.resolve()))
    return None


def _by_version(image: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", image.name)]


def _modules_of(image: Path) -> Path:
    """Of <root>/boot/vmlinuz-VERSION: <root>/lib/modules/VERSION, also where only unpacked."""
    version = image.name.removeprefix("vmlinuz-")
    root = image.parent.parent
    for folder in (root / "lib/modules" / version, root / "usr/lib/modules" / version):
        if folder.is_dir():
            return folder
    return Path("/lib/modules") / version


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


def write_initramfs(
    path: Path, kernel: Kernel, init: Path, modules: Iterable[str] = GUEST_MODULES
) -> None:
    """Write to `path` what makes `kernel` run `init`, with `modules` and all that they need.

    The same input gives the same bytes, as both sides of a migration must boot the same.
    Raises `MissingPartError` for a module that the kernel has neither built in nor as a file.
    """
    archive = bytearray()
    for name in ("dev", "modules"):
        archive += _entry(name, stat.S_IFDIR | 0o755)
    # So that a message of a kernel that cannot go on has somewhere to go.
    archive += _entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive += _entry("init", stat.S_IFREG | 0o755, init.read_bytes())
    for number, content in enumerate(_load_order(kernel, modules)):
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


def _load_order(kernel: Kernel, wanted: Iterable[str]) -> Iterator[bytes]:
    """Content of the modules, each after those it depends on.

    What depends on what is read from the modules themselves: modules.dep is written when a kernel
    package is installed, and is not there for one that was only unpacked.
    """
    files = {_module_name(file): file for file in kernel.modules.glob("kernel/**/*.ko*")}
    builtin_list = kernel.modules / "modules.builtin"
    builtin = builtin_list.read_text().split() if builtin_list.is_file() else []
    seen = {_module_name(Path(line)) for line in builtin}

    def load(name: str) -> Iterator[bytes]:
        if name in seen:
            return
        seen.add(name)
        if name not in files:
            raise MissingPartError(
                f"found no module {name} for the guest's kernel {kernel.image} in "
                f"{kernel.modules}: install the whole package of this kernel"
            )
        content = _read_module(files[name])
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        for needed in depends.group(1).decode().split(",") if depends else ():
            if needed:
                yield from load(needed.replace("-", "_"))
        yield content

    for name in wanted:
        yield from load(name)


def _module_name(file: Path) -> str:
    return file.name.split(".")[0].replace("-", "_")


def _read_module(file: Path) -> bytes:
    """The module as the kernel's loader takes it from our init: not compressed."""
    match file.suffix:
        case ".ko":
            return file.read_bytes()
        case ".xz":
            return lzma.decompress(file.read_bytes())
        case ".gz":
            return gzip.decompress(file.read_bytes())
    raise MissingPartError(
        f"cannot read the kernel module {file}: {file.suffix} is not known here; name a kernel "
        "with plain, xz or gz modules in $POSTCOPYD_KERNEL"
    )
