# SPDX-License-Identifier: Apache-2.0
"""Modules of a kernel for a guest that boots from an initramfs: which, and in what order."""

from __future__ import annotations

import gzip
import lzma
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from postcopyd.demo.initramfs import MissingPartError

# For a disk, a network card and a balloon; Debian's kernels have all of these as modules.
DEVICES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon")


def folder_of(image: Path) -> Path:
    """Of <root>/boot/vmlinuz-VERSION: <root>/lib/modules/VERSION, also where only unpacked."""
    version = image.name.removeprefix("vmlinuz-")
    root = image.parent.parent
    for folder in (root / "lib/modules" / version, root / "usr/lib/modules" / version):
        if folder.is_dir():
            return folder
    return Path("/lib/modules") / version


def load_order(folder: Path, wanted: Iterable[str]) -> Iterator[bytes]:
    """Content of the modules in this folder of a kernel, each after those it depends on.

    Raises `MissingPartError` for one that the kernel has neither built in nor as a file.

    What depends on what is read from the modules themselves: modules.dep is written when a kernel
    package is installed, and is not there for one that was only unpacked.
    """
    files = {_module_name(file): file for file in folder.glob("kernel/**/*.ko*")}
    builtin_list = folder / "modules.builtin"
    builtin = builtin_list.read_text().split() if builtin_list.is_file() else []
    seen = {_module_name(Path(line)) for line in builtin}

    def load(name: str) -> Iterator[bytes]:
        if name in seen:
            return
        seen.add(name)
        if name not in files:
            raise MissingPartError(
                f"found no module {name} in {folder}: install the whole package of this kernel"
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
