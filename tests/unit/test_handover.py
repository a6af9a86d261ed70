# SPDX-License-Identifier: Apache-2.0
"""The tables of ownership: each by itself, and both together in every order of events there is
(handover_model.py), with every number of lost connections and of daemons that die."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from handover_model import (
    DEAD,
    DESTINATION_OVER,
    HERE_AGAIN,
    LET_GO,
    NOBODY_READS,
    START,
    Model,
    Walk,
    World,
)

from postcopyd import protocol as p
from postcopyd.handover import (
    DESTINATION,
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

TABLES: dict[Any, Mapping[Event, Any]] = {**SOURCE, **DESTINATION}
BY_ITSELF = frozenset({""})
WITH_A_PERSON = frozenset({"", "person"})


# --- what must hold, wherever the walk comes to --------------------------------------------------


def moved(w: World) -> bool:
    """The guest is at the destination with all of its memory, and the source has let go."""
    there = (w.destination, w.destination_record) == (Destination.DONE, "drained")
    return there and w.source is Source.DRAINED and w.here == "ended"


def stayed(w: World) -> bool:
    """The guest runs at the source as before, and the destination has let go."""
    here = w.source in HERE_AGAIN and w.source_record == "held" and w.here == "runs"
    return here and (w.there in DEAD or w.destination in LET_GO) and settled(w)


def settled(w: World) -> bool:
    """The destination has nothing left to do."""
    return w.there in DEAD or (
        w.destination in DESTINATION_OVER and w.destination_record in ("", "declined", "drained")
    )


def waits_for_a_person(w: World) -> bool:
    """A VMM was lost that only a person can say is lost: by itself, or ended by a person."""
    return w.source_record == "declined" or (
        w.there in DEAD and w.destination is Destination.RUNNING_LOST
    )


def both_run(walk: Walk) -> Iterator[World]:
    """Two VMMs run the guest at a time."""
    return (w for w in walk.came if w.here == "runs" and w.there == "runs")


def taken_without_right(walk: Walk) -> Iterator[World]:
    """The source has what it gave away, and neither was it declined by a destination whose VMM has
    ended without a vCPU having run, nor taken back by a person who says that VMM is dead."""
    for w, steps in walk.steps.items():
        declined = w.source is Source.DECLINED and w.there == "ended"
        told = w.source is Source.TAKEN_BACK and w.there in DEAD
        for _, _, after in steps:
            gave_away = w.source_record in ("granted", "drained")
            away = after.source_record in ("granted", "drained", "declined")
            runs = after.here == "runs" != w.here
            if gave_away and (runs or not away) and not (declined or told):
                yield after


def ended_while_it_ran(walk: Walk) -> Iterator[World]:
    """The destination itself ends a VMM that has run the guest, or the source one that the
    destination still needs."""
    for steps in walk.steps.values():
        for name, _, after in steps:
            if name == "destination ends its VMM" and after.there == "died":
                yield after
            if name == "source ends its VMM" and not after.whole:
                yield after


def impossible(walk: Walk) -> Iterator[World]:
    """A side receives what its table does not let it take."""
    return iter(walk.impossible)


def stuck(walk: Walk) -> set[World]:
    """Not every order of events without a further fault ends, or waits for a person."""
    return walk.came.keys() - walk.always_leads_to(
        lambda w: moved(w) or stayed(w) or waits_for_a_person(w)
    )


def beyond_help(walk: Walk) -> set[World]:
    """No command leads to an end."""
    return walk.came.keys() - walk.leads_to(
        lambda w: moved(w) or stayed(w) or (w.source_record == "declined" and settled(w)),
        WITH_A_PERSON,
    )


AT_ONCE: list[Callable[[Walk], Any]] = [
    both_run,
    taken_without_right,
    ended_while_it_ran,
    impossible,
]
"""Seen in one world, or in one step; what never leads anywhere is seen only in all of them."""
WRONG: list[Callable[[Walk], Any]] = [*AT_ONCE, stuck, beyond_help]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def everything(model: Model) -> Walk:
    return Walk(model)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_never(wrong: Callable[[Walk], Any], everything: Walk) -> None:
    """Whatever fails, whenever and however often: none of these is reached."""
    assert len(everything.came) > 10_000
    for world in wrong(everything):
        pytest.fail(f"{wrong.__doc__}\n{everything.story(world)}")


def test_tables_mean_what_they_say(everything: Walk) -> None:
    """The VMMs run only in the states of which the tables say so."""
    for w in everything.came:
        assert w.here != "runs" or w.source not in SOURCE_GAVE_AWAY, everything.story(w)
        assert w.there != "runs" or w.destination in DESTINATION_RUNS, everything.story(w)


def test_all_states_are_reached(everything: Walk) -> None:
    """Every state of both tables is met by the walk, except those of a mere check."""
    met = {w.destination for w in everything.came} | {w.far for w in everything.came}
    assert {w.source for w in everything.came} == set(Source) - {Source.CHECKED}
    assert met - {"session", "closed"} == set(Destination) - {Destination.CHECKED}
    assert set(Source) == SOURCE.keys()
    assert set(Destination) == DESTINATION.keys()


def test_every_message_of_the_tables_is_used(model: Model, everything: Walk) -> None:
    """No entry is there for nothing: only of what a peer says at its end, some come in states in
    which ours would not say it, and CHECKED is the end of a mere check."""
    assert everything
    unused = {
        (state, event)
        for state, table in TABLES.items()
        for event in table
        if isinstance(event, Sent) and (state, event) not in model.used
    } - {(Source.OFFERING, Sent(p.Resume))}
    assert {event for _, event in unused} == {
        Received(p.Error), Received(p.Cancel), Received(p.Checked), Sent(p.Checked)
    }  # fmt: skip


def test_what_one_side_sends_the_other_receives() -> None:
    """Each message that a table sends is received by the other, and the other way round."""
    for sender, receiver in ((SOURCE, DESTINATION), (DESTINATION, SOURCE)):
        sent = {e.message for table in sender.values() for e in table if type(e) is Sent}
        received = {e.message for table in receiver.values() for e in table if type(e) is Received}
        assert sent | {p.Hello} == received


def test_without_faults_it_is_moved(everything: Walk) -> None:
    """Without faults each order of events ends with the guest moved."""
    assert START in everything.always_leads_to(moved)


def test_without_a_dead_vmm_nobody_is_needed(everything: Walk) -> None:
    """While no VMM has ended that should not have, it comes to an end without a person."""
    ends = everything.always_leads_to(lambda w: moved(w) or stayed(w))
    alive = {w for w in everything.came if w.there not in DEAD and w.source_record != "declined"}
    assert alive
    assert alive <= ends


def test_declined_means_that_the_destination_has_let_go(everything: Walk) -> None:
    """A source that has its guest back by *declined* has a destination that will not run it."""
    met = [w for w in everything.came if w.source is Source.DECLINED]
    assert met
    assert {w.destination for w in met} == LET_GO
    assert {w.there for w in met} == {"ended"}


def test_the_records_say_where_the_guest_is(everything: Walk) -> None:
    """What two daemons that start at the same time can find, while no VMM has ended but as it
    should: the source never holds what the destination owns, and lets go of nothing before that."""
    assert {
        (w.source_record, w.destination_record)
        for w in everything.came
        if w.there not in DEAD and w.source_record != "declined"
    } == {
        *(("held", there) for there in ("", "arriving", "loading", "declined")),
        *(("intent", there) for there in ("arriving", "loading", "declined")),
        *(("granted", there) for there in ("loading", "owned", "drained")),
        ("drained", "drained"),
    }


# --- mistakes that the walk has to find ----------------------------------------------------------


def planted(table: Any, state: State, event: Event, after: State | None) -> dict[Any, Any]:
    """The table with another entry, or without one."""
    entries = {**table[state], event: after}
    return {**table, state: {e: to for e, to in entries.items() if to is not None}}


LOST, FAILED = Happened.LOST, Happened.FAILED
MISTAKES: dict[str, tuple[Callable[[Walk], Any], Model]] = {
    "a loss after the grant rolls back": (
        taken_without_right,
        Model(source=planted(SOURCE, Source.GRANTED, LOST, Source.ROLLED_BACK)),
    ),
    "a loss after ran rolls back": (
        both_run,
        Model(source=planted(SOURCE, Source.RAN, LOST, Source.ROLLED_BACK)),
    ),
    "the destination lets go of what it was granted": (
        ended_while_it_ran,
        Model(destination=planted(DESTINATION, Destination.GRANTED, LOST, Destination.CALLED_OFF)),
    ),
    "the destination declines what it runs": (
        impossible,
        Model(destination=planted(DESTINATION, Destination.RESUMED, LOST, Destination.CALLED_OFF)),
    ),
    "the destination keeps what it was not granted": (
        stuck,
        Model(destination=planted(DESTINATION, Destination.LOADED, LOST, Destination.RUNNING_LOST)),
    ),
    "nobody asks": (
        stuck,
        Model(source=planted(SOURCE, Source.RAN_LOST, Sent(p.Resume), None)),
    ),
    "the grant goes before its record": (both_run, Model(careless={"grant"})),
    "the guest runs before the record": (ended_while_it_ran, Model(careless={"run"})),
    "declined is said before the VMM has ended": (
        taken_without_right,
        Model(careless={"declined"}),
    ),
    "held is recorded before the guest runs again": (beyond_help, Model(careless={"held"})),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_walk_finds(mistake: str) -> None:
    """With one entry changed, or one order not kept, something of the above is reached."""
    wrong, model = MISTAKES[mistake]

    def found(walk: Walk) -> bool:
        return any(True for _ in wrong(walk))

    assert found(Walk(model, found if wrong in AT_ONCE else lambda _: False))


# --- the tables by themselves --------------------------------------------------------------------


def test_source_has_it_back_only_by_declined_or_a_person() -> None:
    """No other event leads from having given the guest away to having it."""
    back = {
        event
        for state in SOURCE_GAVE_AWAY
        for event, after in SOURCE[state].items()
        if after not in SOURCE_GAVE_AWAY
    }
    assert back == {Received(p.Declined), Happened.TAKEN_BACK}


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
    asked = (Destination.ASKED_LATER, Sent(p.Drained))  # a connection that says what was before
    assert taken == {(Destination.LOADED, Received(p.Grant)), asked}


def test_destination_lets_go_of_what_it_was_granted_only_by_declining() -> None:
    """Whatever the peer says or fails: nothing else leads out of DESTINATION_RUNS."""
    out = {
        (state, event)
        for state in DESTINATION_RUNS
        for event, after in DESTINATION[state].items()
        if after not in DESTINATION_RUNS
    }
    assert out == {(Destination.GRANTED, Sent(p.Declined))}


def test_check_ends_both_sides() -> None:
    """An offer that only asks leads both sides to CHECKED."""
    source, destination = Machine(Source.ASKED), Machine(Destination.OFFERED)
    checked = p.Checked([])
    destination.sending(checked)
    source.received(checked)
    assert (source.state, destination.state) == (Source.CHECKED, Destination.CHECKED)


@pytest.mark.parametrize("state", [*Source, *Destination], ids=str)
def test_loss_and_failure_are_always_possible(state: State) -> None:
    """A session may tell its machine of a loss or a failure in whatever state it is."""
    for happened in (LOST, FAILED):
        Machine(state).happened(happened)


@pytest.mark.parametrize("state", [*Source, *Destination], ids=str)
def test_only_a_person_takes_back_and_only_when_paused(state: State) -> None:
    """Taking back is refused in any state but those in which the destination is not heard."""
    machine = Machine(state)
    if state in (Source.GRANTED_LOST, Source.RAN_LOST):
        machine.happened(Happened.TAKEN_BACK)
        assert not machine.gave_away
    else:
        with pytest.raises(LocalProtocolError, match="a person says"):
            machine.happened(Happened.TAKEN_BACK)


@pytest.mark.parametrize("state", sorted(NOBODY_READS, key=str), ids=str)
def test_ends_are_ends(state: State) -> None:
    """What ended, or is paused, stays so when the connection goes or something fails afterwards."""
    for happened in (LOST, FAILED):
        assert TABLES[state][happened] is state


def test_machine_refuses_by_whose_fault_it_is() -> None:
    """What this side must not send is a bug here; what the peer must not send is the peer's."""
    source = Machine(Source.SAVED)
    with pytest.raises(LocalProtocolError, match=r"would send 'Grant'.*while it is 'saved'"):
        source.sending(p.Grant(1))
    with pytest.raises(RemoteProtocolError, match="source received 'Ran'"):
        source.received(p.Ran())
    assert source.state is Source.SAVED
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
        assert not {p.Cancel, p.Error} & {e.message for e in SOURCE[state] if type(e) is Sent}


def test_before_the_grant_a_loss_ends_it_at_the_destination() -> None:
    """A destination that has not been granted the guest lets go, also of one it has loaded."""
    early = set(Destination) - DESTINATION_RUNS - NOBODY_READS
    assert Destination.LOADED in early
    for state in early:
        assert DESTINATION[state][LOST] is Destination.CALLED_OFF


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
