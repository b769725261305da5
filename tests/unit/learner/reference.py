"""The objective again in NumPy float64, written from the formulas, one sample at a time."""

from __future__ import annotations

import math

import numpy as np

from learner.config import ObjectiveConfig


def softmax_logs(logits: np.ndarray, temperature: np.ndarray) -> np.ndarray:
    """Log-softmax [N, V] of `logits` [N, V] / `temperature` [N]."""
    scaled = logits / temperature[:, None]
    shifted = scaled - scaled.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def weights_of_sample(log_ratios: np.ndarray, config: ObjectiveConfig) -> list[float]:
    """Correction weights of one sample's tokens."""
    u = [math.exp(min(10.0, max(-10.0, x))) for x in log_ratios]
    whole = math.exp(min(10.0, max(-10.0, sum(log_ratios))))
    geometric = math.exp(min(10.0, max(-10.0, sum(log_ratios) / len(log_ratios))))
    if config.correction == "none":
        return [1.0 for _ in u]
    if config.correction == "tis":
        return [min(whole if config.level == "sequence" else x, config.cap) for x in u]
    if config.correction == "icepop":
        return [x if config.icepop_low <= x <= config.icepop_high else 0.0 for x in u]
    if config.correction == "mis":
        return [min(x, config.cap) * (config.mis_low <= whole <= config.mis_high) for x in u]
    return [min(x, config.cap) * (config.geo_low <= geometric <= config.geo_high) for x in u]


def ppo_token(log_ratio: float, advantage: float, config: ObjectiveConfig) -> float:
    """The clipped surrogate of one token, dual clip included."""
    r = math.exp(min(10.0, max(-10.0, log_ratio)))
    clipped = min(max(r, 1 - config.clip_low), 1 + config.clip_high)
    gain = min(r * advantage, clipped * advantage)
    return -(max(gain, config.dual_clip * advantage) if advantage < 0 else gain)


def loss(
    logprobs: np.ndarray,
    proximal: np.ndarray,
    behaviour: np.ndarray,
    advantages: np.ndarray,
    sample: np.ndarray,
    totals: tuple[float, float],
    config: ObjectiveConfig,
) -> float:
    """The loss of N tokens; `totals` is (tokens, samples)."""
    result = 0.0
    for index in range(sample.max() + 1):
        chosen = np.flatnonzero(sample == index)
        anchor, current = proximal, proximal
        if config.mode == "bypass":
            anchor, current = behaviour, logprobs
        weights = weights_of_sample(current[chosen] - behaviour[chosen], config)
        if config.mode == "bypass":
            weights = [float(w > 0) for w in weights]
        terms = [
            w * ppo_token(logprobs[i] - anchor[i], advantages[i], config)
            for w, i in zip(weights, chosen, strict=True)
        ]
        if config.aggregation == "token_mean":
            result += sum(terms) / totals[0]
        else:
            result += sum(terms) / len(terms) / totals[1]
    return result
