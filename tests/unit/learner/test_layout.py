"""Layouts that a model or a world cannot have are refused by name, before any rank waits for another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from learner.errors import ConfigError
from learner.model.context import owners, places, positions
from learner.model.hf_config import read_shape
from learner.model.layout import check_shape, stage_layers
from learner.model.world import join_world
from learner.step import Trainer
from tests.unit.learner.families import make_family


@pytest.mark.parametrize(
    ("case", "sizes", "said"),
    [
        (
            "qwen3",
            {"tensor": 5},
            "tensor: got 5, which does not divide the model's 48 rows of the vocabulary",
        ),
        ("qwen3", {"tensor": 3}, "tensor: got 3, which does not divide the model's 4 attention heads"),
        ("qwen3", {"tensor": 4}, "tensor: got 4, which does not divide the model's 2 key-value heads"),
        ("qwen3", {"pipeline": 3}, "pipeline: got 3, which does not divide the model's 2 layers"),
        ("qwen3", {"expert": 2}, "expert: got 2 with a qwen3 model, which has no experts"),
        ("qwen3_moe", {"expert": 3}, "expert: got 3, which does not divide the model's 8 experts"),
        ("qwen3_moe", {"expert_tensor": 5}, "expert_tensor: got 5, which does not divide the model's 24 col"),
        (
            "qwen3_next",
            {"context": 4},
            "tensor x context: got 4, which does not divide the model's 2 key heads",
        ),
        ("deepseek_v3", {"tensor": 8}, "tensor: got 8, which does not divide the model's 4 attention heads"),
    ],
)
def test_what_ranks_cannot_share_is_refused(case: str, sizes: dict, said: str, tmp_path: Path) -> None:
    make_family(case, tmp_path)
    with pytest.raises(ConfigError, match=f"model.parallel.{said}"):
        check_shape(ParallelConfig(**sizes), read_shape(tmp_path))
    check_shape(ParallelConfig(), read_shape(tmp_path))


@pytest.mark.parametrize(
    ("sizes", "size", "said"),
    [
        (
            {"tensor": 2, "pipeline": 2},
            6,
            "tensor 2 x pipeline 2 x context 1 = 4 ranks for a copy of the model",
        ),
        ({"expert": 4}, 2, "expert 4 x expert_tensor 1 x pipeline 1 = 4 ranks for a copy of its experts"),
    ],
)
def test_a_world_that_does_not_divide_up_is_refused(sizes: dict, size: int, said: str) -> None:
    with pytest.raises(ConfigError, match=f"{said}, which does not divide the {size} ranks"):
        join_world(size=size, parallel=ParallelConfig(**sizes))


def test_the_interleaved_schedule_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ConfigError, match=r"virtual_pipeline: got 2, expected 1: .* another micro-batch's length"
    ):
        ParallelConfig(pipeline=2, virtual_pipeline=2)


def test_a_trainer_refuses_a_world_with_other_sizes(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    model = ModelConfig(path=str(folder), parallel=ParallelConfig(tensor=2))
    with pytest.raises(ConfigError, match=r"parallel: got .*tensor=2.* joined with .*tensor=1"):
        Trainer(folder, model, OptimizerConfig(), ObjectiveConfig())


def test_stages_have_consecutive_layers(tmp_path: Path) -> None:
    make_family("qwen3_next", tmp_path)
    shape, parallel = read_shape(tmp_path), ParallelConfig(pipeline=2)
    assert [list(stage_layers(shape, parallel, stage)) for stage in (0, 1)] == [[0, 1], [2, 3]]


def test_context_parallel_ranks_hold_a_piece_from_either_end() -> None:
    bounds = torch.tensor([0, 4, 12], dtype=torch.int32)
    assert positions(bounds).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    owner = owners(bounds, 2)
    assert owner.tolist() == [0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    laid = torch.cat([torch.arange(12)[owner == rank] for rank in (0, 1)])
    assert laid[places(owner, 2)].tolist() == list(range(12))
