"""Routing replay through the whole loop: engines, stream, learner, record, and the record trained again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from buffer.record import RecordFolder
from tests.e2e.commands import finish, launch, metrics_of, summary_of
from tests.e2e.test_loop import SMALL

pytestmark = pytest.mark.accept


def test_a_run_replays_the_engines_routing_and_its_record_replays_the_run(tmp_path: Path) -> None:
    options = ("--json", "--record", "--family", "qwen3_moe", *SMALL, "objective.routing_replay=true")
    process = launch(tmp_path, "demo", *options)
    assert process.wait(500) == 0, (tmp_path / "demo.err").read_text()
    summary = summary_of(tmp_path, "demo")
    assert (summary["groups"]["trained"], summary["groups"]["dropped"]) == (24, {})
    run = tmp_path / "runs/demo"
    steps = list(RecordFolder(run / "record").steps())
    assert len(steps) == 6
    interrupted = set()
    for step in steps:
        for group in step.groups(routed=True):
            assert group.routed.layers == 2
            for sample in group.samples:
                assert sample.routed.shape == (len(sample.tokens) - 1, 2, 2)
                assert len(set(map(tuple, sample.routed[:, 0].tolist()))) > 1
                if len(sample.spans) > 1:
                    interrupted.add(step.step)
    # Tokens behind a change of weights have the older ones' choices before them, the engine had its own.
    mismatch = [
        row["mismatch_k3"]
        for row in metrics_of(run)
        if row["mismatch_k3"] is not None and row["step"] not in interrupted
    ]
    assert max(mismatch) < 1e-6
    done = finish(tmp_path, "replay", str(run / "record"), "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, found["steps"], found["identical"]) == (0, 6, True), done.stderr
