"""Estimators of a divergence between two policies from tokens of one of them.

With d = log pi - log ref of tokens drawn from pi each has the mean KL(pi || ref): k1 unbiased, k3
unbiased and never negative, k2 with a bias of third order. As losses they differ: the gradient of k1 has
mean 0, that of k2 is the gradient of KL(pi || ref), that of k3 the gradient of KL(ref || pi).
Source: joschu.net/blog/kl-approx.html; gradients: arXiv 2506.09477.
"""

from __future__ import annotations

import torch

from learner.objective.tokens import exp_clamped


def k1(difference: torch.Tensor) -> torch.Tensor:
    """d, any shape."""
    return difference


def k2(difference: torch.Tensor) -> torch.Tensor:
    """d^2 / 2, any shape."""
    return difference.square() / 2


def k3(difference: torch.Tensor) -> torch.Tensor:
    """e^-d - 1 + d, any shape."""
    return exp_clamped(-difference) - 1 + difference


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
"""By their name in the configuration."""
