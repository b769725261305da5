from __future__ import annotations

import numpy as np
import pytest

from learner.advantage import advantages
from learner.config import ObjectiveConfig
from learner.errors import BatchError, ConfigError

REWARDS = [np.array([1.0, 0.0, 0.25, 1.0]), np.array([0.3, 0.7])]


def test_grpo_divides_by_population_std_plus_epsilon() -> None:
    r = REWARDS[0]
    mean = sum(r) / 4
    std = (sum((x - mean) ** 2 for x in r) / 4) ** 0.5
    np.testing.assert_allclose(
        advantages("grpo", REWARDS)[0], [(x - mean) / (std + 1e-5) for x in r], rtol=1e-12
    )


def test_dr_grpo_only_centres() -> None:
    np.testing.assert_allclose(advantages("dr_grpo", REWARDS)[1], [-0.2, 0.2], rtol=1e-12)


def test_rloo_compares_with_the_others() -> None:
    r = REWARDS[0]
    expected = [x - (sum(r) - x) / 3 for x in r]
    np.testing.assert_allclose(advantages("rloo", REWARDS)[0], expected, rtol=1e-12)


def test_reinforce_pp_scales_by_the_whole_batch() -> None:
    centred = np.concatenate([r - r.mean() for r in REWARDS])
    scale = np.sqrt(np.mean((centred - centred.mean()) ** 2)) + 1e-5
    got = np.concatenate(advantages("reinforce_pp", REWARDS))
    np.testing.assert_allclose(got, centred / scale, rtol=1e-12)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
def test_equal_rewards_have_advantage_exactly_zero(name: str) -> None:
    # 0.1 summed three times and divided by three is not 0.1 in floating point.
    constant, other = advantages(name, [np.full(3, 0.1), np.array([0.0, 1.0])])
    assert constant.tolist() == [0.0, 0.0, 0.0]
    assert np.isfinite(other).all()


def test_nearly_equal_rewards_are_not_zero_variance() -> None:
    assert advantages("grpo", [np.array([0.5, 0.5 + 1e-9])])[0].any()


def test_a_batch_of_constant_groups_is_finite() -> None:
    assert not np.concatenate(advantages("reinforce_pp", [np.ones(2), np.zeros(2)])).any()


def test_a_group_of_one_is_refused_by_its_place() -> None:
    with pytest.raises(BatchError, match="group 1 of the batch: got 1 samples, expected at least 2"):
        advantages("grpo", [np.ones(2), np.ones(1)])


def test_reinforce_pp_scales_by_the_batch_of_all_ranks() -> None:
    """Two ranks, simulated: each holds one group, and their sums are added."""
    whole = advantages("reinforce_pp", REWARDS)
    centred = [values - values.mean() for values in REWARDS]
    others = [[4.0, float(centred[0].sum())], [float(np.square(centred[0]).sum())]]

    def add(numbers: list[float]) -> list[float]:
        return [a + b for a, b in zip(numbers, others.pop(0), strict=True)]

    (second,) = advantages("reinforce_pp", REWARDS[1:], add)
    np.testing.assert_allclose(second, whole[1], rtol=1e-9)
    assert others == []


def test_a_rank_without_groups_still_takes_part_in_the_sums() -> None:
    calls = []

    def add(numbers: list[float]) -> list[float]:
        calls.append(len(numbers))
        return numbers

    assert advantages("reinforce_pp", [], add) == []
    assert calls == [2, 1]


def ranks(rewards: np.ndarray) -> np.ndarray:
    """Of the user's own: the place among the others."""
    return rewards.argsort().argsort() - (len(rewards) - 1) / 2


def too_few(rewards: np.ndarray) -> list[float]:
    return [0.0]


def infinite(rewards: np.ndarray) -> np.ndarray:
    return rewards + np.inf


def test_a_function_of_ones_own() -> None:
    name = ObjectiveConfig(advantage=f"{__name__}:ranks").advantage
    found = advantages(name, [np.array([0.2, 0.9, 0.4]), np.full(3, 0.1)])
    assert [values.tolist() for values in found] == [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("function", ["too_few", "infinite"])
def test_a_function_of_ones_own_gives_a_finite_number_each(function: str) -> None:
    with pytest.raises(ConfigError, match=f"objective.advantage: `{__name__}:{function}` returned .*"):
        advantages(f"{__name__}:{function}", REWARDS)


def test_an_advantage_that_is_none_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"objective.advantage: got `gae`, expected `grpo`, .* or a function"
    ):
        ObjectiveConfig(advantage="gae")
    with pytest.raises(ConfigError, match=r"objective.advantage: got `os:nothing`, .* on PYTHONPATH"):
        advantages("os:nothing", REWARDS)
