"""What is done about the tokens coming from mu and not from the policy at the start of the step.

With u a token's ratio to mu, U = exp(sum log u) and g = exp(mean log u) over a sample's trained tokens:

    none     1
    tis      min(u, cap), or min(U, cap) at level `sequence`      truncated importance sampling
    icepop   u where low <= u <= high, else 0                      arXiv 2510.18855
    mis      min(u, cap) where low <= U <= high, else 0            masked importance sampling
    geo      min(u, cap) where low <= g <= high, else 0
    vtrace   product of min(1, u) over this and the later tokens   V-trace, arXiv 1802.01561
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from learner.config import ObjectiveConfig
from learner.objective.tokens import exp_clamped, sample_mean, sample_sum


@dataclass(frozen=True, eq=False)
class Correction:
    """Stop-gradient weights of N tokens."""

    weights: torch.Tensor
    """[N]: weight of each token, 0 where it is masked."""
    kept: torch.Tensor
    """bool [N]: False where the mask drops a token."""
    truncated: torch.Tensor
    """bool [N]: where a ratio was cut down to its cap."""


@torch.no_grad()
def correct(log_ratio: torch.Tensor, sample: torch.Tensor, config: ObjectiveConfig) -> Correction:
    """The weights of `config.correction` for log u = `log_ratio` [N] of the samples `sample` [N]."""
    return _CORRECTIONS[config.correction](log_ratio, sample, config)


def _none(log_ratio: torch.Tensor, sample: torch.Tensor, config: ObjectiveConfig) -> Correction:
    everywhere = torch.ones_like(log_ratio)
    return Correction(everywhere, everywhere.bool(), ~everywhere.bool())


def _tis(log_ratio: torch.Tensor, sample: torch.Tensor, config: ObjectiveConfig) -> Correction:
    if config.level == "sequence":
        log_ratio = sample_sum(log_ratio, sample)[sample]
    return _truncate(exp_clamped(log_ratio), torch.ones_like(sample, dtype=torch.bool), config)


def _icepop(log_ratio: torch.Tensor, sample: torch.Tensor, config: ObjectiveConfig) -> Correction:
    ratio = exp_clamped(log_ratio)
    kept = _within(ratio, config.icepop_low, config.icepop_high)
    return Correction(ratio * kept, kept, torch.zeros_like(kept))


def _mis(log_ratio: torch.Tensor, sample: torch.Tensor, config: ObjectiveConfig) -> Correction:
    product = exp_clamped(sample_sum(log_ratio, sample))
    kept = _within(product, config.mis_low, config.mis_high)
    return _truncate(exp_clamped(log_ratio), kept[sample], config)


def _geo(log_ratio: torch.Tensor, sample: torch.Tensor, config: ObjectiveConfig) -> Correction:
    geometric = exp_clamped(sample_mean(log_ratio, sample))
    kept = _within(geometric, config.geo_low, config.geo_high)
    return _truncate(exp_clamped(log_ratio), kept[sample], config)


def _vtrace(log_ratio: torch.Tensor, sample: torch.Tensor, config: ObjectiveConfig) -> Correction:
    """V-trace's policy-gradient factor with rho-bar = c-bar = 1, gamma = 1, a reward at the end and the
    group's baseline as the value everywhere: rho_i c_{i+1} ... c_{n-1} rho_n.

    The one weight that is a product of clamped ratios, so it may come close to 0.
    """
    lengths = torch.bincount(sample).tolist()
    factors = exp_clamped(log_ratio).clamp(max=1.0)
    later = [part.flip(0).cumprod(0).flip(0) for part in factors.split(lengths)]
    return Correction(torch.cat(later), torch.ones_like(factors, dtype=torch.bool), log_ratio > 0)


_CORRECTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, ObjectiveConfig], Correction]] = {
    "none": _none,
    "tis": _tis,
    "icepop": _icepop,
    "mis": _mis,
    "geo": _geo,
    "vtrace": _vtrace,
}


def _truncate(ratio: torch.Tensor, kept: torch.Tensor, config: ObjectiveConfig) -> Correction:
    return Correction(ratio.clamp(max=config.cap) * kept, kept, kept & (ratio > config.cap))


def _within(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return (values >= low) & (values <= high)
