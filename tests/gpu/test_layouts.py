"""Two ranks that share a model in any way train what one does, over NCCL; on two GPUs where there are two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learner.config import ParallelConfig
from learner.errors import ConfigError
from learner.model.hf_config import read_shape
from learner.model.layout import check_shape
from tests.gpu.cases import make
from tests.gpu.ranks import LAYOUTS, ROUNDED, make_models
from tests.parallel.layouts import layout
from tests.parallel.processes import run_two
from tests.parallel.test_layouts import assert_same


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_two_ranks_train_what_one_does(name: str, tmp_path: Path) -> None:
    _, trials = LAYOUTS[name]
    make_models(tmp_path, trials)
    run_two("tests.gpu.ranks", tmp_path, name)
    for trial in trials:
        out = tmp_path / trial.id
        figures = [json.loads(out.with_suffix(f".{rank}.json").read_bytes()) for rank in range(2)]
        tensors = load_file(out.with_suffix(".safetensors"))
        alone, expected = trial.run(tmp_path, ParallelConfig())
        print(f"\n{name} {trial.id}: {distances(figures[0], tensors, alone, expected)}", end="")
        for key in (key for key in tensors if key.startswith("weight ")):
            assert torch.equal(tensors[key], expected[key]), key
        if trial.dtype == ROUNDED:
            assert_near(figures, tensors, alone, expected)
        else:
            assert_same(figures, tensors, alone, expected)
    print()


def distances(
    figures: dict, tensors: dict[str, torch.Tensor], alone: dict, expected: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Of the loss, of log-probabilities in the mean, and of all gradients together, relative."""
    pairs = [
        (a, b)
        for mine, theirs in zip(figures["scores"], alone["scores"], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    gradients = [key for key in expected if key.startswith("gradient ")]
    away = sum((tensors[key] - expected[key]).square().sum() for key in gradients)
    size = sum(expected[key].square().sum() for key in gradients)
    return {
        "loss": abs(figures["metrics"]["loss"] - alone["metrics"]["loss"]),
        "scores": sum(abs(a - b) for a, b in pairs) / len(pairs),
        "gradients": float((away / size).sqrt()),
    }


def assert_near(
    figures: list[dict], tensors: dict[str, torch.Tensor], alone: dict, expected: dict[str, torch.Tensor]
) -> None:
    """Apart by what bf16 rounds: a sum in another order, a product in parts."""
    assert figures[1]["metrics"] == figures[0]["metrics"]
    assert figures[0]["metrics"].keys() == alone["metrics"].keys()
    assert tensors.keys() == expected.keys()
    off = distances(figures[0], tensors, alone, expected)
    assert off["loss"] < 0.02
    assert off["scores"] < 0.02
    assert off["gradients"] < 0.06


def test_ranks_do_not_share_a_hybrid(tmp_path: Path) -> None:
    make("nemotron_h", tmp_path)
    shape = read_shape(tmp_path)
    check_shape(ParallelConfig(), shape)
    for parallel in (layout(tensor=2), layout(pipeline=2), layout(context=2)):
        with pytest.raises(ConfigError, match=r"model\.parallel.*nemotron_h"):
            check_shape(parallel, shape)
