# SPDX-License-Identifier: Apache-2.0
"""`postcopyd doctor`: what it prints, and what it finds on hosts that lack something."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from needs import missing
from postcopyd._native import lib

from postcopyd import units
from postcopyd.cli import doctor
from postcopyd.cli.doctor import Check


def checks_of(monkeypatch: pytest.MonkeyPatch, *found: Check) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter(found),))


def test_exit_status_says_whether_something_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Notes leave the status 0; one thing that lacks makes it 1 and is named in the last line."""
    checks_of(
        monkeypatch, Check("kernel", "ok", "6.1"), Check("QEMU", "note", "none", "install it")
    )
    assert doctor.run(json=False) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok     kernel  6.1",
        "note   QEMU    none",
        "               -> install it",
        "This host can migrate guests, as source and as destination.",
    ]
    checks_of(monkeypatch, Check("kernel", "ok", "6.1"), Check("Yama", "lacks", "3", "reboot"))
    assert doctor.run(json=False) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "This host lacks: Yama."


def test_json_is_one_object_on_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --json one line has all checks and whether the host is fit."""
    checks_of(monkeypatch, Check("Yama", "lacks", "3", "reboot"))
    assert doctor.run(json=True) == 1
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert json.loads(line) == {
        "checks": [{"what": "Yama", "state": "lacks", "found": "3", "mend": "reboot"}],
        "ok": False,
    }


def test_a_check_that_breaks_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be looked at is a note, and the checks after it are made."""

    def _open_files() -> Iterator[Check]:
        raise OSError(5, "Input/output error")
        yield

    good = Check("kernel", "ok", "6.1")
    monkeypatch.setattr(doctor, "CHECKS", (_open_files, lambda: iter([good])))
    first, second = doctor.diagnose()
    assert (first.what, first.state) == ("open files", "note")
    assert "Input/output error" in first.found
    assert second == good


def test_everything_that_lacks_says_how_to_mend_it() -> None:
    """On this host too: no line that lacks something is without what to do."""
    checks = doctor.diagnose()
    assert {check.state for check in checks} <= {"ok", "lacks", "note"}
    assert not [check for check in checks if check.state == "lacks" and not check.mend]
    assert len({check.what for check in checks}) >= 20


def test_adoption_is_really_tried() -> None:
    """A child is adopted where this host allows it, and is gone afterwards."""
    if os.geteuid() != 0:
        missing("root, to adopt a process")
    (check,) = doctor._adoption()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    assert children == ""
    assert check.state == "ok", check


