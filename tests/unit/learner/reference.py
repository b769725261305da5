"""The objective again in NumPy float64, in closed form, one sample at a time, gradient included.

Written from the papers' formulas and `docs/objectives.md`, and deliberately not like `learner.objective`:
scalars and branches instead of tensors and masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learner.config import ObjectiveConfig


@dataclass
class Batch:
    """Ragged samples: one array a sample in each list, and one advantage a sample."""

    logprobs: list[np.ndarray]
    proximal: list[np.ndarray]
    behaviour: list[np.ndarray]
    advantages: list[float]
    reference: list[np.ndarray] | None = None
    entropy: list[np.ndarray] | None = None


@dataclass
class Result:
    """Loss, and its derivative by every log-probability and every entropy, sample by sample."""

    loss: float
    by_logprob: list[np.ndarray]
    by_entropy: list[np.ndarray]


def softmax_logs(logits: np.ndarray, temperature: np.ndarray) -> np.ndarray:
    """Log-softmax [N, V] of `logits` [N, V] / `temperature` [N]."""
    scaled = logits / temperature[:, None]
    shifted = scaled - scaled.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def ratio(log_ratio: float) -> float:
    """exp after the clamp."""
    return math.exp(min(10.0, max(-10.0, log_ratio)))


def weights_of_sample(log_ratios: Sequence[float], config: ObjectiveConfig) -> list[float]:
    """Correction weights of one sample's tokens."""
    u = [ratio(x) for x in log_ratios]
    whole = ratio(sum(log_ratios))
    geometric = ratio(sum(log_ratios) / len(log_ratios))
    if config.correction == "none":
        return [1.0 for _ in u]
    if config.correction == "tis":
        return [min(whole if config.level == "sequence" else x, config.cap) for x in u]
    if config.correction == "icepop":
        return [x if config.icepop_low <= x <= config.icepop_high else 0.0 for x in u]
    if config.correction == "mis":
        return [min(x, config.cap) * (config.mis_low <= whole <= config.mis_high) for x in u]
    if config.correction == "geo":
        return [min(x, config.cap) * (config.geo_low <= geometric <= config.geo_high) for x in u]
    return [math.prod(min(1.0, x) for x in u[index:]) for index in range(len(u))]


def is_masked(log_ratios: Sequence[float], config: ObjectiveConfig) -> list[bool]:
    """Whether a mask drops each of one sample's tokens."""
    if config.correction not in ("icepop", "mis", "geo"):
        return [False for _ in log_ratios]
    return [weight == 0.0 for weight in weights_of_sample(log_ratios, config)]


def clip_of(r: float, advantage: float, low: float, high: float, dual: float) -> tuple[float, float]:
    """A clipped surrogate of a ratio and its derivative by that ratio."""
    if advantage > 0:
        return (-advantage * r, -advantage) if r <= 1 + high else (-advantage * (1 + high), 0.0)
    if r < 1 - low:
        return -advantage * (1 - low), 0.0
    if r > dual:
        return -advantage * dual, 0.0
    return -advantage * r, -advantage


def surrogate(
    logprobs: np.ndarray, anchor: np.ndarray, advantage: float, config: ObjectiveConfig
) -> list[tuple[float, float]]:
    """(loss, derivative by the token's log-probability) of each token of a sample."""
    x = [float(value) for value in logprobs - anchor]
    if config.loss == "ppo_clip":
        found = []
        for value in x:
            r = ratio(value)
            loss, slope = clip_of(r, advantage, config.clip_low, config.clip_high, config.dual_clip)
            found.append((loss, slope * r if abs(value) < 10 else 0.0))
        return found
    if config.loss == "gspo":
        mean = sum(x) / len(x)
        s = ratio(mean)
        loss, slope = clip_of(s, advantage, config.gspo_low, config.gspo_high, math.inf)
        # d s / d log pi_t = s / n; the mean over n tokens of n times that.
        return [(loss, slope * s if abs(mean) < 10 else 0.0) for _ in x]
    if config.loss == "cispo":
        caps = [min(ratio(value), config.cispo_cap) for value in x]
        return [(-c * advantage * logp, -c * advantage) for c, logp in zip(caps, logprobs, strict=True)]
    weight = 1.0 if advantage > 0 else min(ratio(sum(x)), 1.0)
    return [(-weight * advantage * logp, -weight * advantage) for logp in logprobs]


def penalty(difference: float, config: ObjectiveConfig) -> tuple[float, float]:
    """The KL in the loss of d = log pi - log ref, and its derivative by d."""
    if config.kl.estimator == "k2":
        return difference**2 / 2, difference
    inside = abs(difference) < 10
    return ratio(-difference) - 1 + difference, 1 - (ratio(-difference) if inside else 0.0)


def objective(batch: Batch, totals: tuple[float, float], config: ObjectiveConfig) -> Result:
    """The loss of a micro-batch; `totals` is (tokens, samples) of the whole batch."""
    result = Result(0.0, [], [])
    for i, logprobs in enumerate(batch.logprobs):
        bypass = config.mode == "bypass"
        current = logprobs if bypass else batch.proximal[i]
        x = [float(value) for value in current - batch.behaviour[i]]
        weights = weights_of_sample(x, config)
        if bypass:
            weights = [0.0 if masked else 1.0 for masked in is_masked(x, config)]
        anchor = batch.behaviour[i] if bypass else batch.proximal[i]
        terms = surrogate(logprobs, anchor, batch.advantages[i], config)
        share = {
            "token_mean": 1 / totals[0],
            "sequence_mean": 1 / (totals[1] * len(logprobs)),
            "sequence_sum": 1 / (totals[1] * max(1, config.sequence_constant)),
        }[config.aggregation]
        slopes = []
        for t, (loss, slope) in enumerate(terms):
            total, rise = weights[t] * loss, weights[t] * slope
            if batch.reference is not None and config.kl.where == "loss":
                stop = min(ratio(x[t]), config.cap) * weights[t] if bypass else weights[t]
                value, by = penalty(float(logprobs[t] - batch.reference[i][t]), config)
                total += config.kl.coefficient * stop * value
                rise += config.kl.coefficient * stop * by
            if batch.entropy is not None:
                total -= config.entropy * float(batch.entropy[i][t])
            result.loss += share * total
            slopes.append(share * rise)
        result.by_logprob.append(np.array(slopes))
        result.by_entropy.append(np.full(len(logprobs), -share * config.entropy))
    return result
