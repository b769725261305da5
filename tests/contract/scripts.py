"""Walks without hypothesis: short scripts that end in a rare place, and seeded random ones."""

from __future__ import annotations

from random import Random

from buffer.client import Stream
from tests.contract.walk import Walk

ACTIONS = {
    # name: (arguments, weight)
    "feed": (1, 2),
    "assign": (0, 6),
    "assign_again": (1, 1),
    "commit": (1, 4),
    "learner_restarts": (0, 1),
    "admit": (2, 10),
    "publish": (2, 8),
    "publish_again": (1, 1),
    "publish_late": (1, 1),
    "publish_unsound": (2, 1),
    "drop": (2, 1),
    "heartbeat": (2, 2),
    "applied": (2, 3),
    "actor_restarts": (2, 1),
    "elapse": (1, 1),
    "clock_jumps": (1, 1),
}
"""Every step a walk can take; the weights are those of `random_walk`."""

SCRIPTS = {
    "an earlier deadline is still leased": (
        {"batch": 1, "eta": 1},
        # Lease 0 stays out while the head moves to its deadline, so the later group may not be taken.
        "feed 7, admit 0, admit 0, publish 1, assign, commit 0, applied 0 0, admit 0, publish 1, assign, "
        "publish 0, assign, assign, assign",
    ),
    "two earlier deadlines, one place": (
        {"batch": 1, "eta": 2},
        "feed 7, admit 0, admit 0, admit 0, publish 2, assign, commit 0, applied 0 0, admit 0, publish 2, "
        "assign, assign, publish 1, assign, assign",
    ),
    "an actor stays behind": (
        {"batch": 1, "eta": 1},
        "feed 7, admit 0, publish 0, assign, commit 0, applied 1 0, admit 1, publish 0, assign, commit 0, "
        "admit 0, admit 1",
    ),
    "leases up to the bound": ({"batch": 2, "eta": 1}, "feed 7, admit 0, admit 0, admit 0, admit 0, admit 0"),
    "the end of the run is covered": (
        {"batch": 1, "eta": 1, "max_steps": 1},
        "feed 7, admit 0, admit 0, publish 0, assign, admit 0, assign",
    ),
    "a group that is not what its lease allows": (
        {"batch": 1, "eta": 2, "attempts": 9},
        "feed 7, admit 0, publish 0, assign, commit 0, applied 0 0, admit 0, publish_unsound 0 3, admit 0, "
        "publish_unsound 0 0, admit 0, publish_unsound 0 1, admit 0, publish_unsound 0 2, publish_late 0, "
        "admit 0, publish_unsound 0 4",
    ),
    "a lease is renewed, then not": (
        {"batch": 1, "eta": 1, "attempts": 2},
        "feed 7, admit 0, admit 0, elapse 0, elapse 0, heartbeat 0 2, elapse 0, elapse 0, elapse 0, "
        "publish_late 0",
    ),
    "a prompt is retired": (
        {"batch": 1, "eta": 1, "attempts": 2},
        "feed 0, admit 0, drop 0 1, admit 0, drop 0 1, admit 0",
    ),
    "repeats": (
        {"batch": 1, "eta": 1},
        "feed 7, admit 0 1, publish 0, publish_again 0, assign, publish_again 0, assign_again 0, commit 0, "
        "publish_again 0, assign_again 0",
    ),
}
"""What is reached -> (settings, steps: names of `Walk` with their numbers)."""


def scripted_walk(stream: Stream, name: str) -> None:
    """One of `SCRIPTS`, checked after each step."""
    settings, steps = SCRIPTS[name]
    walk = Walk(stream, **{"max_steps": 10, "attempts": 3, "actors": 2, **settings})
    for step in steps.split(", "):
        action, *numbers = step.split()
        getattr(walk, action)(*map(int, numbers))
        walk.check()


def random_walk(stream: Stream, seed: int, steps: int) -> None:
    """A walk of random steps from a seed, checked after each.

    Each seed draws how common every action is, so that some walks go where an average one does not.
    """
    source = Random(seed)
    batch, eta, max_steps = source.randint(1, 4), source.randint(0, 3), source.randint(3, 12)
    walk = Walk(stream, batch=batch, eta=eta, max_steps=max_steps, attempts=source.randint(1, 3), actors=2)
    weights = [weight * source.choice((0.3, 1.0, 3.0)) for _, weight in ACTIONS.values()]
    for name in source.choices(list(ACTIONS), weights, k=steps):
        getattr(walk, name)(*[source.randrange(1 << 10) for _ in range(ACTIONS[name][0])])
        walk.check()
