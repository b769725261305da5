"""Which data-parallel rank fetches which groups of a step."""

from __future__ import annotations

import numpy as np
import pytest

from buffer.batches import Assignment, Manifest

SIZES = np.random.default_rng(0).lognormal(0, 1, 24) * 1000
MANIFEST = Manifest([Assignment(f"g{i:02d}", "", 0, 7, int(size)) for i, size in enumerate(SIZES)])


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("mini_batches", [1, 4])
def test_every_mini_batch_is_dealt_evenly(ranks: int, mini_batches: int) -> None:
    shares = [MANIFEST.share(rank, ranks, mini_batches) for rank in range(ranks)]
    assert sorted(row for share in shares for row in share) == MANIFEST.groups()
    assert all(share == sorted(share) for share in shares)
    length = len(SIZES) // mini_batches
    for start in range(0, len(SIZES), length):
        run = {row.group: row.tokens for row in MANIFEST.groups()[start : start + length]}
        sizes = [sum(run.get(row.group, 0) for row in share) for share in shares]
        # Whoever is ahead was the last when it was dealt its smallest row.
        ahead = shares[int(np.argmax(sizes))]
        assert max(sizes) - min(sizes) <= min(run[row.group] for row in ahead if row.group in run)


def test_bytes_have_no_say() -> None:
    """They hold times, which compress now better, now worse; two runs that train the same deal alike."""
    noisy = Manifest([Assignment(r.group, "9-9", 0, i, r.tokens) for i, r in enumerate(MANIFEST.rows)])
    for rank in range(3):
        assert [r.group for r in noisy.share(rank, 3)] == [r.group for r in MANIFEST.share(rank, 3)]


def test_manifests_without_tokens_are_dealt_in_turn() -> None:
    old = Manifest([Assignment(f"g{i}", "", 0, 7) for i in range(6)])
    assert [len(old.share(rank, 3)) for rank in range(3)] == [2, 2, 2]


def test_a_struck_group_is_nobodys() -> None:
    struck = Manifest(MANIFEST.rows, {"g03": "poison"})
    rows = [row.group for rank in range(2) for row in struck.share(rank, 2)]
    assert len(rows) == 23
    assert "g03" not in rows


def test_more_ranks_than_groups_leave_some_without() -> None:
    few = Manifest(MANIFEST.rows[:2])
    assert sorted(len(few.share(rank, 4)) for rank in range(4)) == [0, 0, 1, 1]
