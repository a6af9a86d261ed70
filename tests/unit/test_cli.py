# SPDX-License-Identifier: Apache-2.0
"""The command line as its user meets it: run as a program, against a daemon without guests."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import trio
import trio.testing
from fake_daemon import FAULTS, FOUND_JSON, RESULT, FakeDaemon

import postcopyd.daemon
from postcopyd import units
from postcopyd.cli import main, progress, verbs
from postcopyd.config import options as config
from postcopyd.control import methods
from postcopyd.errors import PostcopydError
from postcopyd.host import procfs
from postcopyd.model import MigrateRequest
from postcopyd.net import socket_file
from postcopyd.records.store import Store

ROOT = Path(__file__).resolve().parents[2]
FAILED = {"event": "failed", "vm": "web1", "migration": "m1", "error": "host2 said no: mend it"}


@dataclass
class Ran:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def objects(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


def environment(**changes: str) -> dict[str, str]:
    keep = {key: value for key, value in os.environ.items() if key != "POSTCOPYD_CONTROL"}
    return {**keep, **changes}


def run(*args: str, **env: str) -> Ran:
    """Run a command that needs no daemon of this process."""
    command = [sys.executable, "-m", "postcopyd", *args]
    done = subprocess.run(
        command, env=environment(**env), capture_output=True, text=True, timeout=30
    )
    return Ran(done.returncode, done.stdout, done.stderr)


class Host:
    """A served fake daemon, and commands run against it."""

    def __init__(self, daemon: FakeDaemon, path: str, nursery: trio.Nursery) -> None:
        self.daemon = daemon
        self.path = path
        self._nursery = nursery

    def kill(self) -> None:
        """End the daemon as SIGKILL would: every connection is closed."""
        self._nursery.cancel_scope.cancel()

    async def run(self, *args: str, **env: str) -> Ran:
        command = [sys.executable, "-m", "postcopyd", *args]
        env = environment(POSTCOPYD_CONTROL=self.path, **env)
        with trio.fail_after(30):
            done = await trio.run_process(
                command, env=env, capture_stdout=True, capture_stderr=True, check=False
            )
        return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())

    async def migrate(
        self, then: Callable[[], None], *args: str, phase: str = "", **env: str
    ) -> Ran:
        """`migrate web1`, with `then` done once it watches and was sent `phase`."""
        ran: list[Ran] = []

        async def go() -> None:
            ran.append(await self.run("migrate", "web1", "--to", "host2", *args, **env))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(go)
            with trio.fail_after(30):
                await self.daemon.watched.wait()
                # Once every task waits again, the server has sent what there was to send.
                await trio.testing.wait_all_tasks_blocked()
                if phase:
                    self.daemon.put("web1", phase=phase)
                await trio.testing.wait_all_tasks_blocked()
            then()
        return ran[0]


@contextlib.asynccontextmanager
async def host(folder: Path, *names: str) -> AsyncIterator[Host]:
    daemon = FakeDaemon(*names)
    path = str(folder / "control")
    async with trio.open_nursery() as nursery:
        await nursery.start(methods.serve, daemon, await socket_file.listen(path))
        made = Host(daemon, path, nursery)
        yield made
        nursery.cancel_scope.cancel()


# What a user meets without a daemon.


def test_help_is_instant() -> None:
    """The help comes in less than 0.15 s of processor time, and names every verb."""
    before = os.times()
    ran = run("--help")
    after = os.times()
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    assert ran.status == 0
    for verb in ("serve", "attach", "migrate", "status", "resolve", "demo", "doctor"):
        assert f"\n    {verb} " in ran.out
    assert spent < 0.15


def test_clients_load_nothing_heavy() -> None:
    """A client verb imports neither trio nor structlog nor rich."""
    code = (
        "import sys; from postcopyd.cli import main; main.main(['list', '--control', '/none']);"
        "print(sorted({'trio', 'structlog', 'rich', 'msgpack'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.stdout == "[]\n"


def test_no_certificates() -> None:
    """Without certificates no daemon starts unless it is told to do without."""
    args = ("serve", "--config", os.devnull, "--tls-dir", "/no/certificates")
    ran = run(*args, PYTHONPATH="", PYTHONSAFEPATH="1")  # as installed, with what is built
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "/no/certificates/ca-cert.pem: No such file" in ran.err
    assert "postcopyd certs --dir /no/certificates" in ran.err and "say `--tls off`" in ran.err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "a verb is missing"),
        (("fly",), "fly"),
        (("--control", "/x", "list"), "'/x'"),
        (("attach", "web1"), "--qemu --libvirt --process is required"),
        (("attach", "web1", "--qemu", "/a", "--process", "/b"), "not allowed with"),
        (("migrate", "web1"), "--to"),
        (("migrate", "web1", "--to", "a:b"), "'a:b'"),
        (("migrate", "web1", "--to", "fe80::1"), "brackets"),
        (("migrate", "web1", "--to", "[fe80::1]"), "[fe80::1%eth0]"),
        (("check", "web1", "--to", "[FEBF::1]:7"), "say which"),
        (("migrate", "web1", "--to", "h", "--bandwidth", "5T"), "'5T'"),
        (("migrate", "web1", "--to", "h", "--band", "5"), "--band"),
        (("migrate", "web1", "--to", "h", "--precopy-passes", "-1"), "'-1'"),
        (("migrate", "web1", "--to", "h", "--max-downtime", "nan"), "'nan'"),
        (("resolve", "web1"), "--wait --poison --kill --take-back is required"),
        (("certs", "--dir", "/nowhere", "--host", "h:1"), "'h:1' cannot be the name of a host"),
        (("serve", "--config", "/no/file"), "/no/file"),
        (("demo", "--memory", "much"), "'much'"),
    ],
)
def test_usage_errors(args: tuple[str, ...], says: str) -> None:
    """What cannot be meant exits with 2 and one sentence on stderr."""
    ran = run(*args)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("postcopyd: ")
    assert ran.err.count("\n") == 1
    assert says in ran.err


def test_no_daemon(tmp_path: Path) -> None:
    """Without a daemon a client says where it looked and how to start one, and exits with 1."""
    path = str(tmp_path / "none")
    for ran in (run("list", "--control", path), run("list", POSTCOPYD_CONTROL=path)):
        assert ran.status == 1
        assert ran.err.startswith(f"postcopyd: no daemon answers on {path} (No such file")
        assert "postcopyd serve" in ran.err
    ran = run("migrate", "web1", "--to", "h", "--json", "--control", path)
    assert (ran.status, ran.objects[-1]["event"]) == (1, "failed")
    ran = run("list")
    assert ran.status == 0 or config.DEFAULT_CONTROL in ran.err


# Addresses, sizes, the configuration.


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host2", ("host2", 16525)),
        ("10.0.0.1:7", ("10.0.0.1", 7)),
        ("[::1]", ("::1", 16525)),
        ("[fe80::1%eth0]:65535", ("fe80::1%eth0", 65535)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    """HOST[:PORT] is read, IPv6 in brackets, and what is written of it reads the same."""
    assert config.parse_address(text) == address
    assert config.parse_address(str(config.parse_address(text))) == address


@pytest.mark.parametrize(
    "text",
    ["", ":1", "h:", "h:0", "h:65536", "h:x", "h:+1", "::1", "[::1", "[h]:1", "[::1]x", " "],
)
def test_bad_addresses(text: str) -> None:
    """What is no address is refused."""
    with pytest.raises(PostcopydError):
        config.parse_address(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("4096", 4096), ("1K", 1024), ("1.5m", 1572864), ("500M", 524288000)],
)
def test_sizes(text: str, size: int) -> None:
    """A number with K, M or G, powers of 1024."""
    assert config.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "0", "-1", "1e3", "1_0", "1KB", "1T", ".", "²", "inf"])
def test_bad_sizes(text: str) -> None:
    """What is no size is refused, and nothing is no size."""
    with pytest.raises(PostcopydError):
        config.parse_size(text)


@pytest.mark.parametrize("wrapped", [False, True])
def test_serve_runs_the_daemon(monkeypatch: pytest.MonkeyPatch, capsys: Any, wrapped: bool) -> None:
    """`serve` hands its options to the daemon, and says in a sentence why that could not start."""
    given: list[config.ServeOptions] = []

    class Service:
        @staticmethod
        async def serve(options: config.ServeOptions) -> None:
            given.append(options)
            error = PostcopydError("cannot listen on port 7: it is taken")
            raise ExceptionGroup("", [ExceptionGroup("", [error])]) if wrapped else error

    monkeypatch.delenv("POSTCOPYD_CONTROL", raising=False)
    monkeypatch.setitem(sys.modules, "postcopyd.daemon.service", Service)
    monkeypatch.setattr(postcopyd.daemon, "service", Service, raising=False)
    args = [
        "--config",
        os.devnull,
        "--tls",
        "off",
        "--listen",
        "127.0.0.1:7",
        "--state-dir",
        "/s",
        "--bandwidth",
        "1M",
    ]
    assert main.main(["serve", *args]) == 1
    assert capsys.readouterr().err == "postcopyd: cannot listen on port 7: it is taken\n"
    listen = config.Address("127.0.0.1", 7)
    expected = config.ServeOptions(
        listen=listen, state_dir=Path("/s"), tls="off", bandwidth=1 << 20
    )
    assert given == [expected]


# Verbs against a daemon.


@pytest.mark.trio
async def test_the_short_verbs(tmp_path: Path) -> None:
    """Each verb asks the daemon for what was said, and says in a line what was done."""
    async with host(tmp_path) as h:
        ran = await h.run("list")
        assert (ran.status, ran.err) == (0, "")
        assert ran.out.split() == ["NAME", "ROLE", "PHASE", "PEER", "REMAINING"]
        assert await h.run("list", "--json") == Ran(0, "", "")
        ran = await h.run("attach", "web1", "--qemu", "qmp.sock")
        assert (ran.status, ran.out) == (0, "web1: idle, web1 runs here\n")
        ran = await h.run("attach", "db", "--process", "/s", "--json")
        assert (ran.objects[0]["vm"], ran.objects[0]["found"]) == ("db", FOUND_JSON)
        ran = await h.run("check", "web1", "--to", "host2")
        found = (
            "web1: guest RAM pc.ram, 1.0 GiB in pages of 4.0 KiB, private memory\n"
            "web1: guest RAM dimm, 4.0 MiB in pages of 2.0 MiB, /dev/huge/a\n"
            "web1: device state, by hand\n"
        )
        assert (ran.status, ran.out) == (
            0,
            f"{found}web1: nothing stands in the way of a migration to host2:16525\n",
        )
        h.daemon.problems = ["host2 has too little memory: free some"]
        ran = await h.run("check", "web1", "--to", "host2")
        assert (ran.status, ran.out) == (
            1,
            f"{found}web1: host2 has too little memory: free some\n",
        )
        ran = await h.run("check", "web1", "--to", "host2", "--json")
        assert (ran.status, ran.objects[-1]["problems"]) == (1, h.daemon.problems)
        assert ran.objects[-1]["found"] == FOUND_JSON
        h.daemon.problems, h.daemon.warnings = [], ["postcopy alone"]
        ran = await h.run("check", "web1", "--to", "host2")
        assert (ran.status, ran.out.splitlines()[-2]) == (0, "web1: postcopy alone")
        ran = await h.run("check", "web1", "--to", "host2", "--json")
        assert (ran.status, ran.objects[-1]["warnings"]) == (0, h.daemon.warnings)
        assert "NAME" not in (await h.run("status")).out
        assert len((await h.run("status", "--json")).objects) == 2
        ran = await h.run("status", "db", "--json")
        assert (ran.objects[0]["vm"], len(ran.objects)) == ("db", 1)
        assert "web1" in (await h.run("list")).out
        assert (await h.run("cancel", "web1")).status == 0
        assert (await h.run("recover", "web1", "--to", "host3")).status == 0
        assert (await h.run("resolve", "web1", "--kill")).status == 0
        ran = await h.run("detach", "web1", "--json")
        assert (ran.status, ran.objects) == (0, [{"event": "detached", "vm": "web1"}])
        ran = await h.run("attach", "web2", "--libvirt")
        assert (ran.status, ran.out) == (0, "web2: idle, web2 runs here\n")
        asked = [entry for entry in h.daemon.asked if entry[0] != "check"]
    assert asked == [
        ("attach", "web1", "qemu", f"{os.getcwd()}/qmp.sock"),
        ("attach", "db", "process", "/s"),
        ("cancel", "web1"),
        ("recover", "web1", "host3:16525"),
        ("resolve", "web1", "kill"),
        ("detach", "web1"),
        ("attach", "web2", "libvirt", ""),
    ]


@pytest.mark.trio
async def test_refusals(tmp_path: Path) -> None:
    """What the daemon refuses is said in its words; a request without sense is a usage error."""
    async with host(tmp_path, "web1") as h:
        ran = await h.run("status", "none")
        assert ran == Ran(1, "", "postcopyd: no VM none is attached here\n")
        ran = await h.run("attach", "a/b", "--qemu", "/s")
        assert ran.status == 2
        assert "'a/b'" in ran.err
        h.daemon.fail = PostcopydError("web1 may run at host2 already", "AfterGrant")
        ran = await h.run("cancel", "web1")
        assert ran == Ran(1, "", "postcopyd: web1 may run at host2 already\n")
        h.daemon.fail = None
        h.daemon.put("web1", phase="bug", remaining="x")
        h.daemon.list = None  # a bug in the daemon
        ran = await h.run("list")
        assert ran.status == 1
        assert "its log says where" in ran.err


@pytest.mark.trio
async def test_migrate_json(tmp_path: Path) -> None:
    """With --json every line is an object, progress events first, the result as it is last."""
    async with host(tmp_path, "web1") as h:
        old = {**RESULT, "migration": "m0"}
        h.daemon.put("web1", result=old)
        options = ["--json", "--bandwidth", "500M", "--max-downtime", "30", "--keep-source"]
        ran = await h.migrate(
            lambda: h.daemon.put("web1", phase="drained", result=RESULT),
            *options,
            phase="postcopy",
        )
        assert (ran.status, ran.err) == (0, "")
        assert [event["event"] for event in ran.objects] == ["progress", "progress", "completed"]
        assert [event.get("phase") for event in ran.objects] == ["precopy", "postcopy", None]
        assert ran.objects[-1] == RESULT
        request = MigrateRequest(
            "host2:16525", bandwidth=500 << 20, max_downtime_ms=30.0, keep_source=True
        )
        assert h.daemon.asked == [("migrate", "web1", request)]


@pytest.mark.trio
async def test_migrate_for_people(tmp_path: Path) -> None:
    """Elsewhere than on a terminal come plain lines, then a summary with the figures."""
    async with host(tmp_path, "web1") as h:
        h.daemon.put("web1", totalBytes=1 << 30, remaining=1 << 29, faults=FAULTS)
        ran = await h.migrate(
            lambda: h.daemon.put("web1", phase="drained", result=RESULT), phase="postcopy"
        )
        assert (ran.status, ran.err) == (0, "")
        lines = ran.out.splitlines()
        figures = "512.0 MiB of 1.0 GiB remaining, 10 faults (p50 90 us, p99 800 us, max 2.1 ms)"
        assert lines[:2] == [f"web1: precopy, {figures}", f"web1: postcopy, {figures}"]
        for part in ("host2:16525", "downtime     7.9 ms", "total        912.0 ms", "830.0 ms"):
            assert part in ran.out
        assert "202134 pushed, 10 urgent, 60000 zero, 3 duplicate" in ran.out
        assert lines[-4:] == [
            "    from    64 us         1  #####",
            "    from   128 us         8  " + "#" * 40,
            "    from   256 us         0",
            "    from   512 us         1  #####",
        ]


@pytest.mark.trio
@pytest.mark.parametrize(
    ("event", "phase", "status"),
    [
        ("failed", "precopy", 1),
        ("failed", "handover", 1),
        ("failed", "postcopy", 1),  # declined, or taken back by a person
        ("failed", "paused", 1),
        ("cancelled", "precopy", 1),
        ("paused", "postcopy", 3),
    ],
)
async def test_migrations_that_do_not_complete(
    tmp_path: Path, event: str, phase: str, status: int
) -> None:
    """1 when it ended with the guest at the source, wherever that was seen; 3 when it waits."""
    async with host(tmp_path, "web1") as h:
        result = {**FAILED, "event": event}
        ran = await h.migrate(
            lambda: h.daemon.put("web1", phase="failed", result=result), "--json", phase=phase
        )
        assert ran.status == status
        assert ran.err.startswith("postcopyd: host2 said no: mend it")
        assert ran.objects[-1] == result
        assert ("postcopyd recover web1" in ran.err) == (event == "paused")


@pytest.mark.trio
@pytest.mark.parametrize(
    ("phase", "status"), [("precopy", 1), ("handover", 3), ("postcopy", 3), ("paused", 3)]
)
async def test_the_daemon_dies_meanwhile(tmp_path: Path, phase: str, status: int) -> None:
    """When the daemon goes, what was seen last decides whether the guest may be elsewhere."""
    async with host(tmp_path, "web1") as h:
        ran = await h.migrate(h.kill, "--json", phase=phase)
        assert ran.status == status
        assert f"the daemon on {h.path} went away" in ran.err
        assert "postcopyd status web1" in ran.err
        assert ("do not start it here" in ran.err) == (status == 3)
        assert ran.objects[-1]["event"] == "failed"


@pytest.mark.trio
async def test_another_migration_takes_its_place(tmp_path: Path) -> None:
    """A migration that was lost sight of is not taken for the one that follows it."""
    async with host(tmp_path, "web1") as h:
        result = {**RESULT, "migration": "m2"}
        ran = await h.migrate(lambda: h.daemon.put("web1", migration="m2", result=result))
        assert ran.status == 1
        assert "lost sight of migration m1" in ran.err


@pytest.mark.trio
async def test_ctrl_c_leaves_the_migration_alone(tmp_path: Path) -> None:
    """An interrupted migrate says that the migration goes on, and how to follow or cancel it."""
    async with host(tmp_path, "web1") as h:
        command = [sys.executable, "-m", "postcopyd", "migrate", "web1", "--to", "host2"]
        with trio.fail_after(30):
            process = await trio.lowlevel.open_process(
                [*command, "--control", h.path],
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # Who runs the tests in the background has it ignored, and so would the client.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            async with process.stdout, process.stderr:
                await process.stdout.receive_some()
                process.send_signal(signal.SIGINT)
                err = b"".join([part async for part in process.stderr])
                assert await process.wait() == 130
        cancel = f"`postcopyd cancel web1 --control {h.path}`".encode()
        assert b"goes on in the daemon" in err
        assert cancel in err
        assert h.daemon.asked == [("migrate", "web1", MigrateRequest("host2:16525"))]


@pytest.mark.trio
async def test_migrate_on_a_terminal(tmp_path: Path) -> None:
    """On a terminal there is a live line with phase and figures, and then the summary."""
    async with host(tmp_path, "web1") as h:
        h.daemon.put("web1", totalBytes=1 << 30, remaining=1 << 29)
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "postcopyd", "migrate", "web1", "--to", "host2"]
        env = environment(POSTCOPYD_CONTROL=h.path, TERM="xterm", COLUMNS="120")
        process = await trio.lowlevel.open_process(command, env=env, stdout=theirs, stderr=theirs)
        os.close(theirs)
        seen = b""

        def read() -> bytes:
            try:
                return os.read(ours, 65536)
            except OSError:  # the terminal's other side was closed
                return b""

        with trio.fail_after(30):
            while b"512.0 MiB of 1.0 GiB" not in seen:
                seen += await trio.to_thread.run_sync(read)
            h.daemon.put("web1", phase="drained", remaining=0, result=RESULT)
            while data := await trio.to_thread.run_sync(read):
                seen += data
            assert await process.wait() == 0
        os.close(ours)
        assert b"web1 precopy" in seen
        assert b"\x1b[" in seen
        assert b"downtime     7.9 ms" in seen


@pytest.mark.trio
async def test_watch_follows(tmp_path: Path) -> None:
    """Watch prints every state as JSON until the daemon goes, which it says."""
    async with host(tmp_path, "web1") as h:
        ran: list[Ran] = []

        async def go() -> None:
            ran.append(await h.run("watch", "web1", "--json"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(go)
            with trio.fail_after(30):
                await h.daemon.watched.wait()
                await trio.testing.wait_all_tasks_blocked()
                h.daemon.put("web1", phase="precopy")
                await trio.testing.wait_all_tasks_blocked()
            h.kill()
        assert [status["phase"] for status in ran[0].objects] == ["idle", "precopy"]
        assert ran[0].status == 1
        assert "went away" in ran[0].err


@pytest.mark.trio
async def test_a_reader_that_stops_is_no_error(tmp_path: Path) -> None:
    """Output that nobody reads any more ends the command without a traceback."""
    async with host(tmp_path, *(f"vm{n}" for n in range(2000))) as h:
        program = f"{sys.executable} -m postcopyd list --json | head -1"
        env = environment(POSTCOPYD_CONTROL=h.path)
        with trio.fail_after(30):
            done = await trio.run_process(
                ["sh", "-c", program], env=env, capture_stdout=True, capture_stderr=True
            )
        assert json.loads(done.stdout)["vm"] == "vm0"
        assert done.stderr == b""


# What people read.


def test_status_block() -> None:
    """A status is one fact a line, without those that are unknown."""
    status = {"vm": "web1", "role": "source", "phase": "drained", "peer": "host2:16525"}
    status |= {"migration": "m1", "remaining": 0, "message": "drained.", "result": RESULT}
    assert progress.block(status).splitlines() == [
        "web1",
        "  role         source",
        "  phase        drained",
        "  peer         host2:16525",
        "  migration    m1",
        "  last result  completed, downtime 7.9 ms, total 912.0 ms",
        "  message      drained.",
    ]


def test_views_are_indulgent() -> None:
    """A status or result with next to nothing in it is shown, not choked on."""
    assert progress.line({"vm": "a"}) == "a: "
    assert progress.block({"vm": "a"}) == "a"
    assert progress.table([{"vm": "a"}]).splitlines()[1].split()[0] == "a"
    assert "a runs at b" in progress.summary({"vm": "a", "event": "completed"}, "b")


def test_plain_lines_are_few(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Between changes of phase there is a line a second at most."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    view = progress.PlainView()
    for tick in range(100):
        now[0] = tick / 10
        view.show({"vm": "a", "phase": "precopy" if tick < 55 else "postcopy", "remaining": 1})
    assert len(capsys.readouterr().out.splitlines()) == 11


@pytest.mark.parametrize(
    ("us", "text"), [(0, "0 us"), (999, "999 us"), (1000, "1.0 ms"), (2_500_000, "2.5 s")]
)
def test_durations(us: float, text: str) -> None:
    """Durations have the unit that suits them."""
    assert units.duration(us) == text


# May a guest be started here?

GONE = {"migration": "m7", "peer": "host2:16525", "epoch": 3, "driver": "qemu", "socket": "/q"}


def intent(folder: Path, name: str = "web1") -> Path:
    """What a source leaves on disk before it stops a guest; the folder of it."""
    made = Store(folder / "state")
    made.save_intent(name, GONE)
    return made.durable


def test_may_run_without_a_daemon(tmp_path: Path) -> None:
    """Without a daemon the disk decides: yes where no guest has left, no with whom to ask."""
    none = {"POSTCOPYD_CONTROL": str(tmp_path / "none")}
    durable = intent(tmp_path, "web2")
    where = ("--durable-dir", str(durable))
    assert run("may-run", "web1", *where, **none) == Ran(
        0, "web1: nothing here forbids starting it\n", ""
    )
    ran = run("may-run", "web2", *where, **none)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("postcopyd: do not start web2 here: it was to be handed to host2:")
    assert ran.err.count("\n") == 1
    assert "(migration m7)" in ran.err
    assert "restarted" not in ran.err
    (answer,) = run("may-run", "web2", "--json", *where, **none).objects
    assert (answer["event"], answer["vm"], answer["mayRun"]) == ("may-run", "web2", False)
    assert "host2" in answer["message"]
    (answer,) = run("may-run", "web1", "--json", *where, **none).objects
    assert (answer["mayRun"], answer["message"]) == (True, "")


def test_may_run_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A host that has restarted since the guest was to leave says so."""
    durable = intent(tmp_path)
    monkeypatch.setattr(procfs, "boot_id", lambda: "another")
    args = ["--durable-dir", str(durable), "--control", str(tmp_path / "none")]
    assert main.main(["may-run", "web1", *args]) == 1
    assert "this host, which has restarted since, has not recorded" in capsys.readouterr().err


