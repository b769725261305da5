"""The objective against an independent NumPy float64 reference, for every legal combination."""

from __future__ import annotations

import itertools
import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.config import KlConfig, ObjectiveConfig
from learner.config.legal import CUSTOM, LEGAL
from learner.errors import ConfigError
from learner.objective import Tokens, Totals, objective
from learner.objective.corrections import correct
from learner.objective.losses import Surrogate
from tests.unit.learner import reference
from tests.unit.learner.reference import Batch

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")
MORE = 3.0
"""Denominators exceed what the micro-batch holds by this: they belong to the whole batch."""


def legal() -> list[ObjectiveConfig]:
    """A configuration for every legal combination, level and aggregation."""
    found = []
    for row, aggregation in itertools.product(LEGAL, AGGREGATIONS):
        if row.loss == CUSTOM or (row.loss == "gspo" and aggregation != "sequence_mean"):
            continue
        for correction in row.corrections:
            for level in ("token", "sequence") if correction == "tis" else ("token",):
                found.append(
                    ObjectiveConfig(
                        loss=row.loss,
                        mode=row.mode,
                        mini_batches=row.mini_batches,
                        correction=correction,
                        level=level,
                        aggregation=aggregation,
                        sequence_constant=7 if aggregation == "sequence_sum" else 0,
                    )
                )
    return found


def name_of(config: ObjectiveConfig) -> str:
    return "-".join((config.loss, config.mode, config.correction, config.level, config.aggregation))


def make_batch(seed: int, lengths: list[int], spread: float, extras: bool = False) -> Batch:
    """Random samples; log-ratios have the standard deviation `spread`."""
    source = np.random.default_rng(seed)
    logprobs = [source.normal(-2.0, 1.0, n) for n in lengths]
    proximal, behaviour, far = (
        [values + source.normal(0.0, spread, len(values)) for values in logprobs] for _ in range(3)
    )
    advantages = source.normal(0.0, 1.0, len(lengths)).tolist()
    entropy = [source.uniform(0.1, 3.0, n) for n in lengths]
    return Batch(logprobs, proximal, behaviour, advantages, *((far, entropy) if extras else (None, None)))


def flat(parts: list[np.ndarray] | None, gradient: bool = False) -> torch.Tensor | None:
    return None if parts is None else torch.tensor(np.concatenate(parts), requires_grad=gradient)


def tokens_of(batch: Batch) -> Tokens:
    lengths = [len(part) for part in batch.logprobs]
    return Tokens(
        logprobs=flat(batch.logprobs, gradient=True),
        proximal=flat(batch.proximal),
        behaviour=flat(batch.behaviour),
        advantages=torch.tensor(np.repeat(batch.advantages, lengths)),
        sample=torch.tensor(np.repeat(np.arange(len(lengths)), lengths)),
        reference=flat(batch.reference),
        entropy=flat(batch.entropy, gradient=True),
    )


def totals_of(batch: Batch) -> Totals:
    return Totals(sum(map(len, batch.logprobs)) + MORE, len(batch.logprobs) + MORE)


def check(batch: Batch, config: ObjectiveConfig) -> None:
    """Value and gradient agree to 1e-6."""
    tokens, totals = tokens_of(batch), totals_of(batch)
    result = objective(tokens, totals, config)
    result.loss.backward()
    expected = reference.objective(batch, (totals.tokens, totals.samples), config)
    assert result.loss.item() == pytest.approx(expected.loss, rel=1e-6, abs=1e-9)
    np.testing.assert_allclose(
        tokens.logprobs.grad.numpy(), np.concatenate(expected.by_logprob), rtol=1e-6, atol=1e-9
    )
    if tokens.entropy is not None and config.entropy:
        got = tokens.entropy.grad.numpy()
        np.testing.assert_allclose(got, np.concatenate(expected.by_entropy), rtol=1e-6)


RAGGED = st.lists(st.integers(1, 9), min_size=1, max_size=5)
SPREAD = st.sampled_from([1e-4, 0.005, 0.3, 1.5, 8.0])


@pytest.mark.parametrize("config", legal(), ids=name_of)
@given(seed=st.integers(0, 2**32 - 1), lengths=RAGGED, spread=SPREAD)
@settings(max_examples=20, deadline=None)
def test_loss_and_gradient_equal_the_reference(
    config: ObjectiveConfig, seed: int, lengths: list[int], spread: float
) -> None:
    check(make_batch(seed, lengths, spread), config)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("config", legal()[::5], ids=name_of)
