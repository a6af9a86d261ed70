# SPDX-License-Identifier: Apache-2.0
"""`make fuzz`: every target for some seconds, both at once, on a copy of the corpus.

frame_fuzz.c (libFuzzer, address and undefined behaviour sanitizers) and python_fuzz.py say what
they try. With `--keep` what was found new is merged into tests/fuzz/corpus, which holds as few
inputs as reach the same; look at it with `git diff --stat` and commit it. An input that fails is
left in .build/fuzz.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ENGINE = HERE.parents[1] / "postcopyd"
HEADERS = ENGINE / "native"
CORPUS = HERE / "corpus"
WORK = HERE.parents[1] / ".build/fuzz"
PYTHON_TARGETS = ("control", "call")
FRAMES = "frames"
INCLUDED = {"answer.c", "receive.c", "source.c"}  # by frame_fuzz.c, as is uffd_native.c
MISSING = 77  # exit status: the last line says what this machine lacks
MOST = 1000  # bytes of an input of frame_fuzz.c; payloads are made by it
# More would be lost to looking for leaks after each input than it could find.
OPTIONS = [f"-max_len={MOST}", "-use_value_profile=1", "-detect_leaks=0", "-timeout=10"]


def build(folder: Path) -> Path:
    """Compiles frame_fuzz.c with the engines. Raises CalledProcessError and FileNotFoundError."""
    program = folder / "frame_fuzz"
    command = ["clang", "-std=gnu11", "-g", "-O1", "-pthread", "-Wall", "-Wextra", "-Wshadow"]
    command += ["-Werror", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    command += [f"-I{HEADERS}", f"-I{ENGINE}", str(HERE / "frame_fuzz.c")]
    command += [str(file) for file in sorted(HEADERS.glob("*.c")) if file.name not in INCLUDED]
    subprocess.run(
        [*command, "-lssl", "-lcrypto", "-o", str(program)],
        check=True,
        capture_output=True,
        text=True,
    )
    return program


def frames(program: Path, folder: Path, seconds: float) -> list[str]:
    """The command that fuzzes the native engines; 0 seconds: that replays."""
    inputs = folder / FRAMES
    found = [f"-artifact_prefix={folder}/{FRAMES}-crash-"]
    if seconds == 0:
        return [str(program), *OPTIONS, *found, "-runs=0", str(inputs)]
    return [str(program), *OPTIONS, *found, f"-max_total_time={seconds:.0f}", str(inputs)]


def python(target: str, folder: Path, *words: str) -> list[str]:
    return [sys.executable, str(HERE / "python_fuzz.py"), target, str(folder / target), *words]


def keep(program: Path) -> None:
    """The corpus anew, from the old one and what was found."""
    inputs, merged = CORPUS / FRAMES, WORK / "merged"
    merged.mkdir()
    subprocess.run([program, "-merge=1", merged, inputs, WORK / FRAMES], check=True)
    shutil.rmtree(inputs)
    shutil.move(merged, inputs)
    for target in PYTHON_TARGETS:
        shutil.copytree(WORK / target, CORPUS / target, dirs_exist_ok=True)
        subprocess.run(python(target, CORPUS, "--merge"), check=True)


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("--seconds", type=float, default=60)
    words.add_argument("--keep", action="store_true")
    given = words.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    shutil.copytree(CORPUS, WORK)
    try:
        program = build(WORK)
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        return 1
    commands = [frames(program, WORK, given.seconds)]
    commands += [python(name, WORK, "--seconds", str(given.seconds)) for name in PYTHON_TARGETS]
    jobs = [subprocess.Popen(command) for command in commands]
    failed = [job.args for job in jobs if job.wait() != 0]
    for args in failed:
        print("failed:", *map(str, args if isinstance(args, list) else [args]), file=sys.stderr)
    if not failed and given.keep:
        keep(program)
    return len(failed)


if __name__ == "__main__":
    os.environ.setdefault("ASAN_OPTIONS", "quarantine_size_mb=1")
    sys.exit(main())
