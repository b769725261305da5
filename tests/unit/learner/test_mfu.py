"""Model FLOPs utilisation against counts by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.flops import Cost
from learner.mfu import PEAKS, Utilisation, peak_tflops
from learner.model.hf_config import read_shape
from learner.packing import pack, row_of_tokens
from learner.step import Trainer
from tests.unit.learner.families import make_family
from tests.unit.learner.groups import make_group


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_card_is_known_by_its_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_a_share_is_the_share_of_all_ranks() -> None:
    use = Utilisation(Cost(1, 1, 1), peak=100.0, ranks=4)
    assert use.figures(8e14, 4.0) == {"tflops": 50.0, "mfu": 0.5}
    assert Utilisation(Cost(1, 1, 1), None, 4).figures(8e14, 4.0) == {"tflops": 50.0, "mfu": None}
    assert Utilisation(None, 100.0, 4).figures(0.0, 4.0) == {"tflops": None, "mfu": None}


def test_padding_and_context_parallelism_cost_nothing() -> None:
    """5 and 3 fed tokens, of which 4 and 1 predict; 6 (3 T + 7 T^2 / 2 + 11 n) each."""
    use = Utilisation(Cost(token=3, pair=7, target=11), None, 1)
    rows = [row_of_tokens([1] * 6, 2), row_of_tokens([1] * 4, 3)]
    expected = 6 * (3 * 8 + 7 * (25 + 9) / 2 + 11 * 5)
    for context, tensor, count in ((1, 1, None), (2, 2, 4)):
        batches = pack(rows, 100, context=context, tensor=tensor, count=count)
        assert sum(map(use.flops, batches)) == expected


def test_a_dense_model_by_hand(tmp_path: Path) -> None:
    """Two layers of width 32 with 4 heads of 16 and 2 groups, MLPs of 56, a vocabulary of 48."""
    make_family("qwen3", tmp_path)
    shape = read_shape(tmp_path)
    assert (shape.hidden_size, shape.dense_width, shape.vocab_size) == (32, 56, 48)
    layer = 32 * 16 * (4 + 2 + 2) + 4 * 16 * 32 + 3 * 32 * 56
    model = ModelConfig(path=str(tmp_path), micro_batch_tokens=50)
    trainer = Trainer(tmp_path, model, OptimizerConfig(), ObjectiveConfig(mini_batches=2))
    groups = [make_group(index) for index in range(6)]
    samples = [sample for group in groups for sample in group.samples]
    fed = [len(sample.tokens) - 1 for sample in samples]
    pairs = sum(2 * 2 * 4 * 16 * tokens**2 / 2 for tokens in fed)
    flops = 6 * (2 * layer * sum(fed) + pairs + 32 * 48 * sum(s.answer_length for s in samples))
    metrics = trainer.train_step(groups, 0)
    assert metrics["tflops"] == pytest.approx(flops / metrics["seconds"] / 1e12, rel=1e-9)
    assert metrics["mfu"] is None


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)


def test_what_can_be_said_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_family("qwen3", tmp_path)
    shape, bf16 = read_shape(tmp_path), ModelConfig(path="", dtype="bfloat16")
    on_a_gpu(monkeypatch, "NVIDIA H200")
    assert (Utilisation.of(bf16, shape).peak, Utilisation.of(bf16, shape).ranks) == (PEAKS["H200"], 8)
    assert Utilisation.of(ModelConfig(path=""), shape).peak is None, "the table is for bf16"
    told = ModelConfig(path="", peak_tflops=67.0)
    assert Utilisation.of(told, shape).peak == 67.0
    on_a_gpu(monkeypatch, "NVIDIA GB999")
    assert Utilisation.of(bf16, shape).peak is None
