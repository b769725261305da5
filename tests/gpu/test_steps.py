"""Training steps on the GPU: the CPU's in fp32, and a falling loss in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.step import Trainer
from tests.gpu.cases import CASES, make
from tests.gpu.steps import on_cpu, train


@pytest.mark.parametrize("case", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_two_steps_in_fp32_are_those_of_the_cpu(case: str, tmp_path: Path) -> None:
    start = tmp_path / "start"
    make(case, start)
    expected = on_cpu(start, tmp_path / "cpu")
    found = train(start, tmp_path / "gpu")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), name
    before, right, got = (load_file(tmp_path / run / "model.safetensors") for run in ("start", "cpu", "gpu"))
    moved = max((right[name] - before[name]).abs().max().item() for name in right)
    away = max((right[name] - got[name]).abs().max().item() for name in right)
    print(f"\n{case}: weights moved by {moved:.1e}, and are {away:.1e} from the CPU's")
    assert moved > 1e-3
    assert away <= 1e-2 * moved


@pytest.mark.parametrize("case", list(CASES))
def test_the_loss_falls_in_bf16(case: str, tmp_path: Path) -> None:
    make(case, tmp_path)
    model = ModelConfig(path=str(tmp_path), micro_batch_tokens=64, dtype="bfloat16")
    trainer = Trainer(tmp_path, model, OptimizerConfig(lr=1e-3, warmup_steps=0), ObjectiveConfig())
    samples = [([1, 2, value], [value, 5, 0]) for value in range(8, 40)]
    losses = [trainer.sft_step(samples, lr=3e-3)["loss"] for _ in range(20)]
    print(f"\n{case}: loss {losses[0]:.2f} -> {losses[-1]:.2f} in 20 steps of bf16")
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.isfinite(tensor).all() for tensor in trainer.export().values())
