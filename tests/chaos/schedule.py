# SPDX-License-Identifier: Apache-2.0
"""What shall break, when, and for how long: an endless sequence of faults that a seed decides.

Pure: no clock, no process, no network. A fault is aimed at a phase of a migration; when that phase
comes is for the run to find out (chaos.py), and what really was under way is what its log says.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import cycle

IDLE, PREPARE, ADOPTION = "idle", "prepare", "adoption"
PRECOPY, HANDOVER = "precopy", "handover"
GRANTED, POSTCOPY, RECOVERY, DRAINED = "granted", "postcopy", "recovery", "drained"
PHASES = (IDLE, PREPARE, ADOPTION, PRECOPY, HANDOVER, GRANTED, POSTCOPY, RECOVERY, DRAINED)

# A round comes to each phase in this order, so that one migration can meet several of its faults.
# What fails before the grant is tried again, what fails after it recovers: most faults go there.
ROUND = (
    IDLE, PREPARE, ADOPTION, PRECOPY, PRECOPY, HANDOVER,
    GRANTED, RECOVERY, RECOVERY, POSTCOPY, RECOVERY, RECOVERY, DRAINED,
)  # fmt: skip
LEFT_OUT = 0.1
"""The share of a round's faults that are left out, so that no two rounds need be alike."""

NOW = "now"
"""A moment that has always come: the fault is timed from the one before it."""

PATIENCE = {RECOVERY: 1.0}
"""Seconds to wait for a moment that may never come: the fault before may have broken nothing."""

# What a fault waits for: a message on its way through the proxy (docs/PROTOCOL.md has them), or a
# state of the run. The number: seconds after it at most.
MOMENTS: dict[str, tuple[tuple[str, ...], float]] = {
    IDLE: (("idle",), 0.3),
    PREPARE: (("hello", "offer"), 0.02),
    ADOPTION: (("offer", "ready", "serving"), 0.06),
    PRECOPY: (("serving", "pass", "passed"), 1.0),
    HANDOVER: (("handover", "device", "deviceEnd", "loaded"), 0.01),
    GRANTED: (("grant",), 0.005),
    POSTCOPY: (("postcopy",), 1.5),
    RECOVERY: ((NOW, "resume", "have"), 1.0),
    DRAINED: (("drained", "acknowledged"), 0.1),
}

BOTH, SOURCE, DESTINATION = "both", "source", "destination"
GUEST = "guest"  # the QEMU that runs it
ALL, CONTROL, URGENT, PUSH = "all", "control", "urgent", "push"

# Whom each kind of fault may meet, and for how many seconds. Of two ranges the first is taken three
# times as often: a daemon takes its peer for dead after 10 s of silence (protocol.DEAD_S).
Range = tuple[float, float]
KINDS: dict[str, tuple[tuple[str, ...], tuple[Range, ...]]] = {
    "kill": ((SOURCE, DESTINATION, BOTH), ((0, 1),)),  # until it is started again
    "terminate": ((SOURCE, DESTINATION), ((0, 1),)),
    "stop": ((SOURCE, DESTINATION), ((0.1, 3),)),
    "cut": ((ALL, CONTROL, URGENT, PUSH), ()),
    "reset": ((ALL, CONTROL, URGENT, PUSH), ()),
    "destroy": ((SOURCE, DESTINATION), ()),  # its sockets, by the kernel
    "stall": ((BOTH, SOURCE, DESTINATION), ((0.2, 2), (9, 12))),  # what goes to these
    "refuse": ((ALL,), ((1, 3),)),  # cuts, and takes no new connections
    "cancel": ((SOURCE,), ()),  # by a person
    "freeze": ((SOURCE, DESTINATION), ((0.2, 2), (4, 12))),  # its QEMU answers late
    "full": ((SOURCE, DESTINATION, BOTH), ((0.3, 3),)),  # its state folder
    "save": ((GUEST,), ()),  # another's, by QEMU's own migration
    "leave": ((GUEST,), ()),  # the same to a third QEMU
    "unplug": ((GUEST,), ()),  # devices, by another
    "shutdown": ((GUEST,), ()),  # the guest is switched off from within
}
# Without a connection there is none to break; what was granted cannot be cancelled, and a QEMU that
# gives its guest away, or has done so, is moved by nobody else.
IDLE_KINDS = ("kill", "terminate", "stop", "refuse", "freeze", "full")
EARLY = (PREPARE, ADOPTION, PRECOPY)
LATE = (GRANTED, POSTCOPY, RECOVERY, DRAINED)
ONLY = {
    "cancel": (*EARLY, HANDOVER),
    "save": (*EARLY, POSTCOPY, RECOVERY),
    "leave": EARLY,
    "unplug": (*EARLY, POSTCOPY, RECOVERY),
    "shutdown": (*EARLY, POSTCOPY, RECOVERY),
}


