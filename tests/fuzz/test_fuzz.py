# SPDX-License-Identifier: Apache-2.0
"""Whatever a peer or a client sends: a named error, and memory as it must be."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import fuzz  # beside this file
import pytest
from needs import missing

SECONDS = 5


def output_of(job: subprocess.Popen[str]) -> str:
    output = job.communicate(timeout=SECONDS + 60)[0]
    if job.returncode == fuzz.MISSING:
        missing(output.splitlines()[-1].removeprefix("missing: "))
    return "" if job.returncode == 0 else output[-8000:]


def started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("clang") is None:
        missing("clang")
    return fuzz.build(tmp_path_factory.mktemp("fuzz"))


def test_corpus_of_frames(program: Path, tmp_path: Path) -> None:
    """Every input that was kept does to the engines what the model says, under sanitizers."""
    shutil.copytree(fuzz.CORPUS / fuzz.FRAMES, tmp_path / fuzz.FRAMES)
    assert output_of(started(fuzz.frames(program, tmp_path, 0))) == ""


def test_corpus_of_messages(tmp_path: Path) -> None:
    """Every message and call that was kept ends in what it may end in."""
    for target in fuzz.PYTHON_TARGETS:
        shutil.copytree(fuzz.CORPUS / target, tmp_path / target)
        assert output_of(started(fuzz.python(target, tmp_path))) == ""


def test_new_inputs(program: Path, tmp_path: Path) -> None:
    """Some seconds of inputs that nobody has thought of, all targets at once."""
    shutil.copytree(fuzz.CORPUS, tmp_path / "corpus")
    folder = tmp_path / "corpus"
    commands = [fuzz.frames(program, folder, SECONDS)]
    commands += [
        fuzz.python(name, folder, "--seconds", str(SECONDS)) for name in fuzz.PYTHON_TARGETS
    ]
    jobs = [started(command) for command in commands]
    assert [output_of(job) for job in jobs] == [""] * len(jobs)
