"""Timed acceptance on an otherwise idle machine: the demo learns on three seeds, its control does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.commands import launch, summary_of

pytestmark = pytest.mark.accept
LIMIT_S = 600


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_learns(tmp_path: Path, seed: int) -> None:
    process = launch(tmp_path, "demo", "--json", "--seed", str(seed))
    assert process.wait(2 * LIMIT_S) == 0, (tmp_path / "demo.err").read_text()
    summary = summary_of(tmp_path, "demo")
    print(summary)
    assert summary["seconds"] <= LIMIT_S
    assert summary["reward_last"] >= 0.65
    assert summary["reward_last"] - summary["reward_first"] >= 0.25
    assert summary["staleness_mean"] > 0
    assert summary["staleness_max"] <= summary["max_staleness"] == 2
    assert summary["overlap"] > 0.5
    assert summary["conserved"]
    weights = summary["report"]["weights"]
    assert weights["max_difference"].keys() == {"actor-0", "actor-1"}
    assert not weights["missing"]
    assert max(weights["max_difference"].values()) <= 1e-4


def test_shuffled_advantages_teach_nothing(tmp_path: Path) -> None:
    process = launch(tmp_path, "demo", "--json", "objective.control=shuffle_advantages")
    assert process.wait(2 * LIMIT_S) == 0, (tmp_path / "demo.err").read_text()
    summary = summary_of(tmp_path, "demo")
    print(summary)
    assert summary["reward_last"] - summary["reward_first"] < 0.05
