# SPDX-License-Identifier: Apache-2.0
"""What is run in a machine that has booted one of Debian's kernels: see machine.py.

Each step writes lines of JSON to descriptor 3 and decides nothing; test_kernels.py, outside, knows
what is to be expected. A machine under TCG is slow: nothing here looks at a clock but to give up.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SITE, REPO, PROGRAMS = Path("/site"), Path("/repo"), Path("/programs")
os.environ |= {"PYTHONPATH": str(SITE), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
sys.path.insert(0, str(SITE))
GIVE_UP_S = 600
MEMORY = 24 << 20
PATIENT = ("--timeout", 60000)  # ms: a thread of an emulated machine stops when it gets a turn

results = os.fdopen(3, "w")


def say(step: str, **about: Any) -> None:
    results.write(json.dumps({"step": step} | about) + "\n")
    results.flush()


def run(*command: str | Path) -> tuple[int, str]:
    """Its exit status and the end of what it said; -1 when it came to no end."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=GIVE_UP_S,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return -1, str(late)
    return done.returncode, done.stdout[-4000:]


def doctor() -> None:
    """What it finds of this kernel."""
    status, text = run(sys.executable, "-m", "postcopyd", "doctor", "--json")
    say("doctor", status=status, **json.loads(text))


def native() -> None:
    """The subtests of the native programs, as built for use."""
    Path("/proc/sys/vm/overcommit_memory").write_text("1")  # mappings far larger than the machine
    for program in sorted(PROGRAMS.glob("*_test-plain")):
        source = REPO / "tests/native" / program.name.replace("-plain", ".c")
        for name in re.findall(r'^    \{"(\w+)", \w+\},$', source.read_text(), re.MULTILINE):
            status, text = run(program, name)
            say("native", name=f"{source.stem} {name}", status=status, text=text)


def adoption() -> None:
    """A process that notices damage makes system calls for us again and again, in each thread; and
    for tracers that are killed at each of their ptrace calls."""

    def adopt(*words: object) -> tuple[int, dict[str, Any]]:
        status, text = run(PROGRAMS / "adopt_test", *map(str, words))
        return status, json.loads(text) if text.startswith("{") else {}

    with (
        open("/tmp/noticed", "w+") as noticed,
        subprocess.Popen(
            [PROGRAMS / "adoptee"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noticed,
            text=True,
        ) as adoptee,
    ):
        assert adoptee.stdin
        assert adoptee.stdout
        tids = json.loads(adoptee.stdout.readline())["tids"]
        status, result = adopt(*PATIENT, adoptee.pid, "cycle", 50, *tids.values())
        calls = adopt("--tid", adoptee.pid, adoptee.pid, "call", 39)[1].get("ptraceCalls", 0)
        died = 0
        for number in range(1, calls + 1):
            words = ("--tid", adoptee.pid, "--die-after", number, adoptee.pid, "call", 39)
            died += adopt(*words)[0] == -9
        adoptee.stdin.write("check\n")
        adoptee.stdin.flush()
        after = json.loads(adoptee.stdout.readline())
        adoptee.stdin.close()
        ended = adoptee.wait(GIVE_UP_S)
        noticed.seek(0)
        said = noticed.read()
    say("adoption", status=status, done=result.get("done"), calls=calls, died=died,
        bad=after["bad"], ended=ended, said=said, error=result.get("error"))  # fmt: skip


def migration() -> None:
    """A guest moves between two daemons, its RAM in files for which the kernel makes huge pages as
    fast as it can: every page is checked by the guest. Then one is refused that would get huge
    pages while it waits, where that is what the kernel makes zeros by."""
    import trio

    huge = Path("/sys/kernel/mm/transparent_hugepage")
    (huge / "enabled").write_text("always")
    for name, value in (("scan_sleep_millisecs", 100), ("pages_to_scan", 16384)):
        (huge / "khugepaged" / name).write_text(str(value))
    folder = Path("/run/huge")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m,huge=always", "t", folder], check=True)
    for mode in ("postcopy", "hybrid"):
        say("migration", mode=mode, **trio.run(move, folder, mode))
    (huge / "enabled").write_text("madvise")
    (huge / "khugepaged/scan_sleep_millisecs").write_text("10000")


async def move(folder: Path, mode: str) -> dict[str, Any]:
    import trio

    from postcopyd.demo import hosts
    from postcopyd.host import kernel
    from postcopyd.native import adoption

    hosts.START_S = GIVE_UP_S
    ram = ("--memory", str(MEMORY), "--threads", "2", "--rate", "300", "--backing", "file")
    guests: list[Any] = []

    def guest(name: str, *more: str) -> Any:
        at = str(folder / f"{name}-{mode}")
        guests.append(hosts.ProcessGuest(Path(f"{at}.vmm"), *ram, "--path", at, *more))
        return guests[-1]

    (state := Path("/run") / mode).mkdir()
    async with hosts.open_hosts(state) as (source, destination):
        try:
            await source.attach("guest", "process", guest("a").path)
            exposed, arriving = guest("b", "--incoming"), guest("c", "--incoming")
            # As a VMM that knows nothing of it: the example forbids huge pages while it waits.
            await adoption.prctl(exposed.process.pid, 41, 0)
            await destination.attach("guest", "process", exposed.path)
            refused = await source.call("Check", name="guest", to=destination.address)
            await destination.call("Detach", name="guest")
            await destination.attach("guest", "process", arriving.path)
            result = await source.migrate("guest", destination, mode=mode)
            checked = (0, 0)
            if result["event"] == "completed":
                checked = await trio.to_thread.run_sync(arriving.verify)
        finally:
            for one in guests:
                one.kill()
    return {
        "result": result,
        "checked": checked,
        "refused": refused["problems"],
        "fills_holes": kernel.fills_holes(),
    }


STEPS: tuple[Callable[[], None], ...] = (doctor, migration, adoption, native)


def main() -> None:
    say("kernel", release=platform.release())
    wanted = sys.argv[1:]
    for step in STEPS:
        if not wanted or step.__name__ in wanted:
            try:
                step()
            except BaseException:
                say(step.__name__, trouble=traceback.format_exc()[-4000:])


main()
