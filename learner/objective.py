"""The policy-gradient objective: pure functions over tensors of the N trained tokens of S samples.

mu wrote the tokens, pi_p is the policy at the start of the step, pi is the one differentiated. With
one optimizer step a batch pi_p = stopgrad(pi): the ratio pi / pi_p is 1 in value and carries the
gradient of log pi, so in mode `decoupled` clipping cannot act and the correction does all the work.
Log-ratios are clamped to +-10 before they are exponentiated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from learner.config import ObjectiveConfig

LOG_RATIO_LIMIT = 10.0
"""Bound of every log-ratio before exp."""


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of a micro-batch and what it was made of."""

    loss: torch.Tensor
    """Scalar with gradient: this micro-batch's share of the loss of the whole batch."""
    weights: torch.Tensor
    """[N] without gradient: correction weight of each token."""
    clipped: torch.Tensor
    """bool [N]: tokens whose gradient the loss's clipping removed."""


@dataclass(frozen=True)
class Totals:
    """Denominators: counts over the whole batch and all data-parallel ranks, before correction masks."""

    tokens: float
    """Trained tokens."""
    samples: float
    """Samples with at least one trained token."""


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability [N] of `targets` [N] under `logits` [N, V] / `temperature` [N], and entropy [N].

    Natural logarithms; the entropy carries no gradient.
    """
    logs = (logits / temperature[:, None]).log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -(logs.exp() * logs).sum(dim=-1)
    return logs.gather(1, targets[:, None]).squeeze(1), entropy


def objective(
    logprobs: torch.Tensor,
    proximal: torch.Tensor,
    behaviour: torch.Tensor,
    advantages: torch.Tensor,
    sample: torch.Tensor,
    totals: Totals,
    config: ObjectiveConfig,
) -> Objective:
    """The loss of N tokens; all tensors [N], `sample` numbering the micro-batch's samples from 0.

    `logprobs` is log pi with gradient, `proximal` log pi_p and `behaviour` log mu without.
    """
    if config.mode == "bypass":
        anchor = behaviour
        # Only the masks: the ratio itself already stands for pi / mu.
        weights = correction_weights(logprobs.detach() - behaviour, sample, config).gt(0).to(logprobs.dtype)
    else:
        anchor = proximal
        weights = correction_weights(proximal - behaviour, sample, config)
    losses, clipped = ppo_clip(logprobs - anchor, advantages, config)
    return Objective(aggregate(weights * losses, sample, totals, config.aggregation), weights, clipped)


@torch.no_grad()
def correction_weights(
    log_ratio: torch.Tensor, sample: torch.Tensor, config: ObjectiveConfig
) -> torch.Tensor:
    """Weights [N] from u = exp(`log_ratio` [N]), pi_p over mu, by token or by sample.

    With U = exp(sum log u) and g = exp(mean log u) over a sample's tokens:
    `none` 1; `tis` min(u, cap), or min(U, cap) at level `sequence`; `icepop` u where low <= u <= high;
    `mis` min(u, cap) where low <= U <= high; `geo` min(u, cap) where low <= g <= high; else 0.
    """
    ratio = _exp(log_ratio)
    truncated = ratio.clamp(max=config.cap)
    match config.correction:
        case "none":
            return torch.ones_like(ratio)
        case "tis" if config.level == "sequence":
            return _exp(_sample_sum(log_ratio, sample))[sample].clamp(max=config.cap)
        case "tis":
            return truncated
        case "icepop":
            return ratio * _within(ratio, config.icepop_low, config.icepop_high)
        case "mis":
            product = _exp(_sample_sum(log_ratio, sample))[sample]
            return truncated * _within(product, config.mis_low, config.mis_high)
        case "geo":
            mean = _sample_sum(log_ratio, sample) / _sample_sum(torch.ones_like(log_ratio), sample)
            return truncated * _within(_exp(mean)[sample], config.geo_low, config.geo_high)


def ppo_clip(
    log_ratio: torch.Tensor, advantages: torch.Tensor, config: ObjectiveConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate with the dual clip, loss [N] and bool [N] where it stopped the gradient.

    L = max(-A r, -A clip(r, 1 - low, 1 + high)) (arXiv 1707.06347), and where A < 0 at most -A c
    (arXiv 1912.09729).
    """
    ratio = _exp(log_ratio)
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(plain, bounded)
    ceiling = torch.where(advantages < 0, -advantages * config.dual_clip, torch.inf)
    clipped = (bounded > plain) | (loss > ceiling)
    return torch.minimum(loss, ceiling), clipped.detach()


def aggregate(losses: torch.Tensor, sample: torch.Tensor, totals: Totals, how: str) -> torch.Tensor:
    """Token losses [N] to this micro-batch's share of the batch loss.

    `token_mean`: sum / tokens. `sequence_mean`: sum over samples of their token mean / samples.
    """
    if how == "token_mean":
        return losses.sum() / totals.tokens
    counts = _sample_sum(torch.ones_like(losses), sample)
    return (_sample_sum(losses, sample) / counts).sum() / totals.samples


def _exp(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _sample_sum(values: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """[S]: the sum of `values` [N] over each sample; every sample has at least one token."""
    size = int(sample[-1]) + 1
    return torch.zeros(size, dtype=values.dtype).index_add(0, sample, values)


def _within(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return ((values >= low) & (values <= high)).to(values.dtype)
