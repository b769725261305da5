"""Checkpoints with the distributed optimizer: a GPU, another layout, and a CPU go on from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from learner.checkpoint.folder import State, complete
from learner.checkpoint.saver import Saver
from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.ranks import Leader, Ranks
from tests.gpu.cases import CASES, make
from tests.gpu.test_kernels import run_dtype
from tests.parallel.rank import six_groups
from tests.parallel.sharded import held, named
from tests.parallel.test_sharded import check

ROOT = Path(__file__).parents[2]


def make_leader(folder: Path, dtype: str) -> Leader:
    model = ModelConfig(path=str(folder), micro_batch_tokens=64, dtype=dtype)
    optimizer = OptimizerConfig(lr=1e-2, eps=1e-2, warmup_steps=0)
    return Leader(Ranks(), folder, model, optimizer, ObjectiveConfig())


@pytest.mark.parametrize("case", list(CASES))
def test_a_trainer_goes_on_from_what_was_copied_while_it_trained(case: str, tmp_path: Path) -> None:
    make(case, tmp_path / "model", rounded=run_dtype(case) != "float32")
    trainer = make_leader(tmp_path / "model", run_dtype(case))
    for _ in range(2):
        trainer.train_step(six_groups(), trainer.version)
    then, kept = named(trainer), trainer.snapshot()
    state = State(2, "d", "d", 1, 0, msgspec.Raw(b"{}"), trainer.optimizer_steps())
    with Saver(tmp_path / "saved") as saver:
        trainer.begin_checkpoint(saver, tmp_path / "saved", state)
        trainer.train_step(six_groups(), 2)
        written = saver.wait()
    assert written is not None
    assert not written.error, written.error
    assert trainer.optimizer_steps() == 3
    again = make_leader(tmp_path / "model", run_dtype(case))
    again.load_checkpoint(complete(tmp_path / "saved")[0].path)
    assert again.optimizer_steps() == again.version == 2
    assert_equal(named(again), then)
    again.train_step(six_groups(), 2)
    assert_close(again.export(), trainer.export())
    trainer.restore(kept)
    assert trainer.optimizer_steps() == 2
    assert_equal(named(trainer), then)
    trainer.train_step(six_groups(), 2)
    assert_close(trainer.export(), again.export())


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """A GPU adds in an order of its own each time."""
    for key, tensor in expected.items():
        assert (found[key] - tensor).float().abs().max() <= 1e-2 * tensor.float().abs().max(), key


@pytest.mark.parametrize(
    ("case", "dtype"), [("qwen3_moe", "float32"), ("qwen3_moe", "bfloat16"), ("qwen3_next", "bfloat16")]
)
def test_two_ranks_save_what_any_layout_and_a_cpu_load(case: str, dtype: str, tmp_path: Path) -> None:
    make(case, tmp_path / "model", rounded=dtype == "bfloat16")
    check(tmp_path, dtype, ["DP 2 EP 2", "TP 2", "PP 2"], exact=False)
    out = tmp_path / "cpu.safetensors"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.gpu.steps", "--read", str(tmp_path), dtype, str(out)],
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"},
        cwd=ROOT,
    )
    assert_equal(load_file(out), held(tmp_path, dtype, 0))
