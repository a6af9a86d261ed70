# SPDX-License-Identifier: Apache-2.0
"""The engines, adoption and a migration on kernels that people have, each booted under TCG.

bookworm is Debian 12's 6.1: no WP_ASYNC, no UFFDIO_POISON, and zeros where pages lack in huge
pages. trixie is Debian 13's 6.12, sid the newest there is. A kernel that is not in .build/kernels
(tools/debian-kernels) and cannot be fetched is one that this machine lacks.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from machine import ROOT, boot, find, make_disk
from needs import missing

pytestmark = pytest.mark.long

NATIVE = ROOT / "tests/native"
HEADERS = ROOT / "postcopyd/native"
ENGINE = [ROOT / "postcopyd/uffd_native.c", *sorted(HEADERS.glob("*.c"))]
FLAGS = ["-std=gnu11", "-g", "-O2", "-pthread", f"-I{HEADERS}", "-DTLS_KEY_RECORDS=50"]
FLAGS += ["-DEMULATED"]
FEATURES = {  # what doctor has to find
    "bookworm": {"userfaultfd POISON": "note", "seeing written pages (tried)": "note",
                 "missing pages stay missing (tried)": "note", "adoption (tried)": "ok"},
    "trixie": {"seeing written pages (tried)": "ok", "missing pages stay missing (tried)": "ok",
               "adoption (tried)": "ok"},
    "sid": {"seeing written pages (tried)": "ok", "missing pages stay missing (tried)": "ok",
            "adoption (tried)": "ok"},
}  # fmt: skip
MAY_LACK = {
    "bookworm": {"Linux 6.6", "Linux 6.7"},
    "trixie": set[str](),
    "sid": set[str](),
}
MACHINE_LACKS = {"free huge pages of 2 MiB"}
"""What a machine of 1 GiB does not have, whatever its kernel."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for program in ("qemu-system-x86_64", "cc", "mke2fs"):
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            missing(program)
    folder = tmp_path_factory.mktemp("kernels")
    programs = folder / "programs"
    programs.mkdir()
    jobs = [
        [
            "cc",
            *FLAGS,
            source,
            *ENGINE,
            "-lssl",
            "-lcrypto",
            "-o",
            programs / f"{source.stem}-plain",
        ]
        for source in sorted(NATIVE.glob("*_test.c"))
        if source.stem != "adopt_test"
    ]
    adopt = ["cc", *FLAGS, "-DADOPT_TEST"]
    jobs += [
        [*adopt, NATIVE / "adoptee.c", "-o", programs / "adoptee"],
        [
            *adopt,
            NATIVE / "adopt_test.c",
            *sorted(HEADERS.glob("adopt*.c")),
            "-o",
            programs / "adopt_test",
        ],
    ]
    for job in jobs:
        subprocess.run(job, check=True)
    make_disk(folder / "disk", folder, programs)
    return folder / "disk"


class Found:
    """What was said of one kernel."""

    def __init__(self, release: str, said: list[dict[str, Any]]) -> None:
        self.release, self._said = release, said

    def of(self, step: str) -> list[dict[str, Any]]:
        found = [one for one in self._said if one["step"] == step]
        assert found, f"{step} was not run"
        assert not [one["trouble"] for one in found if "trouble" in one]
        return found


@pytest.fixture(scope="module", params=["bookworm", "trixie", "sid"])
def kernel(
    request: pytest.FixtureRequest, disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> Found:
    release: str = request.param
    fetched = subprocess.run(
        [ROOT / "tools/debian-kernels", release], cwd=ROOT, capture_output=True, text=True
    )
    found = find(release)
    if release == "sid" and (fetched.returncode or found is None):
        pytest.skip(f"sid has no kernel today: {fetched.stderr[-500:]}")
    if fetched.returncode or found is None:
        missing(f"the kernel of Debian {release}: {fetched.stderr[-500:]}")
    return Found(release, boot(found, disk, tmp_path_factory.mktemp(release)))


def test_doctor_finds_what_this_kernel_is(kernel: Found) -> None:
    """By trying it: what lacks, and what is there and wrong."""
    (doctor,) = kernel.of("doctor")
    assert doctor["ok"], doctor
    states = {check["what"]: check["state"] for check in doctor["checks"]}
    assert FEATURES[kernel.release].items() <= states.items(), states


def test_the_engines(kernel: Found) -> None:
    """Each subtest passes, or says what the kernel has not; and that is so for this one."""
    lacking, failed = set(), {}
    for one in kernel.of("native"):
        if one["status"] == 77:
            lacking |= set(re.findall("^missing: (.*)$", one["text"], re.MULTILINE))
        elif one["status"]:
            failed[one["name"]] = one["text"]
    assert {} == failed
    assert MAY_LACK[kernel.release] == lacking - MACHINE_LACKS


def test_adoption(kernel: Found) -> None:
    """Neither many system calls nor tracers that die at any ptrace call do harm."""
    (adoption,) = kernel.of("adoption")
    assert (adoption["status"], adoption["done"]) == (0, 50), adoption["error"]
    assert adoption["died"] >= adoption["calls"] - 1 > 5
    assert (adoption["bad"], adoption["ended"]) == (0, 0), adoption["said"]


def test_a_guest_moves(kernel: Found) -> None:
    """Every page is right, by postcopy and by passes where the kernel shows what is written; and
    nothing is put into huge pages where that would make zeros of missing pages."""
    right = FEATURES[kernel.release]["missing pages stay missing (tried)"] == "ok"
    for one in kernel.of("migration"):
        result = one["result"]
        assert result["event"] == "completed", result
        assert one["checked"] == [result["memory"]["pages"], 0]
        if one["mode"] == "hybrid" and kernel.release == "bookworm":
            assert "Linux 6.7" in result["warning"]
        else:
            assert "warning" not in result
        assert bool(result["passes"]) == (one["mode"] == "hybrid" and kernel.release != "bookworm")
        assert one["fills_holes"] is not right
        refusals = [problem for problem in one["refused"] if "MADV_NOHUGEPAGE" in problem]
        assert bool(refusals) is not right, one["refused"]