def possible(phase: str) -> tuple[str, ...]:
    """The kinds of faults that can be met in a phase."""
    if phase == IDLE:
        return IDLE_KINDS
    return tuple(kind for kind in KINDS if phase in ONLY.get(kind, PHASES))


@dataclass(frozen=True)
class Fault:
    """One fault: `delay` seconds after `moment`; with 0 the message waits until it has happened."""

    phase: str
    moment: str
    delay: float
    kind: str
    victim: str
    seconds: float
    """How long it lasts, 0 for what lasts no time."""

    def __str__(self) -> str:
        lasts = f" {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.kind} {self.victim}{lasts}"


def schedule(
    seed: int, phases: Collection[str] = PHASES, kinds: Collection[str] = tuple(KINDS)
) -> Iterator[Fault]:
    """The faults of a seed, without end; only those aimed at `phases`, only of these `kinds`.

    Every phase meets every kind before it meets one again.
    """
    if not (phases and kinds and set(phases) <= set(PHASES) and set(kinds) <= set(KINDS)):
        raise ValueError(f"no faults of the kinds {[*kinds]} in the phases {[*phases]}")
    if not any(set(possible(phase)) & set(kinds) for phase in phases):
        raise ValueError(f"no fault of the kinds {[*kinds]} can come in the phases {[*phases]}")
    dice = random.Random(seed)
    decks: dict[str, list[str]] = {phase: [] for phase in PHASES}
    for phase in cycle(ROUND):
        left_out = dice.random() < LEFT_OUT
        here = [kind for kind in possible(phase) if kind in kinds]
        if left_out or phase not in phases or not here:
            continue
        deck = decks[phase]
        if not deck:
            deck += here
            dice.shuffle(deck)
        yield _fault(dice, phase, deck.pop())


@dataclass(frozen=True)
class Move:
    """How one migration is made: with this share of the run's bandwidth, and these words more."""

    mode: str
    share: float
    words: tuple[str, ...]


def moves(seed: int) -> Iterator[Move]:
    """The migrations of a seed, without end: most of them hybrid, now and then a precopy that is
    bound to fail or one that is not."""
    dice = random.Random(f"moves of {seed}")
    while True:
        mode = dice.choice((*["hybrid"] * 7, *["postcopy"] * 3, "precopy"))
        share, words = 1.0, tuple[str, ...]()
        if mode == "hybrid":
            # So few passes that something is left for postcopy, mostly.
            words = ("--precopy-passes", dice.choice("11123"))
        elif mode == "precopy":
            share = dice.choice((1.0, 1.0, 0.5))
            fails = ("--max-downtime", "1", "--precopy-passes", "1")
            words = ("--max-downtime", "5000") if share == 1 else fails
        yield Move(mode, share, words)


def _fault(dice: random.Random, phase: str, kind: str) -> Fault:
    moments, most = MOMENTS[phase]
    moment = dice.choice(moments)
    # Half of them at the very moment: the rarest phases last a few milliseconds.
    exact = moment not in (NOW, "idle", "postcopy") and dice.random() < 0.5
    delay = 0.0 if exact else dice.uniform(0, most)
    victims, ranges = KINDS[kind]
    victim = dice.choice(victims)
    seconds = 0.0
    if ranges:
        seconds = dice.uniform(*dice.choice((*[ranges[0]] * 3, ranges[-1])))
    return Fault(phase, moment, round(delay, 4), kind, victim, round(seconds, 3))
