"""Scoring under weights that lie in folders, which may be gone by the time they are read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from learner.config import ModelConfig
from learner.errors import ModelError
from learner.rescore import Job, Wanted, rescore

SEQUENCES = [[3, 1, 4, 1, 5], [9, 2, 6]]


def logs_of(model: torch.nn.Module, sequence: list[int]) -> np.ndarray:
    tokens = torch.tensor([sequence])
    with torch.no_grad():
        return model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].numpy()


def test_each_folder_scores_by_its_own_weights_and_one_that_is_gone_is_null(
    make_checkpoint: Callable, tmp_path: Path
) -> None:
    (first, theirs), (second, others) = make_checkpoint(seed=0), make_checkpoint(seed=1)
    broken = shutil.copytree(second, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    folders = [first, tmp_path / "gone", broken, second]
    job = Job(ModelConfig(path=str(first)), [Wanted(str(folder), SEQUENCES) for folder in folders])
    command = [sys.executable, "-W", "ignore", "-m", "learner.rescore"]
    done = subprocess.run(command, input=msgspec.json.encode(job), capture_output=True, check=True)
    found = msgspec.json.decode(done.stdout.splitlines()[-1], type=list[list[list[float]] | None])
    assert found[1:3] == [None, None]
    for scores, model in ((found[0], theirs), (found[3], others)):
        assert scores is not None
        for got, sequence in zip(scores, SEQUENCES, strict=True):
            np.testing.assert_allclose(got, logs_of(model, sequence), atol=1e-5)


def test_a_model_that_cannot_be_built_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json: no such file"):
        rescore(Job(ModelConfig(path=str(tmp_path)), []))
