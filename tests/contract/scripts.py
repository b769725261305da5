"""Walks without hypothesis: short scripts that end in a rare place, and seeded random ones."""

from __future__ import annotations

from random import Random
from typing import Any

from buffer.client import Stream
from tests.contract.walk import Walk

ACTIONS = {
    # name: (arguments, weight)
    "feed": (1, 2),
    "assign": (0, 6),
    "assign_again": (1, 1),
    "strike": (1, 1),
    "checkpoint": (1, 1),
    "fork": (1, 0.3),
    "save": (0, 1),
    "roll_back": (0, 1),
    "end_data": (1, 0.3),
    "requeue": (1, 1),
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
    "elapse": (1, 3),
    "clock_jumps": (1, 1),
}
"""Every step a walk can take; the weights are those of `random_walk`."""

STEP = "admit 0, publish {}, assign, commit 0, applied 0 0"
"""An actor fills a batch of one, beside as many older leases as the number says."""

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
        {"batch": 1, "eta": 2, "attempts_max": 9},
        "feed 7, admit 0, publish 0, assign, commit 0, applied 0 0, admit 0, publish_unsound 0 3, admit 0, "
        "publish_unsound 0 0, admit 0, publish_unsound 0 1, admit 0, publish_unsound 0 2, publish_late 0, "
        "admit 0, publish_unsound 0 4",
    ),
    "a lease is renewed, then not": (
        {"batch": 1, "eta": 1, "attempts_max": 2},
        "feed 7, admit 0, admit 0, elapse 0, elapse 0, heartbeat 0 2, elapse 0, elapse 0, elapse 0, "
        "publish_late 0",
    ),
    "a prompt is retired": (
        {"batch": 1, "eta": 1, "attempts_max": 2},
        "feed 0, admit 0, drop 0 1, admit 0, drop 0 1, admit 0",
    ),
    "repeats": (
        {"batch": 1, "eta": 1},
        "feed 7, admit 0 1, publish 0, publish_again 0, assign, publish_again 0, assign_again 0, commit 0, "
        "publish_again 0, assign_again 0",
    ),
    "payloads fill the memory": (
        {"batch": 2, "eta": 1, "bytes_limit": 14},
        "feed 7, admit 0, publish 0, admit 0, admit 0, assign",
    ),
    "a slow actor gets a probe, then nothing, and the probe is abandoned": (
        {"batch": 1, "eta": 3, "max_steps": 50},
        f"feed 7, elapse 0, admit 1, {STEP.format(1)}, {STEP.format(1)}, elapse 1, admit 1, admit 1, "
        "admit 0, publish 2, assign",
    ),
    "a slow actor's ordinary lease is abandoned, too": (
        {"batch": 1, "eta": 3, "max_steps": 50, "actors": 3},
        f"feed 7, elapse 0, admit 1, admit 2, {STEP.format(2)}, applied 2 0, {STEP.format(2)}, applied 2 0, "
        "elapse 1, elapse 2, admit 2, admit 0, publish 3, assign",
    ),
    "late groups are dropped, as few as can be": (
        {"batch": 2, "eta": 2, "policy": "drop"},
        f"feed 7{', admit 0' * 6}, publish 4, publish 4, assign, commit 0, applied 0 0, "
        "drop 0 0, admit 0, admit 0, publish 3, publish 3, assign",
    ),
    "surplus is dropped when it is due": (
        {"batch": 1, "eta": 0, "policy": "drop", "cap": 2},
        "feed 7, admit 0, admit 0, publish 0, publish 0, assign",
    ),
    "a checkpoint is due": (
        {"batch": 1, "eta": 1, "uncovered_max": 2},
        "feed 7, admit 0, publish 0, assign, commit 2, applied 0 0, admit 0, publish 0, assign, commit 2, "
        "applied 0 0, admit 0, publish 0, assign, checkpoint 0, assign",
    ),
    "records that cannot be read": (
        {"batch": 2, "eta": 1},
        "feed 7, admit 0, admit 0, publish 0, publish 0, assign, strike 1, commit 1, strike 1, admit 0, "
        "publish 0, strike 0, strike 0, strike 0, requeue 0",
    ),
    "no lease lives for ever": (
        {"batch": 1, "eta": 1},
        "feed 7, admit 0, elapse 0, publish 0, admit 0" + ", elapse 0, heartbeat 0 1" * 15,
    ),
    "an engine's version does not go back": (
        {"batch": 1, "eta": 1},
        f"feed 7, {STEP.format(0)}, applied 0 1",
    ),
    "a fork takes weights back": (
        {"batch": 1, "eta": 1},
        f"feed 7, {STEP.format(0)}, admit 0, fork 1, admit 0, {STEP.format(0)}",
    ),
    "the data ends with a short batch": (
        {"batch": 2, "eta": 1},
        "feed 2, admit 0, admit 0, publish 0, assign, end_data 0, publish 0, assign, admit 0, assign, "
        "publish 0, assign, assign",
    ),
    "an older server, and groups that are due no more": (
        {"batch": 1, "eta": 1, "attempts_max": 1},
        f"feed 7, admit 0, admit 0, publish 0, save, drop 0 0, assign, commit 0, applied 0 0, "
        f"{STEP.format(0)}, {STEP.format(0)}, roll_back, applied 0 0, {STEP.format(0)}",
    ),
    "an older server, and groups that were leased or queued": (
        {"batch": 1, "eta": 1},
        "feed 7, admit 0, admit 0, publish 0, save, assign, commit 0, applied 0 0, publish 0, assign, "
        f"commit 0, roll_back, applied 0 0, {STEP.format(0)}, learner_restarts",
    ),
    "an older server, and prompts that it never had": (
        {"batch": 1, "eta": 1},
        f"feed 0, admit 0, publish 0, save, assign, commit 0, applied 0 0, feed 1, {STEP.format(0)}, "
        "admit 0, publish 0, assign, strike 1, roll_back, feed 7, commit 0, applied 0 0, "
        f"{STEP.format(0)}, {STEP.format(0)}",
    ),
}
"""What is reached -> (settings, steps: names of `Walk` with their numbers)."""


