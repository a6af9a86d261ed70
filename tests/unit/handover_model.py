# SPDX-License-Identifier: Apache-2.0
"""Two hosts, one guest and a bad network as a model that can be walked to the last corner.

A `World` is everything that counts: the two state machines, what each daemon has recorded, what
each VMM does, and the messages on their way. `Model.steps` has everything that can happen next: the
events are those of handover.py's own tables, and around them is what the sessions do with records
and VMMs, each write, stop and run a step of its own, so that a daemon may die between any two.

What a step is:

  ""        something that happens by itself
  "fault"   the network is cut, a session fails, a daemon dies and is started again, the
            destination's VMM ends, a person ends the source's copy of a paused guest
  "person"  what only a person can say: *taken back* when the destination's VMM is dead, *kill*
            there when the source's is (or *poison*, which changes nothing of what is here)

Nothing is counted, so every number of faults, connections and restarts is covered. It stays finite
because of these, which lose nothing:

- Messages that change neither side's state (`IDLE`) lie in one direction at most one at a time.
- Only the newest connection has its whole state. Of those before it the source reads nothing any
  more; what the destination may still do with them is to read on (`left`), and to meet an ask that
  nobody waits for (`stale`, which stands for any number of them).
- A daemon that died and the one started after it are one step: one that is down does nothing, as
  one that has not come to it yet; who dials it meanwhile is refused, which is a step anyway.
- Pages are one bit, `whole`: they travel beside the tables, while both ends are up.
- One pass stands for any number of them: it ends where it began.
"""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from postcopyd import protocol as p
from postcopyd.handover import (
    DESTINATION,
    SOURCE,
    Destination,
    Event,
    Happened,
    Received,
    Sent,
    Source,
    State,
)

Messages = tuple[type[p.Message], ...]
Table = Mapping[Any, Mapping[Event, Any]]
Kind = Literal["", "fault", "person"]


class World(NamedTuple):
    """`here` and `there` are the VMMs of source and destination."""

    source: Source
    destination: Destination
    here: Literal["runs", "stopped", "ended"]
    there: Literal["waits", "runs", "ended", "died"]  # ended: before a vCPU has run; died: after
    source_record: Literal["held", "intent", "granted", "drained", "declined"]
    destination_record: Literal["", "arriving", "loading", "owned", "drained", "declined"]
    whole: bool  # all memory is at the destination
    # The connection that the source holds. The destination's end of it has its session, or a state
    # of its own while it asks, or nothing.
    near: bool
    far: Destination | Literal["session", "closed"]
    out: Messages
    back: Messages
    cut: bool
    left: Messages  # what the destination's session may still read of a connection before it
    stale: bool  # the destination has yet to notice an ask for whose answer nobody waits
    passed: bool = False  # there was a pass before the handover


Step = tuple[str, Kind, World]

START = World(
    source=Source.GREETING,
    destination=Destination.GREETING,
    here="runs",
    there="waits",
    source_record="held",
    destination_record="",
    whole=False,
    near=True,
    far="session",
    out=(p.Hello,),
    back=(p.Hello,),
    cut=False,
    left=(),
    stale=False,
)

LOST = frozenset({Source.GRANTED_LOST, Source.RAN_LOST})
ASKS = frozenset({Source.GRANTED_ASKS, Source.RAN_ASKS})
HERE_AGAIN = frozenset({Source.ROLLED_BACK, Source.DECLINED, Source.TAKEN_BACK})
SOURCE_OVER = HERE_AGAIN | {Source.DRAINED, Source.CHECKED}
LET_GO = frozenset({Destination.CALLED_OFF, Destination.DECLINED})
DESTINATION_OVER = LET_GO | {Destination.DONE, Destination.CHECKED}
NOBODY_READS: frozenset[State] = LOST | SOURCE_OVER | DESTINATION_OVER | {Destination.RUNNING_LOST}
"""The session is over, or paused; a paused source reads the greeting of the next connection."""

DEAD = frozenset({"ended", "died"})

ANSWERS: dict[str, type[p.Message]] = {"drained": p.Drained, "declined": p.Declined}

RESTARTED_SOURCE = {
    "held": Source.ROLLED_BACK,
    "intent": Source.ROLLED_BACK,
    "granted": Source.GRANTED_LOST,
    "drained": Source.DRAINED,
}
RESTARTED_DESTINATION = {
    "": Destination.CALLED_OFF,
    "arriving": Destination.CALLED_OFF,
    "loading": Destination.CALLED_OFF,
    "owned": Destination.RUNNING_LOST,
    "drained": Destination.DONE,
    "declined": Destination.DECLINED,
}


