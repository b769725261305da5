"""Rows 3 to 6 and 18 with the real learner: Megatron-Core, its optimizer, its checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from buffer.ledger import violations
from learner.checkpoint.restore import NEWEST
from tests.faults.points import FAILED, FENCED
from tests.faults.real import RealTrial
from tests.faults.synchronous import synchronous
from tests.faults.trial import until

STEPS = 9
WRITE_POINTS = (
    "ckpt-begin", "ckpt-half", "ckpt-tensors", "ckpt-index", "ckpt-state", "ckpt-synced", "ckpt-renamed",
    "ckpt-committed",
)  # fmt: skip
BEFORE_ITS_NAME = WRITE_POINTS[:6]


@pytest.fixture(scope="module")
def undisturbed(real_trial_of_module: Callable[..., RealTrial]) -> RealTrial:
    """A run at eta = 0 that nothing happens to."""
    run = real_trial_of_module(eta=0, max_steps=STEPS)
    run.learner(), run.actor()
    run.learners[0].wait(0)
    run.finish()
    return run


@pytest.fixture(scope="module")
def unfaulted(undisturbed: RealTrial) -> dict[int, str]:
    """Digest of each of its versions."""
    return undisturbed.versions()


def test_eta_0_is_the_synchronous_loop_bit_for_bit(undisturbed: RealTrial) -> None:
    """Through stream, actors and another process the weights are those of a plain loop in this one."""
    torch.set_num_threads(1)
    config = (undisturbed.files / "config.json").read_bytes()
    expected = synchronous(config, undisturbed.config.group_size)
    assert undisturbed.versions() == expected
    assert len(set(expected.values())) == STEPS + 1


@pytest.mark.parametrize(
    "points",
    [("ckpt-half", "ckpt-renamed"), pytest.param(WRITE_POINTS, marks=pytest.mark.faults)],
    ids=["two", "all"],
)
def test_rows_3_4_5_killed_again_and_again(
    real_trial: Callable[..., RealTrial], unfaulted: dict[int, str], points: tuple[str, ...]
) -> None:
    """eta = 0: after any number of deaths, the weights of every version are those of the unfaulted run.

    `uncovered_max` has the learner wait for a checkpoint before it assigns beyond the next one, so that each
    life sees its own: without, ten tiny steps are over before the first is written.
    """
    run = real_trial(eta=0, max_steps=STEPS, uncovered_max=2)
    run.actor(), run.actor()
    for life, point in enumerate(points):  # row 5
        # The life before this one left a complete checkpoint without its commit, which comes first.
        times, saved = 2 if point == "ckpt-committed" else 1, run.newest()
        killed = run.learner(fault=f"learner:{point}:{times}")
        killed.wait_killed()
        assert [one["version"] for one in killed.events("restored")] == [saved] * bool(life)
        assert (run.newest() > saved) == (point not in BEFORE_ITS_NAME), point
    saved = run.newest()
    killed = run.learner(fault="learner:trained:1")  # row 3: after the optimizer, before the commit
    killed.wait_killed()
    unsaid = killed.events("trained")[-1]
    killed = run.learner(fault="learner:assigned:2")  # row 4: after assign, before the checkpoint
    killed.wait_killed()
    assert killed.events("restored")[0]["version"] == saved
    assert killed.events("assigned")[0]["groups"] == unsaid["groups"]
    last = run.learner()
    last.wait(0)
    assert last.events("restored")[0]["version"] == saved
    assert last.events("assigned")[0]["repeat"]
    assert run.versions() == unfaulted
    assert [row["step"] for row in run.metrics()] == list(range(STEPS))
    assert [name for name in run.checkpoints() if name.startswith(".")] == []
    epochs = [int(one.events("joined")[0]["epoch"].partition(":")[0]) for one in run.learners]
    assert epochs == list(range(1, len(epochs) + 1))
    run.finish()


def test_row_4_the_same_up_to_the_last_assigned_step(real_trial: Callable[..., RealTrial]) -> None:
    """eta = 2: every step that was assigned is trained again to the version it was committed with."""
    run = real_trial(eta=2, max_steps=STEPS, checkpoint={"every": 5}, uncovered_max=5)
    killed = run.learner(fault="learner:assigned:9")
    run.actor(), run.actor()
    killed.wait_killed()
    last = run.learner()
    last.wait(0)
    assert last.events("restored")[0]["version"] == 5
    newest = last.events("joined")[0]["version"]  # is said again, which changes nothing, and then offered
    again = [one for one in last.events("trained") if one["replayed"]]
    assert [one["step"] for one in again] == list(range(5, newest))
    before = {one["step"]: one["digest"] for one in killed.events("trained")}
    assert all(one["digest"] == before[one["step"]] for one in again)
    assert [one["step"] for one in last.events("assigned") if one["repeat"]] == [5, 6, 7, 8]
    assert [one["version"] for one in last.events("committed")] == list(range(newest, STEPS + 1))
    run.finish()


@pytest.mark.parametrize("point", ["trained", pytest.param("ckpt-synced", marks=pytest.mark.faults)])
def test_row_6_a_stopped_learner_wakes_beside_its_successor(
    real_trial: Callable[..., RealTrial], point: str
) -> None:
    """The old one's next write is refused: it ends with code 1, names both epochs, and changed nothing."""
    run = real_trial(uncovered_max=2)
    zombie = run.learner(fault=f"learner:{point}:1:stop")
    run.actor(), run.actor()
    zombie.wait_stopped()
    successor = run.learner()
    run.wait_more(3, seconds=30)
    zombie.go_on()
    zombie.wait(FENCED)
    reason = zombie.events("stopped")[0]["reason"]
    for learner in (zombie, successor):
        assert learner.events("joined")[0]["epoch"] in reason
    run.wait_more(3, seconds=20)
    run.finish()


