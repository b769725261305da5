"""Seeded sampling: the right law, a function of seed and position alone."""

from __future__ import annotations

import numpy as np
import torch

from actors.sglang_cpu import activate
from actors.sglang_cpu.sampling import multinomial_with_seed, uniform


def test_uniform_numbers_are_uniform_and_uncorrelated_between_neighbours() -> None:
    seeds, positions = np.meshgrid(np.arange(300), np.arange(300), indexing="ij")
    numbers = uniform(seeds.ravel(), positions.ravel()).reshape(300, 300)
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    assert ((counts - 900) ** 2 / 900).sum() < 99 + 5 * np.sqrt(2 * 99)
    for a, b in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / 300


def test_draws_follow_the_weights_and_never_take_an_excluded_column() -> None:
    weights = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    rows = weights.log().expand(20_000, -1)
    drawn = multinomial_with_seed(rows, torch.arange(20_000), torch.full((20_000,), 7))
    counts = torch.bincount(drawn[:, 0], minlength=6)
    assert counts[weights == 0].sum() == 0
    assert (counts / 20_000 - weights).abs().max() < 0.02


def test_a_draw_does_not_depend_on_the_other_rows() -> None:
    logprobs = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    seeds, positions = torch.arange(8), torch.arange(8) + 3
    together = multinomial_with_seed(logprobs, seeds, positions)
    alone = [
        multinomial_with_seed(logprobs[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) for i in range(8)
    ]
    assert together.tolist() == [draw[0].tolist() for draw in alone]


def test_the_plug_in_stands_aside_unless_asked(monkeypatch) -> None:
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    assert activate() is None
    monkeypatch.setenv("SGLANG_PLATFORM", "slipstream_cpu")
    assert activate() == "actors.sglang_cpu.platform.TorchCpuPlatform"
