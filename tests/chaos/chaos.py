# SPDX-License-Identifier: Apache-2.0
"""Whatever breaks, no guest is lost, run twice or corrupted.

Two daemons, and a QEMU guest that verifies its memory and is moved between them again and again,
by the command line, while everything around it breaks on a schedule (schedule.py): the daemons'
processes and folders, the QEMUs, the network, which is a proxy (proxy.py) in front of each daemon;
and while others do as they like with the same guest (meddling.py). What is seen from outside judges
(evidence.py): the guest's own reports, both QEMUs' own monitors, the exit statuses, the control
sockets.

    python tests/chaos/chaos.py --seed 1 --seconds 600
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import evidence as e
import schedule as s
import trio
from guests import qemu as q
from lab import ANSWER_S, VM, Lost, Node, Vmm, boot, can_destroy, own_mounts
from meddling import Others, peripherals, with_device
from monitor import Monitor

from postcopyd.config import options as config
from postcopyd.demo.hosts import PACKAGE
from postcopyd.errors import PostcopydError
from postcopyd.varlink.client import ConnectionLost

MIB = 1 << 20

END_S = 60.0
"""How long a migration may take to its end when nothing breaks any more."""
HOLD_S = 5.0
"""How long a message waits for the fault that was to meet it."""
QUIT_S = 10.0
"""How long the source's QEMU may take to end by itself after drained."""

