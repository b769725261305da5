"""The whole objective: correction times surrogate, penalties, aggregation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from learner.config import ObjectiveConfig
from learner.errors import ConfigError
from learner.objective.corrections import Correction, correct
from learner.objective.divergence import ESTIMATORS
from learner.objective.losses import FREE, loss_named
from learner.objective.tokens import Tokens, Totals, aggregate, exp_clamped


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of a micro-batch and what it was made of."""

    loss: torch.Tensor
    """Scalar with gradient: this micro-batch's share of the loss of the whole batch."""
    weights: torch.Tensor
    """[N] without gradient: what multiplies each token's surrogate; 0 or 1 in mode `bypass`."""
    truncated: torch.Tensor
    """bool [N]: where the correction cut a ratio down to its cap; never in mode `bypass`."""
    bound: torch.Tensor
    """int64 [N]: what bounded the surrogate, see `learner.objective.losses.FREE`."""

    @property
    def clipped(self) -> torch.Tensor:
        """bool [N]: tokens that the loss's own bounds reached."""
        return self.bound != FREE


def objective(tokens: Tokens, totals: Totals, config: ObjectiveConfig) -> Objective:
    """The loss of N tokens, float32 or float64 throughout.

    A KL in the loss is part of it if the tokens come with a reference, an entropy bonus if with an
    entropy. Raises `ConfigError` if a loss of the user's own does not return one loss a token.
    """
    logprobs, proximal, behaviour = tokens.logprobs, tokens.proximal, tokens.behaviour
    bypass = config.mode == "bypass"
    anchor = behaviour if bypass else proximal
    log_ratio = (tokens.stop_gradient() if bypass else proximal) - behaviour
    correction = correct(log_ratio, tokens.sample, config)
    # Only the masks in bypass: the ratio itself already stands for pi / mu.
    weights = correction.kept.to(logprobs.dtype) if bypass else correction.weights
    surrogate = loss_named(config.loss)(tokens, anchor, config)
    if surrogate.losses.shape != logprobs.shape:
        raise ConfigError(
            f"objective.loss: `{config.loss}` returned losses of shape {tuple(surrogate.losses.shape)}, "
            f"expected one a token, {tuple(logprobs.shape)}; averaging is the aggregation's part"
        )
    losses = weights * surrogate.losses
    if tokens.reference is not None and config.kl.where == "loss":
        price = config.kl.coefficient * _unbiased(log_ratio, correction, config)
        losses = losses + price * ESTIMATORS[config.kl.estimator](logprobs - tokens.reference)
    if tokens.entropy is not None and config.entropy:
        losses = losses - config.entropy * tokens.entropy
    truncated = torch.zeros_like(correction.kept) if bypass else correction.truncated
    return Objective(
        aggregate(losses, tokens.sample, totals, config), weights, truncated, surrogate.bound.detach()
    )


def _unbiased(log_ratio: torch.Tensor, correction: Correction, config: ObjectiveConfig) -> torch.Tensor:
    """[N]: the stop-gradient correction of a term without a ratio of its own.

    In mode `bypass` the surrogate's ratio corrects it; a divergence has none, so it takes the ratio
    itself, truncated and masked.
    """
    if config.mode == "decoupled":
        return correction.weights
    return exp_clamped(log_ratio).clamp(max=config.cap) * correction.kept
