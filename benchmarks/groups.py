"""Groups as large and as compressible as real ones.

Token ids follow a Zipf-Mandelbrot law over the vocabulary, an id being its rank, as byte-pair merges give
frequent tokens low ids. Log-probabilities are logarithms of float32 probabilities, as an engine
computes them: most tokens nearly certain, 0.3 nats a token on average.
"""

from __future__ import annotations

import numpy as np

from buffer.schema import Group, Sample, Span, Version
from tests.contract.harness import digest

SAMPLES = 16
PROMPT, ANSWER = 64, 2016
"""Tokens of the prompt, and of each answer: 16 samples have 256 KiB of ids and log-probabilities."""
VOCABULARY = 152_000


def token_ids(source: np.random.Generator, count: int) -> np.ndarray:
    """int32 [count]: ids, drawn with probability proportional to (id + 2.7) ^ -1.1."""
    weights = (np.arange(VOCABULARY) + 2.7) ** -1.1
    return np.searchsorted(np.cumsum(weights / weights.sum()), source.random(count)).astype(np.int32)


def log_probabilities(source: np.random.Generator, count: int) -> np.ndarray:
    """float32 [count]: log p of float32 probabilities p, whose -log p is gamma(0.3) distributed."""
    probability = np.exp(-source.gamma(0.3, 1.0, count)).astype(np.float32)
    return np.log(np.maximum(probability, np.finfo(np.float32).tiny))


def realistic_group(seed: int, *, answer: int = ANSWER) -> Group:
    """A group of 16 answers of `answer` tokens to one prompt, by version 0 at prompt position 0."""
    source = np.random.default_rng(seed)
    prompt = token_ids(source, PROMPT)
    samples = [
        Sample(
            tokens=np.concatenate([prompt, token_ids(source, answer)]),
            prompt_length=PROMPT,
            logprobs=log_probabilities(source, answer),
            loss_runs=[answer],
            spans=[Span(answer, 0)],
            reward=float(index % 2),
            rewards={"correct": float(index % 2)},
            finish_reason="stop",
        )
        for index in range(SAMPLES)
    ]
    return Group(0, 0, 0, seed, "a", 1, 1.0, [Version(0, digest(0))], 1.0, 2.0, samples)


def raw_bytes(group: Group) -> bytes:
    """The bytes of the group's arrays, one behind the other."""
    return b"".join(array.tobytes() for sample in group.samples for array in (sample.tokens, sample.logprobs))
