# SPDX-License-Identifier: Apache-2.0
"""A machine under QEMU's TCG that boots one of Debian's kernels and runs our tests in it.

Owns the disk (this machine's Python, the package as installed, its libraries, the tests and their
programs: one for all kernels), the initramfs, and the one boot at a time. What is run there is
inside.py, which writes a line of JSON for each thing it has tried.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guests import modules

from postcopyd.demo import initramfs

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = ROOT / ".build/kernels"
BOOT_S = 1800
"""It takes two or three minutes on two cores that have nothing else to do."""
MODULES = ("virtio_pci", "virtio_blk", "ext4")
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
NOT_NEEDED = shutil.ignore_patterns(
    "mypy*", "*__mypyc*", "mypyc", "pip*", "mesonbuild", "setuptools*", "docutils", "hypothesis",
    "ast_serialize", "librt", "pkg_resources", "pythonwin", "idlelib", "tkinter", "test", "lib2to3",
    "ensurepip", "turtledemo", "config-3*", "dist-packages", "site-packages", "*.a",
)  # fmt: skip
PROGRAMS = ("sleep", "sh", "mount", "umount", "true", "cat")
FOLDERS = ("dev", "proc", "sys", "tmp", "run", "var", "etc", "root")


@dataclass(frozen=True)
class Kernel:
    """A bootable kernel and the folder of the modules that belong to it."""

    image: Path
    modules: Path


def find(release: str) -> Kernel | None:
    """The kernel that tools/debian-kernels has unpacked of this release of Debian."""
    root = KERNELS / release / "root"
    images = [*root.glob("boot/vmlinuz-*"), *root.glob("usr/lib/modules/*/vmlinuz")]
    folders = [*root.glob("lib/modules/*"), *root.glob("usr/lib/modules/*")]
    return Kernel(images[0], folders[0]) if images and folders else None


def make_disk(path: Path, folder: Path, programs: Path) -> None:
    """Writes the disk: all of it is copied to `folder` first. `programs` is a folder of programs,
    which is /programs there."""
    tree = folder / "tree"
    for name in FOLDERS:
        (tree / name).mkdir(parents=True)
    python = Path(sys.executable).resolve()
    standard = Path(sysconfig.get_path("stdlib"))
    copy = [(standard, standard), (SITE_PACKAGES, Path("/site")), (programs, Path("/programs"))]
    copy += [(ROOT / "tests", Path("/repo/tests"))]
    for source, target in copy:
        shutil.copytree(source, _under(tree, target), ignore=NOT_NEEDED, dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", tree / "repo")
    shutil.copytree(ROOT / "postcopyd", tree / "repo/postcopyd", ignore=NOT_NEEDED)
    found = [Path(shutil.which(program) or program) for program in PROGRAMS]
    for program in (python, *found):
        target = _under(tree, program)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(program, target)
    for library in _libraries([python, *found, *tree.rglob("*.so"), *programs.iterdir()]):
        target = _under(tree, library)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    for name in ("bin", "lib", "lib64", "sbin"):  # as on this machine, which has merged them
        if (link := Path("/") / name).is_symlink() and not (tree / name).exists():
            (tree / name).symlink_to(os.readlink(link))
    (tree / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    size = sum(file.lstat().st_size for file in tree.rglob("*")) * 3 // 2 + (32 << 20)
    with path.open("wb") as image:
        image.truncate(size)
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0"]
    subprocess.run([*command, "-d", tree, path], check=True, env=_with_sbin())
    shutil.rmtree(tree)


def _under(tree: Path, path: Path) -> Path:
    """Where an absolute path is in the tree; below /usr whatever a merged system has in both."""
    if path.parts[1] in ("bin", "sbin", "lib", "lib64"):
        path = Path("/usr") / path.relative_to("/")
    return tree / path.relative_to("/")


def _with_sbin() -> dict[str, str]:
    return os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}


def _libraries(programs: Iterable[Path]) -> set[Path]:
    """What the dynamic linker would load for them, and the linker itself."""
    told = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    return {Path(path) for path in re.findall(r"^\t(?:\S+ => )?(/\S+) \(0x", told, re.MULTILINE)}


HUNG = "not done in"
BOOTS = 3
"""How often a machine is booted that comes to nothing of ours. Linux patches its own code by a
breakpoint, and QEMU's emulation with several threads may meet it after it has gone: "Oops: int3",
seen with Debian's 7.2 in the second of its boot."""


def boot(kernel: Kernel, disk: Path, folder: Path, *words: str) -> list[dict[str, Any]]:
    """Runs inside.py there with these words; what it said. Raises AssertionError with the end of
    the console when the machine did not get to its end."""
    init, archive = folder / "init", folder / "initramfs"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static"]
    subprocess.run(["cc", *flags, HERE / "init.c", "-o", init], check=True)
    initramfs.write(archive, init, modules.load_order(kernel.modules, MODULES))
    console, results = folder / "console", folder / "results"
    for file in (console, results):
        file.unlink(missing_ok=True)
    python = Path(sys.executable).resolve()
    arguments = "console=ttyS0 loglevel=5 panic=-1 mitigations=off no_timer_check rootfstype=ramfs"
    arguments += f" -- {python} -u"
    command = [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1G",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-kernel", kernel.image,
        "-initrd", archive, "-drive", f"file={disk},format=raw,if=virtio,readonly=on",
        "-append", " ".join([arguments, "/repo/tests/kernels/inside.py", *words]),
        "-serial", f"file:{console}", "-serial", f"file:{results}",
    ]  # fmt: skip
    with one_at_a_time():
        for _ in range(BOOTS):
            problem = _run(command)
            said = results.read_text(errors="replace").splitlines() if results.exists() else []
            if said or problem.startswith(HUNG):
                break
    tail = console.read_text(errors="replace")[-4000:] if console.exists() else ""
    assert said and said[-1] == "exit 0", f"{problem}\n{said[-3:]}\n{tail}"
    return [json.loads(line) for line in said[:-1]]


def _run(command: list[Any]) -> str:
    """To its end; what QEMU had to say."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BOOT_S
        )
    except subprocess.TimeoutExpired:
        return f"{HUNG} {BOOT_S} s"
    return done.stderr


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """A boot takes all of two cores; whoever else tests on this machine waits."""
    with open("/run/lock/postcopyd-tests.kernels", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