def test_may_run_when_nobody_can_say(tmp_path: Path) -> None:
    """A torn intent, and a folder or a socket that cannot be asked, say no; a dead socket does
    not: its daemon has ended."""
    durable = intent(tmp_path)
    where = ("--durable-dir", str(durable), "--control", str(tmp_path / "none"))
    torn = durable / "web1.intent"
    torn.write_bytes(torn.read_bytes()[:-9])
    ran = run("may-run", "web1", *where)
    assert ran.status == 1
    assert str(torn) in ran.err
    assert run("may-run", "web2", *where).status == 0
    ran = run("may-run", "web2", "--durable-dir", str(tmp_path / "typo"), *where[2:])
    assert ran.status == 1
    assert "there is no folder" in ran.err
    ran = run("may-run", "web2", *where[:2], "--control", str(torn / "no"))
    assert ran.status == 1  # neither there nor absent: it cannot be asked
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    assert run("may-run", "web2", *where[:2], "--control", str(tmp_path / "dead")).status == 0


@pytest.fixture
def held(tmp_path: Path) -> Iterator[str]:
    """A control socket that somebody holds, as systemd does, and where nobody answers."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "held"))
        listener.listen(64)
        yield str(tmp_path / "held")


VERBS = (["list"], ["status", "web1"], ["watch", "web1"], ["migrate", "web1", "--to", "host2"],
         ["attach", "web1", "--qemu", "/q"], ["detach", "web1"], ["check", "web1", "--to", "host2"],
         ["cancel", "web1"], ["recover", "web1"], ["resolve", "web1", "--wait"])  # fmt: skip


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_nobody_answers(
    held: str, verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """No verb waits for ever for a service that does not start: it says so, and has asked
    nothing."""
    monkeypatch.setattr(verbs, "GREETING_SECONDS", 0.1)
    assert main.main([*verb, "--control", held]) == 1
    said = capsys.readouterr().err
    assert f"the daemon on {held} does not answer (nobody answered within 0 s)" in said
    assert "systemctl status postcopyd.service" in said


def test_every_verb_that_asks_is_tried() -> None:
    """A new one is not forgotten: all have --control, and may-run has tests of its own."""
    subparsers = main.parser()._subparsers
    assert subparsers is not None
    (action,) = subparsers._group_actions
    choices: Any = action.choices
    asking = {n for n, made in choices.items() if "--control" in made._option_string_actions}
    assert asking - {"may-run", "serve"} == {verb[0] for verb in VERBS}


def test_may_run_when_nobody_answers(
    held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Where a service that cannot start has its socket held, the disk answers: what was to leave,
    and what the daemon has recorded of a guest that is on its way here."""
    monkeypatch.setattr(verbs, "MAY_RUN_SECONDS", 0.1)
    durable = intent(tmp_path)
    state = Store(tmp_path / "state")
    status = {"role": "destination", "phase": "paused", "message": "web2 waits for pages"}
    record = {"ownership": "held", "epoch": 1, "driver": "qemu", "socket": "/run/web.qmp", "pid": 9,
              "started": 7, "about": {}}  # fmt: skip
    state.save("web2", {**record, "status": status})
    state.save("web3", {**record, "status": {**status, "phase": "drained"}})
    state.save("web4", {**record, "status": "what?"})

    def asked(name: str, *where: str) -> tuple[int, str]:
        status = main.main(["may-run", name, "--control", held, *where])
        return status, capsys.readouterr().err

    for where in (
        ("--durable-dir", str(durable)),
        ("--durable-dir", str(durable), "--state-dir", str(tmp_path / "state")),
    ):
        assert asked("web1", *where)[0] == 1
        assert asked("web2", *where) == (
            1,
            "postcopyd: do not start web2 here: web2 waits for pages; no daemon answers here: "
            "start it, and it goes on\n",
        )
        assert asked("web3", *where) == (0, "")
        assert "web4.json: it does not make sense" in asked("web4", *where)[1]
        assert asked("web5", *where) == (0, "")
    elsewhere = ("--durable-dir", str(durable), "--state-dir", str(tmp_path / "none"))
    assert asked("web2", *elsewhere)[0] == 0


