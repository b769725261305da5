"""The objective against an independent NumPy float64 reference, values and gradients."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
import torch

from learner.config import ObjectiveConfig
from learner.errors import ConfigError
from learner.objective import Tokens, Totals, objective, token_logprobs
from tests.unit.learner import reference

SAMPLE = np.array([0, 0, 0, 1, 2, 2, 2, 2])
TOTALS = (11.0, 4.0)
"""More than the micro-batch holds: denominators belong to the whole batch."""

LEGAL = [
    {"mode": "decoupled", "correction": c, "level": level, "aggregation": a}
    for c, level, a in itertools.product(
        ("none", "tis", "icepop", "mis", "geo"), ("token", "sequence"), ("token_mean", "sequence_mean")
    )
    if level == "token" or c == "tis"
] + [
    {"mode": "bypass", "correction": c, "aggregation": a}
    for c, a in itertools.product(("none", "icepop", "mis", "geo"), ("token_mean", "sequence_mean"))
]


def _tokens(seed: int, spread: float) -> tuple[np.ndarray, ...]:
    source = np.random.default_rng(seed)
    logprobs = source.normal(-2.0, 1.0, 8)
    proximal = logprobs + source.normal(0.0, spread, 8)
    behaviour = logprobs + source.normal(0.0, spread, 8)
    return logprobs, proximal, behaviour, source.normal(0.0, 1.0, 8)


@pytest.mark.parametrize("spread", [0.005, 0.3, 1.5, 8.0])
@pytest.mark.parametrize("options", LEGAL, ids=lambda options: "-".join(options.values()))
def test_loss_and_gradient_equal_the_reference(options: dict[str, str], spread: float) -> None:
    config = ObjectiveConfig(**options)
    for seed in range(5):
        logprobs, proximal, behaviour, advantages = _tokens(seed, spread)
        variable = torch.tensor(logprobs, requires_grad=True)
        fixed = [torch.tensor(values) for values in (proximal, behaviour, advantages, SAMPLE)]
        result = objective(Tokens(variable, *fixed), Totals(*TOTALS), config)
        result.loss.backward()

        def at(values: np.ndarray, rest: tuple = (proximal, behaviour, advantages)) -> float:
            return reference.loss(values, *rest, SAMPLE, TOTALS, config)

        assert result.loss.item() == pytest.approx(at(logprobs), rel=1e-6, abs=1e-9)
        for index in range(8):
            nudge = np.zeros(8)
            nudge[index] = 1e-6
            slope = (at(logprobs + nudge) - at(logprobs - nudge)) / 2e-6
            assert variable.grad[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("correction", ["none", "tis", "icepop", "mis", "geo"])
def test_on_policy_gradient_is_the_policy_gradient(correction: str) -> None:
    """With pi = pi_p = mu every correction is 1 and the gradient is -A / tokens, exactly."""
    logprobs, _, _, advantages = _tokens(0, 0.0)
    variable = torch.tensor(logprobs, requires_grad=True)
    fixed = torch.tensor(logprobs)
    result = objective(
        Tokens(variable, fixed, fixed, torch.tensor(advantages), torch.tensor(SAMPLE)),
        Totals(*TOTALS),
        ObjectiveConfig(correction=correction),
    )
    result.loss.backward()
    np.testing.assert_allclose(variable.grad.numpy(), -advantages / TOTALS[0], rtol=1e-12)
    assert result.weights.eq(1).all()
    assert not result.clipped.any()


def test_clipped_marks_exactly_the_tokens_without_gradient() -> None:
    logprobs, _, behaviour, advantages = _tokens(3, 1.0)
    variable = torch.tensor(logprobs, requires_grad=True)
    fixed = [torch.tensor(values) for values in (logprobs, behaviour, advantages, SAMPLE)]
    result = objective(
        Tokens(variable, *fixed), Totals(*TOTALS), ObjectiveConfig(mode="bypass", correction="none")
    )
    result.loss.backward()
    assert result.clipped.any()
    assert torch.equal(result.clipped, variable.grad == 0)


def test_extreme_ratios_stay_finite() -> None:
    variable = torch.tensor([-500.0, 0.0], requires_grad=True)
    fixed = [torch.tensor([-500.0, 0.0]), torch.tensor([0.0, -500.0]), torch.tensor([1.0, -1.0])]
    sample = torch.tensor([0, 1])
    for options in LEGAL:
        result = objective(Tokens(variable, *fixed, sample), Totals(2.0, 2.0), ObjectiveConfig(**options))
        assert torch.isfinite(result.loss)


def test_token_logprobs_and_entropy_divide_by_the_temperature() -> None:
    source = np.random.default_rng(0)
    logits = source.normal(0, 3, (6, 9))
    temperature = np.array([1.0, 0.5, 2.0, 1.0, 0.7, 1.3])
    targets = source.integers(0, 9, 6)
    logs = reference.softmax_logs(logits, temperature)
    variable = torch.tensor(logits, requires_grad=True)
    got, entropy = token_logprobs(variable, torch.tensor(targets), torch.tensor(temperature))
    np.testing.assert_allclose(got.detach().numpy(), logs[np.arange(6), targets], rtol=1e-6)
    np.testing.assert_allclose(entropy.numpy(), -(np.exp(logs) * logs).sum(axis=1), rtol=1e-6)
    got.sum().backward()
    closed = (np.eye(9)[targets] - np.exp(logs)) / temperature[:, None]
    np.testing.assert_allclose(variable.grad.numpy(), closed, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "bypass", "correction": "tis"}, "the weight would count twice"),
        ({"mode": "bypass"}, "the weight would count twice"),
        ({"correction": "mis", "level": "sequence"}, "only `tis` has both"),
        ({"correction": "geo", "geo_low": 1.2}, "expected low < 1 < high"),
    ],
)
def test_illegal_combinations_are_refused_with_the_reason(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ObjectiveConfig(**options)


def test_a_refusal_carries_the_path_of_the_field() -> None:
    with pytest.raises(msgspec.ValidationError, match="twice"):
        msgspec.convert({"mode": "bypass", "correction": "tis"}, ObjectiveConfig)
    with pytest.raises(msgspec.ValidationError, match="unknown field `cliplow`"):
        msgspec.convert({"cliplow": 0.1}, ObjectiveConfig)
