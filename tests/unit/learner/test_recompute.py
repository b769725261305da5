"""What the backward pass computes again: the same gradients from fewer kept bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.model.forward import target_logprobs
from learner.packing import MicroBatch, pack, row_of_tokens
from learner.step import Trainer
from tests.unit.learner.families import make_family


def micro_batch() -> MicroBatch:
    rows = [row_of_tokens([(7 * i + n) % 48 for i in range(n)], 1) for n in (5, 90, 33, 120)]
    return pack(rows, 1000)[0]


def gradients(folder: Path, recompute: str) -> tuple[torch.Tensor, int]:
    """All gradients of a backward pass in one vector, and the bytes that its forward pass kept for it."""
    model = ModelConfig(path=str(folder), recompute=recompute)
    trainer = Trainer(folder, model, OptimizerConfig(), ObjectiveConfig())
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, _ = target_logprobs(trainer._parallel, micro_batch(), 1000)
    forward = sum(kept.values())
    logprobs.sum().backward()
    return torch.cat([value.main_grad.flatten() for value in trainer._model.parameters()]), forward


@pytest.mark.parametrize("case", ["qwen3", "qwen3_moe_mixed", "qwen3_next", "deepseek_v3"])
def test_gradients_are_the_same_and_less_is_kept(case: str, tmp_path: Path) -> None:
    make_family(case, tmp_path)
    exact, most = gradients(tmp_path, "none")
    selective, less = gradients(tmp_path, "selective")
    full, least = gradients(tmp_path, "full")
    assert exact.norm() > 0
    for again in (selective, full):
        assert (again - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert less < 0.9 * most
    assert least < 0.1 * most