@given(seed=st.integers(0, 2**32 - 1), lengths=RAGGED, spread=SPREAD)
@settings(max_examples=10, deadline=None)
def test_penalties_equal_the_reference(
    config: ObjectiveConfig, estimator: str, seed: int, lengths: list[int], spread: float
) -> None:
    kl = KlConfig(coefficient=0.3, where="loss", estimator=estimator)
    check(
        make_batch(seed, lengths, spread, extras=True),
        msgspec.structs.replace(config, kl=kl, entropy=0.05),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_low": 0.1, "clip_high": 0.6, "dual_clip": 1.5, "mode": "bypass", "correction": "none"},
        {"correction": "icepop", "icepop_low": 0.9, "icepop_high": 1.1},
        {"correction": "mis", "mis_low": 0.7, "mis_high": 1.2, "cap": 1.1},
        {"correction": "geo", "geo_low": 0.8, "geo_high": 1.3, "cap": 1.1},
        {"loss": "cispo", "mode": "bypass", "correction": "none", "cispo_cap": 1.2},
        {
            "loss": "gspo",
            "mode": "bypass",
            "correction": "none",
            "aggregation": "sequence_mean",
            "gspo_low": 0.1,
            "gspo_high": 0.3,
        },
    ],
    ids=lambda changes: changes.get("loss", changes.get("correction")),
)
def test_every_bound_is_the_configured_one(changes: dict[str, object]) -> None:
    config = ObjectiveConfig(**changes)
    for seed in range(60):
        check(make_batch(seed, [4, 1, 6], 0.3), config)


def corner_distance(batch: Batch, config: ObjectiveConfig) -> float:
    """How near any log-ratio, of a token, an answer or its mean, is to a kink of the objective."""
    corners = [config.cap, config.cispo_cap, config.dual_clip, 1.0, math.exp(10), math.exp(-10)]
    corners += [1 - config.clip_low, 1 + config.clip_high, 1 - config.gspo_low, 1 + config.gspo_high]
    corners += [getattr(config, f"{c}_{end}") for c in ("icepop", "mis", "geo") for end in ("low", "high")]
    found = []
    for i, logprobs in enumerate(batch.logprobs):
        for anchor in (batch.proximal[i], batch.behaviour[i]):
            found += [*(logprobs - anchor), (logprobs - anchor).sum(), (logprobs - anchor).mean()]
    return min(abs(value - math.log(corner)) for value in found for corner in corners)