def test_may_run_makes_nothing(tmp_path: Path) -> None:
    """The question leaves no file, and needs the default folder as little as a daemon."""
    run("may-run", "web1", POSTCOPYD_CONTROL=str(tmp_path / "none"))
    assert [*tmp_path.iterdir()] == []
    assert not (tmp_path / "none").exists()


FAILED_HERE = {"event": "failed", "migration": "m1", "vm": "web1"}


@pytest.mark.trio
@pytest.mark.parametrize(
    ("status", "may"),
    [
        ({}, True),
        ({"role": "source", "phase": "idle", "migration": "m1"}, False),
        ({"role": "source", "phase": "precopy"}, False),
        ({"role": "source", "phase": "handover"}, False),
        ({"role": "source", "phase": "postcopy"}, False),
        ({"role": "source", "phase": "paused"}, False),
        ({"role": "source", "phase": "drained"}, False),
        ({"role": "source", "phase": "failed", "result": FAILED_HERE}, True),
        ({"role": "source", "phase": "failed"}, False),
        (
            {"role": "source", "phase": "failed", "result": {**FAILED_HERE, "event": "paused"}},
            False,
        ),
        ({"role": "", "phase": "paused"}, False),
        ({"role": "destination", "phase": "idle", "migration": "m1"}, False),
        ({"role": "destination", "phase": "handover"}, False),
        ({"role": "destination", "phase": "postcopy"}, False),
        ({"role": "destination", "phase": "paused"}, False),
        ({"role": "destination", "phase": "drained"}, True),
        ({"role": "destination", "phase": "failed"}, True),
    ],
)
async def test_may_run_by_the_daemon(
    tmp_path: Path, status: dict[str, Any], may: bool, capsys: Any
) -> None:
    """A daemon that runs says no to a guest that is on its way or has left, in its own words."""
    intent(tmp_path, "web2")
    args = ["--durable-dir", str(tmp_path / "state" / "durable")]
    async with host(tmp_path, "web1", "db") as h:
        h.daemon.put("web1", message="see host2", **status)
        args += ["--control", h.path]
        asked = await trio.to_thread.run_sync(main.main, ["may-run", "web1", *args])
    said = capsys.readouterr()
    assert asked == (0 if may else 1)
    assert said.err == ("" if may else "postcopyd: do not start web1 here: see host2\n")


