"""Every benchmark runs, prints a table and one line of JSON, and finds no violation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.groups import realistic_group
from benchmarks.harness import table
from benchmarks.packing import AIM, log_normal, rows_of, waste
from benchmarks.queue import JSON, OURS, RAW
from benchmarks.rules import Others
from benchmarks.simulation import Fleet, Simulation, length
from buffer.codec import decode, encode

ROOT = Path(__file__).parents[3]


def quick(name: str, *options: str) -> dict[str, Any]:
    """The JSON that a benchmark prints last."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| ")
    return json.loads(done.stdout.splitlines()[-1])


def test_queue() -> None:
    result = quick("queue", "--appendfsync", "everysec")
    assert result["group_bytes"] == 256 * 1024
    ways = result["everysec"]
    assert {OURS, RAW, JSON} <= set(ways)
    assert ways[RAW]["bytes"] == 256 * 1024
    assert ways[OURS]["bytes_to_json"] < 0.25
    assert all(way["ms"] > 0 for way in ways.values())
    assert {name[:3] for name in result["missing"]} == {"(c)", "(e)"}, "--quick leaves out what needs Ray"


def test_admission() -> None:
    result = quick("admission", "--appendfsync", "everysec")
    assert set(result["actors"]) == {"1", "50"}
    for figures in result["actors"].values():
        assert figures["admissions_per_s"] > 0
        assert all(figures[f"{call}_us"] > 0 for call in ("admit", "drop", "publish", "assign", "commit"))


def test_packing() -> None:
    result = quick("packing")
    assert len(result["lengths"]) == 2
    for figures in result["lengths"].values():
        assert figures["padding_1x1"] == 0 < figures["padding_padded"]
        assert figures["packed_tokens_per_s"] > 0 < figures["padded_tokens_per_s"]
    assert figures["by_tokens"] < figures["in_turn"]


def test_rollout() -> None:
    result = quick("rollout")
    assert result["ours_ms"] > result["encode_ms"] > 0
    assert result["ours_to_json"] == result["ours_ms"] / result["json_ms"]


@pytest.mark.parametrize(("median", "spread"), [(100, 0.4), (300, 1.0)])
def test_packed_batches_are_hardly_padded(median: float, spread: float) -> None:
    found = waste(rows_of(log_normal(median, spread, 4000)))
    assert max(value for name, value in found.items() if name != "padding_padded") < AIM
    assert found["padding_padded"] > 0.2


def test_late_policies(tmp_path: Path) -> None:
    result = quick("late_policies", "--plot", str(tmp_path / "plot.png"))
    assert (result["violations"], result["false_slow"]) == (0, 0)
    assert len(result["runs"]) == 9
    assert any(run["violations"] > 0 for run in result["runs"] if run["policy"] == "others")
    assert any(run["slow_actors"] == ["actor-0"] for run in result["runs"])
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_without_a_bound_a_long_group_is_trained_too_late() -> None:
    figures = Simulation(Others(2, 1), Fleet(2, {"a": 1.0, "b": 20.0}), eta=1, steps=40, step_ms=10).run()
    assert figures.violations > 0
    equal = Simulation(Others(2, 0), Fleet(1, {"a": 1.0, "b": 1.0}), eta=0, steps=10, step_ms=10).run()
    assert (equal.violations, equal.staleness, equal.wasted) == (0, 0.0, 0.0)


def test_lengths_are_long_tailed_and_capped() -> None:
    lengths = [length(position, 0) for position in range(3000)]
    assert 900 < np.median(lengths) < 1100
    assert max(lengths) == 8000
    assert 0.95 < np.std(np.log(lengths)) < 1.05
    assert length(5, 0) != length(5, 1), "another try has another length"


def test_a_realistic_group_is_valid() -> None:
    group = realistic_group(0)
    assert np.array_equal(decode(encode(group)).samples[3].tokens, group.samples[3].tokens)


def test_a_table_is_markdown() -> None:
    assert table(["a", "b"], [["x", 1234.5], ["y", 0.01234]]).splitlines() == [
        "| a | b |",
        "|---|---|",
        "| x | 1234 |",
        "| y | 0.0123 |",
    ]


def test_weightsync() -> None:
    result = quick("weightsync")
    ways = result["mib"]["16"]
    assert set(ways) == {"export", "shm", "peer", "disk", "delta", "gloo", "bucket", "stock"}
    assert all(way["seconds"] > 0 and way["floor"] > 0 for way in ways.values())
    assert ways["delta"]["bytes_to_full"] < 0.1, "one word in a hundred has changed"


def test_learner_step() -> None:
    tiny = quick("learner_step")["tiny"]
    assert tiny["beside"] < tiny["step"]
    assert tiny["wait"] < tiny["step"] / 4, "the next batch is fetched while this one trains"
    parts = sum(tiny[part] for part in ("pack", "score", "wait", "rest of the step", "publish", "record"))
    assert 0.3 * tiny["beside"] < parts < 3 * tiny["beside"]
