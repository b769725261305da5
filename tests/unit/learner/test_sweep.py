"""The delay line of the staleness sweep keeps the staleness it is asked for."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.delay_line import QUICK, TASKS, Run, train, warm_up
from benchmarks.staleness_sweep import by_cell, cells, table


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes digits, so that rewards differ and the weights move."""
    sizes = msgspec.structs.replace(QUICK, digit_steps=30)
    return warm_up("digits", 0, tmp_path_factory.mktemp("warm"), sizes)


def test_without_delay_the_actor_is_the_learner(start: Path) -> None:
    found = train(Run("digits", "none", 0, 0), start, QUICK)
    assert found.kl == pytest.approx(0.0, abs=1e-9)
    assert found.ess_raw == pytest.approx(1.0)


def test_with_delay_it_is_behind(start: Path) -> None:
    """The run itself asserts that its staleness reached eta; here, that this is real weights' staleness."""
    found = train(Run("digits", "vtrace", 2, 0), start, QUICK)
    assert len(found.rewards) == QUICK.steps
    assert found.kl > 1e-7


def test_rewards_of_the_tasks() -> None:
    sums, digits = TASKS["sums"], TASKS["digits"]
    assert [sums.reward(answer, "104") for answer in ([1, 0, 4], [1, 0], [1, 0, 4, 4])] == [1.0, 0.0, 0.0]
    assert digits.reward([7] * 16 + [1] * 48, "7") == 0.25


def test_cells_are_the_sweep() -> None:
    found = cells(["sums", "digits"], 3)
    assert len(found) == len(set(found)) == 2 * (3 * 4 + 1) * 3
    assert ("digits", "vtrace", 2, 1) in found
    assert ("digits", "vtrace", 8, 1) not in found


def test_the_table_means_over_seeds() -> None:
    same = {"kl": 0.5, "ess_raw": 0.5, "masked": 0.0, "seconds": 1.0}
    runs = [
        {"run": {"task": "sums", "method": "tis", "eta": 2, "seed": s}, "reward_last": s, **same}
        for s in (0, 1)
    ]
    rows = by_cell(runs)
    assert (rows[0]["reward"], rows[0]["reward_low"], rows[0]["reward_high"]) == (0.5, 0, 1)
    assert table(rows).endswith("| sums | 2 | tis | 0.500 (0.000-1.000) | 5.0e-01 | 0.500 | 0.000 |")
