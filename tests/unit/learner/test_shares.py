"""Two data-parallel ranks over gloo train what one process trains: denominators, statistics, figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from learner.config import KlConfig, ModelConfig, ObjectiveConfig
from learner.step import Trainer
from tests.unit.learner.test_step import QUICK, batch_of

SPLIT = 4
"""Groups of rank 0 in a batch of 6: unequal shares, so that a local mean would show."""

BUDGETS = (64, 1)
"""Tokens in a micro-batch of each configuration; with 1 each sample has its own, and rank 1 too few."""

RANK = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
torch.set_num_threads(1)
from pathlib import Path
from learner.model.build import build_model
from learner.model.world import join_world
from tests.parallel.processes import leave
from tests.unit.learner.test_shares import BUDGETS, SPLIT, train
rank, store, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
join_world(dist.FileStore(store, 2), rank, 2)
share = slice(None, SPLIT) if rank == 0 else slice(SPLIT, None)
print(json.dumps([train(folder, number, share) for number in range(len(BUDGETS))]))
leave()
"""


def configs() -> list[ObjectiveConfig]:
    return [
        ObjectiveConfig(advantage="reinforce_pp", kl=KlConfig(coefficient=0.1)),
        ObjectiveConfig(aggregation="sequence_mean", mini_batches=2, correction="vtrace"),
    ]


def batch(step: int) -> list:
    """Six groups; rank 1 sees a staleness and a part of the reward that rank 0 does not."""
    groups = batch_of(step)
    for sample in groups[5].samples:
        sample.rewards = {"format": 1.0}
    groups[5].versions[0] = type(groups[5].versions[0])(0, "00")
    return groups


def train(folder: Path, number: int, share: slice) -> list[dict[str, float | None]]:
    model = ModelConfig(path=str(folder), micro_batch_tokens=BUDGETS[number])
    trainer = Trainer(folder, model, QUICK, configs()[number])
    found = [trainer.train_step(batch(step)[share], step) for step in range(3)]
    return [
        {k: v for k, v in metrics.items() if not k.startswith(("seconds", "tflops"))} for metrics in found
    ]


@pytest.fixture(scope="module")
def ranks(make_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    folder, _ = make_checkpoint()
    store = tmp_path_factory.mktemp("store") / "store"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(store), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[3],
        )
        for rank in range(2)
    ]
    try:
        answers = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], answers
    return folder, [json.loads(out.splitlines()[-1]) for out, _ in answers]


@pytest.mark.parametrize("number", [0, 1], ids=["reinforce_pp-kl", "sequence_mean-vtrace"])
def test_two_ranks_report_what_one_process_does(ranks: tuple[Path, list], number: int) -> None:
    folder, found = ranks
    whole = train(folder, number, slice(None))
    assert found[0][number] == found[1][number]
    for step, expected in enumerate(whole):
        got = found[0][number][step]
        assert got.keys() == expected.keys()
        # Rank 0 has more groups than rank 1, which (above) has its count of micro-batches.
        assert expected.pop("micro_batches") >= got.pop("micro_batches") > 1
        for name, value in expected.items():
            assert got[name] == (None if value is None else pytest.approx(value, rel=2e-3, abs=2e-5)), (
                step,
                name,
            )
    assert whole[1]["reward/format"] == 1.0
