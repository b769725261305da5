"""A policy whose every number is a pure function: what was generated can be re-scored by anybody.

Weights are a vector that changes with every trained group, in canonical order. A token and its
log-probability are functions of (digest of the weights, run seed, prompt position, sample, place).

    >>> weights = train(initial(7), [])
    >>> digest(weights) == digest(initial(7))
    True
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import xxhash

from buffer.schema import Group, Prompt, Sample, Span

SIZE = 16
RATE = np.float32(0.01)


def initial(seed: int) -> np.ndarray:
    """float32 [SIZE]: the weights of version 0."""
    return np.random.default_rng(seed).standard_normal(SIZE, np.float32)


def digest(weights: np.ndarray) -> str:
    """Hex digest of the weights' bytes."""
    return xxhash.xxh3_128_hexdigest(weights.tobytes())


def train(weights: np.ndarray, groups: Iterable[Group]) -> np.ndarray:
    """The weights after one step on these groups, which must stand in canonical order."""
    for group in groups:
        for sample in group.samples:
            key = xxhash.xxh3_64_intdigest(sample.tokens.tobytes() + sample.logprobs.tobytes())
            direction = np.random.default_rng(key).standard_normal(SIZE, np.float32)
            weights = weights + RATE * np.float32(1 + sample.reward) * direction
    return weights


def prompt_of(position: int) -> Prompt:
    """The prompt at a position of the queue."""
    return Prompt(position, [position % 997, position // 997], "")


def speak(
    of: str, seed: int, position: int, sample: int, begin: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [length] tokens, float32 [length] log-probabilities) from place `begin` on, by weights `of`."""
    drawn = [
        xxhash.xxh3_64_intdigest(f"{of}:{seed}:{position}:{sample}:{place}".encode())
        for place in range(begin, begin + length)
    ]
    tokens = np.array([value % 1000 for value in drawn], np.int32)
    return tokens, np.array([-5 * (value >> 32) / 2**32 for value in drawn], np.float32)


def reward_of(answer: np.ndarray) -> float:
    """The reward of an answer's tokens."""
    return float(answer.sum() % 5) / 4


def finished_sample(prompt: Prompt, parts: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> Sample:
    """A sample of parts (index into the version table, tokens, log-probabilities)."""
    answer = np.concatenate([tokens for _, tokens, _ in parts])
    return Sample(
        tokens=np.concatenate([np.array(prompt.tokens, np.int32), answer]),
        prompt_length=len(prompt.tokens),
        logprobs=np.concatenate([logprobs for _, _, logprobs in parts]),
        loss_runs=[len(answer)],
        spans=[Span(len(tokens), version) for version, tokens, _ in parts],
        reward=reward_of(answer),
        rewards={},
        finish_reason="stop",
    )


def untrue(group: Group, seed: int, committed: Mapping[int, str]) -> list[str]:
    """What is not true of a group: its version tags, and every number when scored again under them (I4)."""
    problems = [
        f"{group.id}: version {tag.number} has digest {tag.digest}, not the committed one"
        for tag in group.versions
        if committed.get(tag.number) != tag.digest
    ]
    for index, sample in enumerate(group.samples):
        parts, begin = [], 0
        for span in sample.spans:
            of = group.versions[span.version].digest
            parts.append((span.version, *speak(of, seed, group.position, index, begin, span.length)))
            begin += span.length
        expected = finished_sample(prompt_of(group.position), parts)
        same = np.array_equal(sample.tokens, expected.tokens) and sample.reward == expected.reward
        if not same or sample.logprobs.tobytes() != expected.logprobs.tobytes():
            problems.append(f"{group.id}: sample {index} is not what its versions say")
    return problems
