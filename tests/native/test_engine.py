# SPDX-License-Identifier: Apache-2.0
"""Runs the subtests of engine_test.c: as built for use, and with address and thread sanitizers."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from needs import missing

HERE = Path(__file__).parent
ENGINE = HERE.parents[1] / "postcopyd"
SOURCES = [
    HERE / "engine_test.c",
    *(ENGINE / f"{name}.c" for name in ("engine", "uffd_native", "source_native")),
]
SUBTESTS = re.findall(r'^    \{"(\w+)", \w+\},$', SOURCES[0].read_text(), re.MULTILINE)
FLAGS = ["-std=gnu11", "-g", "-pthread", "-Wall", "-Wextra", "-Wshadow"]
BUILDS = {
    "plain": ["-O2", "-Werror"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-fsanitize=thread"],
}
MISSING = 77


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths of the test program by the name of its build."""
    folder = tmp_path_factory.mktemp("engine")
    compiler = os.environ.get("CC", "cc")
    jobs = {}
    for name, flags in BUILDS.items():
        command = [
            compiler,
            *FLAGS,
            *flags,
            f"-I{ENGINE}",
            *map(str, SOURCES),
            "-o",
            str(folder / name),
        ]
        jobs[name] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for name, job in jobs.items():
        assert (0, "") == (job.wait(), job.communicate()[1]), f"compiling {name}"
    return {name: folder / name for name in BUILDS}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("subtest", SUBTESTS)
def test_engine(programs: dict[str, Path], subtest: str, build: str) -> None:
    """What the comment at the subtest of this name in engine_test.c says."""
    job = subprocess.Popen(
        [programs[build], subtest],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = job.communicate(timeout=90)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):  # the child that plays the VMM
            os.killpg(job.pid, signal.SIGKILL)
    if job.returncode == MISSING:
        missing(output.splitlines()[-1].removeprefix("missing: "))
    assert (0, "") == (job.returncode, "" if job.returncode == 0 else output)
