"""Rows 3, 4, 5, 6 and 15: the learner dies, is replaced, or is slow."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.faults.points import FENCED
from tests.faults.trial import Trial

WRITE_POINTS = (
    "ckpt-begin", "ckpt-weights", "ckpt-half", "ckpt-synced", "ckpt-renamed", "ckpt-committed",
)  # fmt: skip


def test_row_3_killed_between_optimizer_and_commit(trial: Callable[..., Trial]) -> None:
    """The new learner commits the very version that the old one had trained, under a higher epoch."""
    run = trial()
    killed = run.learner(fault="learner:trained:5")
    run.actor(), run.actor()
    killed.wait_killed()
    unsaid = killed.events("trained")[-1]
    assert unsaid["step"] + 1 not in [one["version"] for one in killed.events("committed")]
    successor = run.learner()
    said = successor.wait_event("committed")
    assert (said["version"], said["digest"]) == (unsaid["step"] + 1, unsaid["digest"])
    first, second = killed.events("joined")[0]["epoch"], successor.events("joined")[0]["epoch"]
    assert int(second.partition(":")[0]) > int(first.partition(":")[0])
    run.wait_more(3, seconds=10)
    run.finish()


@pytest.mark.parametrize("eta", [0, 2])
def test_row_4_killed_between_assign_and_checkpoint(trial: Callable[..., Trial], eta: int) -> None:
    """Bitwise: at eta = 0 every version is that of a run without faults; else every replayed step is."""
    steps = 14
    unfaulted, run = (trial(eta=eta, max_steps=steps) for _ in range(2))
    if eta == 0:
        unfaulted.learner(checkpoint_every=5), unfaulted.actor()
    killed = run.learner(checkpoint_every=5, fault="learner:assigned:9")
    run.actor(), run.actor()
    killed.wait_killed()
    again = run.learner(checkpoint_every=5, fault="learner:read:3")
    again.wait_killed()
    assert [one["step"] for one in again.events("assigned")] == [5, 6, 7]
    last = run.learner(checkpoint_every=5)
    last.wait(0)
    assert [one["step"] for one in last.events("trained") if one["replayed"]] == [5, 6, 7]
    ledger = run.finish()
    assert ledger.number("version") == steps
    if eta == 0:
        unfaulted.learners[0].wait(0)
        assert weights(unfaulted) == weights(run)
        unfaulted.finish()


def weights(run: Trial) -> dict[int, str]:
    """Digest of the weights after each step."""
    return {one["step"]: one["digest"] for one in run.trained()}


def test_row_5_killed_at_each_write_point_of_a_checkpoint(trial: Callable[..., Trial]) -> None:
    """What is restored is a complete checkpoint, the latest; nothing unfinished is ever taken for one."""
    run = trial()
    run.actor(), run.actor()
    complete = 0
    for point in WRITE_POINTS:
        killed = run.learner(fault=f"learner:{point}:2")
        killed.wait_killed()
        joined = killed.events("joined")[0]
        assert joined["restored"] >= complete, point
        assert joined["version"] - joined["restored"] <= 2 + 1, point  # a checkpoint every two steps
        committed = max(one["version"] for one in killed.events("committed"))
        half = point not in ("ckpt-renamed", "ckpt-committed")
        complete = committed - 2 if half else committed
    run.learner().wait_event("joined", restored=complete)
    run.wait_more(3, seconds=10)
    run.finish()


@pytest.mark.parametrize("point", ["assigned", "trained", "ckpt-synced", "ckpt-renamed"])
def test_row_6_a_stopped_learner_wakes_beside_its_successor(trial: Callable[..., Trial], point: str) -> None:
    """The old one's next write is refused: it ends with code 1, names both epochs, and changed nothing."""
    run = trial()
    zombie = run.learner(fault=f"learner:{point}:2:stop")
    run.actor(), run.actor()
    zombie.wait_stopped()
    successor = run.learner()
    run.wait_more(4, seconds=15)
    zombie.go_on()
    zombie.wait(FENCED)
    reason = zombie.events("stopped")[0]["reason"]
    for learner in (zombie, successor):
        assert learner.events("joined")[0]["epoch"] in reason
    run.wait_more(3, seconds=10)
    run.finish()


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.faults)])
def test_row_15_a_slow_learner_bounds_the_stream(trial: Callable[..., Trial], seconds: int) -> None:
    """Payloads and Redis's memory stay within (eta + 1 + uncovered_max) B groups; actors wait."""
    eta, batch, uncovered = 2, 4, 3
    run = trial(eta=eta, batch=batch, uncovered_max=uncovered)
    run.learner(step_s=0.3, checkpoint_every=1000, keep=1)
    fast = [run.actor(answer=4000, concurrency=4) for _ in range(2)]
    bound, sizes = (eta + 1 + uncovered) * batch, []
    fast[0].wait_event("waiting: full")
    begun = time.monotonic()
    before = memory(run)
    while time.monotonic() - begun < seconds:
        sizes.append(run.ledger().sizes["payloads"])
        time.sleep(0.05)
    assert batch < max(sizes) <= bound, (max(sizes), bound)
    assert memory(run) - before < bound * 40_000  # a payload of these is about 30 KB
    assert run.learners[0].events("checkpoint"), "it checkpoints before it assigns"
    run.finish()


def memory(run: Trial) -> int:
    """Bytes Redis uses."""
    return run.stream.redis.info("memory")["used_memory"]
