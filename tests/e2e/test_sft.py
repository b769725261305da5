"""`launch sft` by itself: demonstrations in, a checkpoint that differs out."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import load_file

from tests.e2e.commands import finish, output

QUICK = ["data.path=data/train.jsonl", "sft.max_steps=4", "sft.batch=16", "sft.measure_every=2"]


def test_a_warm_up_writes_a_checkpoint_that_learned(tmp_path: Path) -> None:
    output(tmp_path, "model", "--out", "model")
    output(tmp_path, "data", "--out", "data")
    shown = ["data.demonstrations=data/demonstrations.jsonl"]
    done = finish(tmp_path, "sft", "--out", "warm", "model.path=model", *QUICK, *shown)
    assert done.returncode == 0, done.stderr
    assert "4 steps, accuracy" in done.stderr.splitlines()[-1]
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "warm"))
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    assert (tmp_path / "warm/tokenizer.json").read_bytes() == (tmp_path / "model/tokenizer.json").read_bytes()


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    output(tmp_path, "data", "--out", "data")
    done = finish(tmp_path, "sft", "--out", "warm", "model.path=nowhere", *QUICK)
    assert done.returncode == 2
    assert "nowhere has no config.json" in done.stderr.splitlines()[-1]
