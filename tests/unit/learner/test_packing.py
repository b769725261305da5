from __future__ import annotations

import numpy as np
import pytest
import torch

from learner.bins import first_fit, spread
from learner.flops import Cost
from learner.packing import MicroBatch, pack, row_of_tokens, rows_of_groups
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


@pytest.mark.parametrize(("context", "tensor"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 3)])
def test_padding_is_for_the_layout_and_for_nothing_else(context: int, tensor: int) -> None:
    source = np.random.default_rng(2)
    rows = [
        row_of_tokens(source.integers(1, 99, n).tolist(), int(source.integers(1, n)))
        for n in source.integers(2, 30, 40)
    ]
    piece = 2 * context if context > 1 else 1
    for batch in pack(rows, 64, context=context, tensor=tensor):
        bounds, lengths = batch.cu_seqlens_padded, batch.cu_seqlens.diff()
        assert bounds.dtype == batch.cu_seqlens.dtype == torch.int32
        assert len(batch.tokens) == len(batch.positions) == bounds[-1]
        assert len(batch.tokens) % (context * tensor) == 0
        assert (bounds.diff() % piece == 0).all()
        padding = bounds.diff() - lengths
        assert (padding[:-1] < piece).all()  # the last sequence also rounds the total up
        assert 0 <= padding[-1] < piece + context * tensor * 2
        assert batch.max_length == bounds.diff().max()
        for place, index in enumerate(batch.rows):
            part = slice(int(bounds[place]), int(bounds[place + 1]))
            fed, row = batch.tokens[part], rows[index]
            assert fed[: lengths[place]].tolist() == row.tokens[:-1].tolist()
            assert not fed[lengths[place] :].any()
            assert batch.positions[part].tolist() == list(range(len(fed)))
            mine = batch.sample == place
            assert batch.targets[mine].tolist() == row.tokens[row.targets].tolist()
            assert (batch.predictors[mine] - bounds[place]).tolist() == (row.targets - 1).tolist()
        if (context, tensor) == (1, 1):
            assert torch.equal(bounds, batch.cu_seqlens)


def test_the_worked_example_with_padding() -> None:
    rows = [row_of_tokens([5, 6, 7, 8], 2), row_of_tokens([5, 9], 1)]
    (batch,) = pack(rows, budget=10, context=2)
    assert batch.tokens.tolist() == [5, 6, 7, 0, 5, 0, 0, 0]
    assert batch.cu_seqlens_padded.tolist() == [0, 4, 8]
    assert batch.cu_seqlens.tolist() == [0, 3, 4]
    assert batch.predictors.tolist() == [1, 2, 4]
    assert [len(part.rows) for part in pack(rows, budget=7, context=2)] == [1, 1]


@pytest.mark.parametrize("cost", [None, Cost(token=1, pair=0.1, target=3)])
def test_a_count_is_met_with_empty_micro_batches(cost: Cost | None) -> None:
    rows = [row_of_tokens([1, 2, 3], 1)] * 3
    batches = pack(rows, 2, context=2, tensor=3, count=5, cost=cost)
    assert [len(batch.rows) for batch in batches] == [1, 1, 1, 0, 0]
    empty = batches[-1]
    assert empty.tokens.tolist() == [0] * 12
    assert empty.cu_seqlens_padded.tolist() == [0, 12]
    assert {len(empty.targets), len(empty.sample), len(empty.predictors), len(empty.advantages)} == {0}
    assert empty.predictors.dtype == empty.targets.dtype == torch.int64
    assert [len(batch.rows) for batch in pack([], 2, count=2, cost=cost)] == [0, 0]


def test_micro_batches_of_ranks_that_wait_cost_the_same() -> None:
    source, cost = np.random.default_rng(3), Cost(token=100, pair=0.1, target=10)
    lengths = np.minimum(source.lognormal(4, 1, 120).astype(int) + 2, 500)
    rows = [row_of_tokens([1] * n, n // 3 + 1) for n in lengths]

    def spent(batch: MicroBatch) -> float:
        of = [rows[index] for index in batch.rows]
        fed = np.array([len(row.tokens) - 1 for row in of])
        return float(cost.flops(fed, np.array([len(row.targets) for row in of])).sum())

    least = len(pack(rows, 1200))
    even = [spent(batch) for batch in pack(rows, 1200, count=least + 2, cost=cost)]
    assert len(even) == least + 2
    assert even == sorted(even, reverse=True)
    assert max(even) < 1.03 * np.mean(even)
    plain = [spent(batch) for batch in pack(rows, 1200, count=least + 2)]
    assert max(plain) > 1.1 * np.mean(plain)
    assert all(len(batch.tokens) <= 1200 for batch in pack(rows, 1200, count=least + 2, cost=cost))


def test_where_an_even_spread_has_no_room_first_fit_has() -> None:
    lengths = np.array([6, 4, 4, 3, 3])  # evenly by cost: 6 + 3 and 4 + 4, and no room for the last 3
    assert first_fit(lengths, 10) == [[0, 1], [2, 3, 4]]
    assert spread(lengths, lengths.astype(float), 10, 2) == [[0, 1], [2, 3, 4]]
