"""A discrete-event simulation of actors and a learner under a rule of admission, in virtual milliseconds.

A group takes its length times the actor's time a token; lengths are lognormal with sigma 1, half of the
variance the prompt's own and half chance, capped at 8 times the median. An actor keeps a fixed number of
groups under way and asks again when it is woken or has waited 5 s; a withdrawn lease ends with its
actor's next heartbeat. A step takes the learner a fixed time; weights arrive at once.
"""

from __future__ import annotations

import heapq
from itertools import count
from typing import Any

import msgspec
import numpy as np

from benchmarks.rules import Rule, Ticket

MEDIAN, CAP = 1_000, 8
"""Median length in tokens, and the cap as a multiple of it."""
TOKEN_MS = 10
RETRY_MS = 5_000
BEAT_MS = 3_000


class Fleet(msgspec.Struct, frozen=True):
    """The actors: how many groups each keeps under way, and how much slower than others it is."""

    slots: int
    """Groups an actor keeps under way."""
    slowness: dict[str, float]
    """By actor, factor on its time a token; 1: as fast as any."""


class Figures(msgspec.Struct):
    """What a simulated run came to."""

    step_ms: float = 0.0
    """Mean time of a step after the first quarter of them."""
    first_slow_step: int = -1
    """The head when an actor was first answered `slow`, -1 if none was."""
    slow_actors: list[str] = []
    """Actors that were ever answered `slow`."""
    wasted: float = 0.0
    """Share of the tokens generated that were never trained because their group was dropped."""
    bias: float = 0.0
    """Mean length of trained groups over that of generated ones, of groups whose deadline lies in the run."""
    violations: int = 0
    """Groups trained more than eta steps after the version that began them."""
    staleness: float = 0.0
    """Mean staleness in steps of trained groups."""
    steps: int = 0
    """Steps trained."""


def length(position: int, attempt: int) -> int:
    """Tokens of a group: the same for every rule."""
    own = np.random.default_rng([position]).normal()
    chance = np.random.default_rng([position, attempt + 1]).normal()
    return int(min(MEDIAN * np.exp((own + chance) * np.sqrt(0.5)), CAP * MEDIAN))


class Simulation:
    """One run of a rule with a fleet."""

    def __init__(self, rule: Rule, fleet: Fleet, *, eta: int, steps: int, step_ms: int) -> None:
        self.rule, self.fleet, self.eta, self.steps, self.step_ms = rule, fleet, eta, steps, step_ms
        self.events: list[tuple[int, int, str, Any]] = []
        self.order = count()
        self.now, self.head, self.version, self.training = 0, 0, 0, False
        self.running: dict[str, tuple[Ticket, int]] = {}
        self.tickets: dict[str, Ticket] = {}
        self.waiting: set[str] = set()
        self.busy = dict.fromkeys(fleet.slowness, 0)
        self.ended: list[int] = []
        self.trained: dict[str, int] = {}
        self.wasted_tokens = self.generated_tokens = 0.0
        self.figures = Figures()

    def run(self) -> Figures:
        """Plays until the last step is trained."""
        self._admit_all()
        while self.version < self.steps:
            self.now, _, kind, what = heapq.heappop(self.events)
            getattr(self, f"_{kind}")(what)
        self._conclude()
        return self.figures

    def _at(self, delay: float, kind: str, what: Any = None) -> None:
        heapq.heappush(self.events, (self.now + int(delay), next(self.order), kind, what))

    def _admit_all(self) -> None:
        """One group for each actor that has a place for it and is not turned away, again and again."""
        asking = sorted(self.busy, key=lambda name: (self.busy[name], name))
        while asking:
            asking = [actor for actor in asking if self._admit_one(actor)]

    def _admit_one(self, actor: str) -> bool:
        if self.busy[actor] >= self.fleet.slots:
            return False
        ticket = self.rule.admit(actor, self.now)
        if isinstance(ticket, str):
            self._turned_away(actor, ticket)
            return False
        self.busy[actor] += 1
        self.tickets[ticket.name] = ticket
        self.running[ticket.name] = (ticket, self.now)
        tokens = length(ticket.position, ticket.attempt)
        self._at(tokens * TOKEN_MS * self.fleet.slowness[actor], "finished", ticket)
        return True

    def _admit(self, actor: str) -> None:
        while self._admit_one(actor):
            pass

    def _turned_away(self, actor: str, reason: str) -> None:
        if reason == "slow" and actor not in self.figures.slow_actors:
            self.figures.slow_actors.append(actor)
            if self.figures.first_slow_step < 0:
                self.figures.first_slow_step = self.head
        if actor not in self.waiting:
            self.waiting.add(actor)
            self._at(RETRY_MS, "retry", actor)

    def _retry(self, actor: str) -> None:
        self.waiting.discard(actor)
        self._admit(actor)

    def _finished(self, ticket: Ticket) -> None:
        if self.running.pop(ticket.name, None) is None:
            return  # it was told to stop
        tokens = length(ticket.position, ticket.attempt)
        self.generated_tokens += tokens
        self.busy[ticket.actor] -= 1
        if not self.rule.publish(ticket, self.now):
            self.wasted_tokens += tokens
        self._assign()
        self._admit(ticket.actor)

    def _assign(self) -> None:
        if self.training:
            return
        taken = self.rule.assign(self.head, self.now)
        for name in self.rule.given_up():
            self._at(BEAT_MS * (next(self.order) % 8) / 8, "stop", name)
        if taken:
            for name in taken:
                self.trained[name] = self.head
            self.head, self.training = self.head + 1, True
            self._at(self.step_ms, "stepped")
            self._admit_all()

    def _stop(self, name: str) -> None:
        ticket, started = self.running.pop(name, (None, 0))
        if ticket is not None:
            tokens = (self.now - started) / TOKEN_MS / self.fleet.slowness[ticket.actor]
            self.generated_tokens += tokens
            self.wasted_tokens += tokens
            self.busy[ticket.actor] -= 1
            self._admit(ticket.actor)

    def _stepped(self, _: None) -> None:
        self.version, self.training = self.version + 1, False
        self.ended.append(self.now)
        self.rule.commit(self.version, self.now)
        self._admit_all()
        self._assign()

    def _conclude(self) -> None:
        figures, after = self.figures, self.steps // 4
        figures.steps = self.steps
        figures.step_ms = (self.ended[-1] - self.ended[after - 1]) / (self.steps - after)
        ages = [step - self.tickets[name].version for name, step in self.trained.items()]
        figures.staleness = float(np.mean(ages))
        figures.violations = sum(age > self.eta for age in ages)
        figures.wasted = self.wasted_tokens / max(1.0, self.generated_tokens)
        due = [one for one in self.tickets.values() if one.version + self.eta < self.steps]
        made = [length(one.position, one.attempt) for one in due]
        used = [length(one.position, one.attempt) for one in due if one.name in self.trained]
        figures.bias = float(np.mean(used) / np.mean(made))