class Impossible(Exception):
    """An event that a table does not have."""


class Model:
    """The rules, with other tables or less care where a test plants a mistake.

    `careless` has what a side does without waiting for what must come first: "grant", "run",
    "declined", "held".
    """

    def __init__(
        self,
        source: Table = SOURCE,
        destination: Table = DESTINATION,
        careless: Iterable[str] = (),
    ) -> None:
        self.tables: dict[type[State], Table] = {Source: source, Destination: destination}
        self.careless = frozenset(careless)
        self.used: set[tuple[State, Event]] = set()

    def steps(self, w: World) -> Iterator[Step]:
        """Everything that can happen next."""
        yield from self._source(w)
        yield from self._destination(w)
        yield from self._asking(w)
        if w.near and not w.cut:
            yield "the network is cut", "fault", w._replace(cut=True)

    def _go(self, state: Any, event: Event) -> Any:
        """The state after an event, by the table."""
        after = self.tables[type(state)][state].get(event)
        if after is None:
            raise Impossible(f"{state!r} does not allow {event!r}")
        self.used.add((state, event))
        return after

    def _sends(self, state: State) -> list[type[p.Message]]:
        return [event.message for event in self.tables[type(state)][state] if type(event) is Sent]

    # --- the source --------------------------------------------------------------------------

    def _source(self, w: World) -> Iterator[Step]:
        state = w.source
        if w.source_record == "declined":
            return  # a person has ended the VMM: there is nothing to go on with
        yield (
            "source's daemon dies",
            "fault",
            _left(w)._replace(source=RESTARTED_SOURCE[w.source_record]),
        )
        yield from self._source_does(w)
        for message in self._sends(state):
            if w.near and self._source_may(w, message):
                passed = w.passed or message is p.Pass
                after = w._replace(source=self._go(state, Sent(message)), passed=passed)
                if not w.cut:
                    after = after._replace(out=_with(w.out, message, after.source is state))
                kind: Kind = "" if message not in (p.Cancel, p.Error) or _over(w) else "fault"
                yield f"source sends {message.__name__}", kind, after
        if state is Source.LOADED and w.source_record == "granted":
            return  # between the record and the grant nothing but the daemon's death comes
        reads = w.near and w.back and (state not in NOBODY_READS or state in LOST)
        if reads:
            yield f"source takes {w.back[0].__name__}", "", self._source_takes(w)
        if w.near and (w.cut or (w.far == "closed" and not w.back)) and not _over(w):
            lost = w._replace(source=self._go(state, Happened.LOST), back=())
            yield "source sees the loss", "", _left(lost) if lost.source in LOST else lost
        if not _over(w) and (w.near or state not in LOST):
            failed = w._replace(source=self._go(state, Happened.FAILED))
            yield "source fails", "fault", _left(failed) if failed.source in LOST else failed
        if w.near and _over(w):
            yield "source closes", "", _left(w)
        if state in LOST and not w.near:
            yield "source dials", "", _dialled(w)
        if state in LOST | ASKS:
            yield from self._person_at_source(w)

    def _source_does(self, w: World) -> Iterator[Step]:
        """What it records and what it does with its VMM, in the order of the session."""
        state, record = w.source, w.source_record
        if state is Source.SERVING and record == "held":
            yield "source records intent", "", w._replace(source_record="intent")
        if state is Source.SAVING and w.here == "runs":
            yield "source stops", "", w._replace(here="stopped")
        if state in (Source.LOADED, Source.GRANTED) and record == "intent":
            yield "source records granted", "", w._replace(source_record="granted")
        if state in (Source.DECLINED, Source.TAKEN_BACK) and record == "granted":
            # Not held yet: a daemon that dies before the guest runs has to have it run again.
            again: Any = "held" if "held" in self.careless else "intent"
            yield f"source records {again} again", "", w._replace(source_record=again)
        elif state in HERE_AGAIN and w.here == "stopped":
            if record != "held" or state is not Source.ROLLED_BACK:
                yield "source runs its guest", "", w._replace(here="runs")
        elif state in HERE_AGAIN and w.here == "runs" and record != "held":
            yield "source records held", "", w._replace(source_record="held")
        if state is Source.DRAINED and record == "granted":
            yield "source records drained", "", w._replace(source_record="drained")
        if state is Source.DRAINED and record == "drained" and w.here == "stopped":
            yield "source ends its VMM", "", w._replace(here="ended")

    def _source_may(self, w: World, message: type[p.Message]) -> bool:
        """Whether what has to be done first was done."""
        if w.source is Source.LOADED and w.source_record == "granted":
            return message is p.Grant
        if message is p.Grant:
            return w.source_record == "granted" or "grant" in self.careless
        if message is p.Handover:
            return w.source_record == "intent"
        if message in (p.Device, p.Stale, p.DeviceEnd):
            return w.here == "stopped"
        if message is p.Pass:
            return w.source_record == "held" and not w.passed
        if message in LAST_WORDS:  # once it has it back, after its guest runs again
            said = w.out and w.out[-1] in LAST_WORDS
            return w.source is not Source.ROLLED_BACK or (w.here == "runs" and not said)
        if message is p.Acknowledged:
            return w.source_record == "drained"
        if message is p.Resume:
            return w.source in LOST and p.Hello not in w.back  # elsewhere it only looks
        return True

    def _source_takes(self, w: World) -> World:
        after = w._replace(source=self._go(w.source, Received(w.back[0])), back=w.back[1:])
        return _left(after) if after.source in LOST and w.back[0] is not p.Hello else after

    def _person_at_source(self, w: World) -> Iterator[Step]:
        gone = _left(w)._replace(source=self._go(w.source, Happened.LOST))
        if w.there in DEAD:
            back = gone._replace(source=self._go(gone.source, Happened.TAKEN_BACK))
            yield "a person takes it back", "person", back
        yield "a person ends it", "fault", gone._replace(here="ended", source_record="declined")

    # --- the destination's session -----------------------------------------------------------

    def _destination(self, w: World) -> Iterator[Step]:
        state = w.destination
        here, over = w.far == "session", w.destination in DESTINATION_OVER
        yield (
            "destination's daemon dies",
            "fault",
            w._replace(
                destination=RESTARTED_DESTINATION[w.destination_record],
                far="closed",
                out=(),
                left=(),
                stale=False,
            ),
        )
        yield from self._destination_does(w)
        for message in self._sends(state):
            if message is p.Checked or not self._destination_may(w, message):
                continue
            after = w._replace(destination=self._go(state, Sent(message)))
            if here and not w.cut:
                after = after._replace(back=_with(w.back, message, after.destination is state))
            kind: Kind = "fault" if message is p.Error and not over else ""
            yield f"destination sends {message.__name__}", kind, after
        if _answering(w):
            return  # between the record of an answer and the answer: nothing
        inbox = w.out if here else w.left
        if (
            inbox
            and state not in NOBODY_READS
            and (state is not Destination.RECEIVING or w.destination_record == "loading")
        ):
            yield f"destination takes {inbox[0].__name__}", "", self._destination_takes(w, inbox)
        if state not in NOBODY_READS:
            if w.cut if here else not w.left:
                yield "destination sees the loss", "", self._happened(w, Happened.LOST)
            elif not here:
                yield "destination sees a loss early", "fault", self._happened(w, Happened.LOST)
            fails: Kind = "" if w.there in DEAD and not w.whole else "fault"
            yield "destination fails", fails, self._happened(w, Happened.FAILED)
        if here and state in NOBODY_READS:
            yield "destination closes", "", w._replace(far="closed", out=())
        if not over and w.there not in DEAD and w.destination_record:
            yield "destination's VMM ends", "fault", w._replace(there=_dead(w))

    def _happened(self, w: World, event: Happened) -> World:
        after = w._replace(destination=self._go(w.destination, event), left=())
        if w.far == "session" and (event is Happened.LOST or after.destination in NOBODY_READS):
            return after._replace(out=())
        return after

    def _destination_does(self, w: World) -> Iterator[Step]:
        """What it records and what it does with its VMM, in the order of the session."""
        state, record = w.destination, w.destination_record
        if state is Destination.OFFERED and record == "":
            yield "destination records arriving", "", w._replace(destination_record="arriving")
        if state is Destination.RECEIVING and record == "arriving":
            yield "destination records loading", "", w._replace(destination_record="loading")
        if state in (Destination.GRANTED, Destination.RESUMED) and w.there == "waits":
            if record == "loading":
                yield "destination records owned", "", w._replace(destination_record="owned")
            if record == "owned" or "run" in self.careless:
                yield "destination runs the guest", "", w._replace(there="runs")
            if state is Destination.GRANTED:
                yield "destination cannot run it", "fault", w._replace(there="ended")
        declines = w.there == "ended" or "declined" in self.careless
        if state is Destination.GRANTED and declines and record in ("loading", "owned"):
            yield "destination records declined", "", w._replace(destination_record="declined")
        if state in LET_GO and record not in ("", "declined"):
            if record != "arriving" and w.there not in DEAD:
                yield "destination ends its VMM", "", w._replace(there=_dead(w))
            else:
                yield "destination records declined", "", w._replace(destination_record="declined")
        if state is Destination.RUNNING and w.there == "runs" and not w.whole:
            served = w.source in ASKS | {Source.GRANTED, Source.RAN}
            if served and w.near and w.far == "session" and not w.cut:
                yield "the last page comes", "", w._replace(whole=True)
        if state is Destination.RUNNING_LOST and w.here == "ended" and w.there not in DEAD:
            yield "a person ends the destination's VMM", "person", w._replace(there=_dead(w))
        drains = state is Destination.RUNNING or (
            state is Destination.RUNNING_LOST and w.there == "runs"
        )
        if drains and w.whole and record == "owned":
            yield "destination records drained", "", w._replace(destination_record="drained")

    def _destination_may(self, w: World, message: type[p.Message]) -> bool:
        """Whether what has to be done first was done."""
        if _answering(w):
            return message in (p.Drained, p.Declined)
        if message is p.Queued:
            return w.destination_record == ""
        if message is p.Ready:
            return w.destination_record not in ("", "declined")
        if message is p.Loaded:
            return w.destination_record == "loading" and w.there == "waits"
        if message is p.Ran:
            return w.there in ("runs", "died")
        if message in (p.Drained, p.Declined):
            return False
        return message is not p.Error or w.far == "session"

    def _destination_takes(self, w: World, inbox: Messages) -> World:
        rest: dict[str, Any] = {("out" if w.far == "session" else "left"): inbox[1:]}
        return w._replace(destination=self._go(w.destination, Received(inbox[0])), **rest)

    # --- a connection that asks --------------------------------------------------------------

    def _asking(self, w: World) -> Iterator[Step]:
        """The destination's end of a connection whose session is not known yet, and old asks."""
        if w.stale:
            answer = self._answer(w)
            if isinstance(answer, World):
                what = "drops its session for" if answer.destination is w.destination else "resumes"
                yield f"destination {what} an old ask", "fault", answer
                if answer.destination is not w.destination:
                    yield "destination resumes the last old ask", "", answer._replace(stale=False)
            elif answer is not None:
                yield "destination answers an old ask", "", w._replace(stale=False)
        if not isinstance(door := w.far, Destination):
            return
        if w.cut or door in NOBODY_READS:
            if w.cut:
                self._go(door, Happened.LOST)
            yield "the door closes", "", w._replace(far="closed", out=())
        if w.out and door not in NOBODY_READS:
            taken = w._replace(far=self._go(door, Received(w.out[0])), out=w.out[1:])
            yield f"the door takes {w.out[0].__name__}", "", taken
        if p.Error in self._sends(door) and door not in NOBODY_READS:
            yield "the door refuses", "fault", self._told(w, p.Error)
        if door is Destination.ASKED_LATER:
            answer = self._answer(w)
            if isinstance(answer, World):
                if answer.destination is not w.destination:
                    answer = answer._replace(far="session")
                yield "destination hears the ask", "", answer
            elif answer is not None:
                yield f"the door sends {answer.__name__}", "", self._told(w, answer)

    def _told(self, w: World, message: type[p.Message]) -> World:
        after = w._replace(far=self._go(w.far, Sent(message)))
        return after if w.cut else after._replace(back=(*w.back, message))

    def _answer(self, w: World) -> World | type[p.Message] | None:
        """What an ask leads to now: a message; or a session dropped or resumed; None: it waits."""
        state, record = w.destination, w.destination_record
        if _answering(w):
            return None
        if state is Destination.RUNNING_LOST:
            if w.far == "session":
                return None  # it closes first
            if w.there in DEAD:
                return p.Error
            return w._replace(destination=self._go(state, Received(p.Resume)), left=())
        if state in DESTINATION_OVER:
            return ANSWERS.get(record)
        if w.far == "session":
            return w._replace(far="closed", out=(), left=())
        return w._replace(left=()) if w.left else None


