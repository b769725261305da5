"""What a step reports of its tokens: how far the policies are apart, and what the correction did."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from learner.objective import LOG_RATIO_LIMIT, Objective
from learner.packing import MicroBatch


@dataclass(eq=False)
class TokenRecord:
    """Token values of a step's micro-batches, collected while they train."""

    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Name -> one array [N] a micro-batch."""
    loss: float = 0.0
    """The batch's loss so far."""

    def add(
        self, batch: MicroBatch, logprobs: torch.Tensor, entropy: torch.Tensor, result: Objective
    ) -> None:
        """Take the values [N] of one micro-batch."""
        values = {
            "log_ratio": logprobs.detach() - batch.behaviour,
            "entropy": entropy,
            "weight": result.weights,
            "clipped": result.clipped,
            "staleness": batch.staleness,
        }
        for name, tensor in values.items():
            self.columns.setdefault(name, []).append(tensor.numpy())
        self.loss += result.loss.item()

    def summary(self) -> dict[str, float]:
        """Means over the trained tokens, in float64.

        `ratio_deviation_max` is the largest |pi / mu - 1|; `ess` is (sum w)^2 / (n sum w^2), 0 when every
        weight is 0; `kl_k1` = mean(-d) and `kl_k3` = mean(e^d - 1 - d) with d = log pi - log mu estimate
        KL(mu || pi), also for each staleness s as `kl_k1/s`, `kl_k3/s`; `masked` is the share of tokens
        of weight 0.
        """
        columns = {name: np.concatenate(parts) for name, parts in self.columns.items()}
        log_ratio = columns["log_ratio"].astype(np.float64)
        weight = columns["weight"].astype(np.float64)
        squares = float(np.square(weight).sum())
        staleness = columns["staleness"]
        ratio = np.exp(np.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
        kinds = {"": np.ones(len(log_ratio), bool)}
        kinds |= {f"/{value}": staleness == value for value in np.unique(staleness)}
        divergences = {}
        for suffix, chosen in kinds.items():
            divergences["kl_k1" + suffix] = float(-log_ratio[chosen].mean())
            divergences["kl_k3" + suffix] = float((ratio - 1 - log_ratio)[chosen].mean())
        return {
            "loss": self.loss,
            "entropy": float(columns["entropy"].mean(dtype=np.float64)),
            "ratio_deviation_max": float(np.abs(ratio - 1).max()),
            "clip_fraction": float(columns["clipped"].mean()),
            "weight_mean": float(weight.mean()),
            "masked": float((weight == 0).mean()),
            "ess": float(weight.sum()) ** 2 / (len(weight) * squares) if squares else 0.0,
            "token_staleness_mean": float(staleness.mean()),
            "tokens": float(len(log_ratio)),
            **divergences,
        }