@pytest.mark.trio
async def test_may_run_asks_both(tmp_path: Path) -> None:
    """An intent says no whatever the daemon knows; a daemon that cannot answer says no as well."""
    args = ("--durable-dir", str(intent(tmp_path)))
    async with host(tmp_path, "web1") as h:
        for name in ("web1", "web2"):
            ran = await h.run("may-run", name, *args)
            assert ran.status == (1 if name == "web1" else 0)
        ran = await h.run("may-run", "../durable/web1", *args)
        assert ran.status == 0
        h.daemon.list = None  # a bug in the daemon
        ran = await h.run("may-run", "web2", *args)
        assert ran.status == 1
        assert "its log says where" in ran.err


def test_a_domain_that_is_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restoring: dict[str, Any]
) -> None:
    """Its XML names a folder that is locked: of a domain that was made once, it is not any more."""
    monkeypatch.setattr(verbs, "MAKING", str(tmp_path))
    folder = tmp_path / "0a-_x1"
    folder.mkdir()
    plain = b"<domain>\n  <name>web1</name>\n</domain>"
    other = plain.replace(b"</name>", b"</name><metadata><a:b xmlns:a='urn:a'/></metadata>")
    empty = plain.replace(b"</name>", b"</name><metadata/>")
    for xml in (plain, other, empty):
        marked = restoring["marked"](xml, folder.name)
        (mark,) = ElementTree.fromstring(marked).findall(f"metadata/{{{restoring['MARK']}}}making")
        assert mark.get("in") == folder.name
        assert not verbs._is_made_here(marked)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert verbs._is_made_here(marked)
            assert not verbs._is_made_here(xml)
            assert not verbs._is_made_here(restoring["marked"](xml, "other"))
        finally:
            os.close(lock)
        assert not verbs._is_made_here(marked)


