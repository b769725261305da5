from __future__ import annotations

import numpy as np
import pytest
import torch

from learner.packing import pack, row_of_tokens, rows_of_groups
from tests.unit.learner.groups import make_group


def test_the_worked_example() -> None:
    rows = [row_of_tokens([5, 6, 7, 8], 2), row_of_tokens([5, 9], 1)]
    (batch,) = pack(rows, budget=10)
    assert batch.tokens.tolist() == [5, 6, 7, 5]
    assert batch.positions.tolist() == [0, 1, 2, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 4]
    assert batch.predictors.tolist() == [1, 2, 3]
    assert batch.targets.tolist() == [7, 8, 9]
    assert batch.sample.tolist() == [0, 0, 1]
    assert (batch.max_length, batch.rows) == (3, (0, 1))


@pytest.mark.parametrize("budget", [1, 16, 40, 10_000])
def test_every_target_appears_once_within_the_budget(budget: int) -> None:
    source = np.random.default_rng(1)
    rows = [
        row_of_tokens(source.integers(0, 99, n).tolist(), int(source.integers(1, n)))
        for n in source.integers(2, 30, 60)
    ]
    batches = pack(rows, budget)
    seen = sorted(index for batch in batches for index in batch.rows)
    assert seen == list(range(60))
    for batch in batches:
        assert len(batch.tokens) <= budget or len(batch.rows) == 1
        bounds, counts = batch.cu_seqlens.tolist(), torch.bincount(batch.sample).tolist()
        targets = batch.targets.split(counts)
        for place, index in enumerate(batch.rows):
            row = rows[index]
            fed = batch.tokens[bounds[place] : bounds[place + 1]]
            assert fed.tolist() == row.tokens[:-1].tolist()
            assert targets[place].tolist() == row.tokens[row.targets].tolist()
        assert torch.equal(batch.positions, torch.arange(len(batch.tokens)) - _starts(batch.cu_seqlens))


def _starts(bounds: torch.Tensor) -> torch.Tensor:
    return bounds[:-1].repeat_interleave(bounds.diff())


def test_first_fit_decreasing_fills_gaps() -> None:
    rows = [row_of_tokens(list(range(n + 1)), 1) for n in (2, 6, 3, 5, 4)]
    assert [batch.rows for batch in pack(rows, 10)] == [(1, 4), (0, 2, 3)]


def test_samples_carry_mask_staleness_temperature_and_advantage() -> None:
    group = make_group(0, versions=(3, 5), size=2)
    group.temperature = 0.5
    sample = group.samples[0]
    length = sample.answer_length
    sample.loss_runs = [0, 1, length - 1]  # the first answer token is context only
    (row, other) = rows_of_groups([group], [np.array([1.5, -1.5])], step=6)
    assert row.targets.tolist() == list(range(sample.prompt_length + 1, len(sample.tokens)))
    assert row.staleness.tolist() == [1] * (length - 1)
    assert row.behaviour.tolist() == sample.logprobs[1:].tolist()
    assert other.staleness.tolist() == [3] + [1] * (group.samples[1].answer_length - 1)
    (batch,) = pack([row, other], 1000)
    assert set(batch.temperature.tolist()) == {0.5}
    assert batch.advantages[batch.sample == 0].eq(1.5).all()
    assert batch.advantages[batch.sample == 1].eq(-1.5).all()


def test_a_sample_without_targets_is_left_out() -> None:
    group = make_group(0, size=2)
    group.samples[0].loss_runs = [0, group.samples[0].answer_length]
    rows = rows_of_groups([group], [np.array([1.0, -1.0])], step=0)
    (batch,) = pack(rows, 1000)
    assert batch.rows == (1,)
