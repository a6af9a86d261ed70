# SPDX-License-Identifier: Apache-2.0
"""What the other host says of a guest that may have gone there, of which this host knows too little
to go on.

Owns one task for each such VM, which asks until it is answered, and shows the answer. Decides
nothing: that is for a person (decisions.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import trio

from postcopyd.errors import PostcopydError
from postcopyd.sessions.shared import Shared
from postcopyd.sessions.vm import Vm
from postcopyd.source.restart import ask_destination

AGAIN_S = 5.0
"""How long until a host that did not answer is asked again."""


class Inquiry(NamedTuple):
    """`intent` says whom to ask, and after what; `sentence` is what this host knows itself."""

    intent: Mapping[str, Any]
    sentence: str


class Inquiries:
    """Those of one daemon; `spawn` starts the task of a VM that is in `vms`."""

    def __init__(
        self,
        shared: Shared,
        vms: Mapping[str, Vm],
        spawn: Callable[[Vm, Callable[..., Awaitable[None]], Vm, Inquiry], None],
    ) -> None:
        self._shared = shared
        self._vms = vms
        self._spawn = spawn
        self._open: dict[Vm, Inquiry] = {}

    def of(self, vm: Vm) -> Inquiry | None:
        """What is asked at present about this VM."""
        return self._open.get(vm)

    def ask(self, vm: Vm, intent: Mapping[str, Any], sentence: str) -> None:
        """Has the host that may have the guest asked, in place of one that was asked before."""
        inquiry = self._open[vm] = Inquiry(intent, sentence)
        vm.show(peer=intent["peer"], message=sentence)
        self._spawn(vm, self._ask, vm, inquiry)

    async def _ask(self, vm: Vm, inquiry: Inquiry) -> None:
        (intent, sentence), why = inquiry, ""

        def wanted() -> bool:
            here = self._vms.get(vm.name) is vm and vm.status.phase == "paused"
            return here and self._open.get(vm) is inquiry

        while wanted():
            try:
                said = await ask_destination(vm.name, intent, self._shared)
            except PostcopydError as error:
                if why != (why := str(error)):
                    vm.log.warning("destination not asked", error=why)
                await trio.sleep(AGAIN_S)
            else:
                if wanted():
                    vm.show(message=f"{sentence}; {intent['peer']} says: {said}")
                return
        if self._open.get(vm) is inquiry:
            del self._open[vm]