def _with(queue: Messages, message: type[p.Message], idle: bool) -> Messages:
    """A message behind the others; an idle one only if none is the last of them."""
    return queue if idle and queue and queue[-1] in IDLE else (*queue, message)


IDLE = frozenset(
    {p.Queued, p.Device, p.Stale, p.Have, p.Serving, p.Progress, p.Ready, p.Acknowledged, p.Error}
)
LAST_WORDS = frozenset({p.Cancel, p.Error})


def _dead(w: World) -> Any:
    return "ended" if w.there == "waits" else "died"


def _over(w: World) -> bool:
    return w.source in SOURCE_OVER


def _answering(w: World) -> bool:
    state, record = w.destination, w.destination_record
    return (record == "drained" and state in (Destination.RUNNING, Destination.RUNNING_LOST)) or (
        record == "declined" and state is Destination.GRANTED
    )


def _left(w: World) -> World:
    """The source has let go of its connection; the destination may read what is in it."""
    if not w.near:
        return w
    asked = isinstance(w.far, Destination) and (
        p.Resume in w.out or w.far is Destination.ASKED_LATER
    )
    left = w.out if w.far == "session" else w.left
    return w._replace(
        near=False, far="closed", out=(), back=(), cut=False, left=left, stale=w.stale or asked
    )


