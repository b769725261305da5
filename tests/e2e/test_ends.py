"""A run that is stopped, interrupted or given bad input ends cleanly: nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks.learner_step import scripted_actor, settings
from buffer.client import Stream
from buffer.local_server import LocalServer
from launch.config import to_json
from launch.status import read_status
from launch.tiny_model import make_tiny
from learner.config import ObjectiveConfig
from tests.e2e.commands import finish, launch, output, processes_in, sockets, summary_of
from tests.waiting import wait_until

QUICK = ["stream.groups_per_step=4", "stream.group_size=4", "sft.max_steps=1", "sft.batch=8"]


def training(folder: Path) -> bool:
    answer = finish(folder, "status", "--json")
    return answer.returncode == 0 and json.loads(answer.stdout)["step"] >= 2


@pytest.mark.parametrize("how", ["launch stop", "ctrl-c"])
def test_a_stopped_demo_leaves_a_summary_and_nothing_else(tmp_path: Path, how: str) -> None:
    before = sockets()
    process = launch(tmp_path, "demo", "--json", "stream.max_steps=5000", *QUICK)
    wait_until(lambda: training(tmp_path), 240, "training")
    assert output(tmp_path, "scale", "actors", "1").endswith(": 1 actors\n")
    if how == "launch stop":
        output(tmp_path, "stop")
    else:
        process.send_signal(signal.SIGINT)
    assert process.wait(120) == 0, (tmp_path / "demo.err").read_text()
    summary = summary_of(tmp_path, "demo")
    assert summary["ended"] == "stopped"
    assert 2 <= summary["steps"] < 5000
    assert summary["conserved"]
    assert (tmp_path / "runs/demo/export/model.safetensors").exists()
    assert processes_in(tmp_path) == []
    assert sockets() <= before
    assert not list(tmp_path.rglob("*.url"))


def test_a_stop_ends_the_warm_up_too(tmp_path: Path) -> None:
    process = launch(
        tmp_path,
        "demo",
        "--json",
        "sft.max_steps=100000",
        "sft.target_accuracy_low=0.98",
        "sft.target_accuracy_high=0.99",
        "sft.measure_every=2",
        "sft.batch=8",
    )
    wait_until(lambda: '"warm-up"' in finish(tmp_path, "status", "--json").stdout, 120, "the warm-up")
    output(tmp_path, "stop")
    assert process.wait(120) == 0, (tmp_path / "demo.err").read_text()
    summary = summary_of(tmp_path, "demo")
    assert (summary["ended"], summary["steps"], summary["reward_last"]) == ("stopped", 0, None)
    assert processes_in(tmp_path) == []


def test_ctrl_c_while_everything_starts_leaves_nothing(tmp_path: Path) -> None:
    before = sockets()
    process = launch(tmp_path, "demo", *QUICK)
    wait_until(lambda: (tmp_path / "runs/demo/redis.url").exists(), 30, "Redis")
    wait_until(lambda: len(processes_in(tmp_path)) >= 4, 30, "the workers")
    process.send_signal(signal.SIGINT)
    assert process.wait(120) in (0, 1, 2)
    assert processes_in(tmp_path) == []
    assert sockets() <= before


def test_a_run_that_is_given_up_is_over_for_everybody(tmp_path: Path, redis_server: LocalServer) -> None:
    """The scripted actor's log-probabilities are made up: the first batch shows engines that disagree."""
    config = settings(tmp_path, make_tiny("qwen3", tmp_path / "gives-up", seed=0), steps=3)
    config = msgspec.structs.replace(config, objective=ObjectiveConfig())
    folder, url = tmp_path / "run", redis_server.socket_url
    folder.mkdir()
    (folder / "config.json").write_bytes(to_json(config))
    with scripted_actor(url, config.name, tmp_path) as actor:
        learner = subprocess.run(
            [sys.executable, "-m", "learner.worker", "--folder", str(folder)],
            env={**os.environ, "SLIPSTREAM_REDIS": url, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert learner.returncode == 2
        assert "engines and learner disagree about version 0" in learner.stderr.splitlines()[-1]
        assert actor.wait(30) == 0
    status = read_status(Stream.connect(url, config.name))
    assert status.phase.startswith("aborted: engines and learner disagree about version 0 before step 0: ")
    assert (status.step, status.conserved) == (0, True)


def test_the_port_of_somebody_else_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = finish(tmp_path, "demo", f"redis.port={port}")
    assert done.returncode == 2
    assert f"redis.port: 127.0.0.1:{port} is taken; choose another" in done.stderr.splitlines()[-1]
    assert processes_in(tmp_path) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("no json", "train.jsonl, line 2: JSON is malformed"),
        ('{"question": "2+2="}', "train.jsonl, line 2: Object missing required field `answer`"),
        (
            '{"question": "2+2=", "answer": "4"}',
            "train.jsonl, line 2: answer: got '4', expected it to end in `####",
        ),
    ],
)
def test_a_bad_line_of_the_data_is_named(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "1+1=", "answer": "#### 2"}\n' + line + "\n")
    assert_refused(tmp_path, said, "--data", "train.jsonl")


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    assert_refused(tmp_path, "data.path: no file nowhere.jsonl", "--data", "nowhere.jsonl")


def test_a_model_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    output(tmp_path, "model", "--out", "model")
    (tmp_path / "model/tokenizer.json").unlink()
    assert_refused(tmp_path, "model has no tokenizer.json", "model.path=model")


def test_an_engine_without_memory_says_what_to_lower(tmp_path: Path) -> None:
    """The cache asked for does not fit into what a process may have."""
    said = "it ran out of memory: lower engine.max_total_tokens"
    assert_refused(tmp_path, said, "engine.max_total_tokens=100000000", *QUICK, address_space=8 << 30)


def assert_refused(folder: Path, said: str, *argv: str, address_space: int = 0) -> None:
    """`launch demo` with these arguments ends with code 2, one line that says so, and nothing running."""
    done = finish(folder, "demo", *argv, address_space=address_space)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.splitlines()[-1]
    assert processes_in(folder) == []
