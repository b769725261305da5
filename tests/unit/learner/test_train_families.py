"""The trainer's ordinary path on every kind of layer: it learns, exactly and reproducibly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.step import Trainer
from tests.unit.learner.families import make_family
from tests.unit.learner.test_step import batch_of, digest

KINDS = ("qwen3_next", "qwen3_moe", "deepseek_v3")


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make_family(request.param, tmp_path / "in")
    return tmp_path / "in"


def make_trainer(folder: Path, tokens: int = 64) -> Trainer:
    model = ModelConfig(path=str(folder), micro_batch_tokens=tokens)
    return Trainer(folder, model, OptimizerConfig(lr=1e-2, warmup_steps=0), ObjectiveConfig())


def test_steps_on_packed_rows_repeat_bit_by_bit_and_change_every_weight(folder: Path) -> None:
    digests = []
    for turn in (1, -1):
        trainer = make_trainer(folder)
        before = trainer.export()
        for step in range(3):
            metrics = trainer.train_step(batch_of(step)[::turn], step)
            assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
            assert metrics["grad_norm"] > 0
            assert metrics["skipped"] == 0
            assert metrics["micro_batches"] < metrics["samples"]
        digests.append(digest(trainer))
    assert digests[0] == digests[1]
    same = [name for name, tensor in trainer.export().items() if tensor.equal(before[name])]
    assert all(name.endswith("e_score_correction_bias") for name in same)  # chooses, is never trained


def test_micro_batches_do_not_change_the_gradient(folder: Path) -> None:
    norms = [make_trainer(folder, tokens).train_step(batch_of(0), 0)["grad_norm"] for tokens in (1, 64, 9999)]
    np.testing.assert_allclose(norms, norms[0], rtol=1e-4)


def test_the_loss_falls_and_a_snapshot_brings_it_back(folder: Path) -> None:
    trainer = make_trainer(folder)
    samples = [([1, 2, value], [value, 5, 0]) for value in range(8, 40)]
    start = trainer.snapshot()
    losses = [trainer.sft_step(samples, lr=1e-2)["loss"] for _ in range(15)]
    assert losses[-1] < 0.6 * losses[0]
    trainer.restore(start)
    assert trainer.sft_step(samples, lr=1e-2)["loss"] == losses[0]


def test_what_was_trained_is_what_transformers_loads(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(folder)
    trainer.train_step(batch_of(0), 0)
    trainer.save(tmp_path / "out")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values())
    sequence = list(range(40))
    tokens = torch.tensor([sequence])
    with torch.no_grad():
        logs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    np.testing.assert_allclose(trainer.score([sequence])[0], logs.numpy(), atol=1e-4)
