"""The summary and the plots of a run, from files written by hand."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from buffer.ledger import ActorRecord, Counts, Ledger
from launch.plots import plot_run
from launch.summary import overlap, render, summarise, utilisation

REST = {"standard_error": 0.02, "skipped": [], "digest": "d"}
"""Of a line in `evaluations.jsonl`, what else is looked at."""


def ledger() -> Ledger:
    state = dict.fromkeys(("lineage", "tail", "clock", "last"), "0")
    state |= {
        "ended": "done",
        "version": "30",
        "head": "30",
        "max_steps": "30",
        "eta": "2",
        "lease_ms": "10000",
    }
    return Ledger(
        state=state,
        counts=Counts(admitted=61, trained=60, dropped={"expired": 1}),
        staleness={0: 20, 1: 30, 2: 10},
        actors={},
        outstanding={},
        progress={},
        sizes={"stopping": 0},
    )


def write_run(folder: Path, steps: int = 30) -> None:
    rows, spans = [], []
    for step in range(steps):
        rows.append(
            {
                "step": step,
                "reward_mean": step / steps,
                "staleness_mean": 1.0,
                "staleness_max": 2,
                "tokens": 100,
                "time_batch": 10.0 + step,
                "time": 11.0 + step,
            }
        )
        spans.append(
            {"lane": "learner", "kind": "train", "step": step, "start": 10.5 + step, "end": 11.0 + step}
        )
        spans.append(
            {"lane": "actor-0", "kind": "generate", "group": "g", "start": 10.0 + step, "end": 10.75 + step}
        )
    for name, lines in (("metrics", rows), ("timeline", spans)):
        (folder / f"{name}.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def test_the_figures_come_from_metrics_and_ledger(tmp_path: Path) -> None:
    write_run(tmp_path)
    summary = summarise(tmp_path, ledger(), "demo", 99.0)
    assert summary.reward_first == pytest.approx(sum(range(10)) / 10 / 30, abs=1e-4)
    assert summary.reward_last == pytest.approx(sum(range(10, 30)) / 20 / 30, abs=1e-4)
    assert summary.staleness_mean == pytest.approx((30 + 20) / 60)
    assert (summary.staleness_max, summary.versions, summary.conserved) == (2, 31, True)
    assert summary.tokens_per_second == pytest.approx(30 * 100 / 30)
    assert summary.overlap == 0.5
    assert msgspec.json.decode((tmp_path / "summary.json").read_bytes())["steps"] == 30


def test_a_run_without_a_step_still_has_a_summary(tmp_path: Path) -> None:
    summary = summarise(tmp_path, ledger(), "demo", 1.0)
    assert (summary.steps, summary.reward_first, summary.overlap) == (0, None, None)
    assert plot_run(tmp_path, 2) == []


def test_the_plots_are_pictures(tmp_path: Path) -> None:
    write_run(tmp_path)
    for path in plot_run(tmp_path, 2):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_evaluations_are_in_the_summary_and_in_the_picture(tmp_path: Path) -> None:
    write_run(tmp_path)
    (before, *_) = plot_run(tmp_path, 2)
    plain = before.read_bytes()
    lines = [
        {"version": version, "samples": 8, "mean_at_k": mean, "pass_at_k": {1: mean, 8: 0.9}, **REST}
        for version, mean in ((0, 0.25), (25, 0.5), (25, 0.625))
    ]
    (tmp_path / "evaluations.jsonl").write_bytes(
        b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    )
    (after, *_) = plot_run(tmp_path, 2)
    assert after.read_bytes() != plain
    summary = summarise(tmp_path, ledger(), "demo", 99.0)
    assert [(one["version"], one["mean_at_k"]) for one in summary.evaluations] == [
        (0, 0.25),
        (25, 0.5),
        (25, 0.625),
    ]
    assert "evaluated   mean@8 0.250 at 0, 0.500 at 25, 0.625 at 25" in render(summary)


def test_overlap_counts_training_time_once() -> None:
    spans = [
        {"kind": "train", "start": 0.0, "end": 2.0},
        {"kind": "generate", "start": 1.0, "end": 9.0},
        {"kind": "generate", "start": 1.0, "end": 1.5},
    ]
    assert overlap(spans) == 0.5


def test_engines_are_used_as_much_as_their_actors_say() -> None:
    def actor(**stats: float) -> ActorRecord:
        return ActorRecord("1:x", 3, "running", 0, "host", stats)

    found = msgspec.structs.replace(
        ledger(),
        actors={"a": actor(held_s=10.0, busy_s=9.0), "b": actor(held_s=30.0, busy_s=30.0), "c": actor()},
    )
    assert utilisation(found) == 39 / 40
    assert utilisation(ledger()) is None