def scripted_walk(stream: Stream, name: str) -> None:
    """One of `SCRIPTS`, checked after each step."""
    settings, steps = SCRIPTS[name]
    walk = Walk(stream, **{"max_steps": 10, "attempts_max": 3, "actors": 2, **settings})
    for step in steps.split(", "):
        action, *numbers = step.split()
        getattr(walk, action)(*map(int, numbers))
        walk.check()


def some_rules(source: Random) -> dict[str, Any]:
    """Rules for a walk, as various as they can be."""
    pick = source.choice
    batch, policy = pick([1, 1, 2, 3, 4]), pick(["wait", "wait", "drop"])
    return {
        "batch": batch,
        "eta": pick([0, 1, 2, 3]),
        "max_steps": pick([2, 4, 12, 50, 50]),
        "attempts_max": pick([1, 2, 3]),
        "policy": policy,
        "cap": batch + (pick([0, 0, 1, 2]) if policy == "drop" else 0),
        "dynamic": pick([0, 1]),
        "uncovered_max": pick([0, 0, 3]),
        "bytes_limit": pick([0, 0, 0, 56]),
        "actors": pick([2, 3]),
    }


def random_walk(stream: Stream, seed: int, steps: int) -> None:
    """A walk of random steps from a seed, checked after each.

    Each seed draws how common every action is, so that some walks go where an average one does not.
    """
    source = Random(seed)
    walk = Walk(stream, **some_rules(source))
    weights = [weight * source.choice((0.3, 1.0, 3.0)) for _, weight in ACTIONS.values()]
    for name in source.choices(list(ACTIONS), weights, k=steps):
        getattr(walk, name)(*[source.randrange(1 << 10) for _ in range(ACTIONS[name][0])])
        walk.check()