@pytest.mark.parametrize("config", legal(), ids=name_of)
def test_gradcheck_with_stop_gradients_as_constants(config: ObjectiveConfig) -> None:
    """Finite differences by `log pi` alone: weights, masks and pi_p come in as constants."""
    kl = KlConfig(coefficient=0.3, where="loss", estimator="k3")
    config = msgspec.structs.replace(config, kl=kl, entropy=0.05)
    candidates = (make_batch(seed, [3, 1, 4], 0.4, extras=True) for seed in itertools.count())
    batch = next(b for b in candidates if corner_distance(b, config) > 1e-4)
    fixed, totals = tokens_of(batch), totals_of(batch)
    stopped = fixed.logprobs.detach().clone()  # gradcheck nudges its inputs in place

    def loss(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        tokens = Tokens(
            logprobs,
            fixed.proximal,
            fixed.behaviour,
            fixed.advantages,
            fixed.sample,
            fixed.reference,
            entropy,
            stopped=stopped,
        )
        return objective(tokens, totals, config).loss

    assert torch.autograd.gradcheck(loss, (fixed.logprobs, fixed.entropy), eps=1e-7, atol=1e-7)


@pytest.mark.parametrize("config", legal(), ids=name_of)
def test_at_identical_policies_every_objective_is_plain_grpo(config: ObjectiveConfig) -> None:
    """pi = pi_p = mu: every weight is 1 and the gradient is -A over the denominator."""
    batch = make_batch(0, [3, 1, 4], 0.0)
    tokens, totals = tokens_of(batch), totals_of(batch)
    result = objective(tokens, totals, config)
    result.loss.backward()
    assert result.weights.eq(1).all()
    assert not result.clipped.any()
    share = {
        "token_mean": [1 / totals.tokens] * 3,
        "sequence_mean": [1 / totals.samples / n for n in (3, 1, 4)],
        "sequence_sum": [1 / totals.samples / 7] * 3,
    }[config.aggregation]
    expected = np.repeat([-a * s for a, s in zip(batch.advantages, share, strict=True)], (3, 1, 4))
    np.testing.assert_allclose(tokens.logprobs.grad.numpy(), expected, rtol=1e-12)


U = np.array([0.4, 1.0, 3.0, 6.0])
"""Ratios of one answer: U = 7.2, g = 1.638."""
MISMATCHES = [
    ("none", {}, [1, 1, 1, 1]),
    ("tis", {}, [0.4, 1.0, 2.0, 2.0]),
    ("tis", {"level": "sequence"}, [2.0, 2.0, 2.0, 2.0]),
    ("icepop", {}, [0, 1.0, 3.0, 0]),
    ("mis", {}, [0, 0, 0, 0]),
    ("mis", {"mis_high": 8.0}, [0.4, 1.0, 2.0, 2.0]),
    ("geo", {}, [0, 0, 0, 0]),
    ("geo", {"geo_high": 1.7}, [0.4, 1.0, 2.0, 2.0]),
    ("vtrace", {}, [0.4, 1.0, 1.0, 1.0]),
]


@pytest.mark.parametrize(("correction", "limits", "expected"), MISMATCHES)
def test_a_constructed_mismatch_is_weighted_as_the_formula_says(
    correction: str, limits: dict[str, object], expected: list[float]
) -> None:
    config = ObjectiveConfig(correction=correction, **limits)
    found = correct(torch.tensor(np.log(U)), torch.zeros(4, dtype=torch.int64), config)
    np.testing.assert_allclose(found.weights.numpy(), expected, rtol=1e-12)
    assert found.kept.tolist() == [weight > 0 for weight in expected]
    cut = {"tis": U > 2, "vtrace": U > 1, "none": U < 0, "icepop": U < 0}
    if limits.get("level") == "sequence":
        assert found.truncated.all()
    else:
        masked = not any(expected)
        assert found.truncated.tolist() == ((U < 0) if masked else cut.get(correction, U > 2)).tolist()


def vtrace_recursion(
    u: np.ndarray, rewards: np.ndarray, values: np.ndarray, discount: float
) -> tuple[np.ndarray, np.ndarray]:
    """v_s and the policy-gradient advantages as published (arXiv 1802.01561, section 4; rho = c = 1 bars).

    `values` [n + 1] ends with the bootstrap value.
    """
    rho = np.minimum(1.0, u)
    delta = rho * (rewards + discount * values[1:] - values[:-1])
    targets = values.copy()
    for s in reversed(range(len(u))):
        targets[s] = values[s] + delta[s] + discount * rho[s] * (targets[s + 1] - values[s + 1])
    return targets, rho * (rewards + discount * targets[1:] - values[:-1])


def weights_of_prefix(u: np.ndarray) -> np.ndarray:
    found = correct(
        torch.tensor(np.log(u)), torch.zeros(len(u), dtype=torch.int64), ObjectiveConfig(correction="vtrace")
    )
    return found.weights.numpy()


@pytest.mark.parametrize("seed", range(20))
def test_vtrace_is_the_published_recursion_with_any_value_function(seed: int) -> None:
    """The recursion is a sum of temporal differences, each weighted as our weights say for an answer
    that ends there."""
    source = np.random.default_rng(seed)
    n = int(source.integers(1, 12))
    u, rewards = np.exp(source.normal(0, 0.7, n)), source.normal(0, 1, n)
    values = source.normal(0, 1, n + 1)
    differences = rewards + values[1:] - values[:-1]
    ours = np.zeros(n)
    for end in range(n):
        ours[: end + 1] += weights_of_prefix(u[: end + 1]) * differences[end]
    _, published = vtrace_recursion(u, rewards, values, 1.0)
    np.testing.assert_allclose(ours, published, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_vtrace_with_the_group_baseline_and_a_terminal_reward_is_the_weight(seed: int) -> None:
    source = np.random.default_rng(seed)
    u, reward, baseline = np.exp(source.normal(0, 0.7, 9)), 1.3, 0.4
    rewards = np.zeros(9)
    rewards[-1] = reward
    _, published = vtrace_recursion(u, rewards, np.array([baseline] * 9 + [0.0]), 1.0)
    np.testing.assert_allclose(weights_of_prefix(u) * (reward - baseline), published, rtol=1e-9)


def test_vtrace_starts_again_with_every_sample() -> None:
    log_ratio, sample = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0, 0, 1])
    found = correct(log_ratio, sample, ObjectiveConfig(correction="vtrace")).weights
    np.testing.assert_allclose(found.numpy(), np.exp([-3.0, -2.0, -3.0]), rtol=1e-6)


