"""Sampling with a seed for each request, in torch and NumPy.

SGLang hashes (seed, position, token) in a Triton kernel and takes the Gumbel maximum over the
vocabulary. Here one uniform number is drawn for (seed, position) and the distribution function is
inverted at it: the same law, one hash a row, no Triton.
"""

from __future__ import annotations

import numpy as np
import torch

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Increment of SplitMix64: 2^64 divided by the golden ratio, made odd."""


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [n], one for each (seed, position); 53 random bits each.

    Two rounds of the SplitMix64 finaliser (Steele, Lea, Flood 2014), so that neighbouring seeds and
    neighbouring positions are unrelated.

    >>> uniform(np.array([1, 1, 2]), np.array([7, 8, 7])).round(3).tolist()
    [0.2, 0.172, 0.03]
    """
    mixed = splitmix64(splitmix64(seeds.astype(np.uint64)) + positions.astype(np.uint64))
    return (mixed >> np.uint64(11)) * 2.0**-53


def splitmix64(state: np.ndarray) -> np.ndarray:
    """One SplitMix64 output for each state, uint64 [n]; arithmetic is modulo 2^64."""
    z = state + GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def multinomial_with_seed(
    logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Draw one column for each row; stands in for SGLang's function of this name.

    Args:
        logprobs: float [n, m], log-weights of the columns; -inf excludes a column. Rows need not be
            normalised.
        seed: int64 [n], the request's seed.
        positions: int [n], the sequence position being sampled, so that a seed gives a new number at
            every token.

    Returns:
        int64 [n, 1], the drawn columns.
    """
    cumulative = logprobs.double().exp_().cumsum(dim=-1)
    draws = torch.from_numpy(uniform(seed.numpy(), positions.numpy())).unsqueeze(-1)
    drawn = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    return drawn.clamp_(max=logprobs.shape[-1] - 1)
