"""Ranks that share a model in any way train what one process trains: losses, gradients, clipping, weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learner.config import ParallelConfig
from learner.convert.hf import HfFolder
from tests.parallel.layouts import OBJECTIVES, PLANS, Trial, make_checkpoints, trials
from tests.parallel.rank import train

ROOT = Path(__file__).parents[2]
ALL = [(size, trial) for size in PLANS for trial in trials(size)]
TRIALS = [pytest.param(size, trial, id=trial.id) for size, trial in ALL if trial.dtype == "float32"]
BF16 = [pytest.param(size, trial, id=trial.id) for size, trial in ALL if trial.dtype == "bfloat16"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the ranks have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parallel")
    make_checkpoints(path)
    return path


class Worlds:
    """What each world size wrote; its processes are started when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._done = folder, set[int]()
        self._alone: dict[tuple[str, str], tuple[dict, dict]] = {}

    def of(self, size: int, trial: Trial) -> tuple[list[dict], dict[str, torch.Tensor]]:
        """Figures of all ranks, and the tensors of rank 0."""
        if size not in self._done:
            self._done.add(size)
            start(self.folder, size)
        out = self.folder / trial.id
        figures = [json.loads(out.with_suffix(f".{rank}.json").read_bytes()) for rank in range(size)]
        return figures, load_file(out.with_suffix(".safetensors"))

    def alone(self, trial: Trial) -> tuple[dict, dict[str, torch.Tensor]]:
        """The same from this process."""
        key = trial.case, trial.kind
        if key not in self._alone:
            objective = OBJECTIVES[trial.kind]
            self._alone[key] = train(
                self.folder / trial.case, ParallelConfig(), objective, trial.all_calls, trial.dtype
            )
        return self._alone[key]


@pytest.fixture(scope="module")
def worlds(folder: Path) -> Worlds:
    return Worlds(folder)


def start(folder: Path, size: int) -> None:
    """Run a world's ranks to their end."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.rank", str(rank), str(size), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=300)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(said)[-5000:]


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the tensor's largest value."""
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("size", "trial"), TRIALS)
def test_ranks_train_what_one_process_does(worlds: Worlds, size: int, trial: Trial) -> None:
    assert_same(*worlds.of(size, trial), *worlds.alone(trial))


def assert_same(
    figures: list[dict], tensors: dict[str, torch.Tensor], alone: dict, expected: dict[str, torch.Tensor]
) -> None:
    """Every rank reports the same, which is what one process does; and so are rank 0's gradients."""
    assert all(other == figures[0] for other in figures[1:])
    got, wanted = figures[0]["metrics"], alone["metrics"]
    assert got.keys() == wanted.keys()
    for metric, value in wanted.items():
        assert got[metric] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)), metric
    assert got["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
    for mine, theirs in zip(figures[0]["scores"], alone["scores"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert figures[0].get("answers") == alone.get("answers")
    assert figures[0].get("losses", []) == pytest.approx(alone.get("losses", []), abs=1e-4)
    assert tensors.keys() == expected.keys()
    worst = {name: off(tensor, expected[name]) for name, tensor in tensors.items() if name.startswith("grad")}
    assert max(worst.values()) < 1e-4, max(worst, key=worst.get)
    print(f"\ngradients {max(worst.values()):.1e}, loss {abs(got['loss'] - wanted['loss']):.1e}")


@pytest.mark.parametrize(("size", "trial"), TRIALS)
def test_what_was_loaded_onto_ranks_comes_back_bit_by_bit(worlds: Worlds, size: int, trial: Trial) -> None:
    _, tensors = worlds.of(size, trial)
    stored = HfFolder(worlds.folder / trial.case)
    exported = {name.removeprefix("weight "): t for name, t in tensors.items() if name.startswith("weight ")}
    assert exported.keys() == {name for name in stored.shapes if not name.startswith("mtp.")}
    for name, tensor in exported.items():
        assert torch.equal(tensor, stored.tensor(name)), name


@pytest.mark.parametrize(("size", "trial"), BF16)
def test_bf16_weights_are_put_together_in_their_own_dtypes(worlds: Worlds, size: int, trial: Trial) -> None:
    tensors, expected = worlds.of(size, trial)[1], worlds.alone(trial)[1]
    weights = {name: tensor for name, tensor in expected.items() if name.startswith("weight ")}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16, torch.float32}
    for name, tensor in weights.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name
