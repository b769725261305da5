"""What a step reports, made of sums that are added over the data-parallel ranks before any division."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from buffer.schema import Group
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
    weights, bound, ages = _array(result.weights), result.bound.numpy(), staleness.numpy()
    tally.add("loss", result.loss.item())
    tally.add("tokens", len(ratio))
    tally.add("entropy", _array(entropy.detach()))
    for name, values in (("u", ratio), ("w", weights)):
        tally.add(name, values)
        tally.add(f"{name} squared", np.square(values))
    tally.add("masked", weights == 0)
    tally.add("truncated", result.truncated.numpy())
    for name, code in (("low", LOW), ("high", HIGH), ("dual", DUAL)):
        tally.add(name, bound == code)
    firsts = np.flatnonzero(np.diff(tokens.sample.numpy(), prepend=-1))
    tally.add("first weights", weights[firsts])
    tally.add("firsts", len(firsts))
    for age in np.unique(ages):
        chosen = ages == age
        tally.add(f"{_TOKEN_STALENESS}{age}", chosen)
        tally.add(f"k1 at {age}", -difference[chosen])
        tally.add(f"k3 at {age}", k3[chosen])
    tally.top("ratio", np.abs(ratio - 1))
    if tokens.reference is not None:
        away = _array(tokens.logprobs.detach()) - _array(tokens.reference)
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
    for sample in (sample for samples in valid for sample in samples):
        tally.add("valid", 1)
        tally.add("reward", sample.reward)
        tally.add("reward squared", sample.reward**2)
        tally.add("length", sample.answer_length)
        tally.top("length", np.array([sample.answer_length]))
        tally.add("cut", sample.finish_reason == "length")
        for part, value in sample.rewards.items():
            tally.add(_PART + part, value)
            tally.add(f"with {part}", 1)
    tally.add("groups", len(chosen.groups))
    tally.add("dropped", len(chosen.dropped))
    tally.add("invalid", chosen.invalid)
    tally.add("left out", chosen.masked)
    for group, values in zip(shaped, advantages, strict=True):
        tally.add("samples", len(values))
        tally.add("shaped", np.array([sample.reward for sample in group.samples]))
        tally.add("advantage", values)
        tally.add("advantage squared", np.square(values))
        tally.add("no advantage", values == 0)
        tally.top("advantage", np.abs(values))


def summary(tally: Tally, vtrace: bool) -> Metrics:
    """The figures of `learner.metrics` that come from a tally; None where nothing was counted."""

    def share(name: str, of: str) -> float | None:
        return _ratio(tally.sums.get(name, 0.0), tally.sums.get(of, 0.0))

    def deviation(name: str, of: str) -> float | None:
        mean, square = share(name, of), share(f"{name} squared", of)
        return None if mean is None or square is None else max(0.0, square - mean**2) ** 0.5

    def effective(name: str) -> float | None:
        count, squares = tally.sums.get("tokens", 0.0), tally.sums.get(f"{name} squared", 0.0)
        return (tally.sums[name] ** 2 / (count * squares) if squares else 0.0) if count else None

    ages, sums = _histogram(tally, _TOKEN_STALENESS), tally.sums
    parts = sorted(name.removeprefix(_PART) for name in sums if name.startswith(_PART))
    fresh = f"{_TOKEN_STALENESS}0"
    clips = [share(name, "tokens") for name in ("low", "high", "dual")]
    return {
        "loss": sums.get("loss", 0.0),
        "tokens": sums.get("tokens", 0.0),
        "samples": sums.get("samples", 0.0),
        "groups": sums.get("groups", 0.0),
        "groups_dropped": sums.get("dropped", 0.0),
        "samples_invalid": sums.get("invalid", 0.0),
        "samples_masked": sums.get("left out", 0.0),
        "reward_mean": share("reward", "valid"),
        "reward_std": deviation("reward", "valid"),
        "reward_constant": share("constant", "batch"),
        "reward_shaped": share("shaped", "samples"),
        **{f"reward/{part}": share(_PART + part, f"with {part}") for part in parts},
        "advantage_mean": share("advantage", "samples"),
        "advantage_std": deviation("advantage", "samples"),
        "advantage_max": tally.maxima["advantage"],
        "advantage_zero": share("no advantage", "samples"),
        "answer_length_mean": share("length", "valid"),
        "answer_length_max": tally.maxima["length"],
        "trained_length_mean": share("tokens", "samples"),
        "truncated": share("cut", "valid"),
        **_spread("staleness", _histogram(tally, _GROUP_STALENESS)),
        **_spread("token_staleness", ages),
        "entropy": share("entropy", "tokens"),
        "ratio_deviation_max": tally.maxima["ratio"],
        "mismatch_k1": share("k1 at 0", fresh),
        "mismatch_k3": share("k3 at 0", fresh),
        "kl_k1": _ratio(sum(sums[f"k1 at {age}"] for age in ages), sums.get("tokens", 0.0)),
        "kl_k3": _ratio(sum(sums[f"k3 at {age}"] for age in ages), sums.get("tokens", 0.0)),
        **{
            f"kl_{k}/{age}": share(f"{k} at {age}", f"{_TOKEN_STALENESS}{age}")
            for k in ("k1", "k3")
            for age in ages
        },
        "kl_reference_k1": share("reference k1", "reference tokens"),
        "kl_reference_k3": share("reference k3", "reference tokens"),
        "clip_fraction": None if None in clips else float(sum(clips)),
        **dict(zip(("clip_low", "clip_high", "clip_dual"), clips, strict=True)),
        "weight_mean": share("w", "tokens"),
        "weight_truncated": share("truncated", "tokens"),
        "masked": share("masked", "tokens"),
        "ess": effective("w"),
        "ess_raw": effective("u"),
        "first_weight": share("first weights", "firsts") if vtrace else None,
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

    def seconds(self) -> Metrics:
        """The whole time since construction, and that of each part."""
        whole = time.perf_counter() - self._began
        return {"seconds": whole, **{f"seconds_{part}": spent for part, spent in self._parts.items()}}


def _array(values: torch.Tensor) -> np.ndarray:
    return values.double().numpy()


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


def _histogram(tally: Tally, prefix: str) -> dict[int, float]:
    """Staleness -> how many, by rising staleness."""
    found = {int(name.removeprefix(prefix)): n for name, n in tally.sums.items() if name.startswith(prefix)}
    return dict(sorted(found.items()))


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
