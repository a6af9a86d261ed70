# SPDX-License-Identifier: Apache-2.0
"""The tables of ownership: each by itself, and both together in every order of events there is.

`walk` is a model of two hosts that know nothing but the tables: a side may send whatever its table
allows, in each direction messages arrive in order, either session may fail and the network may be
cut at any moment, and each side notices a loss in its own time, or reads on for a while. A session
that has ended no longer reads; the other side sees that as a loss.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from postcopyd import protocol as p
from postcopyd.handover import (
    DESTINATION,
    DESTINATION_KEEPS,
    DESTINATION_RUNS,
    SOURCE,
    SOURCE_GAVE_AWAY,
    Destination,
    Event,
    Happened,
    Machine,
    Received,
    Sent,
    Source,
    State,
)
from postcopyd.protocol import LocalProtocolError, RemoteProtocolError

TABLES: dict[State, Any] = {**SOURCE, **DESTINATION}

# The session is over, or paused without a connection: nobody reads.
DEAF = {
    Source.CHECKED,
    Source.DECLINED,
    Source.ROLLED_BACK,
    Source.GRANTED_LOST,
    Source.RAN_LOST,
    Destination.CHECKED,
    Destination.DECLINED,
    Destination.CALLED_OFF,
    Destination.IN_DOUBT,
    Destination.GRANTED_LOST,
    Destination.RUNNING_LOST,
    Destination.DONE,
    Source.DRAINED,
}
IN_FLIGHT = 4  # more messages than that lie in one direction only by repetition


class World(NamedTuple):
    """Both sides and what is between them; the source is greeted as the first event."""

    source: Source
    destination: Destination
    there: tuple[type[p.Message], ...]  # on the way to the destination
    back: tuple[type[p.Message], ...]
    cut: bool = False


START = World(Source.GREETING, Destination.GREETING, (p.Hello,), (p.Hello,))


def may_send(state: State) -> list[type[p.Message]]:
    return [event.message for event in TABLES[state] if type(event) is Sent]


def steps(world: World, *, faults: bool) -> Iterator[tuple[str, World]]:
    """Everything that can happen next, each with the name of what it is."""
    for mine, way_out, way_in in (("source", "there", "back"), ("destination", "back", "there")):
        state: State = getattr(world, mine)
        table = TABLES[state]
        waiting = getattr(world, way_in)
        leaving = getattr(world, way_out)

        def go(event: Event, mine: str = mine, table: Any = table, **more: Any) -> World:
            return world._replace(**{mine: table[event]}, **more)

        for message in may_send(state):
            fault_only = message in (p.Error, p.Cancel, p.Declined)
            if (fault_only and not faults) or message is p.Checked:
                continue
            if world.cut:  # written, and lost
                yield f"{mine} sends {message.__name__}, lost", go(Sent(message))
            elif len(leaving) < IN_FLIGHT:
                yield (
                    f"{mine} sends {message.__name__}",
                    go(Sent(message), **{way_out: (*leaving, message)}),
                )
        if waiting and state not in DEAF:
            event: Event = Received(waiting[0])
            assert event in table, f"{mine} in {state} cannot take {waiting[0].__name__}: {world}"
            yield f"{mine} takes {waiting[0].__name__}", go(event, **{way_in: waiting[1:]})
        if faults:
            other = world.destination if mine == "source" else world.source
            yield f"{mine} fails", go(Happened.FAILED)
            if world.cut or (other in DEAF and not waiting):
                yield f"{mine} sees the loss", go(Happened.LOST, **{way_in: ()})
    if faults and not world.cut:
        yield "cut", world._replace(cut=True)


def walk(*, faults: bool) -> dict[World, tuple[str, World] | None]:
    """All worlds that can be reached, each with how it was reached first."""
    came: dict[World, tuple[str, World] | None] = {START: None}
    queue = deque([START])
    while queue:
        world = queue.popleft()
        for name, after in steps(world, faults=faults):
            if after not in came:
                came[after] = (name, world)
                queue.append(after)
    return came


def story(came: dict[World, tuple[str, World] | None], world: World) -> str:
    """How a world came to be, for the message of a failure."""
    lines = [repr(world)]
    while (before := came[world]) is not None:
        lines.append(before[0])
        world = before[1]
    return "\n".join(reversed(lines))


@pytest.fixture(scope="module")
def everything() -> dict[World, tuple[str, World] | None]:
    return walk(faults=True)


@pytest.fixture(scope="module")
def peaceful() -> dict[World, tuple[str, World] | None]:
    return walk(faults=False)


def never(came: dict[World, tuple[str, World] | None], wrong: Callable[[World], bool]) -> None:
    for world in came:
        assert not wrong(world), story(came, world)


def test_never_may_both_run(everything: dict[World, tuple[str, World] | None]) -> None:
    """Whatever fails and whenever: the destination may run only while the source may not."""
    assert len(everything) > 3000
    never(
        everything,
        lambda w: w.source not in SOURCE_GAVE_AWAY and w.destination in DESTINATION_RUNS,
    )


def test_never_may_none_have_it(everything: dict[World, tuple[str, World] | None]) -> None:
    """A source that gave its guest away has a destination that keeps it, or one that declined."""
    never(
        everything,
        lambda w: (
            w.source in SOURCE_GAVE_AWAY
            and w.destination not in DESTINATION_KEEPS | {Destination.DECLINED}
        ),
    )


def test_declined_means_that_the_destination_has_let_go(
    everything: dict[World, tuple[str, World] | None],
) -> None:
    """A source that has its guest back by *declined* has a destination that will not run it."""
    met = [w for w in everything if w.source is Source.DECLINED]
    assert met
    assert {w.destination for w in met} == {Destination.DECLINED}


def test_destination_ends_its_guest_only_when_the_source_has_it(
    everything: dict[World, tuple[str, World] | None],
) -> None:
    """After *loaded* the destination lets go only of what the source has, or declines."""
    for world in everything:
        for name, after in steps(world, faults=True):
            if (
                world.destination in DESTINATION_KEEPS
                and after.destination not in DESTINATION_KEEPS
            ):
                told = name in ("destination takes Cancel", "destination takes Error")
                if told:
                    assert world.source is Source.ROLLED_BACK, story(everything, world)
                else:
                    assert name.startswith("destination sends Declined"), name
                    assert world.source in SOURCE_GAVE_AWAY, story(everything, world)


def test_source_has_it_back_only_by_declined() -> None:
    """No event but *declined* leads from having given the guest away to having it."""
    back = {
        event
        for state in SOURCE_GAVE_AWAY
        for event, after in SOURCE[state].items()
        if after not in SOURCE_GAVE_AWAY
    }
    assert back == {Received(p.Declined)}


def test_only_grant_gives_away() -> None:
    """No event but sending the grant leads into the states in which the source never runs it."""
    away = {
        (state, event)
        for state, table in SOURCE.items()
        for event, after in table.items()
        if after in SOURCE_GAVE_AWAY and state not in SOURCE_GAVE_AWAY
    }
    assert away == {(Source.LOADED, Sent(p.Grant))}
    taken = {
        (state, event)
        for state, table in DESTINATION.items()
        for event, after in table.items()
        if after in DESTINATION_RUNS and state not in DESTINATION_RUNS
    }
    assert taken == {(Destination.LOADED, Received(p.Grant))}


def test_all_states_are_reached(everything: dict[World, tuple[str, World] | None]) -> None:
    """Every state of both tables is met by the walk, except those of a mere check."""
    assert {w.source for w in everything} == set(Source) - {Source.CHECKED}
    assert {w.destination for w in everything} == set(Destination) - {Destination.CHECKED}
    assert set(Source) == SOURCE.keys()
    assert set(Destination) == DESTINATION.keys()


def test_check_ends_both_sides() -> None:
    """An offer that only asks leads both sides to CHECKED."""
    source, destination = Machine(Source.ASKED), Machine(Destination.OFFERED)
    checked = p.Checked([])
    destination.sending(checked)
    source.received(checked)
    assert (source.state, destination.state) == (Source.CHECKED, Destination.CHECKED)


def test_without_faults_it_always_drains(
    peaceful: dict[World, tuple[str, World] | None],
) -> None:
    """Without faults no order of events gets stuck, and from everywhere drained can be reached."""
    after = {w: [a for _, a in steps(w, faults=False)] for w in peaceful}
    assert {w for w, next_ in after.items() if not [n for n in next_ if n != w]} <= {
        w for w in peaceful if w.destination is Destination.DONE
    }
    good = {w for w in peaceful if w[:2] == (Source.DRAINED, Destination.DONE)}
    assert good
    grows = True
    while grows:
        more = {w for w, next_ in after.items() if w not in good and good & set(next_)}
        grows, good = bool(more), good | more
    assert good == set(peaceful)


def test_ends_that_recovery_must_know(
    everything: dict[World, tuple[str, World] | None],
) -> None:
    """When both sides have stopped reading, these pairs remain, and no others."""
    ends = {(w.source, w.destination) for w in everything if {w.source, w.destination} <= DEAF}
    here, there = Source, Destination
    held = {here.ROLLED_BACK}
    assert ends == {
        # nothing to recover
        (here.DRAINED, there.DONE),
        (here.DECLINED, there.DECLINED),
        *((source, there.CALLED_OFF) for source in held),
        # the guest is at the source; the destination holds a loaded one and has to be told
        *((source, there.IN_DOUBT) for source in held),
        # the destination's by right, and only the source knows
        (here.GRANTED_LOST, there.IN_DOUBT),
        # the destination knows, the source has to ask
        (here.GRANTED_LOST, there.DECLINED),
        (here.GRANTED_LOST, there.GRANTED_LOST),
        (here.GRANTED_LOST, there.RUNNING_LOST),
        (here.GRANTED_LOST, there.DONE),
        (here.RAN_LOST, there.RUNNING_LOST),
        (here.RAN_LOST, there.DONE),
    }


@pytest.mark.parametrize("state", [*Source, *Destination], ids=str)
def test_loss_and_failure_are_always_possible(state: State) -> None:
    """A session may tell its machine of a loss or a failure in whatever state it is."""
    for happened in Happened:
        Machine(state).happened(happened)


@pytest.mark.parametrize("state", sorted(DEAF, key=str), ids=str)
def test_ends_are_ends(state: State) -> None:
    """What ended stays as it is when the connection goes or something fails afterwards."""
    for happened in Happened:
        assert TABLES[state][happened] is state


def test_machine_refuses_by_whose_fault_it_is() -> None:
    """What this side must not send is a bug here; what the peer must not send is the peer's."""
    source = Machine(Source.OFFERED)
    with pytest.raises(LocalProtocolError, match=r"would send 'Grant'.*while it is 'offered'"):
        source.sending(p.Grant(1))
    with pytest.raises(RemoteProtocolError, match="source received 'Ran'"):
        source.received(p.Ran())
    assert source.state is Source.OFFERED
    with pytest.raises(RemoteProtocolError, match="destination received 'Offer'"):
        Machine(Destination.GREETING).received(
            p.Offer("m", "web1", "qemu", [p.RegionOffer("ram", 1, 4096)], {}, 1, 1)
        )


