"""`launch learner --nodes 2`: two processes that train as one, on what a scripted actor answers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from buffer.local_server import LocalServer
from tests.e2e.commands import finish, launch, metrics_of, output, worker_pid
from tests.faults.actor import ActorSettings
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
STEPS = 10
SETTINGS = [
    "model.path=model",
    "data.path=data/train.jsonl",
    f"stream.max_steps={STEPS}",
    "stream.max_staleness=0",
    "stream.groups_per_step=6",
    "stream.group_size=4",
    "weightsync.timeout_s=1",
    "objective.abort.mismatch=0",  # what the actor says is made up
    "objective.mini_batches=2",
    "sft.max_steps=2",
    "sft.batch=8",
    "sft.measure_every=1",
    "sft.measure_prompts=8",
    "optimizer.warmup_steps=0",
    "optimizer.eps=1e-5",  # else an element whose gradient is rounding alone moves by the learning rate
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, questions, and a Redis beside it."""
    folder = tmp_path_factory.mktemp("nodes")
    output(folder, "model", "--out", "model")
    output(folder, "data", "--out", "data")
    return folder


@contextmanager
def scripted_actor(folder: Path, url: str, run: str, group_s: float = 0.0) -> Iterator[None]:
    """An actor that answers the same to the same version number, `group_s` seconds a group."""
    settings = ActorSettings(
        url=url, run=run, name="actor-0", log=str(folder / f"{run}-actor.log"),
        group_size=4, lease_s=5, concurrency=8, group_s=group_s, vocabulary=12, by_number=True,
    )  # fmt: skip
    argv = [sys.executable, "-m", "tests.faults.actor", msgspec.json.encode(settings).decode()]
    process = subprocess.Popen(argv, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        yield
    finally:
        process.kill()
        process.wait()


def train(folder: Path, url: str, run: str, *options: str) -> dict[str, np.ndarray]:
    """The weights that a learner ends with."""
    with scripted_actor(folder, url, run):
        done = finish(folder, "learner", "--redis", url, f"name={run}", *options, *SETTINGS)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "runs" / run / "export/model.safetensors")


def test_two_nodes_train_what_one_does(folder: Path) -> None:
    """As two copies of the model that share the batch, and as one that shares its matrices."""
    with LocalServer.start(folder / "redis") as server:
        one = train(folder, server.url, "one")
        copies = train(folder, server.url, "copies", "--nodes", "2")
        halves = train(folder, server.url, "halves", "--nodes", "2", "model.parallel.tensor=2")
    start = load_file(folder / "model/model.safetensors")
    assert max(np.abs(one[name] - start[name]).max() for name in one) > 1e-3
    alone = metrics_of(folder / "runs/one")
    assert len(alone) == STEPS
    for run, weights in (("copies", copies), ("halves", halves)):
        assert max(np.abs(one[name] - weights[name]).max() for name in one) <= 1e-5
        for name in ("tokens", "loss", "grad_norm", "reward_mean", "entropy", "mismatch_k3"):
            together = [step[name] for step in metrics_of(folder / "runs" / run)]
            np.testing.assert_allclose(together, [step[name] for step in alone], atol=1e-5, rtol=1e-4)


def test_two_nodes_that_were_killed_go_on_to_the_same_bits(folder: Path) -> None:
    """Steps after the checkpoint are trained again; a version that came out differently would be logged."""
    command = [
        "learner",
        "name=cut",
        "--nodes",
        "2",
        "checkpoint.every=4",
        "checkpoint.keep_last=20",
        *SETTINGS,
        "stream.max_steps=40",
    ]
    run = folder / "runs/cut"
    with (
        LocalServer.start(folder / "redis") as server,
        scripted_actor(folder, server.url, "cut", group_s=0.4),
    ):
        process = launch(folder, *command, "--redis", server.url)
        checkpoints = run / "checkpoints"
        wait_until(lambda: list(checkpoints.glob("step-*")), 60, "a checkpoint", pause=0.02)
        os.kill(worker_pid(folder, "learner.worker", variable="RANK=0"), signal.SIGKILL)
        assert process.wait(60) == 2
        first = min(checkpoints.glob("step-*"))
        pieces = {path.name for path in first.glob("*.distcp")}
        done = finish(folder, *command, "--redis", server.url)
    assert done.returncode == 0, done.stderr
    assert pieces == {"__0_0.distcp", "__1_0.distcp", "common_0.distcp"}
    assert [step["step"] for step in metrics_of(run)] == list(range(40))
    said = (run / "logs/learner.log").read_text()
    again = re.search(r"going on from the checkpoint of version \d+: (\d+) steps are trained again", said)
    assert again
    assert int(again[1]) >= 1
    assert " again, it was " not in said


def test_a_rank_that_dies_ends_the_learner_by_name(folder: Path) -> None:
    with LocalServer.start(folder / "redis") as server, scripted_actor(folder, server.url, "dies"):
        options = ["--redis", server.url, "name=dies", "stream.max_steps=100000", "--nodes", "2"]
        process = launch(folder, "learner", *options, *SETTINGS)
        metrics = folder / "runs/dies/metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.stat().st_size, 60, "training")
        pid = worker_pid(folder, "learner.worker", variable="RANK=1")
        os.kill(pid, signal.SIGKILL)
        assert process.wait(60) == 2
        assert "learner-1: it was killed" in (folder / "learner.err").read_text()
