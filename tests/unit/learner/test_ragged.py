"""Groups as actors hand them in: fewer than G samples, answers with parts that are not trained."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from buffer.schema import Group
from learner.advantage import advantages
from tests.unit.learner.groups import make_group
from tests.unit.learner.test_step import digest, make_trainer

SIZES = (4, 2, 3)


def ragged(mask: bool = False, noise: float = 0.0) -> list[Group]:
    """Groups of 4, 2 and 3 samples; with `mask`, the middle of each longer answer is somebody else's, and
    `noise` is what the record says of its log-probabilities."""
    groups = [make_group(position, size=size) for position, size in enumerate(SIZES)]
    for sample in (
        sample for group in groups for sample in group.samples if mask and sample.answer_length > 4
    ):
        sample.loss_runs = [2, 2, sample.answer_length - 4]
        sample.logprobs[2:4] = noise
    return groups


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
@pytest.mark.parametrize("control", ["none", "shuffle_advantages"])
def test_groups_of_different_sizes_train_together(
    make_checkpoint: Callable, advantage: str, control: str
) -> None:
    folder, _ = make_checkpoint()
    trainer = make_trainer(folder, advantage=advantage, control=control)
    metrics = trainer.train_step(ragged(), 0)
    assert (metrics["groups"], metrics["samples"], metrics["skipped"]) == (3, 9, 0)
    assert metrics["reward_mean"] == pytest.approx(4 / 9)


def test_each_group_is_measured_by_its_own_samples() -> None:
    values = advantages("dr_grpo", [np.array([1.0, 0.0]), np.array([1.0, 0.0, 0.0])])
    assert [part.round(4).tolist() for part in values] == [[0.5, -0.5], [0.6667, -0.3333, -0.3333]]


def test_tokens_of_a_tool_are_context_and_nothing_else(make_checkpoint: Callable) -> None:
    """What the record says of them cannot matter; what they are does."""
    folder, _ = make_checkpoint()
    digests = []
    for noise in (0.0, -50.0):
        trainer = make_trainer(folder)
        metrics = trainer.train_step(ragged(mask=True, noise=noise), 0)
        digests.append(digest(trainer))
    whole = make_trainer(folder)
    trained = whole.train_step(ragged(), 0)["tokens"]
    longer = sum(sample.answer_length > 4 for group in ragged() for sample in group.samples)
    assert metrics["tokens"] == trained - 2 * longer
    assert digests[0] == digests[1] != digest(whole)
    groups = ragged(mask=True)
    masked = next(sample for group in groups for sample in group.samples if len(sample.loss_runs) == 3)
    masked.tokens[masked.prompt_length + 2] += 1
    other = make_trainer(folder)
    other.train_step(groups, 0)
    assert digest(other) != digests[0]
