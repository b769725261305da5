"""Timed acceptance on an otherwise idle machine: the demo learns on three seeds, its control does not."""

from __future__ import annotations

import json
import subprocess
import sys
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


def test_actors_come_and_go_in_one_run() -> None:
    """2 -> 4 -> 1 -> 3, and `launch verify` finds nothing."""
    command = [sys.executable, "-m", "benchmarks.scale_out", "--json"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["verified"]
    assert [(one["actors"], one["new"]) for one in result["scaled"]] == [(4, 2), (1, 0), (3, 2)]


def test_shuffled_advantages_teach_nothing(tmp_path: Path) -> None:
    process = launch(tmp_path, "demo", "--json", "objective.control=shuffle_advantages")
    assert process.wait(2 * LIMIT_S) == 0, (tmp_path / "demo.err").read_text()
    summary = summary_of(tmp_path, "demo")
    print(summary)
    assert summary["reward_last"] - summary["reward_first"] < 0.05
