"""Rewards into advantages: pure functions on float64 arrays, one array a group.

A group of equal rewards (max == min, tested exactly) has advantage 0 under every definition:
a computed mean can differ from equal rewards by a rounding error, which a division by the
standard deviation would blow up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from learner.errors import BatchError, ConfigError
from learner.own import find

Sum = Callable[[list[float]], list[float]]
"""Adds each of several numbers over the data-parallel ranks; `list` in a world of one."""

EPSILON = 1e-5
"""Added to a standard deviation before dividing by it."""


def grpo(rewards: np.ndarray) -> np.ndarray:
    """(r - mean) / (population std + 1e-5), float64 [G] (DeepSeekMath, arXiv 2402.03300).

    >>> grpo(np.array([1.0, 0.0])).round(4).tolist()
    [1.0, -1.0]
    """
    return dr_grpo(rewards) / (rewards.std() + EPSILON)


def dr_grpo(rewards: np.ndarray) -> np.ndarray:
    """r - mean, float64 [G] (Dr. GRPO, arXiv 2503.20783)."""
    return np.zeros_like(rewards) if _is_constant(rewards) else rewards - rewards.mean()


def rloo(rewards: np.ndarray) -> np.ndarray:
    """r minus the mean of the other samples, float64 [G] (RLOO, arXiv 2402.14740)."""
    size = len(rewards)
    return dr_grpo(rewards) * (size / (size - 1))


def reinforce_pp(groups: list[np.ndarray], over_ranks: Sum = list) -> list[np.ndarray]:
    """(r - group mean) / (its population std over the global batch + 1e-5) (REINFORCE++, arXiv 2501.03262).

    `over_ranks` adds numbers over the data-parallel ranks, each of which holds other groups.
    """
    centred = [dr_grpo(rewards) for rewards in groups]
    local = [float(sum(len(values) for values in centred)), float(sum(values.sum() for values in centred))]
    count, total = over_ranks(local)
    mean = total / count if count else 0.0
    (squares,) = over_ranks([float(sum(np.square(values - mean).sum() for values in centred))])
    scale = math.sqrt(squares / count) + EPSILON if count else 1.0
    return [values / scale for values in centred]


def advantages(name: str, groups: list[np.ndarray], over_ranks: Sum = list) -> list[np.ndarray]:
    """Advantages of a batch, a float64 [G] for each group's rewards, in the same order.

    The rewards are those of valid samples only (`learner.samples`). `over_ranks` adds a list of numbers
    over the data-parallel ranks; every rank calls it equally often. Raises `BatchError` for a group of
    fewer than 2 samples, which has no baseline.
    """
    for index, rewards in enumerate(groups):
        if len(rewards) < 2:
            raise BatchError(
                f"group {index} of the batch: got {len(rewards)} samples, expected at least 2; an "
                "advantage compares samples of one prompt, so drop the group before training"
            )
    rewards = [np.asarray(values, np.float64) for values in groups]
    if name == "reinforce_pp":
        return reinforce_pp(rewards, over_ranks)
    formula = formula_named(name)
    return [formula(values) for values in rewards]


def formula_named(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What `objective.advantage` names, of one group: rewards [G] to advantages [G]; `reinforce_pp` unscaled.
    Raises `ConfigError` if a `module:function` cannot be found."""
    known = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo, "reinforce_pp": dr_grpo}
    return known.get(name) or partial(_own, name, find(name, "objective.advantage"))


def _own(name: str, formula: Callable[[np.ndarray], np.ndarray], rewards: np.ndarray) -> np.ndarray:
    """A function of the user's own, which is not asked about equal rewards. Raises `ConfigError`."""
    if _is_constant(rewards):
        return np.zeros_like(rewards)
    found = np.asarray(formula(rewards.copy()), np.float64)
    if found.shape != rewards.shape or not np.isfinite(found).all():
        raise ConfigError(
            f"objective.advantage: `{name}` returned {found.tolist()} for rewards {rewards.tolist()}, "
            "expected one finite number for each"
        )
    return found


def _is_constant(rewards: np.ndarray) -> bool:
    return bool(rewards.max() == rewards.min())