LONG_S = 300.0
"""A run of so many seconds shall have met each phase, and a fault every 8 s: a guest that was
switched off takes as long to boot."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    seed: int = 1
    seconds: float = 600.0
    """How long faults are injected; what is under way then comes to its end."""
    memory: int = 256 * MIB
    """Bytes of guest RAM."""
    bandwidth: int = 96 * MIB
    """Bytes per second copied and pushed, so that both last long enough to be met by faults."""
    rate: int = 4000
    """Pages that the guest checks and writes in a second: some are asked for, others pushed."""
    phases: tuple[str, ...] = s.PHASES
    kinds: tuple[str, ...] = tuple(s.KINDS)


class Chaos:
    """One run. `run` returns what is to be printed, or raises Lost."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.nodes = [Node(folder, name, self._passing) for name in ("host1", "host2")]
        self.runs = e.Runs()
        self.faults: Counter[tuple[str, str]] = Counter()
        """By kind, and by the phase in which it really was."""
        self.moves: Counter[tuple[str, str]] = Counter()
        """Attempts by mode, and by where the guest was after them."""
        self._moves = s.moves(options.seed)
        self.migrations = self.attempts = self.recoveries = self.left_behind = 0
        self.durations: list[float] = []
        self.migrating = False
        self._move_now = next(self._moves)
        self._began = trio.current_time()
        self._at = 0  # the host that has the guest
        self._launched = 0
        self._whole = True  # nothing was taken from the guest
        self._quiet = 0.0  # when the last fault is over
        self._granted = self._copying = False
        self._news = trio.Event()
        self._awaited = ""
        self._reached = self._injected = trio.Event()
        self._here: Vmm | None = None
        self._arriving: Vmm | None = None
        self._destroys = True

    async def run(self) -> str:
        self._config = boot(self.folder, self.options.memory, self.options.rate)
        if self._config.qemu.version < (10, 0) and "leave" in self.options.kinds:
            self.say("no guest leaves: this QEMU's own migration loses pages of emulated guests")
            kinds = tuple(kind for kind in self.options.kinds if kind != "leave")
            self.options = dataclasses.replace(self.options, kinds=kinds)
        self._destroys = await can_destroy()
        try:
            async with q.Guest.open(self.folder) as self.guest:
                try:
                    async with trio.open_nursery() as self._nursery:
                        await self._run()
                        self._nursery.cancel_scope.cancel()
                except (Exception, BaseExceptionGroup) as error:
                    with trio.CancelScope(shield=True):
                        why = await self._why(first(error))
                    raise Lost(why) from error
        except (Exception, BaseExceptionGroup) as error:
            raise first(error) from None
        finally:
            for node in self.nodes:
                if node.host.process is not None:
                    node.host.process.kill()
                    node.host.end()
        return self.summary()

    @property
    def lacking(self) -> str:
        """What a run of this length should have met and has not, or ""."""
        count, met = sum(self.faults.values()), {phase for _, phase in +self.faults}
        missed = [phase for phase in self.options.phases if phase not in met]
        if missed:
            return f"no fault came while the migration was in {', '.join(missed)}"
        wanted = self.options.seconds // 8
        return f"{count} faults are fewer than {wanted:.0f}" if count < wanted else ""

    async def _run(self) -> None:
        """Everything, in order; Lost is raised here or in one of the tasks."""
        self.others = Others(self.folder, self.runs, self._nursery)
        for node in self.nodes:
            await node.host.start()
            await self._nursery.start(node.proxy.run)
        self._here = await self._launch()
        self.runs.resumed(self._here.name, time.time())
        await self._attach(self.nodes[0], self._here)
        self._size = await self.guest.ready() * 4096
        self._nursery.start_soon(self._look)
        self.say(f"guest of {self.options.memory >> 20} MiB runs, seed {self.options.seed}")
        self._began = trio.current_time()
        end = self._began + self.options.seconds
        self._nursery.start_soon(self._break, end)
        while trio.current_time() < end:
            await self._move()
        # Nothing breaks any more: two more, so that both hosts are seen to be in order.
        for node in self.nodes:
            await node.whole.wait()
        await trio.sleep(max(0, self._quiet - trio.current_time()))
        before, attempts = self.migrations, self.attempts
        while self.migrations < before + 2:
            if self.attempts >= attempts + 10:
                raise Lost("nothing breaks any more, and the guest cannot be moved")
            await self._move()
        await self._verify()
        for node in self.nodes:
            node.broken("down")
            await node.restart(signal.SIGTERM, 0)
            for line in node.host.log.read_text().splitlines():
                if "Traceback" in line:
                    raise Lost(f"{node.host.name} has met a bug of its own: {line}")
        if self.options.seconds >= LONG_S and (lacking := self.lacking):
            raise Lost(f"nothing was lost, but {lacking}: this run shows too little")

    # --- moving ----------------------------------------------------------------------------------

    @property
    def source(self) -> Node:
        return self.nodes[self._at]

    @property
    def destination(self) -> Node:
        return self.nodes[1 - self._at]

    async def _move(self) -> None:
        """One migration, tried once: it ends with the guest at either host, verified there."""
        await self._patient(self._wait_at_destination, "a QEMU could not be attached")
        self._granted = self._copying = False
        self._move_now = next(self._moves)
        self.migrating = True
        self._tell()
        self.attempts += 1
        began = trio.current_time()
        status, result = await self._patient(self._command, "`postcopyd migrate` did not end")
        where = await self._patient(self._settled, "the migration did not come to its end")
        self.migrating = False
        self._tell()
        said = str(result.get("error") or result.get("event"))
        mode = " ".join((self._move_now.mode, *self._move_now.words))
        self.moves[self._move_now.mode, where] += 1
        self.say(f"{mode} ended with {status}, guest at the {where}: {said}")
        await self._patient(self.others.done.wait, "what another does to the guest did not end")
        if self.others.off:
            await self._patient(self._begin_anew, "a new guest could not be started")
            return
        if self.others.third_has_it:
            await self._patient(self._follow_it, "the third QEMU could not be attached")
            return
        # Without a migration's id it is the command that has lost its daemon.
        if status == 0 and where != "destination":
            raise Lost("exit status 0, and the guest is at the source")
        if status == 1 and "migration" in result and where != "source":
            raise Lost("exit status 1, and the guest is at the destination")
        if status not in (0, 1, 3):
            raise Lost(f"exit status {status}: {said}")
        if where == "destination":
            await self._moved(trio.current_time() - began)
        else:
            await self._patient(self._runs_here, "the guest did not run at the source")
        await self._patient(self._untracked, "something of tracking was left in a QEMU")
        if self.others.unplugged:
            await self._stays_away()
        self._in_one_place()

    async def _begin_anew(self) -> None:
        """The guest was switched off, wherever it was: it runs nowhere, and both hosts know it."""
        for vmm in filter(None, (self._here, self._arriving)):
            if (state := await vmm.state()) == "running":
                raise Lost(f"{vmm.name} is {state}, and its guest was switched off")
        if twice := self.runs.twice():
            raise Lost(f"the guest ran twice: {twice}")
        await self._let_go()
        self.others.off = ""
        self.runs.orderly.clear()
        self.others.unplugged = ""
        self._whole = True
        if self.others.third is not None:
            self.others.third.process.kill()
            self.others.third = None
        self._here = await self._launch()
        self.runs.resumed(self._here.name, time.time())
        await self._attach(self.source, self._here)
        await self.guest.ready()
        await self._verify()

    async def _follow_it(self) -> None:
        """Another has moved the guest to a third QEMU, which is at this host too; the one that it
        has left is ended by whoever did that."""
        assert self._here is not None and self.others.third is not None
        if (state := await self._here.state()) == "running":
            raise Lost(f"{self._here.name} is {state}, and another has moved its guest away")
        await self._let_go()
        self._here, self.others.third, self.others.third_has_it = self.others.third, None, False
        await self._attach(self.source, self._here)
        await self._verify()
        await self._untracked()
        self._in_one_place()

    async def _let_go(self) -> None:
        """All QEMUs of this guest end, and no host knows it any more."""
        for vmm in filter(None, (self._here, self._arriving)):
            vmm.process.kill()
            await vmm.process.wait()
        self._arriving = None
        for node in self.nodes:
            while True:
                with suppress(ConnectionLost):
                    try:
                        await node.host.call("Detach", name=VM)
                    except PostcopydError as error:
                        if error.name == "NoSuchVm":
                            break
                await trio.sleep(0.1)

    async def _stays_away(self) -> None:
        """What was taken from the guest is not in it where it is now; nor has its next QEMU it."""
        here = self._here
        assert here is not None
        unplugged, self.others.unplugged = self.others.unplugged, ""
        if "tablet" in await peripherals(here):
            raise Lost(f"what was unplugged in {unplugged} is in {here.name} again")
        self._whole = False
        for vmm in filter(None, (self._arriving, self.others.third)):
            vmm.process.kill()
        self.others.third = None

    async def _command(self) -> tuple[int, dict[str, Any]]:
        """The command line's exit status, and the last object that it printed."""
        move = self._move_now
        done = await trio.run_process(
            [
                *(sys.executable, "-m", "postcopyd", "migrate", VM, "--json"),
                *("--control", self.source.host.control, "--to", self.destination.proxy.address),
                *("--bandwidth", str(round(self.options.bandwidth * move.share))),
                *("--mode", move.mode, *move.words),
            ],
            cwd=PACKAGE.parent,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        lines = done.stdout.decode().splitlines()
        last = json.loads(lines[-1]) if lines else {"error": done.stderr.decode().strip()}
        return done.returncode, last

    async def _settled(self) -> str:
        """Where the guest is, once both sides say the same at two looks."""
        before = ""
        while True:
            here, there = await self.source.status(), await self.destination.status()
            where = e.where(here, there)
            if self.others.off and e.over(here, there):
                where = where or "source"  # for all that it still counts
            if where and where == before:
                if where == "destination":
                    self.recoveries += (here.get("result") or {}).get("recoveries", 0)
                return where
            before = where
            await trio.sleep(0.1)

    async def _moved(self, seconds: float) -> None:
        left, self._here, self._arriving = self._here, self._arriving, None
        assert left is not None and self._here is not None
        self._at = 1 - self._at
        self.migrations += 1
        self.durations.append(seconds)
        await left.whole.wait()
        with trio.move_on_after(QUIT_S):
            await left.process.wait()
        if not left.ended:
            # Its daemon was killed between drained and telling it to quit, and must not guess.
            if (state := await left.state()) == "running":
                raise Lost(f"{left.name} runs, and its guest was moved to {self._here.name}")
            self.say(f"{left.name} was left behind, {state}")
            self.left_behind += 1
            left.process.kill()
            await left.process.wait()
        if (state := await self._here.state()) != "running":
            raise Lost(f"{self._here.name} is {state} and not running after drained")
        await self._verify()

    async def _runs_here(self) -> None:
        """After a failure: here as before, and not there."""
        assert self._here is not None
        while (state := await self._here.state()) != "running":
            if state == "ended":
                raise Lost(f"{self._here.name} has ended, and its guest was not moved")
            await trio.sleep(0.1)
        arriving = self._arriving
        if arriving is not None and not arriving.ended and await arriving.state() == "running":
            raise Lost(f"{arriving.name} runs, and the migration to it has failed")
        await self._works()

    async def _untracked(self) -> None:
        """Neither QEMU has a userfaultfd, nor are its mappings tracked."""
        while any(e.tracked(vmm.process.pid) for vmm in (self._here, self._arriving) if vmm):
            await trio.sleep(0.1)

    async def _works(self) -> None:
        """The guest does something, and it is this QEMU's guest that does it."""
        assert self._here is not None
        before = await self.guest.report()
        while True:
            after = await self.guest.report(before)
            if after.qemu != self._here.name:
                raise Lost(f"the guest is heard from {after.qemu}; it is in {self._here.name}")
            if after.operations > before.operations:
                return

    async def _verify(self) -> None:
        """The guest checks each of its pages."""
        await self._works()
        sweep = await self.guest.sweep(END_S)
        if sweep.bad:
            raise Lost(f"{sweep.bad} of {sweep.pages} pages are wrong: {self.guest.bad}")

    def _in_one_place(self) -> None:
        if twice := self.runs.twice():
            raise Lost(f"the guest ran twice: {twice}")
        if self._here is None or set(self.runs.since) != {self._here.name}:
            raise Lost(f"the guest runs in {[*self.runs.since] or 'no QEMU'}")
        if qemu := e.returned(report.qemu for report in self.guest.reports):
            raise Lost(f"the guest of {qemu} was heard again after it had moved")

    # --- QEMUs -----------------------------------------------------------------------------------

    async def _launch(self, *, incoming: bool = False) -> Vmm:
        name = f"qemu{self._launched}"
        self._launched += 1
        own = self.folder / f"{name}.own"
        process = await self.guest.launch(
            with_device(
                dataclasses.replace(self._config, name=name, second_qmp=own, incoming=incoming),
                self._whole,
            )
        )
        monitor = Monitor(own)
        with trio.fail_after(ANSWER_S):
            await self._nursery.start(monitor.run)
        self._nursery.start_soon(e.follow, monitor, name, self.runs)
        return Vmm(process, monitor)

    async def _wait_at_destination(self) -> None:
        """A QEMU that waits for the guest, attached: that of the last attempt if it still can."""
        while True:
            if self._arriving is not None and await self._arriving.state() != "inmigrate":
                self._arriving.process.kill()
                await self._arriving.process.wait()
                self._arriving = None
            if self._arriving is None:
                self._arriving = await self._launch(incoming=True)
            with trio.move_on_after(2.0):
                await self._attach(self.destination, self._arriving)
                return

    async def _attach(self, node: Node, vmm: Vmm) -> None:
        """Until the daemon has it; the one before may still be on its way out."""
        path = vmm.process.qmp_path
        while True:
            try:
                await node.host.attach(VM, "qemu", path)
            except PostcopydError as error:
                if error.name == "AlreadyAttached" and str(path) in str(error):
                    return
            except ConnectionLost:
                pass
            else:
                return
            await trio.sleep(0.1)

    # --- breaking --------------------------------------------------------------------------------

    async def _break(self, end: float) -> None:
        with trio.move_on_at(end):
            for fault in s.schedule(self.options.seed, self.options.phases, self.options.kinds):
                if fault.kind == "leave" and self.others.third is None:
                    await self.others.expect(await self._launch(incoming=True))
                await self._come(fault)
                await trio.sleep(fault.delay)
                with trio.CancelScope(shield=True):
                    await self._inject(fault)
                self._injected.set()
        self._awaited = ""
        self._injected.set()

    async def _come(self, fault: s.Fault) -> None:
        """Until the fault's moment has come."""
        self._injected = trio.Event()
        with trio.move_on_after(s.PATIENCE.get(fault.phase, float("inf"))):
            match fault.moment:
                case s.NOW:
                    pass
                case "idle":
                    while self.migrating:
                        await self._news.wait()
                case "postcopy":
                    while not (self.migrating and self._granted):
                        await self._news.wait()
                case message:
                    self._reached = trio.Event()
                    self._awaited = message
                    await self._reached.wait()
            if fault.delay:
                self._injected.set()  # nothing waits for it
        self._awaited = ""

    async def _passing(self, message: str) -> None:
        """A message is about to pass the proxy: it waits for a fault that shall meet it."""
        if message == "grant":
            self._granted = True
            self._tell()
        elif message in ("serving", "handover"):
            self._copying = message == "serving" and self._move_now.mode != "postcopy"
        if message == self._awaited:
            self._awaited = ""
            self._reached.set()
            with trio.move_on_after(HOLD_S):
                await self._injected.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def _inject(self, fault: s.Fault) -> None:
        roles = {s.SOURCE: [self.source], s.DESTINATION: [self.destination], s.BOTH: self.nodes}
        hit = roles.get(fault.victim, [])
        daemons = fault.kind in ("kill", "terminate", "stop")
        if daemons:
            for node in hit:
                await node.whole.wait()
        proxy = self.destination.proxy
        disturbed = any(node.proxy.disturbed for node in self.nodes)
        source, destination = self.source.side, self.destination.side
        phase = e.phase(source, destination, self.migrating, disturbed, self._copying)
        did = True
        match fault.kind:
            case "kill" | "terminate":
                number = signal.SIGKILL if fault.kind == "kill" else signal.SIGTERM
                for node in hit:
                    node.broken("down")
                    self._nursery.start_soon(node.restart, number, fault.seconds)
            case "stop":
                for node in hit:
                    node.broken("stopped")
                    self._nursery.start_soon(node.pause, fault.seconds)
            case "cut":
                did = bool(proxy.cut(fault.victim) or proxy.cut())
            case "reset":
                did = bool(proxy.reset(fault.victim) or proxy.reset())
            case "destroy":
                did = await self._destroy(fault.victim)
            case "stall":
                sides = (s.SOURCE, s.DESTINATION) if fault.victim == s.BOTH else (fault.victim,)
                proxy.stall(fault.seconds, sides)
            case "refuse":
                proxy.refuse(fault.seconds)
                proxy.cut()
            case "cancel":
                did = await self._cancel()
            case "freeze":
                vmm = self._here if fault.victim == s.SOURCE else self._arriving
                did = vmm is not None and vmm.whole.is_set() and not vmm.ended
                if vmm is not None and did:
                    self._nursery.start_soon(vmm.freeze, fault.seconds)
            case "full":
                for node in hit:
                    if not (node.host.state / "filler").exists():
                        self._nursery.start_soon(node.fill, fault.seconds)
            case "save" | "leave" | "unplug" | "shutdown":
                did = await self._meddle(fault.kind)
        self._quiet = max(self._quiet, trio.current_time() + fault.seconds)
        self.say(
            f"{fault} ({fault.moment}+{fault.delay * 1e3:.0f} ms) in {phase}: "
            f"source {source}; destination {destination}{'' if did else ': nothing to break'}"
        )
        self.faults[fault.kind, phase] += did

    async def _meddle(self, kind: str) -> bool:
        """By others, with the QEMU that runs the guest, while a migration goes on."""
        here, there = self._here, self._arriving
        vmm = next((one for one in (here, there) if one and one.name in self.runs.since), None)
        if vmm is None or not vmm.whole.is_set() or not self.migrating:
            return False
        if not self.others.done.is_set() or self.others.off or self.others.third_has_it:
            return False
        match kind:
            case "save":
                return await self.others.save(vmm, vmm is there, self._size)
            case "leave":
                return vmm is here and await self.others.leave(vmm)
            case "unplug":
                return await self.others.unplug(vmm)
        return await self.others.switch_off(vmm, self.guest)

    async def _cancel(self) -> bool:
        with trio.move_on_after(2.0), suppress(PostcopydError, ConnectionLost):
            await self.source.host.call("Cancel", name=VM)
            return True
        return False

    async def _destroy(self, victim: str) -> bool:
        """One side's sockets, by the kernel, as when a firewall or a route forgets them."""
        proxy = self.destination.proxy
        if not self._destroys:
            return bool(proxy.reset())
        there = self.destination.host.address.rpartition(":")[2]
        sockets = f"sport = :{there}" if victim == s.DESTINATION else f"dport = :{proxy.port}"
        done = await trio.run_process(["ss", "-KtnH", sockets], capture_stdout=True)
        return bool(done.stdout.strip())

    # --- what is watched all the time ------------------------------------------------------------

    async def _look(self) -> None:
        """Wrong pages, a guest that runs twice or ends, and daemons that end by themselves."""
        before = ""
        while True:
            for node in self.nodes:
                process = node.host.process
                if node.daemon == "up" and process is not None and process.poll() is not None:
                    raise Lost(f"{node.host.name} ended by itself, status {process.returncode}")
            if self.guest.bad or any(report.bad for report in self.guest.reports[-1:]):
                raise Lost(f"the guest has found wrong pages: {self.guest.bad}")
            if self.runs.ended:
                raise Lost(f"{self.runs.ended} has ended while it ran the guest")
            twice = self.runs.twice()  # or one of the monitors is still to be read
            if twice and twice == before:
                raise Lost(f"the guest ran twice: {twice}")
            before = twice
            await trio.sleep(0.2)

    async def _patient(self, work: Callable[[], Awaitable[T]], failure: str) -> T:
        """What `work` returns; Lost when it takes longer than END_S without a fault."""
        began = trio.current_time()
        answer: list[T] = []
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                answer.append(await work())
                nursery.cancel_scope.cancel()

            nursery.start_soon(run)
            while trio.current_time() < max(began, self._quiet) + END_S:
                await trio.sleep(0.2)
            raise Lost(f"{failure} within {END_S:.0f} s")
        return answer[0]

    # --- what is said ----------------------------------------------------------------------------

    def say(self, text: str) -> None:
        line = f"{trio.current_time() - self._began:8.3f}  {text}"
        print(line, flush=True)
        self.note(line)

    def note(self, line: str) -> None:
        with (self.folder / "chaos.log").open("a") as log:
            log.write(line + "\n")

    async def _why(self, error: BaseException) -> str:
        """A failure with all that is needed to understand it."""
        lines = [str(error)]
        if not isinstance(error, Lost):
            lines = traceback.format_exception(error)
        for node in self.nodes:
            lines.append(f"--- {node.host.name}: {node.side}")
            if node.daemon == "stopped" and node.host.process is not None:
                node.host.process.send_signal(signal.SIGCONT)
            lines.append(json.dumps(await node.status()))
            said = node.host.log.read_text().splitlines()
            asked = ("level=debug", "io.postcopyd.Status")  # by this run
            lines += [line for line in said if not any(word in line for word in asked)][-25:]
        for vmm in filter(None, (self._here, self._arriving, self.others.third)):
            lines.append(f"--- {vmm.name}: {await self._asked_anew(vmm)}")
        if self.durations:
            lines.append(f"--- until then:\n{self.summary()}")
        lines.append(f"--- seed {self.options.seed}; everything is in {self.folder}")
        text = "\n".join(lines)
        self.note(f"failed: {text}")
        return text

    async def _asked_anew(self, vmm: Vmm) -> str:
        """Its state, once the run's own monitors are closed."""
        if vmm.ended:
            return "ended"
        vmm.process.process.send_signal(signal.SIGCONT)
        vmm.whole.set()
        vmm.monitor = Monitor(vmm.monitor.path)
        with suppress(Exception), trio.move_on_after(ANSWER_S):
            async with trio.open_nursery() as nursery:
                await nursery.start(vmm.monitor.run)
                state = await vmm.state()
                nursery.cancel_scope.cancel()
            return state
        return "does not answer"

    def summary(self) -> str:
        """Faults by kind and phase, and what the guest has seen of them."""
        width = max(map(len, s.PHASES)) + 2
        rows = ["faults".ljust(10) + "".join(phase.rjust(width) for phase in (*s.PHASES, "all"))]
        for kind in s.KINDS:
            counts = [self.faults[kind, phase] for phase in s.PHASES]
            rows.append(kind.ljust(10) + "".join(f"{n:{width}}" for n in (*counts, sum(counts))))
        sums = [sum(self.faults[kind, phase] for kind in s.KINDS) for phase in s.PHASES]
        rows.append("all".ljust(10) + "".join(f"{n:{width}}" for n in (*sums, sum(sums))))
        reports = self.guest.reports
        silent = max(b.at - a.at for a, b in pairwise(reports))
        waited = max(report.gap_us for report in reports) / 1e6
        modes = [
            f"{mode} {self.moves[mode, 'destination']} of {sum(counts)}"
            for mode in ("hybrid", "postcopy", "precopy")
            if sum(counts := [self.moves[mode, where] for where in ("source", "destination")])
        ]
        middle = sorted(self.durations)[len(self.durations) // 2]
        rows += [
            f"migrations  {self.migrations} of {self.attempts} attempts, median {middle:.1f} s, "
            f"longest {max(self.durations):.1f} s",
            f"modes       {', '.join(modes)}",
            f"recoveries  {self.recoveries}",
            f"the guest   waited {waited:.1f} s for a page at most, was silent {silent:.1f} s at "
            f"most; 0 bad pages in {len(reports)} reports and {self.migrations + 1} sweeps",
            f"QEMUs       {len(self.runs.spans) + 1} runs of the guest, never two at a time, "
            f"{self.runs.nowhere:.1f} s in none at most; {self.left_behind} left behind",
            f"seed        {self.options.seed}",
        ]
        return "\n".join(rows)


def first(error: BaseException) -> BaseException:
    """Of what went wrong in several tasks: the run's own word, if there is one."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    causes = [first(one) for one in error.exceptions]
    return next((one for one in causes if isinstance(one, Lost)), causes[0])


def run(options: Options) -> str:
    """A whole run; what to print at its end. Raises Lost, with the folder that has all the logs."""
    # On tmpfs for guest RAM and records, its name short for sockets.
    folder = Path(tempfile.mkdtemp(prefix="postcopyd-chaos-", dir="/dev/shm"))
    own_mounts()

    async def whole() -> str:
        return await Chaos(options, folder).run()

    said = trio.run(whole)
    subprocess.run(["umount", *folder.glob("*.state")], check=True)
    shutil.rmtree(folder)
    return said


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--seconds", type=float, default=600, help="how long things break")
    words.add_argument("--memory", type=int, default=256, metavar="MIB", help="guest RAM")
    words.add_argument("--bandwidth", type=config.parse_rate, default=96 * MIB, metavar="RATE")
    words.add_argument("--phases", default=",".join(s.PHASES), help="break only in these")
    words.add_argument("--kinds", default=",".join(s.KINDS), help="break only in these ways")
    given = words.parse_args()
    options = Options(
        seed=given.seed,
        seconds=given.seconds,
        memory=given.memory * MIB,
        bandwidth=given.bandwidth,
        phases=tuple(given.phases.split(",")),
        kinds=tuple(given.kinds.split(",")),
    )
    try:
        next(s.schedule(options.seed, options.phases, options.kinds))
    except ValueError as error:
        words.error(str(error))
    # As ^C does, also in a shell's background: nothing that was started stays behind.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        print(run(options))
    except (Lost, PostcopydError, KeyboardInterrupt) as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