def test_an_offer_is_made_once() -> None:
    """A second offer on the same connection is a bug of the source, found before it is sent."""
    offer = p.Offer("m", "web1", "qemu", [p.RegionOffer("ram", 1, 4096)], {}, 1, 1)
    source = Machine(Source.OFFERING)
    with pytest.raises(RemoteProtocolError):
        source.received(p.Ready(bytes(32)))
    source.sending(offer)
    with pytest.raises(LocalProtocolError):
        source.sending(offer)


def test_nothing_is_said_after_the_grant_that_takes_it_back() -> None:
    """From the grant on the source sends neither Cancel nor Error: both mean *not granted*."""
    for state in SOURCE_GAVE_AWAY:
        assert not {p.Cancel, p.Error} & set(may_send(state))


def test_a_loaded_destination_says_nothing_that_ends_it() -> None:
    """A destination that may be the only guest sends no Error: the source would not be answered."""
    for state in DESTINATION_KEEPS:
        assert p.Error not in may_send(state)


def test_a_guest_that_may_be_the_only_one_is_kept_whatever_the_peer_says() -> None:
    """Told to before the grant, or by declining: nothing else leads out of DESTINATION_KEEPS."""
    out = {
        (state, event)
        for state in DESTINATION_KEEPS
        for event, after in DESTINATION[state].items()
        if after not in DESTINATION_KEEPS
    }
    assert out == {
        (Destination.LOADED, Received(p.Cancel)),
        (Destination.LOADED, Received(p.Error)),
        (Destination.GRANTED, Sent(p.Declined)),
    }


