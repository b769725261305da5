"""`launch eval`: a real engine's answers are those of the learner, and a run is evaluated while it trains."""

from __future__ import annotations

import json
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from launch.arithmetic import write_arithmetic
from launch.cli import main
from launch.tiny_model import make_tiny
from learner.config import DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.datasets import held_out
from learner.tokenizer import Tokenizer
from tests.e2e.commands import finish, launch, output, processes_in, summary_of
from tests.waiting import wait_until

TOKENS, QUESTIONS = 8, 24


def odd(text: str, answer: str) -> float:
    """A reward that a model earns without having learned anything: for about half of its answers."""
    return float(sum(map(ord, text)) % 2)


def test_a_greedy_evaluation_is_what_the_learner_answers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from learner.step import Trainer

    model, data = make_tiny("qwen3", tmp_path / "model", seed=0), write_arithmetic(tmp_path / "data", seed=0)
    asked = ["--data", str(data.held_out), "--temperature", "0", "--samples", "2", "--json"]
    settings = [
        f"evaluation.questions={QUESTIONS}",
        f"rollout.sampling.max_new_tokens={TOKENS}",
        f"rollout.reward={odd.__module__}:{odd.__name__}",
    ]
    assert main(["eval", str(model), *asked, *settings]) == 0
    printed = capfd.readouterr()
    found: dict[str, Any] = json.loads(printed.out.splitlines()[-1])
    tokenizer = Tokenizer(model)
    prompts = held_out(DataConfig(path=str(data.held_out)), tokenizer)[:QUESTIONS]
    trainer = Trainer(model, ModelConfig(path=str(model)), OptimizerConfig(), ObjectiveConfig())
    answers = trainer.generate([one.tokens for one in prompts], TOKENS, tokenizer.eos_id, temperature=0.0)
    passed = [odd(tokenizer.decode(answer), "") for answer in answers]
    assert 0 < sum(passed) < QUESTIONS
    share = sum(passed) / QUESTIONS
    assert (found["questions"], found["samples"], found["data"]) == (QUESTIONS, 2, str(data.held_out))
    assert found["mean_at_k"] == pytest.approx(share)
    assert found["pass_at_k"] == {"1": pytest.approx(share), "2": pytest.approx(share)}
    assert found["reward"] == pytest.approx(share)
    assert (found["version"], found["invalid"], found["skipped"]) == (None, {}, [])
    assert "starting an engine" in printed.err


def test_an_engine_that_fails_leaves_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, data = make_tiny("qwen3", tmp_path / "model", seed=0), write_arithmetic(tmp_path / "data", seed=0)
    (model / "model.safetensors").write_bytes(b"no weights")
    assert main(["eval", str(model), "--data", str(data.held_out)]) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    (log,) = tmp_path.glob("slipstream-eval-*.log")
    assert said.startswith("launch eval: engine evaluator: the server ended")
    assert str(log) in said


def test_an_interrupted_evaluation_leaves_nothing(tmp_path: Path) -> None:
    make_tiny("qwen3", tmp_path / "model", seed=0)
    write_arithmetic(tmp_path / "data", seed=0)
    process = launch(tmp_path, "eval", "model", "--data", "data/held_out.jsonl", "--samples", "64")

    def serving() -> bool:
        assert process.poll() is None, (tmp_path / "eval.err").read_text()
        return any("sglang" in line for line in processes_in(tmp_path))

    wait_until(serving, 60, "the engine")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, (tmp_path / "eval.err").read_text()
    assert processes_in(tmp_path) == []


@pytest.mark.accept
def test_a_run_is_evaluated_while_it_trains_and_its_checkpoint_is_its_version(tmp_path: Path) -> None:
    quick = [
        "stream.max_steps=8",
        "stream.groups_per_step=4",
        "stream.group_size=4",
        "sft.max_steps=40",
        "checkpoint.every=4",
        "evaluation.every=4",
        "evaluation.questions=8",
        "evaluation.samples=4",
    ]
    demo = launch(tmp_path, "demo", "--json", *quick)
    shown: dict[str, Any] = {}

    def evaluated() -> bool:
        answer = finish(tmp_path, "status", "--json")
        if answer.returncode == 0:
            shown.update(json.loads(answer.stdout))
        return bool(shown.get("evaluation")) or demo.poll() is not None

    wait_until(evaluated, 400, "an evaluation")
    assert demo.wait(400) == 0, (tmp_path / "demo.err").read_text()
    run = tmp_path / "runs/demo"
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    covered = {line["version"] for line in lines} | {one for line in lines for one in line["skipped"]}
    assert covered == {0, 4, 8}
    assert (lines[-1]["version"], lines[-1]["model"]) == (8, "runs/demo/weights/8")
    assert shown["evaluation"]["version"] in covered
    evaluations = summary_of(tmp_path, "demo")["evaluations"]
    assert [one["version"] for one in evaluations] == [line["version"] for line in lines]
    assert sorted(path.name for path in (run / "weights").iterdir()) == ["0", "5", "6", "7", "8"]
    (checkpoint,) = (run / "checkpoints").glob("step-00000008-*")
    for folder in (run / "weights/8", checkpoint, run / "export"):
        again = json.loads(output(tmp_path, "eval", str(folder), "--json").splitlines()[-1])
        same = ("mean_at_k", "pass_at_k", "reward", "answer_tokens", "truncated", "seed")
        assert {name: again[name] for name in same} == {name: lines[-1][name] for name in same}
        if folder.name != "export":
            assert (again["version"], again["digest"]) == (8, lines[-1]["digest"])
    assert processes_in(tmp_path) == []
