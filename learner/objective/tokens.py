"""The tokens an objective is computed over, and the sums that turn their losses into one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from learner.config import ObjectiveConfig

LOG_RATIO_LIMIT = 10.0
"""Bound of every log-ratio before exp."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The N trained tokens of a micro-batch with S samples; nothing but `logprobs` and `entropy` has a
    gradient. Tokens outside the loss mask are not here."""

    logprobs: torch.Tensor
    """[N]: log pi, natural logarithm, after temperature."""
    proximal: torch.Tensor
    """[N]: log pi_p."""
    behaviour: torch.Tensor
    """[N]: log mu."""
    advantages: torch.Tensor
    """[N]: the advantage of each token's sample."""
    sample: torch.Tensor
    """int64 [N]: the sample of each token, 0..S-1, never falling; every sample has a token."""
    reference: torch.Tensor | None = None
    """[N]: log-probability under the reference model; None without one."""
    entropy: torch.Tensor | None = None
    """[N]: entropy of pi where each token was drawn, nats; None without an entropy bonus."""
    stopped: torch.Tensor | None = None
    """[N]: stopgrad(log pi) apart, for checks of the gradient by finite differences; None: `logprobs`."""

    def stop_gradient(self) -> torch.Tensor:
        """[N]: stopgrad(log pi), from which every weight and mask is computed."""
        return self.logprobs.detach() if self.stopped is None else self.stopped


@dataclass(frozen=True)
class Totals:
    """Denominators: counts over the whole batch (or mini-batch) and all data-parallel ranks, before
    correction masks."""

    tokens: float
    """Trained tokens."""
    samples: float
    """Samples with at least one trained token."""


def aggregate(
    losses: torch.Tensor, sample: torch.Tensor, totals: Totals, config: ObjectiveConfig
) -> torch.Tensor:
    """Token losses [N] to this micro-batch's share of the batch loss.

    `token_mean`: sum / tokens (DAPO, arXiv 2503.14476). `sequence_mean`: sum over samples of their token
    mean / samples (GRPO, arXiv 2402.03300). `sequence_sum`: sum / (samples * `sequence_constant`)
    (Dr. GRPO, arXiv 2503.20783).
    """
    match config.aggregation:
        case "token_mean":
            return losses.sum() / totals.tokens
        case "sequence_mean":
            return sample_mean(losses, sample).sum() / totals.samples
        case "sequence_sum":
            return losses.sum() / (totals.samples * config.sequence_constant)


def exp_clamped(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp of a log-ratio after clamping it to +-10, any shape."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def sample_sum(values: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """[S]: the sum of `values` [N] over each sample."""
    size = int(sample[-1]) + 1
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, sample, values)


def sample_mean(values: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """[S]: the mean of `values` [N] over each sample."""
    return sample_sum(values, sample) / sample_sum(torch.ones_like(values), sample)
