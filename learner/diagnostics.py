"""What a step reports, made of sums that are added over the data-parallel ranks before any division."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from buffer.schema import Group, Sample
from learner.metrics import Metrics
from learner.objective import LOG_RATIO_LIMIT, Objective, Tokens
from learner.objective.losses import DUAL, HIGH, LOW
from learner.samples import Chosen, is_valid

_TOKEN_STALENESS, _GROUP_STALENESS, _PART = "tokens at ", "groups at ", "reward of "


class Tally:
    """Named sums and maxima of one step on this rank."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.maxima: dict[str, float] = {"ratio": 0.0, "advantage": 0.0, "length": 0.0}

    def add(self, name: str, values: np.ndarray | float) -> None:
        """Adds the sum of `values` to the sum `name`, in float64."""
        self.sums[name] = self.sums.get(name, 0.0) + float(np.sum(values, dtype=np.float64))

    def top(self, name: str, values: np.ndarray) -> None:
        """Raises the maximum `name` to the largest of `values`."""
        if values.size:
            self.maxima[name] = max(self.maxima[name], float(values.max()))

    def __getitem__(self, name: str) -> float:
        """The sum `name`; 0 if nothing was added to it."""
        return self.sums.get(name, 0.0)

    def mean(self, name: str, count: str) -> float | None:
        """The sum `name` over the sum `count`; None over 0."""
        return _ratio(self[name], self[count])

    def deviation(self, name: str, count: str) -> float | None:
        """Population standard deviation of what was added to `name` and squared to `name squared`."""
        if not self[count]:
            return None
        return max(0.0, self[f"{name} squared"] / self[count] - (self[name] / self[count]) ** 2) ** 0.5

    def effective(self, name: str, count: str) -> float | None:
        """(sum w)^2 / (n sum w^2); 0 if every weight is 0, None of no weights."""
        squares = self[f"{name} squared"]
        return _ratio(self[name] ** 2 / squares if squares else 0.0, self[count])

    def histogram(self, prefix: str) -> dict[int, float]:
        """Value -> sum, of the sums whose name is `prefix` and a whole number; by rising value."""
        found = {int(name.removeprefix(prefix)): self[name] for name in self.sums if name.startswith(prefix)}
        return dict(sorted(found.items()))

    def merged(
        self,
        merge: Callable[[dict[str, float]], dict[str, float]],
        largest: Callable[[list[float]], list[float]],
    ) -> Tally:
        """The tally of all data-parallel ranks: `merge` adds by name, `largest` takes maxima."""
        total = Tally()
        total.sums = merge(self.sums)
        total.maxima = dict(zip(self.maxima, largest(list(self.maxima.values())), strict=True))
        return total


