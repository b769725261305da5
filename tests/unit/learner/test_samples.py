"""Which samples are trained, and with what reward."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from buffer.schema import Group, Sample
from learner.config import ObjectiveConfig
from learner.samples import choose, soft_overlong
from tests.unit.learner.groups import make_group


def group_of(*finished: str, rewards: tuple[float, ...] = (), position: int = 0) -> Group:
    """A group whose samples end so."""
    group = make_group(position, size=len(finished))
    for index, (sample, reason) in enumerate(zip(group.samples, finished, strict=True)):
        sample.finish_reason = reason
        if rewards:
            sample.reward = rewards[index]
    return group


def with_length(sample: Sample, length: int, runs: list[int] | None = None) -> Sample:
    tokens = np.zeros(sample.prompt_length + length, np.int32)
    return msgspec.structs.replace(sample, tokens=tokens, loss_runs=runs or [length])


def test_valid_samples_go_through_as_they_are() -> None:
    groups = [group_of("stop", "length"), group_of("stop", "stop", position=1)]
    chosen = choose(groups, ObjectiveConfig())
    assert [group.id for group in chosen.groups] == [group.id for group in groups]
    for got, given in zip(chosen.groups, groups, strict=True):
        assert all(a is b for a, b in zip(got.samples, given.samples, strict=True))
    assert (chosen.dropped, chosen.invalid, chosen.masked) == ({}, 0, 0)


@pytest.mark.parametrize("failed", ["reward", "abort", ""])
def test_a_failed_sample_is_left_out(failed: str) -> None:
    group = group_of("stop", failed, "stop")
    chosen = choose([group], ObjectiveConfig())
    assert chosen.groups[0].samples == [group.samples[0], group.samples[2]]
    assert chosen.invalid == 1
    assert len(group.samples) == 3  # the batch itself is not changed


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_no_reward(reward: float) -> None:
    chosen = choose([group_of("stop", "stop", "stop", rewards=(1.0, reward, 0.0))], ObjectiveConfig())
    assert [sample.reward for sample in chosen.groups[0].samples] == [1.0, 0.0]


def test_a_group_of_fewer_than_two_valid_samples_is_dropped_with_the_reason() -> None:
    bad, good = group_of("stop", "error", "error"), group_of("stop", "stop", position=1)
    chosen = choose([bad, good], ObjectiveConfig())
    assert [group.id for group in chosen.groups] == [good.id]
    assert chosen.dropped == {bad.id: "1 of 3 samples are valid, expected at least 2 (2 failed, 0 cut off)"}


def test_mask_treats_cut_off_answers_as_never_sampled() -> None:
    group = group_of("stop", "length", "stop")
    short = group_of("stop", "length", "length", position=1)
    chosen = choose([group, short], ObjectiveConfig(overlong="mask"))
    assert chosen.groups[0].samples == [group.samples[0], group.samples[2]]
    assert chosen.masked == 3
    assert chosen.invalid == 0
    assert "0 failed, 2 cut off" in chosen.dropped[short.id]


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0.0), (16384, 0.0), (18432, 0.5), (20480, 1.0), (30000, 1.0)]
)
def test_the_soft_penalty_is_that_of_dapo(tokens: int, expected: float) -> None:
    """The paper's figures: L_max = 20,480, L_cache = 4,096."""
    assert soft_overlong(tokens, 20480, 4096) == expected


def test_the_penalty_lowers_rewards_by_length_and_leaves_the_batch_alone() -> None:
    group = group_of("stop", "stop", "length", rewards=(1.0, 1.0, 0.0))
    group.samples = [
        with_length(sample, length) for sample, length in zip(group.samples, (6, 9, 10), strict=True)
    ]
    config = ObjectiveConfig(overlong="penalty", overlong_length=10, overlong_ramp=4, overlong_factor=0.5)
    chosen = choose([group], config)
    assert [sample.reward for sample in chosen.groups[0].samples] == [1.0, 1.0 - 0.375, -0.5]
    assert [sample.reward for sample in group.samples] == [1.0, 1.0, 0.0]


def test_tokens_of_the_environment_do_not_count_as_length() -> None:
    group = group_of("stop", "stop", rewards=(1.0, 1.0))
    group.samples = [with_length(group.samples[0], 10), with_length(group.samples[1], 10, runs=[3, 4, 3])]
    config = ObjectiveConfig(overlong="penalty", overlong_length=10, overlong_ramp=4)
    assert [sample.reward for sample in choose([group], config).groups[0].samples] == [0.0, 1.0]
