"""Random groups to train on."""

from __future__ import annotations

import msgspec
import numpy as np

from buffer.schema import Group, Sample, Span, Version


def make_group(
    position: int, versions: tuple[int, ...] = (0,), size: int = 4, seed: int = 0, vocabulary: int = 48
) -> Group:
    """A group of `size` samples with answers of 1 to 9 tokens, spans over `versions` and varied rewards."""
    source = np.random.default_rng([seed, position])
    prompt = source.integers(0, vocabulary, source.integers(1, 12))
    samples = []
    for index in range(size):
        length = int(source.integers(len(versions), 10))
        answer = source.integers(0, vocabulary, length)
        spans = [Span(1, number) for number in range(len(versions) - 1)]
        spans.append(Span(length - len(spans), len(versions) - 1))
        samples.append(
            Sample(
                tokens=np.concatenate([prompt, answer]).astype(np.int32),
                prompt_length=len(prompt),
                logprobs=source.normal(-3.0, 0.5, length).astype(np.float32),
                loss_runs=[length],
                spans=spans,
                reward=float(index % 2),
                rewards={},
                finish_reason="stop",
            )
        )
    table = [Version(number, "00") for number in versions]
    return Group(0, position, 0, 0, "actor-0", 1, 1.0, table, 0.0, 1.0, samples)


def any_experts(tokens: int, layers: int, chosen: int, count: int, seed: int = 0) -> np.ndarray:
    """uint16 [tokens, layers, chosen]: different experts out of `count` for each token and layer."""
    source = np.random.default_rng(seed)
    order = source.random((tokens, layers, count)).argsort(axis=2)
    return order[:, :, :chosen].astype(np.uint16)


def with_experts(group: Group, layers: int, chosen: int, count: int) -> Group:
    """The group with routed experts, a function of its position."""
    samples = [
        msgspec.structs.replace(
            sample,
            routed=any_experts(
                len(sample.tokens) - 1, layers, chosen, count, seed=8 * group.position + index
            ),
        )
        for index, sample in enumerate(group.samples)
    ]
    return msgspec.structs.replace(group, samples=samples)
