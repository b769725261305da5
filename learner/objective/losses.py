"""The surrogates: a loss of each token from its ratio r = pi / anchor.

The anchor is pi_p in mode `decoupled` and mu in mode `bypass`. A loss of your own has the signature of
these functions and is named as `module:function`; it must not fold in the correction, which multiplies
what it returns, nor average, which is the aggregation's part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from learner.config import ObjectiveConfig
from learner.objective.tokens import Tokens, exp_clamped, sample_mean, sample_sum
from learner.own import find

FREE, LOW, HIGH, DUAL = 0, 1, 2, 3
"""What bounded a token: nothing, the lower clip, the upper clip (or a cap), the dual clip."""


@dataclass(frozen=True, eq=False)
class Surrogate:
    """The losses of N tokens before correction and aggregation."""

    losses: torch.Tensor
    """[N] with gradient."""
    bound: torch.Tensor
    """int64 [N]: `FREE`, `LOW`, `HIGH` or `DUAL`."""


Loss = Callable[[Tokens, torch.Tensor, ObjectiveConfig], Surrogate]
"""(tokens, log-probabilities [N] of the anchor, configuration) -> the losses."""


def ppo_clip(tokens: Tokens, anchor: torch.Tensor, config: ObjectiveConfig) -> Surrogate:
    """PPO's clipped surrogate with the dual clip; a bound removes the token's gradient.

    L = max(-A r, -A clip(r, 1 - low, 1 + high)) (arXiv 1707.06347), and where A < 0 at most -A c
    (arXiv 1912.09729).
    """
    ratio, advantages = exp_clamped(tokens.logprobs - anchor), tokens.advantages
    losses, bound = _clipped(ratio, advantages, config.clip_low, config.clip_high)
    ceiling = torch.where(advantages < 0, -advantages * config.dual_clip, torch.inf)
    bound = torch.where(losses > ceiling, DUAL, bound)
    return Surrogate(torch.minimum(losses, ceiling), bound)


def gspo(tokens: Tokens, anchor: torch.Tensor, config: ObjectiveConfig) -> Surrogate:
    """PPO's surrogate of s = exp(mean log r), one ratio for a whole answer (arXiv 2507.18071).

    In the form GSPO-token: s in value, s grad log pi of the token in gradient. The mean over an answer's
    tokens is then GSPO in value and gradient, and a mask still removes single tokens.
    """
    stopped = tokens.stop_gradient()
    answer = sample_mean(stopped - anchor, tokens.sample)[tokens.sample]
    ratio = exp_clamped(answer + tokens.logprobs - stopped)
    return Surrogate(*_clipped(ratio, tokens.advantages, config.gspo_low, config.gspo_high))


def cispo(tokens: Tokens, anchor: torch.Tensor, config: ObjectiveConfig) -> Surrogate:
    """-stopgrad(min(r, cap)) A log pi (arXiv 2506.13585): every token keeps a gradient, of bounded weight.

    There is no lower bound, as in the paper; the cap is that of ScaleRL (arXiv 2510.13786).
    """
    ratio = exp_clamped(tokens.stop_gradient() - anchor)
    losses = -ratio.clamp(max=config.cispo_cap) * tokens.advantages * tokens.logprobs
    return Surrogate(losses, torch.where(ratio > config.cispo_cap, HIGH, FREE))


def topr(tokens: Tokens, anchor: torch.Tensor, config: ObjectiveConfig) -> Surrogate:
    """-a A log pi with a = 1 where A > 0 and a = min(U, 1) elsewhere (arXiv 2503.14286).

    U = stopgrad(exp(sum log r)) over the answer.
    """
    whole = exp_clamped(sample_sum(tokens.stop_gradient() - anchor, tokens.sample))[tokens.sample]
    positive = tokens.advantages > 0
    weights = torch.where(positive, 1.0, whole.clamp(max=1.0))
    bound = torch.where(~positive & (whole > 1), HIGH, FREE)
    return Surrogate(-weights * tokens.advantages * tokens.logprobs, bound)


_LOSSES: dict[str, Loss] = {"ppo_clip": ppo_clip, "gspo": gspo, "cispo": cispo, "topr": topr}


def loss_named(name: str) -> Loss:
    """The loss `objective.loss` names. Raises `ConfigError` if a `module:function` cannot be found."""
    return _LOSSES.get(name) or find(name, "objective.loss")


def _clipped(
    ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), and which bound it took."""
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - low, 1 + high)
    bound = torch.where(bounded > plain, torch.where(advantages > 0, HIGH, LOW), FREE)
    return torch.maximum(plain, bounded), bound
