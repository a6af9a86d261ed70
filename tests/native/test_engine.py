# SPDX-License-Identifier: Apache-2.0
"""Runs the subtests of the native programs as built for use and with the sanitizers.

engine_test.c tries both engines, stage_test.c the staged destination, loss_test.c pages that cannot
be read, dirty_test.c tracking, record_test.c the page record, order_test.c what is pushed next,
tls_test.c connections with TLS. Keys of TLS are replaced all the time in all of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from needs import missing

HERE = Path(__file__).parent
ENGINE = HERE.parents[1] / "postcopyd"
SOURCES = [ENGINE / "uffd_native.c", *sorted(ENGINE.glob("native/*.c"))]
PROGRAMS = [path for path in sorted(HERE.glob("*_test.c")) if path.name != "adopt_test.c"]
SUBTESTS = [
    (path.stem, name)
    for path in PROGRAMS
    for name in re.findall(r'^    \{"(\w+)", \w+\},$', path.read_text(), re.MULTILINE)
]
FLAGS = ["-std=gnu11", "-g", "-pthread", "-Wall", "-Wextra", "-Wshadow", f"-I{ENGINE}/native"]
FLAGS += ["-DTLS_KEY_RECORDS=50"]
BUILDS = {
    "plain": ["-O2", "-Werror"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-fsanitize=thread"],
}
MISSING = 77


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Paths of the test programs by their names and those of the builds. The first process of a
    test run compiles them for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "engine"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "compiled").exists():
            objects = [str(folder / f"{part.stem}-{{build}}.o") for part in SOURCES]
            compile_all(folder, SOURCES, "-c", suffix=".o")
            compile_all(folder, PROGRAMS, *objects, "-lssl", "-lcrypto")
            (folder / "compiled").touch()
    return {
        (path.stem, build): folder / f"{path.stem}-{build}" for path in PROGRAMS for build in BUILDS
    }


def compile_all(folder: Path, sources: list[Path], *options: str, suffix: str = "") -> None:
    """Each source in each build, as many at a time as there are processors."""

    def compiled(source: Path, build: str) -> None:
        output = folder / f"{source.stem}-{build}{suffix}"
        command = [os.environ.get("CC", "cc"), *FLAGS, *BUILDS[build], str(source)]
        command += [*(option.format(build=build) for option in options), "-o", str(output)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        assert (done.stderr, done.returncode) == ("", 0), f"compiling {output.name}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for job in [pool.submit(compiled, *each) for each in product(sources, BUILDS)]:
            job.result()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("program", "subtest"), SUBTESTS)
def test_engine(
    programs: dict[tuple[str, str], Path], program: str, subtest: str, build: str
) -> None:
    """What the comment at the subtest of this name in the program's source says."""
    job = subprocess.Popen(
        [programs[program, build], subtest],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"TSAN_OPTIONS": "atexit_sleep_ms=100"},
    )
    try:
        output = job.communicate(timeout=90)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):  # the child that plays the VMM
            os.killpg(job.pid, signal.SIGKILL)
    if job.returncode == MISSING:
        missing(output.splitlines()[-1].removeprefix("missing: "))
    assert (0, "") == (job.returncode, "" if job.returncode == 0 else output)
