"""The estimate of a sequence's cost against the products that the model really computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.flops import Cost, cost_of
from learner.model.forward import target_logits
from learner.model.hf_config import read_shape
from learner.packing import pack, row_of_tokens
from learner.step import Trainer
from tests.unit.learner.families import CASES, make_family


def products(folder: Path, length: int) -> int:
    """Multiply-adds in the linear layers of one forward pass over a sequence of `length` fed tokens."""
    model = ModelConfig(path=str(folder), micro_batch_tokens=length)
    trainer = Trainer(folder, model, OptimizerConfig(), ObjectiveConfig())
    (batch,) = pack([row_of_tokens([1] * (length + 1), length)], length)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        target_logits(trainer._model, batch)
    return counter.get_flop_counts()["Global"][torch.ops.aten.mm] // 2


@pytest.mark.parametrize("case", list(CASES))
def test_linear_layers_are_counted_to_the_unit(case: str, tmp_path: Path) -> None:
    make_family(case, tmp_path)
    shape = read_shape(tmp_path)
    cost, recurrent = cost_of(shape), 0
    if shape.delta_net is not None:  # the convolution and the state are no products with weights
        delta, count = shape.delta_net, sum(layer.delta_net for layer in shape.layers)
        keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
        recurrent = count * (delta.kernel * (2 * keys + values) + 3 * delta.key_dim * values)
    for length in (10, 70):
        assert products(tmp_path, length) == (cost.token - recurrent) * length + cost.target


def test_attention_is_paid_by_the_pair(tmp_path: Path) -> None:
    make_family("qwen3", tmp_path)
    heads, width, layers = 4, 16, 2
    assert cost_of(read_shape(tmp_path)).pair == layers * 2 * heads * width
    make_family("moonlight", tmp_path)
    assert cost_of(read_shape(tmp_path)).pair == layers * heads * (12 + 8 + 10)


def test_a_backward_pass_costs_two_forward_passes() -> None:
    cost = Cost(token=5, pair=2, target=7)
    got = cost.flops(np.array([1, 10]), np.array([1, 3]))
    assert got.tolist() == [6 * (5 + 1 + 7), 6 * (50 + 100 + 21)]