def test_libvirt_hook(tmp_path: Path) -> None:
    """The hook keeps a domain from starting that may be elsewhere, and stops nothing else."""
    durable = intent(tmp_path)
    program = tmp_path / "postcopyd"
    options = f"--durable-dir {durable} --control {tmp_path}/none"
    program.write_text(
        f'#!/bin/sh\nverb=$1; shift\nexec {sys.executable} -m postcopyd $verb {options} "$@"\n'
    )
    program.chmod(0o755)

    def hook(*args: str, path: str = f"{tmp_path}:{os.environ['PATH']}") -> Ran:
        command = [ROOT / "examples" / "libvirt-hook", *args, "begin", "-"]
        done = subprocess.run(
            command, input="<domain/>", env=environment(PATH=path), capture_output=True, text=True
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    for operation in ("prepare", "start"):
        ran = hook("web1", operation)
        assert (ran.status, ran.out) == (1, "")
        assert "do not start web1 here" in ran.err
        assert hook("web2", operation) == Ran(0, "", "")
        assert hook("-web 2", operation) == Ran(0, "", "")
    for operation in ("started", "stopped", "release", "migrate", "restore", "reconnect", "attach"):
        assert hook("web1", operation) == Ran(0, "", "")
    program.unlink()
    assert hook("web2", "start", path="/usr/bin:/bin").status != 0