def test_bound_marks_what_each_loss_bounded() -> None:
    """0 free, 1 low, 2 high, 3 dual, at ratios of 0.5, 1, 1.5 and 4 to mu."""
    ratios = np.array([0.5, 1.0, 1.5, 4.0])
    for advantage, expected in ((1.0, [0, 0, 2, 2]), (-1.0, [1, 0, 0, 3])):
        batch = Batch([np.log(ratios)], [np.zeros(4)], [np.zeros(4)], [advantage])
        tokens = tokens_of(batch)
        config = ObjectiveConfig(mode="bypass", correction="none")
        result = objective(tokens, totals_of(batch), config)
        result.loss.backward()
        assert result.bound.tolist() == expected
        assert (tokens.logprobs.grad == 0).tolist() == [code > 0 for code in expected]
        cispo = msgspec.structs.replace(config, loss="cispo", cispo_cap=2.0)
        assert objective(tokens, totals_of(batch), cispo).bound.tolist() == [0, 0, 0, 2]
        topr = msgspec.structs.replace(config, loss="topr")  # U = 3
        assert objective(tokens, totals_of(batch), topr).bound.tolist() == [0 if advantage > 0 else 2] * 4


@pytest.mark.parametrize("config", legal(), ids=name_of)
def test_extreme_ratios_stay_finite(config: ObjectiveConfig) -> None:
    batch = Batch(
        [np.array([-500.0]), np.array([0.0])],
        [np.array([-500.0]), np.array([0.0])],
        [np.array([0.0]), np.array([-500.0])],
        [1.0, -1.0],
    )
    tokens = tokens_of(batch)
    result = objective(tokens, totals_of(batch), config)
    result.loss.backward()
    assert torch.isfinite(result.loss)
    assert torch.isfinite(tokens.logprobs.grad).all()


def squared(tokens: Tokens, anchor: torch.Tensor, config: ObjectiveConfig) -> Surrogate:
    """A loss of the user's own: -A (log pi - log anchor + clip_low)."""
    losses = -tokens.advantages * (tokens.logprobs - anchor + config.clip_low)
    return Surrogate(losses, torch.zeros_like(tokens.sample))


def averaged(tokens: Tokens, anchor: torch.Tensor, config: ObjectiveConfig) -> Surrogate:
    """What a loss must not do."""
    return Surrogate(tokens.logprobs.mean(), torch.zeros_like(tokens.sample))


def test_a_loss_of_ones_own_is_corrected_and_aggregated() -> None:
    config = ObjectiveConfig(loss=f"{__name__}:squared")
    batch = make_batch(1, [2, 5], 0.5)
    tokens, totals = tokens_of(batch), totals_of(batch)
    result = objective(tokens, totals, config)
    weights = np.minimum(np.exp(np.concatenate(batch.proximal) - np.concatenate(batch.behaviour)), 2.0)
    away = np.concatenate(batch.logprobs) - np.concatenate(batch.proximal)
    terms = weights * -np.repeat(batch.advantages, (2, 5)) * (away + 0.2)
    assert result.loss.item() == pytest.approx(terms.sum() / totals.tokens)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("nowhere.to.be:found", "expected a function that can be imported: No module named"),
        (f"{__name__}:missing", "expected a function that can be imported"),
        (f"{__name__}:AGGREGATIONS", "a tuple, expected a function"),
        (f"{__name__}:averaged", r"returned losses of shape \(\), expected one a token, \(3,\)"),
    ],
)
def test_a_loss_of_ones_own_that_cannot_be_used_is_refused(loss: str, said: str) -> None:
    batch = make_batch(0, [3], 0.1)
    with pytest.raises(ConfigError, match=said):
        objective(tokens_of(batch), totals_of(batch), ObjectiveConfig(loss=loss))
