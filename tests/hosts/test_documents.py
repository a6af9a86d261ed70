# SPDX-License-Identifier: Apache-2.0
"""docs/FIRST-GUEST.md as a new user types it, on two hosts that have nothing but Debian.

docs/LIBVIRT.md goes on from there, where $POSTCOPYD_LIBVIRT says so: `make test-libvirt`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import bare_hosts
from lab import REPOSITORY, Host
from needs import missing

sys.path.append(str(Path(__file__).parent.parent / "documents"))
import documents as d
from shells import Shell

DOCS = REPOSITORY / "docs"
COPY_S = 20


@pytest.fixture(scope="module")
def fresh() -> Iterator[tuple[Host, Host]]:
    yield from bare_hosts()


@pytest.fixture(scope="module")
def prompts(fresh: tuple[Host, Host]) -> Iterator[dict[str, d.Run]]:
    """A shell on each, at home in /root, with the package that was copied there."""
    packages = sorted((REPOSITORY / ".build/deb").glob("postcopyd_*.deb"))
    if not packages:
        missing("the Debian package of postcopyd: `make deb`")
    shutil.copy(packages[-1], fresh[0].root / "root" / d.DEB)
    shells = {f"{host.name}# ": Shell(host.command(["bash"])) for host in fresh}
    by_name = {host.name: host for host in fresh}

    def run(prompt: str, text: str) -> tuple[int, str]:
        if text.startswith("scp "):
            return scp(text, by_name[prompt.rstrip("# ")], by_name)
        return shells[prompt].run(text)

    for shell in shells.values():
        shell.run("cd /root && rm -f web1*")
    yield {prompt.strip(): lambda text, prompt=prompt: run(prompt, text) for prompt in shells}
    for shell in shells.values():
        shell.end()


def scp(text: str, here: Host, hosts: dict[str, Host]) -> tuple[int, str]:
    """What scp(1) would do: nobody is there to log in at these hosts."""
    *files, to = [word for word in shlex.split(text)[1:] if not word.startswith("-")]
    name, _, folder = to.partition(":")
    for pattern in files:
        found = list(here.root.glob(f"root/{pattern}"))
        assert found, f"{text}: no {pattern} at {here.name}"
        for file in found:
            shutil.copy(file, hosts[name].root / (folder.lstrip("/") or "root") / file.name)
    return 0, ""


def test_first_guest(prompts: dict[str, d.Run]) -> None:
    """Each command works and prints what the document says."""
    assert d.run(DOCS / "FIRST-GUEST.md", prompts) > 40


@pytest.mark.skipif("POSTCOPYD_LIBVIRT" not in os.environ, reason="`make test-libvirt` runs it")
def test_libvirt(prompts: dict[str, d.Run]) -> None:
    """The same of docs/LIBVIRT.md, with the libvirt of this machine's Debian."""
    assert d.run(DOCS / "LIBVIRT.md", prompts, needs="libvirt") > 20
