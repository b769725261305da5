"""What the backward pass computes again: the same gradients from less memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu_learner import MODELS, write_checkpoint
from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.model.forward import target_logprobs
from learner.packing import pack, row_of_tokens
from learner.step import Trainer

TOKENS = 8192


def run(folder: Path, recompute: str) -> tuple[torch.Tensor, float]:
    """All gradients of a micro-batch in one vector, and the memory of the pass at its peak, in bytes."""
    model = ModelConfig(
        path=str(folder), micro_batch_tokens=TOKENS, dtype="bfloat16", recompute=recompute, logits_chunk=1024
    )
    trainer = Trainer(folder, model, OptimizerConfig(), ObjectiveConfig())
    source = np.random.default_rng(0)
    rows = [row_of_tokens(source.integers(0, 4096, length).tolist(), 1) for length in (4096, 3000, 1096)]
    (batch,) = pack(rows, TOKENS)
    for _ in range(2):  # the first takes what kernels keep for good
        trainer._parallel.zero_grad_buffer()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logprobs, _ = target_logprobs(trainer._parallel, batch, 1024)
        (-logprobs.mean()).backward()
        peak = torch.cuda.max_memory_allocated() - before
    return torch.cat([p.main_grad.flatten() for p in trainer._model.parameters()]).cpu(), peak


@pytest.mark.parametrize("model", ["dense", "next"])
def test_gradients_stay_and_memory_falls(model: str, tmp_path: Path) -> None:
    # Where every expert is chosen, no difference in rounding changes a choice.
    chosen = {"num_experts": 4} if model == "next" else {}
    write_checkpoint({**MODELS[model], "vocab_size": 4096, **chosen}, tmp_path / "model")
    found = {recompute: run(tmp_path / "model", recompute) for recompute in ("none", "selective", "full")}
    right, most = found["none"]
    again = run(tmp_path / "model", "none")[0]  # some kernels add in an order of their own
    noise = float((again - right).norm() / right.norm())
    for recompute, (gradient, peak) in found.items():
        off = float((gradient - right).norm() / right.norm())
        print(
            f"\n{model} {recompute}: {peak / 1e9:.2f} GB, gradients {off:.1e} off (twice: {noise:.1e})",
            end="",
        )
        assert off <= 1e-2
        assert recompute == "none" or peak < 0.9 * most
    print()
    assert found["full"][1] < found["selective"][1]
