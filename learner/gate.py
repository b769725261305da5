"""Batch zero: before the first step, what the engines said of their own tokens against what the learner says.

Both have the weights of version 0. A wrong temperature, tokenizer, mask or checkpoint, or weights that never
arrived, all show here, in the first batch's own samples, before anything was trained on them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import msgspec
import numpy as np

from buffer.schema import Group, Sample
from learner.errors import Aborted

log = logging.getLogger("learner")

SAMPLES = 8
"""Samples of the first batch that are looked at."""

Score = Callable[[Sequence[Sequence[int]], float], list[np.ndarray]]
"""`Trainer.score`: (sequences, temperature) to log-probabilities of tokens 1.. of each, float32."""


class Agreement(msgspec.Struct, frozen=True):
    """How far the learner is from the engines, over the tokens that one version wrote."""

    tokens: int
    """Tokens compared; 0 if the batch has none that the version wrote."""
    mean: float
    """Mean |log p(engine) - log p(learner)| of a token, nats; 0 without tokens."""
    worst: str
    """The token that differs most, and what both say of it; empty without tokens."""


class _Looked(NamedTuple):
    group: Group
    """The group it is in."""
    number: int
    """Which sample of the group."""
    sample: Sample
    """What its engine recorded."""
    counted: np.ndarray
    """bool [T - P]: answer tokens that the version wrote and that are trained."""


def agreement(groups: Sequence[Group], version: int, score: Score) -> Agreement:
    """Scores `SAMPLES` samples, as many of each group as of any other, under the learner's weights."""
    looked = list(_samples(groups, version))[:SAMPLES]
    differences = []
    for temperature in sorted({one.group.temperature for one in looked}):
        ours = [one for one in looked if one.group.temperature == temperature]
        scores = score([one.sample.tokens.tolist() for one in ours], temperature)
        for one, found in zip(ours, scores, strict=True):
            said = found[one.sample.prompt_length - 1 :]
            differences.append((one, said, np.where(one.counted, np.abs(said - one.sample.logprobs), 0.0)))
    tokens = sum(int(one.counted.sum()) for one in looked)
    if not tokens:
        return Agreement(0, 0.0, "")
    one, said, difference = max(differences, key=lambda entry: float(entry[2].max()))
    place = int(difference.argmax())
    worst = (
        f"token {place} of the answer of sample {one.number} of group {one.group.id} by {one.group.actor} "
        f"(id {one.sample.tokens[one.sample.prompt_length + place]}): engine "
        f"{one.sample.logprobs[place]:.4g}, learner {said[place]:.4g}"
    )
    mean = sum(float(difference.sum(dtype=np.float64)) for _, _, difference in differences) / tokens
    return Agreement(tokens, mean, worst)


def check(groups: Sequence[Group], version: int, score: Score, limit: float) -> None:
    """Raises `Aborted` if engines and learner disagree by more than `limit` nats a token; 0: never."""
    if not limit:
        return
    found = agreement(groups, version, score)
    log.info(
        "engines against learner, %d tokens of version %d: mean difference %.2g nats",
        found.tokens,
        version,
        found.mean,
    )
    if not found.mean <= limit:  # nan is no agreement
        raise Aborted(
            f"engines and learner disagree about version {version} before step {version}: mean |delta log p| "
            f"{found.mean:.4g} over {found.tokens} tokens, allowed {limit:g} (objective.abort.mismatch); "
            f"worst: {found.worst}; look at the engine's dtype and flags, the tokenizer and the template"
        )


def _samples(groups: Sequence[Group], version: int) -> Iterator[_Looked]:
    """The first sample of every group, then the second of every group, and so on."""
    for number, row in enumerate(zip_longest(*(group.samples for group in groups))):
        for group, sample in zip(groups, row, strict=True):
            if sample is not None:
                numbers = np.array([one.number for one in group.versions])
                wrote = np.repeat(
                    numbers[[span.version for span in sample.spans]], [span.length for span in sample.spans]
                )
                yield _Looked(group, number, sample, sample.loss_mask() & (wrote == version))
