# SPDX-License-Identifier: Apache-2.0
"""Two hosts that run postcopyd as its package has it, made once for all tests of a worker."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from containers import NEWEST, THIS, Debian, Host, certificates, open_lab
from guests import qemu as q
from needs import missing

from postcopyd.demo.initramfs import find_kernel

NEEDED = ("systemd-nspawn", "ip", "nsenter", "setpriv", "systemd-run")


def bare_hosts(debian: Debian) -> Iterator[tuple[Host, Host]]:
    """Both as a user has them who has just installed Debian and QEMU."""
    if os.geteuid() != 0:
        missing("root")
    for program in NEEDED:
        if shutil.which(program) is None:
            missing(f"{program}: the Debian packages systemd-container and iproute2")
    if not Path("/lib/systemd/systemd").exists():
        missing("systemd")
    debian.package()
    with open_lab(debian) as hosts:
        yield hosts


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(THIS, id="this"),
        pytest.param(NEWEST, id="newest", marks=pytest.mark.libvirt),
    ],
)
def debian(request: pytest.FixtureRequest) -> Debian:
    """This one, and the one that has the newest libvirt."""
    made: Debian = request.param
    return made


@pytest.fixture(scope="module")
def fresh(debian: Debian) -> Iterator[tuple[Host, Host]]:
    for made in bare_hosts(debian):
        if debian is NEWEST:
            for host in made:
                shutil.copyfile(find_kernel(), host.root / "vmlinuz")  # it has none of its own
                # nspawn gives each a boot of its own, which services see of newer systemds. By the
                # kernel's the daemons know that what both have on tmpfs is one file.
                host.run("while umount /proc/sys/kernel/random/boot_id; do :; done 2> /dev/null")
        yield made


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    """The package is installed, each has a certificate of one CA, the sockets are open."""
    for made in bare_hosts(THIS):
        with ThreadPoolExecutor() as both:
            list(both.map(lambda host: host.install(THIS.package()), made))
        certificates(*made)
        for host in made:
            # With a hook, which would refuse each migration if the unit did not let it run.
            host.run(
                "mkdir -p /etc/postcopyd/hooks /etc/postcopyd/postcopyd.toml.d;"
                " printf 'hooks-dir = \"/etc/postcopyd/hooks\"\\n'"
                " > /etc/postcopyd/postcopyd.toml.d/hooks.toml;"
                " printf '#!/bin/sh\\ngrep -q web\\n' > /etc/postcopyd/hooks/10;"
                " chmod +x /etc/postcopyd/hooks/10"
            )
            host.run("systemctl stop postcopyd.service; systemctl start postcopyd.socket")
        yield made


@pytest.fixture(scope="module")
def boot(hosts: tuple[Host, Host]) -> tuple[Path, Path]:
    """Kernel and initramfs of the verifying guest, where both hosts and any user can read them."""
    folder = hosts[0].shared
    try:
        kernel, initramfs = q.boot(folder)
    except q.MissingPartError as error:
        missing(f"a guest in QEMU: {error}")
    copied = Path(shutil.copy(kernel, folder / "vmlinuz"))
    for file in (copied, initramfs):
        file.chmod(0o644)
    return copied, initramfs


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure comes with what both daemons have said since the test began."""
    report = yield
    if report.failed:
        for host in getattr(item, "funcargs", {}).get("hosts", ()):
            said = host.journal("--unit=postcopyd", f"--since=@{call.start - 1:.0f}")
            report.sections.append((f"journal of {host.name}", said))
    return report
