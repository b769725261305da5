"""The supervised warm-up."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from learner.config.bounds import Count, Positive
from learner.errors import ConfigError


class SftConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """A supervised warm-up that ends at an accuracy."""

    demonstrate: Literal["solution", "final"] = "solution"
    """What is learned: the whole solution, or only its last line, `#### <final answer>`."""
    lr: Positive = 1e-3
    """Learning rate after 20 steps of linear rise."""
    batch: Count = 256
    """Demonstrations a step."""
    max_steps: Count = 3000
    """End after this many steps, undone ones included, even below the target."""
    target_accuracy_low: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.42
    """Stop when the accuracy, measured on the questions that the run will ask, reaches this."""
    target_accuracy_high: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.48
    """Above this the last interval is undone and taken again in smaller ones."""
    measure_every: Count = 20
    """Steps between two measurements at first; halved after each overshoot."""
    measure_prompts: Count = 512
    """Prompts of a measurement, sampled at temperature 1; each interval first tries a quarter."""
    max_answer_tokens: Count = 16
    """Token limit of a sampled answer."""

    def __post_init__(self) -> None:
        """Refuse an empty target."""
        if self.target_accuracy_low >= self.target_accuracy_high:
            raise ConfigError(
                f"sft.target_accuracy_low: got {self.target_accuracy_low}, expected less than "
                f"target_accuracy_high ({self.target_accuracy_high})"
            )
