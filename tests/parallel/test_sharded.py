"""What the distributed optimizer holds on each rank makes a checkpoint that any layout goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.parallel.processes import run_two
from tests.parallel.rank import six_groups
from tests.parallel.sharded import held, make_trainer, named
from tests.unit.learner.families import make_family


def check(folder: Path, dtype: str, layouts: Sequence[str], exact: bool = True) -> None:
    """Trains and saves in the first layout, goes on in all, compares; `exact`: steps repeat bit by bit."""
    run_two("tests.parallel.sharded", folder, dtype, *layouts)
    alone = make_trainer(folder, dtype)
    for _ in range(2):
        alone.train_step(six_groups(), alone.version)
    right, saved = named(alone), held(folder, dtype, 0)
    assert saved.keys() == right.keys()
    kinds = {"exp_avg", "exp_avg_sq"} | ({"fp32_param"} if dtype == "bfloat16" else set())
    assert {key.split(".")[2] for key in saved if key.startswith("optimizer.state.")} == kinds
    limit = 1e-3 if dtype == "float32" else 0.02
    for key, tensor in saved.items():
        away = (tensor.float() - right[key].float()).norm() / right[key].float().norm().clamp(min=1e-9)
        rounded = dtype == "bfloat16" and ".exp_avg" in key  # gradients of bf16, and their squares
        assert away < (0.15 if rounded else limit), key
    for number in range(1, len(layouts)):
        other = held(folder, dtype, number)
        assert all(torch.equal(other[key], tensor) for key, tensor in saved.items()), layouts[number]
    ends = [load_file(folder / f"{name}.safetensors") for name in ("again", *range(len(layouts)))]
    for name, end in zip(layouts, ends[1:], strict=True):
        for key, tensor in ends[0].items():
            if exact and name == layouts[0]:
                assert torch.equal(end[key], tensor), f"{name} {key}"
            else:
                assert (end[key] - tensor).float().abs().max() <= limit * tensor.float().abs().max(), key


def test_every_layout_goes_on_from_a_sharded_optimizer(tmp_path: Path) -> None:
    """In bf16, whose optimizer holds fp32 weights of most parameters and is mixed with fp32 gates.

    Every expert is chosen, so that no rounding decides where a token goes.
    """
    experts = {"num_experts": 4, "num_experts_per_tok": 4}
    make_family("qwen3_next", tmp_path / "model", num_key_value_heads=4, **experts)
    check(tmp_path, "bfloat16", ["DP 2 EP 2", "TP 2"])
