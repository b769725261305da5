"""Any order of events: the server does what the model does, and no invariant breaks.

After every step: each admitted group is accounted for once (conservation), no group stands in two
manifests, no group is assigned at a staleness above eta, the `outstanding` hash is the sum over
leases and queue, and exactly the payloads still needed are kept.
"""

from __future__ import annotations

import secrets
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from buffer.client import Stream
from tests.contract.walk import Walk

CHOICE = st.integers(0, 7)
"""Which of what there is; taken modulo its number."""


def test_every_order_of_events_keeps_the_invariants(stream: Stream) -> None:
    class Machine(RuleBasedStateMachine):
        """One `Walk` an example, on a run of its own."""

        @initialize(seed=st.integers(0, 1 << 20))
        def start(self, seed: int) -> None:
            """Settings by a generator: hypothesis would mostly try runs that are over after a step."""
            pick = Random(seed).choice
            self.walk = Walk(
                Stream(stream.redis, f"machine-{secrets.token_hex(4)}"),
                batch=pick([1, 1, 2, 3, 4]),
                eta=pick([0, 1, 2, 3]),
                max_steps=pick([2, 4, 50, 50]),
                attempts=pick([1, 2, 3]),
                actors=pick([2, 3]),
            )
            self.walk.feed(7)

        @rule(count=CHOICE)
        def feed(self, count: int) -> None:
            self.walk.feed(count)

        @rule(choice=CHOICE, repeat=CHOICE)
        def admit(self, choice: int, repeat: int) -> None:
            self.walk.admit(choice, repeat)

        @rule(choice=CHOICE, newer=CHOICE)
        def publish(self, choice: int, newer: int) -> None:
            self.walk.publish(choice, newer)

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

        @rule(choice=CHOICE)
        def publish_again(self, choice: int) -> None:
            self.walk.publish_again(choice)

        @rule(choice=CHOICE)
        def publish_late(self, choice: int) -> None:
            self.walk.publish_late(choice)

        @rule(choice=CHOICE, fault=CHOICE)
        def publish_unsound(self, choice: int, fault: int) -> None:
            self.walk.publish_unsound(choice, fault)

        @rule(choice=CHOICE, reason=CHOICE)
        def drop(self, choice: int, reason: int) -> None:
            self.walk.drop(choice, reason)

        @rule()
        def assign(self) -> None:
            self.walk.assign()

        @rule(choice=CHOICE)
        def assign_again(self, choice: int) -> None:
            self.walk.assign_again(choice)

        @rule(lag=CHOICE)
        def commit(self, lag: int) -> None:
            self.walk.commit(lag)

        @rule(choice=CHOICE, back=CHOICE)
        def applied(self, choice: int, back: int) -> None:
            self.walk.applied(choice, back)

        @rule(choice=CHOICE, mask=st.integers(0, 255))
        def heartbeat(self, choice: int, mask: int) -> None:
            self.walk.heartbeat(choice, mask)

        @rule(choice=CHOICE)
        def elapse(self, choice: int) -> None:
            self.walk.elapse(choice)

        @rule(choice=CHOICE)
        def clock_jumps(self, choice: int) -> None:
            self.walk.clock_jumps(choice)

        @rule(choice=CHOICE, leaves=CHOICE)
        def actor_restarts(self, choice: int, leaves: int) -> None:
            self.walk.actor_restarts(choice, leaves)

        @rule()
        def learner_restarts(self) -> None:
            self.walk.learner_restarts()

        @invariant()
        def all_holds(self) -> None:
            self.walk.check()

    run_state_machine_as_test(Machine, settings=settings(max_examples=100, stateful_step_count=60))
