"""Any order of events: the server does what the model does, and no invariant breaks.

After every step: each admitted group is accounted for once (I1), no group stands in two manifests (I2),
no group is assigned at a staleness above eta (I3), and everything Redis holds of the run (leases, queue,
deadlines, manifests, versions, paces, payloads) is what the model says. Learners crash and are restored,
zombies write, servers come back older, lineages fork, replies are lost, data ends.

`--hypothesis-profile thorough` (`make nightly`) runs 2,000 examples of up to 200 steps.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from buffer.client import Stream
from tests.contract.scripts import ACTIONS, some_rules
from tests.contract.walk import Walk

CHOICE = st.integers(0, 7)
"""Which of what there is; taken modulo its number."""


class Events(RuleBasedStateMachine):
    """One `Walk` an example, on a run of its own; a rule for each of `ACTIONS` is added below."""

    stream: Stream

    @initialize(seed=st.integers(0, 1 << 20))
    def start(self, seed: int) -> None:
        """Settings by a generator: hypothesis would mostly try runs that are over after a step."""
        self.walk = Walk(
            Stream(self.stream.redis, f"machine-{secrets.token_hex(4)}"), **some_rules(Random(seed))
        )
        self.walk.feed(7)

    @rule(actor=CHOICE, steps=st.integers(1, 4))
    def train(self, actor: int, steps: int) -> None:
        """One actor fills batches and serves every version while older leases stay out."""
        model = self.walk.model
        for _ in range(steps):
            if len(model.prompts) < model.batch:
                self.walk.feed(7)
            for _ in range(model.batch):
                held = set(model.leases)
                self.walk.admit(actor)
                for token in model.leases.keys() - held:
                    self.walk.publish(sorted(model.leases).index(token))
            self.walk.assign()
            self.walk.commit(0)
            self.walk.applied(actor, 0)

    @invariant()
    def all_holds(self) -> None:
        """The server is as the model says."""
        self.walk.check()


def _event(name: str) -> Callable[..., None]:
    def happens(self: Events, **choices: int) -> None:
        getattr(self.walk, name)(*choices.values())

    happens.__name__ = name
    return happens


for _name, (_arguments, _) in ACTIONS.items():
    _choices = dict.fromkeys("ab"[:_arguments], CHOICE)
    setattr(Events, _name, rule(**_choices)(_event(_name)))


def test_every_order_of_events_keeps_the_invariants(stream: Stream) -> None:
    Events.stream = stream
    thorough = settings.default is not None and settings.default.max_examples >= 2000
    examples, steps = (2000, 200) if thorough else (100, 60)
    run_state_machine_as_test(Events, settings=settings(max_examples=examples, stateful_step_count=steps))