def _dialled(w: World) -> World:
    return w._replace(near=True, far=Destination.GREETING, out=(p.Hello,), back=(p.Hello,))


class Walk:
    """All worlds that can be reached from START, each with how it was reached first (`came`) and
    with what can happen next (`steps`); `impossible` are those in which a table lacks something.

    The walk ends early once `enough` says so of what has been walked, asked whenever that has
    doubled."""

    def __init__(self, model: Model, enough: Callable[[Walk], bool] = lambda _: False) -> None:
        self.impossible: dict[World, str] = {}
        self.came: dict[World, tuple[str, World] | None] = {START: None}
        self.steps: dict[World, list[Step]] = {}
        gc.disable()  # nothing of this is garbage, and looking is a third of the time
        try:
            self._walk(model, enough)
        finally:
            gc.enable()

    def _walk(self, model: Model, enough: Callable[[Walk], bool]) -> None:
        same = {START: START}
        queue = deque([START])
        look = 1000
        while queue:
            if len(self.steps) == look:
                if enough(self):
                    return
                look *= 2
            world = queue.popleft()
            found = self.steps[world] = []
            try:
                for name, kind, after in model.steps(world):
                    known = same.setdefault(after, after)
                    found.append((name, kind, known))
                    if known not in self.came:
                        self.came[known] = (name, world)
                        queue.append(known)
            except Impossible as error:
                self.impossible[world] = str(error)

    def story(self, world: World) -> str:
        """How a world came to be, for the message of a failure."""
        lines = [repr(world)]
        while (before := self.came[world]) is not None:
            lines.append(before[0])
            world = before[1]
        return "\n".join(reversed(lines))

    def leads_to(self, ends: Callable[[World], bool], kinds: frozenset[str]) -> set[World]:
        """The worlds from which some steps of these kinds lead to one of the ends."""
        before = self._before(kinds)
        good = {world for world in self.came if ends(world)}
        queue = deque(good)
        while queue:
            for world in before.get(queue.popleft(), ()):
                if world not in good:
                    good.add(world)
                    queue.append(world)
        return good

    def always_leads_to(self, ends: Callable[[World], bool]) -> set[World]:
        """The worlds that come to one of the ends by themselves, whatever happens in which order,
        if no side says for ever what changes nothing."""
        before = self._before(frozenset({""}), idle=False)
        ways = Counter(world for worlds in before.values() for world in worlds)
        queue = deque(world for world in self.came if ends(world))
        good = set(queue)
        while queue:
            for world in before.get(queue.popleft(), ()):
                ways[world] -= 1
                if not ways[world] and world not in good:
                    good.add(world)
                    queue.append(world)
        return good

    def _before(self, kinds: frozenset[str], *, idle: bool = True) -> dict[World, list[World]]:
        before: dict[World, list[World]] = {}
        for world, steps in self.steps.items():
            for name, kind, after in steps:
                says = " sends " in name and _states(world) == _states(after)
                if kind in kinds and (idle or not says):
                    before.setdefault(after, []).append(world)
        return before


def _states(w: World) -> tuple[State, State, object]:
    return w.source, w.destination, w.far
