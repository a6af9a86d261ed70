# SPDX-License-Identifier: Apache-2.0
"""What all phases of one departure share: the request, what was decided and measured, and how
people, hooks and the record are told. Takes no step of the migration itself.

Owns the state machine, the `Peer`, and this migration's share of the uplink, which begins with the
first `rate` and ends with `stop_sending`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any, Literal, cast

import trio

from postcopyd import protocol as p
from postcopyd.errors import PostcopydError, shortage
from postcopyd.handover import Machine
from postcopyd.model import MigrateRequest, Result
from postcopyd.native.engine import EngineError, Failure
from postcopyd.records import schema
from postcopyd.sessions.hooks import run_hooks
from postcopyd.sessions.shared import Shared
from postcopyd.sessions.vm import Vm
from postcopyd.source.decision import Person
from postcopyd.source.engine import SourceEngine
from postcopyd.source.figures import Figures
from postcopyd.source.granted import Granted
from postcopyd.source.passes import Pass
from postcopyd.source.peer import Peer
from postcopyd.source.retry import GONE
from postcopyd.vmm import Shape

SHOW_S = 0.1
"""How often progress is shown."""


class Migration:
    """`cancelling` is the cancel scope of all steps before the grant. `committed`: the grant is on
    record, and `cancel` is refused. `ending`: the migration is at its last steps. `completed` is
    its result, once nothing of the guest is needed here any more. `definition`: of its VMM as it
    is here, which may be told to be another one at the destination."""

    def __init__(
        self, vm: Vm, request: MigrateRequest, shared: Shared, name: str, machine: Machine
    ) -> None:
        self.vm = vm
        self.request = request
        self.shared = shared
        self.name = name
        self.machine = machine
        self.peer = Peer(request.to, vm.name, machine, shared)
        self.figures = Figures()
        self.person = Person()
        self.definition = ""
        self.cancelling = trio.CancelScope()
        self.committed = False
        self.ending = False
        self.completed: Result | None = None

    @property
    def log(self) -> Any:
        return self.vm.log.bind(migration=self.name, peer=self.peer.to, role="source")

    def ours(self, error: Exception) -> PostcopydError:
        """The error that an operator is told for whatever a step has raised."""
        if isinstance(error, EngineError) and error.failure is Failure.VMM_GONE:
            return PostcopydError(
                f"{error}, and what had not crossed of its memory is lost; end it here by "
                f"`postcopyd resolve {self.vm.name} --kill`, then there by `--poison` or `--kill`",
                GONE,
            )
        if isinstance(error, PostcopydError):
            return error
        if short := shortage(error):
            return short
        self.log.exception("bug in the source's session")
        return PostcopydError(f"internal error: {error!r}", "InternalError")

    async def hooks(self, phase: str, **about: Any) -> None:
        await run_hooks(
            self.shared.hooks,
            self.vm.name,
            "source",
            phase,
            migration=self.name,
            peer=self.peer.to,
            **about,
        )

    # --- how fast it may send --------------------------------------------------------------------

    @property
    def bandwidth(self) -> int:
        """Bytes a second (0: no limit): as asked for, within what the configuration allows."""
        asked, most = self.request.bandwidth or 0, self.shared.bandwidth
        return min(asked, most) if asked and most else asked or most

    def rate(self, engine: SourceEngine) -> int:
        """How many bytes a second `engine` may send; it is told when others begin or end."""
        return self.shared.limits.uplink.join(self, self.bandwidth, engine.limit)

    def stop_sending(self) -> None:
        """Gives its share of the uplink to the others. Idempotent."""
        self.shared.limits.uplink.leave(self)

    # --- what a restarted daemon needs -----------------------------------------------------------

    def note(self, shape: Shape) -> None:
        """Notes for the next record what `know_again` and `Guest.restored` need."""
        figures = self.figures
        about: schema.Departure = {
            "migration": self.name,
            "request": cast(schema.Request, asdict(replace(self.request, to=self.peer.to, xml=""))),
            "regions": [(r.name, r.pages, r.page_size) for r in shape.regions],
            "run": shape.state == "running",  # before it was stopped
            "marked": True,
            "downtime": (figures.downtime_ms, figures.downtime_parts),
            "recoveries": figures.recoveries,
            "passes": [asdict(one) for one in figures.passes],
            "why_now": figures.why_now,
            "identity": [*self.peer.identity],
            "granted": self.peer.granted.recorded(),
        }
        if "keeper" in self.vm.about and self.vm.about["migration"] == self.name:
            about["keeper"] = self.vm.about["keeper"]
        self.vm.note(dict(about))

    def know_again(self, about: schema.Departure) -> None:
        """Restores what `note` has recorded, of a guest that the previous daemon granted."""
        self.committed = True
        self.peer.identity = tuple(about.get("identity", ()))
        if "granted" in about:
            self.peer.granted = Granted.of_record(about["granted"])
        figures = self.figures
        figures.downtime_ms, figures.downtime_parts = about["downtime"]
        figures.recoveries = about["recoveries"]
        figures.passes = [Pass(**one) for one in about.get("passes", [])]
        figures.why_now = about.get("why_now", "")

    # --- what people see -------------------------------------------------------------------------

    async def show_progress(self, until: int | None = None) -> None:
        """Shows progress until it is cancelled. `until`: how many pages will have been sent in
        passes at the end of this one."""
        figures = self.figures
        stats, before, at = figures.stats, 0, time.monotonic()
        while True:
            await trio.sleep(SHOW_S)
            now, moved = time.monotonic(), stats.transferred_bytes
            self.vm.show(
                total_bytes=figures.total_bytes,
                transferred_bytes=moved,
                bytes_per_second=round((moved - before) / (now - at)),
                faults=figures.shown_faults(),
                elapsed_ms=round((now - figures.began) * 1e3),
                downtime_ms=figures.downtime_ms,
            )
            if until is not None:
                self.vm.show(remaining=max(until - stats.passed_pages, 0) * figures.page_size)
            before, at = moved, now

    def result(
        self,
        event: Literal["completed", "failed", "cancelled", "paused", "ended"],
        error: str | None = None,
        drained: p.Drained | None = None,
        at: float | None = None,
    ) -> Result:
        """The result of a migration that ended at `at` (None: now). If a bug spoils the figures,
        people are still told the rest."""
        figures, at = self.figures, at or time.monotonic()
        result = Result(
            event=event,
            vm=self.vm.name,
            migration=self.name,
            peer=self.peer.to,
            mode=self.request.mode,
            handed_over=figures.why_now or None,
            tracking=figures.tracked or None,
            warning="; ".join(figures.warnings) or None,
            error=error or None,
        )
        try:
            figures.tell(result, drained, at)
            result.phases = self.vm.phases(at)
        except Exception:
            self.log.exception("bug in the figures of a result")
        return result