def count_tokens(
    tally: Tally, tokens: Tokens, result: Objective, entropy: torch.Tensor, staleness: torch.Tensor
) -> None:
    """Adds the N tokens of a trained micro-batch; d = log pi_p - log mu, u = e^d, w the weights."""
    difference = _array(tokens.proximal) - _array(tokens.behaviour)
    ratio = np.exp(np.clip(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    k3 = ratio - 1 - difference
    weights, bound, ages = _array(result.weights), result.bound.cpu().numpy(), staleness.cpu().numpy()
    tally.add("loss", result.loss.item())
    tally.add("tokens", len(ratio))
    tally.add("entropy", _array(entropy))
    for name, values in (("u", ratio), ("w", weights)):
        tally.add(name, values)
        tally.add(f"{name} squared", np.square(values))
    tally.add("masked", weights == 0)
    tally.add("truncated", result.truncated.cpu().numpy())
    for name, code in (("low", LOW), ("high", HIGH), ("dual", DUAL)):
        tally.add(name, bound == code)
    firsts = np.flatnonzero(np.diff(tokens.sample.cpu().numpy(), prepend=-1))
    tally.add("first weights", weights[firsts])
    tally.add("firsts", len(firsts))
    for age in np.unique(ages):
        chosen = ages == age
        tally.add(f"{_TOKEN_STALENESS}{age}", chosen)
        tally.add(f"k1 at {age}", -difference[chosen])
        tally.add(f"k3 at {age}", k3[chosen])
    tally.top("ratio", np.abs(ratio - 1))
    if tokens.reference is not None:
        away = _array(tokens.logprobs) - _array(tokens.reference)
        tally.add("reference k1", away)
        tally.add("reference k3", np.exp(np.clip(-away, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)) - 1 + away)
        tally.add("reference tokens", len(away))


def count_groups(
    tally: Tally,
    batch: Sequence[Group],
    chosen: Chosen,
    shaped: Sequence[Group],
    advantages: Sequence[np.ndarray],
    step: int,
) -> None:
    """Adds a batch, the part of it that is trained, the same with its final rewards, and its advantages."""
    valid = [[sample for sample in group.samples if is_valid(sample)] for group in batch]
    rewards = [np.array([sample.reward for sample in samples]) for samples in valid if samples]
    tally.add("batch", len(batch))
    tally.add("constant", sum(part.max() == part.min() for part in rewards))
    for group in batch:
        tally.add(f"{_GROUP_STALENESS}{step - group.version_min}", 1)
    _count_samples(tally, [sample for samples in valid for sample in samples])
    tally.add("groups", len(chosen.groups))
    tally.add("dropped", len(chosen.dropped))
    tally.add("invalid", chosen.invalid)
    tally.add("left out", chosen.masked)
    if shaped:
        values = np.concatenate(advantages)
        tally.add("samples", len(values))
        tally.add("shaped", np.array([sample.reward for group in shaped for sample in group.samples]))
        tally.add("advantage", values)
        tally.add("advantage squared", np.square(values))
        tally.add("no advantage", values == 0)
        tally.top("advantage", np.abs(values))


def _count_samples(tally: Tally, valid: Sequence[Sample]) -> None:
    rewards, lengths = (
        np.array([getattr(sample, field) for sample in valid]) for field in ("reward", "answer_length")
    )
    tally.add("valid", len(valid))
    tally.add("reward", rewards)
    tally.add("reward squared", np.square(rewards))
    tally.add("length", lengths)
    tally.top("length", lengths)
    tally.add("cut", sum(sample.finish_reason == "length" for sample in valid))
    parts: dict[str, list[float]] = {}
    for sample in valid:
        for part, value in sample.rewards.items():
            parts.setdefault(part, []).append(value)
    for part, values in parts.items():
        tally.add(_PART + part, np.array(values))
        tally.add(f"with {part}", len(values))


def summary(tally: Tally, vtrace: bool) -> Metrics:
    """The figures of `learner.metrics` that come from a tally; None where nothing was counted."""
    return {**_of_groups(tally), **_of_policies(tally), **_of_weights(tally, vtrace)}


def _of_groups(tally: Tally) -> Metrics:
    """Counts, rewards, advantages, lengths, staleness."""
    parts = sorted(name.removeprefix(_PART) for name in tally.sums if name.startswith(_PART))
    return {
        "tokens": tally["tokens"],
        "samples": tally["samples"],
        "groups": tally["groups"],
        "groups_dropped": tally["dropped"],
        "samples_invalid": tally["invalid"],
        "samples_masked": tally["left out"],
        "reward_mean": tally.mean("reward", "valid"),
        "reward_std": tally.deviation("reward", "valid"),
        "reward_constant": tally.mean("constant", "batch"),
        "reward_shaped": tally.mean("shaped", "samples"),
        **{f"reward/{part}": tally.mean(_PART + part, f"with {part}") for part in parts},
        "advantage_mean": tally.mean("advantage", "samples"),
        "advantage_std": tally.deviation("advantage", "samples"),
        "advantage_max": tally.maxima["advantage"],
        "advantage_zero": tally.mean("no advantage", "samples"),
        "answer_length_mean": tally.mean("length", "valid"),
        "answer_length_max": tally.maxima["length"],
        "trained_length_mean": tally.mean("tokens", "samples"),
        "truncated": tally.mean("cut", "valid"),
        **_spread("staleness", tally.histogram(_GROUP_STALENESS)),
        **_spread("token_staleness", tally.histogram(_TOKEN_STALENESS)),
    }


def _of_policies(tally: Tally) -> Metrics:
    """How far the policies are from each other."""
    ages = tally.histogram(_TOKEN_STALENESS)
    found: Metrics = {
        "entropy": tally.mean("entropy", "tokens"),
        "ratio_deviation_max": tally.maxima["ratio"],
        "kl_reference_k1": tally.mean("reference k1", "reference tokens"),
        "kl_reference_k3": tally.mean("reference k3", "reference tokens"),
    }
    for k in ("k1", "k3"):
        by_age = {age: tally.mean(f"{k} at {age}", f"{_TOKEN_STALENESS}{age}") for age in ages}
        found[f"mismatch_{k}"] = by_age.get(0)
        found[f"kl_{k}"] = _ratio(sum(tally[f"{k} at {age}"] for age in ages), tally["tokens"])
        found |= {f"kl_{k}/{age}": value for age, value in by_age.items()}
    return found


def _of_weights(tally: Tally, vtrace: bool) -> Metrics:
    """What correction and clips did."""
    clips = {f"clip_{name}": tally.mean(name, "tokens") for name in ("low", "high", "dual")}
    clipped = sum(tally[name] for name in ("low", "high", "dual"))
    return {
        "clip_fraction": _ratio(clipped, tally["tokens"]),
        **clips,
        "weight_mean": tally.mean("w", "tokens"),
        "weight_truncated": tally.mean("truncated", "tokens"),
        "masked": tally.mean("masked", "tokens"),
        "ess": tally.effective("w", "tokens"),
        "ess_raw": tally.effective("u", "tokens"),
        "first_weight": tally.mean("first weights", "firsts") if vtrace else None,
    }


class Stopwatch:
    """Seconds by part of a step.

    with watch("forward"): ...
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._parts = dict.fromkeys(("pack", "score", "forward", "backward", "update"), 0.0)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Adds the time inside to `part`."""
        began = time.perf_counter()
        yield
        self._parts[part] += time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """The whole time since construction, and that of each part."""
        whole = time.perf_counter() - self._began
        return {"seconds": whole, **{f"seconds_{part}": spent for part, spent in self._parts.items()}}


def _array(values: torch.Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


def _spread(name: str, histogram: dict[int, float]) -> Metrics:
    """Mean, median, 90th percentile (the smallest value that so many reach) and maximum."""
    values, counts = np.array(list(histogram)), np.array(list(histogram.values()))
    if not counts.sum():
        return dict.fromkeys((f"{name}_mean", f"{name}_p50", f"{name}_p90", f"{name}_max"))
    reached = np.cumsum(counts) / counts.sum()
    return {
        f"{name}_mean": float((values * counts).sum() / counts.sum()),
        f"{name}_p50": float(values[np.searchsorted(reached, 0.5)]),
        f"{name}_p90": float(values[np.searchsorted(reached, 0.9)]),
        f"{name}_max": float(values.max()),
    }
