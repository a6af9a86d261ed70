# SPDX-License-Identifier: Apache-2.0
"""What a daemon still knows of its VMs when it is started again."""

from __future__ import annotations

import signal
import socket

import pytest
from pair import SMALL, Pair, again, completed, ended, status_until, verified, worked

from postcopyd.errors import PostcopydError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_drained_stays_in_the_status_and_the_guest_can_move_on(
    new_pair: Pair, number: int
) -> None:
    """After a restart both sides say what they said; the guest is attached and may go back."""
    a, b = new_pair
    name, _here, there = await new_pair.place()
    result = await a.migrate(name, b)
    completed(result)
    for host, role in ((a, "source"), (b, "destination")):
        before = await host.status(name)
        host.end(number)
        await host.start()
        after = await host.status(name)
        assert after == before
        assert (after["role"], after["phase"]) == (role, "drained")
    back = await new_pair.attach(a, name, new_pair.guest(*SMALL, "--incoming"))
    completed(await b.migrate(name, a))
    await verified(back)
    await ended(there)


async def test_a_daemon_killed_before_the_stop_can_migrate_again(new_pair: Pair) -> None:
    """The guest never noticed; the daemon that is started again has it, and moves it."""
    a, b = new_pair
    name, here, there = await new_pair.place()
    new_pair.hook(name, "source", "handover", "kill -9 $PPID; sleep 60")
    started = await a.call("Migrate", name=name, to=b.address)
    with pytest.raises(PostcopydError):
        await a.result(name, started["migration"])
    await worked(here)
    new_pair.unhook(name)
    a.end(signal.SIGKILL)
    await a.start()
    await status_until(b, name, lambda status: status["phase"] == "failed")
    await again(new_pair, name, there)
    await ended(here)


async def test_a_taken_port_for_metrics_keeps_no_guest_waiting(new_pair: Pair) -> None:
    """A daemon that is started again takes its guests over, and says that it has no metrics."""
    a, b = new_pair
    name, _, there = await new_pair.place()
    a.end(signal.SIGKILL)
    with socket.create_server(("127.0.0.1", 0)) as other:
        a.options = (*a.options, "--metrics", f"127.0.0.1:{other.getsockname()[1]}")
        await a.start()
        completed(await a.migrate(name, b))
    await verified(there)
    said = [line for line in a.log.read_text().splitlines() if "no metrics" in line]
    assert len(said) == 1
    assert "level=error" in said[0]
    assert "say another address with --metrics" in said[0]
