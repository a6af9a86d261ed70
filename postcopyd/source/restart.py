# SPDX-License-Identifier: Apache-2.0
"""What a restarted daemon does at the source for a guest whose migration no session continues: it
was drained, it was not granted, or this host has nothing of it but the intent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import trio

from postcopyd import protocol as p
from postcopyd.errors import PostcopydError
from postcopyd.handover import Machine, Source
from postcopyd.model import MigrateRequest, Result
from postcopyd.net.connection import dial_control
from postcopyd.net.tls import same_peer
from postcopyd.sessions.shared import Shared
from postcopyd.sessions.vm import Vm
from postcopyd.source.granted import Granted, unknowing
from postcopyd.source.keeping import let_go
from postcopyd.source.rollback import ROLLBACK_S, tell_driver, undone_as


async def ask_destination(vm: str, intent: Mapping[str, Any], shared: Shared) -> str:
    """Asks the destination what became of a handover that this host cannot continue. Returns the
    answer; nothing else changes by it. Raises PostcopydError."""
    peer = intent["peer"]
    granted = Granted.of_record(intent.get("granted", {"at": peer}))
    async with await dial_control(peer, Machine(Source.GREETING), shared) as channel:
        same_peer(intent.get("identity", ()), channel.names, vm)
        answers = Granted.greeted(peer, await channel.greet())
        await channel.send(p.Resume(intent["migration"], vm, intent["epoch"], look=True))
        said = " ".join((await channel.expect(p.Checked)).problems)
    if granted.would_know(answers):
        return said
    return f"{said} (and {unknowing(vm, granted, answers)})"


async def finish_drained(vm: Vm) -> None:
    """Ends the VMM of a guest that was drained, if the previous daemon has not; for `keep_source`
    leaves it stopped and attached. Raises PostcopydError."""
    await let_go(vm)
    if vm.driver is None:
        return
    request = msgspec.convert(vm.about["request"], MigrateRequest)
    vm.driver.undefines = request.undefines
    await vm.driver.finish(request.keep_source)
    if not request.keep_source:
        await vm.leave()


async def roll_back(vm: Vm, shared: Shared) -> None:
    """Runs a guest again whose handover was under way, and not granted, when the previous daemon
    ended. Raises PostcopydError."""
    try:
        with trio.fail_after(ROLLBACK_S):
            await tell_driver(vm)
            left = await vm.attached().rollback()
            await let_go(vm)
    except trio.TooSlowError:
        raise PostcopydError(f"its VMM did not run it again within {ROLLBACK_S:.0f} s") from None
    sentence = undone_as(vm.name, "the daemon ended before it was granted", left)
    name = vm.about["migration"]
    result = Result(event="failed", vm=vm.name, migration=name, error=sentence)
    vm.conclude(phase="failed", remaining=0, message=sentence, result=result)
    vm.home()
    vm.record_soon("held")
    vm.log.warning("migration failed", error=sentence)
