"""The whole loop for a few steps: the real command line, Redis, SGLang and Megatron-Core."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from buffer.codec import encode
from buffer.record import RecordFolder
from tests.e2e.commands import (
    finish,
    launch,
    metrics_of,
    output,
    processes_in,
    summary_of,
    worker_pid,
)
from tests.waiting import wait_until

SMALL = [
    "stream.max_steps=6",
    "stream.groups_per_step=4",
    "stream.group_size=4",
    "sft.max_steps=40",
    "sft.target_accuracy_low=0.01",
    "sft.target_accuracy_high=0.99",
]

Finished = tuple[Path, dict[str, Any], dict[str, Any]]
"""A run's folder, its summary, and its status and verification read while it trained."""


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    """A finished small demo, recorded."""
    folder = tmp_path_factory.mktemp("demo")
    process = launch(folder, "demo", "--json", "--record", *SMALL)
    status: dict[str, Any] = {}

    def training() -> bool:
        if process.poll() is not None:
            return True
        answer = finish(folder, "status", "--json")
        if answer.returncode == 0:
            status.update(json.loads(answer.stdout))
            status["verify"] = finish(folder, "verify", "--json")
        return status.get("phase") == "training"

    wait_until(training, 240, "training")
    assert process.wait(240) == 0, (folder / "demo.err").read_text()
    summary = summary_of(folder, "demo")
    assert processes_in(folder) == []
    return folder, summary, status


def test_the_summary_accounts_for_every_group(finished: Finished) -> None:
    folder, summary, _ = finished
    groups = summary["groups"]
    held = groups["leased"] + groups["queued"] + groups["assigned"] + groups["trained"]
    assert groups["admitted"] == held + sum(groups["dropped"].values())
    assert (summary["steps"], groups["trained"], summary["versions"]) == (6, 24, 7)
    assert summary["staleness_max"] <= 2
    assert json.loads((folder / "runs/demo/summary.json").read_text()) == summary


def test_every_engine_serves_the_weights_of_the_learner(
    finished: Finished,
) -> None:
    weights = finished[1]["report"]["weights"]
    assert weights["version"] == 6
    assert not weights["missing"]
    # Six steps may be over before the second engine is up; `make accept` sees both.
    assert weights["max_difference"].keys() <= {"actor-0", "actor-1"}
    assert weights["max_difference"]
    assert max(weights["max_difference"].values()) < 1e-4


def test_status_shows_the_run_from_redis_alone(finished: Finished) -> None:
    status = finished[2]
    assert (status["run"], status["max_steps"], status["max_staleness"]) == ("demo", 6, 2)
    assert status["conserved"]
    assert {actor["name"] for actor in status["actors"]} == {"actor-0", "actor-1"}


def test_verify_proves_the_run_while_it_goes_on(finished: Finished) -> None:
    done = finished[2]["verify"]
    found = json.loads(done.stdout)
    assert (done.returncode, found["holds"], found["violations"]) == (0, True, [])


def test_a_recorded_run_replays_to_the_same_weights_on_any_folder(finished: Finished, tmp_path: Path) -> None:
    record = shutil.copytree(finished[0] / "runs/demo/record", tmp_path / "record")
    done = finish(tmp_path, "replay", "record", "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, found["steps"], found["identical"], found["unlike"]) == (0, 6, True, {})
    # One reward of step 2 is another: version 3 is the first to differ.
    folder = RecordFolder(record)
    step = list(folder.steps())[2]
    group = step.groups()[0]
    group.samples[0].reward += 1.0
    folder.add(msgspec.structs.replace(step, payloads={**step.payloads, group.id: encode(group)}))
    done = finish(tmp_path, "replay", "record", "--json", "--steps", "4")
    found = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, found["identical"], found["steps"]) == (1, False, 3)
    assert found["differs"].startswith("version 3: got ")


def test_the_run_folder_holds_what_the_readme_promises(
    finished: Finished,
) -> None:
    folder = finished[0] / "runs/demo"
    for name in ("config.json", "metrics.jsonl", "timeline.jsonl", "report.json", "summary.json"):
        assert (folder / name).stat().st_size > 0, name
    for name in ("reward.png", "staleness.png", "timeline.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert not (folder / "redis.url").exists()


def test_transformers_loads_the_export_and_it_answers(
    finished: Finished,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = finished[0] / "runs/demo/export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    example = finished[1]["report"]["held_out"]["examples"][0]
    prompt = tokenizer(example["question"] + "\n", return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == example["answered"]
    assert text.startswith("#### ")


def test_generation_and_training_overlap(finished: Finished) -> None:
    assert finished[1]["overlap"] > 0
    assert finished[1]["staleness_mean"] > 0


def test_learning_rate_zero_keeps_every_ratio_at_one_and_the_parts_start_in_any_order(tmp_path: Path) -> None:
    """Actors first, one more joins later, one is killed; nothing is learned, so every ratio stays 1."""
    redis = launch(tmp_path, "redis")
    processes = [redis]
    try:
        wait_until(lambda: (tmp_path / "runs/redis/redis.url").exists(), 20, "Redis")
        processes.append(launch(tmp_path, "actors", "--count", "2"))
        model = output(tmp_path, "model", "--out", "model").strip()
        output(tmp_path, "data", "--out", "data")
        overrides = ["name=zero", f"model.path={model}", "data.path=data/train.jsonl", "optimizer.lr=0"]
        small = ["stream.max_steps=12", "stream.groups_per_step=4", "stream.group_size=4", "stream.lease_s=3"]
        sampling = ["rollout.sampling.max_new_tokens=6"]
        learner = launch(tmp_path, "learner", "--json", *overrides, *small, *sampling)
        processes.append(learner)

        def status() -> dict[str, Any]:
            return json.loads(output(tmp_path, "status", "--json"))

        wait_until(lambda: "waiting" in (tmp_path / "actors.err").read_text(), 20, "actors to wait")
        wait_until(lambda: "run zero" in (tmp_path / "actors.err").read_text(), 60, "actors to find the run")
        (tmp_path / "later").mkdir()
        later = launch(
            tmp_path / "later", "actors", "--redis", (tmp_path / "runs/redis/redis.url").read_text()
        )
        processes.append(later)
        wait_until(lambda: status()["step"] >= 2, 120, "two steps")
        victim = next(a["name"] for a in status()["actors"] if a["state"] == "running")
        os.kill(worker_pid(tmp_path, "actors.worker", victim), signal.SIGKILL)
        assert learner.wait(180) == 0, (tmp_path / "learner.err").read_text()
        summary = summary_of(tmp_path, "learner")
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(60)
    rows = metrics_of(tmp_path / "runs/zero")
    assert summary["steps"] == 12
    assert summary["conserved"]
    assert max(row["ratio_deviation_max"] for row in rows) < 1e-4
    assert max(row["clip_fraction"] for row in rows) == 0
    assert np.isfinite([row["grad_norm"] for row in rows]).all()
