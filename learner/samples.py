"""Which samples of a batch are trained, and with what reward.

A sample is valid if generation and reward came to an end: statistics and losses are made of valid samples
alone. Answers cut off at the token limit (`finish_reason` `length`) are, by `objective.overlong`,

    keep      trained like any other
    mask      treated as if they had not been sampled: neither loss nor baseline sees them
    penalty   kept, and every answer of n trained tokens loses factor * soft_overlong(n) of its reward
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from buffer.schema import Group, Sample
from learner.config import ObjectiveConfig

FINISHED = ("stop", "length")
"""Finish reasons of samples that can be trained; any other marks one that failed."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """The part of a batch that is trained."""

    groups: list[Group]
    """In the order given, each with its valid samples only (at least 2), which carry their shaped rewards."""
    dropped: dict[str, str]
    """Group id -> why nothing of it is trained. The ledger's reason for all of them is `reward`."""
    invalid: int
    """Samples that failed."""
    masked: int
    """Samples left out because they were cut off."""


def choose(groups: Sequence[Group], config: ObjectiveConfig) -> Chosen:
    """The trained part of `groups`, by validity and `config.overlong`.

    A group of fewer than 2 valid samples is dropped: there is nothing to compare its reward with.
    """
    kept, dropped, invalid, masked = [], {}, 0, 0
    for group in groups:
        valid = [sample for sample in group.samples if is_valid(sample)]
        used = valid
        if config.overlong == "mask":
            used = [sample for sample in valid if sample.finish_reason != "length"]
        invalid += len(group.samples) - len(valid)
        masked += len(valid) - len(used)
        if len(used) < 2:
            dropped[group.id] = (
                f"{len(used)} of {len(group.samples)} samples are valid, expected at least 2 "
                f"({len(group.samples) - len(valid)} failed, {len(valid) - len(used)} cut off)"
            )
            continue
        if config.overlong == "penalty":
            used = with_rewards(used, [sample.reward - _penalty(sample, config) for sample in used])
        kept.append(msgspec.structs.replace(group, samples=used))
    return Chosen(kept, dropped, invalid, masked)


def is_valid(sample: Sample) -> bool:
    """Whether generation and reward of the sample came to an end."""
    return sample.finish_reason in FINISHED and math.isfinite(sample.reward)


def soft_overlong(tokens: int, length: int, ramp: int) -> float:
    """DAPO's soft overlong punishment, as what is taken away (arXiv 2503.14476, equation 13).

    0 up to `length` - `ramp` tokens, then linear up to 1 at `length`, and 1 beyond.

    >>> [soft_overlong(n, length=100, ramp=20) for n in (80, 90, 100, 120)]
    [0.0, 0.5, 1.0, 1.0]
    """
    return min(1.0, max(0.0, (tokens - (length - ramp)) / ramp))


def with_rewards(samples: Sequence[Sample], rewards: Sequence[float]) -> list[Sample]:
    """The samples with other rewards, their arrays shared."""
    return [
        msgspec.structs.replace(sample, reward=float(reward))
        for sample, reward in zip(samples, rewards, strict=True)
    ]


def _penalty(sample: Sample, config: ObjectiveConfig) -> float:
    # What the policy wrote counts; what an environment wrote into the answer does not.
    tokens = int(np.count_nonzero(sample.loss_mask()))
    return config.overlong_factor * soft_overlong(tokens, config.overlong_length, config.overlong_ramp)
