"""A learner that is killed and started again, with real engines: the run goes on to its end."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import launch, metrics_of, output, processes_in, summary_of, worker_pid
from tests.waiting import wait_until


@pytest.mark.accept
def test_a_learner_that_is_killed_goes_on_with_the_same_actors(tmp_path: Path) -> None:
    redis = launch(tmp_path, "redis")
    processes = [redis]
    try:
        wait_until(lambda: (tmp_path / "runs/redis/redis.url").exists(), 20, "Redis")
        model = output(tmp_path, "model", "--out", "model").strip()
        output(tmp_path, "data", "--out", "data")
        command = ["name=again", f"model.path={model}", "data.path=data/train.jsonl", "checkpoint.every=4"]
        command += ["stream.max_steps=24", "stream.groups_per_step=4", "stream.group_size=4"]
        command += ["stream.lease_s=3", "stream.uncovered_max=8", "rollout.sampling.max_new_tokens=6"]
        processes.append(launch(tmp_path, "actors", "--count", "1"))
        first = launch(tmp_path, "learner", "--json", *command)
        processes.append(first)

        def status() -> dict[str, Any]:
            return json.loads(output(tmp_path, "status", "--json"))

        wait_until(lambda: (tmp_path / "runs/again/metrics.jsonl").exists(), 60, "the learner to start")
        wait_until(lambda: status()["step"] >= 10, 150, "ten steps")
        os.kill(worker_pid(tmp_path, "learner.worker"), signal.SIGKILL)
        assert first.wait(60) == 2
        before = metrics_of(tmp_path / "runs/again")
        second = launch(tmp_path, "learner", "--json", *command)
        processes.append(second)
        assert second.wait(240) == 0, (tmp_path / "learner.err").read_text()
        summary = summary_of(tmp_path, "learner")
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(60)
    after = metrics_of(tmp_path / "runs/again")
    assert [row["step"] for row in after] == list(range(24))
    assert [row["loss"] for row in after[: len(before) - 1]] == [row["loss"] for row in before[:-1]]
    assert (summary["steps"], summary["conserved"], summary["ended"]) == (24, True, "done")
    weights = summary["report"]["weights"]
    assert weights["version"] == 24
    assert not weights["missing"]
    assert max(weights["max_difference"].values()) < 1e-4
    assert "going on from the checkpoint of version" in (tmp_path / "runs/again/logs/learner.log").read_text()
    assert processes_in(tmp_path) == []