def test_row_18_the_disk_is_full(real_trial: Callable[..., RealTrial], unfaulted: dict[int, str]) -> None:
    """Training goes on, says so, and the checkpoint before stands: a successor goes on from it."""
    run = real_trial(eta=0, max_steps=STEPS, uncovered_max=4)
    full = run.learner(full_after=1)
    run.actor()
    said = run.folder / "logs/learner-0.text"
    until(
        lambda: "version 2, stands" in said.read_text() if said.exists() else False,
        40,
        lambda: f"it says that a checkpoint failed; {full.said()}",
    )
    full.kill()
    assert "of version 4 failed" in said.read_text() or "of version 6 failed" in said.read_text()
    assert run.checkpoints() == ["step-00000002-1"]
    last = run.learner()
    last.wait(0)
    assert last.events("restored")[0]["version"] == 2
    assert run.versions() == unfaulted
    run.finish()


def test_payloads_that_are_gone_are_undone_by_a_fork(real_trial: Callable[..., RealTrial]) -> None:
    """A step that cannot be trained again is undone with all that came after; the run goes on from there."""
    run = real_trial(eta=1, max_steps=STEPS, checkpoint={"every": 4}, uncovered_max=4)
    killed = run.learner(fault="learner:assigned:8")
    run.actor(), run.actor()
    killed.wait_killed()
    ledger = run.ledger()
    run.stream.redis.xdel(run.stream.key("stream"), ledger.manifests[5].rows[0].entry)
    last = run.learner()
    last.wait(0)
    assert last.events("restored")[0]["version"] == 4
    ledger = run.ledger()
    assert (ledger.number("lineage"), ledger.number("version")) == (1, STEPS)
    assert [one["lineage"] for one in last.events("trained")] == [0, 1, 1, 1, 1]
    undone = last.events("joined")[0]["version"] - 5
    said = (run.folder / "logs/learner-1.text").read_text()
    assert f"undoing {undone} steps: step 5 cannot be trained again (lost)" in said
    for actor in run.actors:
        actor.wait(0)


def test_a_run_that_ended_is_prolonged_under_other_rules_by_a_fork(
    real_trial: Callable[..., RealTrial],
) -> None:
    run = real_trial(eta=1, max_steps=4)
    run.learner(), run.actor()
    run.learners[0].wait(0), run.actors[0].wait(0)
    before = run.versions()
    run.change(max_steps=8, max_staleness=2, groups_per_step=2 * run.config.groups_per_step)
    refused = run.learner()
    refused.wait(FAILED)
    assert (
        "stream.groups_per_step: this run has 2, the learner asks for 4"
        in (refused.events("stopped")[0]["reason"])
    )
    forked = run.learner(fork=NEWEST)
    until(lambda: bool(forked.events("restored")), 40, "it goes on, and the run is no longer over for actors")
    run.actor()
    forked.wait(0)
    assert forked.events("restored")[0]["version"] == 4
    assert {len(one["groups"]) for one in forked.events("trained")} == {run.config.groups_per_step}
    assert {version: run.versions()[version] for version in before} == before
    assert [row["step"] for row in run.metrics()] == list(range(8))
    assert run.ledger().number("lineage") == 1
    run.finish()


def test_a_fork_goes_back_to_the_version_that_is_asked_for(real_trial: Callable[..., RealTrial]) -> None:
    """But leaves alone what actors that live go by, and where payloads lie."""
    run = real_trial(eta=1, max_steps=STEPS, checkpoint={"every": 2, "keep_last": 9}, uncovered_max=2)
    killed = run.learner(fault="learner:assigned:7")
    actor = run.actor()
    killed.wait_killed()
    size = run.config.group_size
    for fork, change, said in [
        (3, {}, "--fork: got version 3, there are checkpoints of ["),
        (2, {"shards": 2}, "stream.shards: this run has 0, the learner asks for 2; no fork changes it"),
        (
            2,
            {"group_size": 5},
            f"stream.group_size: this run has {size}, the learner asks for 5; the actors actor-0",
        ),
    ]:
        kept = run.config
        run.change(**change)
        refused = run.learner(fork=fork)
        refused.wait(FAILED)
        assert said in refused.events("stopped")[0]["reason"]
        run.config = kept
    run.change()
    before = run.versions()
    forked = run.learner(fork=2)
    forked.wait(0)
    assert forked.events("restored")[0]["version"] == 2
    assert [one["step"] for one in forked.events("trained")] == list(range(2, STEPS))
    assert {version: run.versions()[version] for version in range(3)} == {
        version: before[version] for version in range(3)
    }
    actor.wait(0)
    ledger = run.ledger()
    assert (ledger.number("lineage"), ledger.number("version")) == (1, STEPS)
    assert violations(ledger) == []


def test_the_batch_zero_gate_ends_a_run_before_it_trains(real_trial: Callable[..., RealTrial]) -> None:
    """Scripted actors make their log-probabilities up, which the learner finds out at once."""
    run = real_trial(objective={})
    learner = run.learner()
    run.actor()
    learner.wait(FAILED)
    assert "disagree about version 0 before step 0" in learner.events("stopped")[0]["reason"]
    assert learner.events("trained") == []
    run.end()
