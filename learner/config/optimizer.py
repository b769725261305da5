"""How the weights are moved."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from learner.config.bounds import NonNegative, Positive
from learner.errors import ConfigError


class OptimizerConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """AdamW and its learning-rate schedule."""

    lr: NonNegative = 3e-4
    """Peak learning rate. 0 leaves every weight bitwise unchanged."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's first and second moment, each in [0, 1)."""
    eps: Positive = 1e-8
    """Adam's denominator offset."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of matrices; norms are never decayed."""
    clip_grad: NonNegative = 0.5
    """Largest global gradient norm; 0 never clips."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up; `linear` and `cosine` end at 0."""
    warmup_steps: Annotated[int, msgspec.Meta(ge=0)] = 20
    """Steps over which the learning rate rises linearly to `lr`."""
    decay_steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Step at which `linear` and `cosine` reach 0; unused, hence 0, with `constant`."""

    def __post_init__(self) -> None:
        """Refuse what cannot be scheduled."""
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas: got {self.betas}, expected two numbers in [0, 1)")
        if self.schedule == "constant" and self.decay_steps:
            raise ConfigError(
                f"optimizer.decay_steps: got {self.decay_steps} with schedule `constant`, which never "
                "decays; choose `linear` or `cosine`, or leave decay_steps out"
            )
        if self.schedule != "constant" and self.decay_steps <= self.warmup_steps:
            raise ConfigError(
                f"optimizer.decay_steps: got {self.decay_steps}, expected more than warmup_steps "
                f"({self.warmup_steps}) with schedule `{self.schedule}`"
            )
