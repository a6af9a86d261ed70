# SPDX-License-Identifier: Apache-2.0
"""docs/FIRST-GUEST.md as a new user types it, on two hosts that have nothing but Debian.

docs/LIBVIRT.md goes on from there.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from containers import REPOSITORY, THIS, Debian, Host
from needs import libvirt

sys.path.append(str(Path(__file__).parent.parent / "documents"))
import console as d
from shells import Shell, scp

pytestmark = pytest.mark.long

DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def prompts(debian: Debian, fresh: tuple[Host, Host]) -> Iterator[dict[str, d.Run]]:
    """A shell on each, at home in /root, with the package that was copied there."""
    shutil.copy(debian.package(), fresh[0].root / "root" / d.DEB)
    shells = {f"{host.name}# ": Shell(host.command(["bash"])) for host in fresh}
    roots = {host.name: host.root for host in fresh}

    def run(prompt: str, text: str) -> tuple[int, str]:
        if text.startswith("scp "):
            return scp(text, "root", roots[prompt.rstrip("# ")], roots)
        return shells[prompt].run(text)

    for shell in shells.values():
        shell.run("cd /root")
        # dpkg syncs each file, and an index of manual pages is made: half a minute on two hosts.
        shell.run(
            "echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/test; rm -f /var/lib/man-db/auto-update"
        )
    yield {prompt.strip(): lambda text, prompt=prompt: run(prompt, text) for prompt in shells}
    for shell in shells.values():
        shell.end()


def test_first_guest(prompts: dict[str, d.Run]) -> None:
    """Each command works and prints what the document says."""
    assert d.run(DOCS / "FIRST-GUEST.md", prompts) > 40


def test_libvirt(debian: Debian, fresh: tuple[Host, Host], prompts: dict[str, d.Run]) -> None:
    """The same of docs/LIBVIRT.md, with the libvirt of that Debian."""
    if debian is THIS:
        libvirt()
    blocks = list(d.blocks(DOCS / "FIRST-GUEST.md"))
    guest = next(block for block in blocks if "guest/init" in str(block.commands))
    for command in guest.commands:
        prompts["host1#"](command.text)
    for host in fresh:
        host.run(["ln", "-s", str(host.shared), "/srv/web1"])
    prompts["host1#"]("mv web1.initrd /srv/web1/initrd; truncate -s 16M /srv/web1/disk")
    assert d.run(DOCS / "LIBVIRT.md", prompts) > 15