def test_before_loaded_a_loss_leaves_the_destination_as_it_was() -> None:
    """A destination that has not said *loaded* cannot have been granted anything: it lets go."""
    early = set(Destination) - DESTINATION_KEEPS - DEAF
    assert Destination.LOADING in early
    for state in early:
        assert DESTINATION[state][Happened.LOST] is Destination.CALLED_OFF


def test_keepalives_change_nothing_and_went_records_the_way() -> None:
    """Keepalives pass in any state; `went` has each state entered, once."""
    machine = Machine(Source.GREETING)
    machine.sending(p.Hello(1))
    machine.received(p.Keepalive())
    machine.sending(p.Keepalive())
    machine.received(p.Hello(1))
    machine.happened(Happened.LOST)
    machine.happened(Happened.LOST)
    assert machine.went == [Source.GREETING, Source.OFFERING, Source.ROLLED_BACK]
    assert not machine.gave_away


def test_events_compare_by_kind_and_message() -> None:
    """Sending and receiving one message are two events; each equals itself made anew."""
    assert Sent(p.Ran) == Sent(p.Ran)
    assert hash(Received(p.Ran)) == hash(Received(p.Ran))
    assert Sent(p.Ran) != Received(p.Ran)
    assert Received(p.Ran) != Received(p.Grant)
    assert repr(Received(p.Ran)) == "Received(Ran)"
