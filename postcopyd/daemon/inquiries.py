# SPDX-License-Identifier: Apache-2.0
"""Asks the other host about a guest that may have gone there, when this host knows too little to go
on.

Owns one task for each such VM. The task asks until it gets an answer, and shows the answer. Decides
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
    """`intent` says which host to ask, about which migration; `sentence` is what this host itself
    knows."""

    intent: Mapping[str, Any]
    sentence: str


class Inquiries:
    """The inquiries of one daemon; `spawn` starts the task of a VM that is in `vms`."""

    def __init__(
        self,
        shared: Shared,
        vms: Mapping[str, Vm],
        spawn: Callable[[Vm, Callable[..., Awaitable[None]], Vm, Inquiry], bool],
    ) -> None:
        self._shared = shared
        self._vms = vms
        self._spawn = spawn
        self._open: dict[Vm, Inquiry] = {}

    def of(self, vm: Vm) -> Inquiry | None:
        """The inquiry that is under way for this VM."""
        return self._open.get(vm)

    def ask(self, vm: Vm, intent: Mapping[str, Any], sentence: str) -> None:
        """Asks the host that may have the guest. An earlier inquiry for this VM ends."""
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