@pytest.mark.parametrize("dropped", ["-sys_ptrace", "-all"])
def test_without_the_capability_the_host_lacks_it(dropped: str) -> None:
    """Started without CAP_SYS_PTRACE it says so, with status 1 and no traceback."""
    if os.geteuid() != 0:
        missing("root, to give a capability away")
    program = "import sys; from postcopyd.cli import doctor; sys.exit(doctor.run(json=True))"
    without = ["setpriv", "--bounding-set", dropped, "--inh-caps", dropped]
    done = subprocess.run(
        [*without, sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",  # the package that is installed, not the one in the source tree
    )
    assert done.stderr == ""
    found = {check["what"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 1
    assert found["CAP_SYS_PTRACE"]["state"] == "lacks"
    assert (found["CAP_KILL"]["state"] == "note") is (dropped == "-all")


def test_features_are_read_from_a_real_descriptor() -> None:
    """The features are those that the kernel names, and a descriptor can be asked once only."""
    try:
        fd, _ = doctor.open_userfaultfd()
    except OSError as error:
        missing(f"userfaultfd for this user ({error})")
    try:
        assert doctor.userfaultfd_features(fd) >> 5 & 1
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("bits", "lacking", "noted"),
    [
        (0x1FFFF, [], 0),
        (0x1FFFF & ~(1 << 5), ["userfaultfd MISSING_SHMEM"], 0),
        (1 << 5, [], len(doctor.FEATURES) - 1),
    ],
)
def test_features_that_lack(
    monkeypatch: pytest.MonkeyPatch, bits: int, lacking: list[str], noted: int
) -> None:
    """Only what postcopy needs counts as lacking; what later modes need is noted."""
    monkeypatch.setattr(doctor, "open_userfaultfd", lambda: (os.open("/dev/null", 0), "a test"))
    monkeypatch.setattr(doctor, "userfaultfd_features", lambda fd: bits)
    checks = list(doctor._userfaultfd())
    assert [check.what for check in checks if check.state == "lacks"] == lacking
    assert len([check for check in checks if check.state == "note"]) == noted
    assert all("use Linux" in check.mend for check in checks if check.state != "ok")


@pytest.mark.parametrize(
    ("found", "state", "words"),
    [
        (0, "ok", ["hybrid migration"]),
        (lib.PC_MISSES_ZAPPED, "note", ["swapped out", "postcopy alone", "update the kernel"]),
        (lib.PC_MISSES_TABLES, "note", ["huge page that was split", "postcopy alone"]),
        (lib.PC_SEES_QUIET, "note", ["reports pages as written", "postcopy alone"]),
        (-errno.EOPNOTSUPP, "note", ["Linux 6.7", "postcopy alone"]),
        (-errno.ENOMEM, "note", ["could not be tried (Cannot allocate memory)", "postcopy alone"]),
    ],
)
def test_without_tracking_there_is_no_hybrid_migration(
    kernel_says: Callable[..., None], found: int, state: str, words: list[str]
) -> None:
    """A kernel that does not show all written pages is no hindrance, and what it means is said."""
    kernel_says(written=found)
    (check,) = doctor._tracking()
    assert check.state == state
    assert all(word in check.found + check.mend for word in words), check


@pytest.mark.parametrize(
    ("found", "state", "words"),
    [
        (0, "ok", "also where"),
        (1, "note", "puts zeros where pages are missing"),
        (-errno.ENOMEM, "note", "could not be tried (Cannot allocate memory)"),
    ],
)
def test_a_kernel_that_puts_zeros_where_pages_lack(
    kernel_says: Callable[..., None], found: int, state: str, words: str
) -> None:
    """Is said to do so, and one of which it is not known may."""
    kernel_says(zeros=found)
    (check,) = doctor._huge_page_zeros()
    assert check.state == state
    assert words in check.found


@pytest.mark.parametrize(("value", "state"), [("", "ok"), ("1", "ok"), ("2", "ok"), ("3", "lacks")])
def test_yama(monkeypatch: pytest.MonkeyPatch, value: str, state: str) -> None:
    """Only ptrace_scope 3 stands in the way of a daemon with its capability."""
    monkeypatch.setattr(doctor, "_read", lambda path: value)
    (check,) = doctor._ptrace_scope()
    assert check.state == state


def test_other_architecture_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is not x86-64 is told so."""
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    (check,) = doctor._architecture()
    assert check.state == "lacks"


@pytest.mark.parametrize(
    ("says", "state", "text"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2)", "ok", "was tried"),
        ("QEMU emulator version 10.0.2", "ok", "was tried"),
        ("QEMU emulator version 11.1.3", "ok", "was tried"),
        ("QEMU emulator version 9.1.0", "ok", "tried were 7.2, 10.0 and 11.1"),
        ("QEMU emulator version 6.2.0", "note", "6.2.0"),
        ("no version at all", "note", "of no known version"),
    ],
)
def test_qemu_versions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says: str, state: str, text: str
) -> None:
    """A QEMU is judged by the version that it says itself; a link to it is not a second one."""
    qemu = tmp_path / "qemu-system-x86_64"
    qemu.write_text(f"#!/bin/sh\necho '{says}'\n")
    qemu.chmod(0o755)
    (tmp_path / "qemu-kvm").symlink_to(qemu)
    monkeypatch.setenv("PATH", f"{tmp_path}:/nonexistent")
    monkeypatch.setattr(doctor, "QEMU_PLACES", ())
    (check,) = doctor._qemu()
    assert check.state == state
    assert text in check.found


def test_no_qemu_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A host without QEMU can still migrate guests of other VMMs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "QEMU_PLACES", ())
    (check,) = doctor._qemu()
    assert (check.state, bool(check.mend)) == ("note", True)


def test_sizes_for_people() -> None:
    """Bytes are shown in the unit that a person would use."""
    assert [units.size(n) for n in (0, 512 << 20, 3 << 30)] == ["0 B", "512.0 MiB", "3.0 GiB"]
