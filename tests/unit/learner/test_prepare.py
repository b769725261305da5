"""A batch made ready ahead trains as one that was not, and leaves nothing of it to the step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from buffer.schema import Group
from learner.config import ModelConfig, ObjectiveConfig
from learner.errors import BatchError
from learner.step import Trainer
from tests.unit.learner.test_step import QUICK, batch_of, digest


@pytest.fixture
def folder(make_checkpoint: Callable[..., Any]) -> Path:
    return make_checkpoint()[0]


def make_trainer(folder: Path, **objective: Any) -> Trainer:
    model = ModelConfig(path=str(folder), micro_batch_tokens=64)
    return Trainer(folder, model, QUICK, ObjectiveConfig(**objective), seed=3)


def in_a_thread(trainer: Trainer, groups: list[Group], step: int) -> None:
    thread = threading.Thread(target=trainer.prepare, args=(groups, step))
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    "objective",
    [{}, {"mini_batches": 2}, {"overlong": "penalty", "overlong_length": 9, "overlong_ramp": 4}],
    ids=["plain", "mini-batches", "penalty"],
)
def test_the_same_bits(folder: Path, objective: dict[str, Any]) -> None:
    digests, figures = [], []
    for ahead in (False, True):
        trainer = make_trainer(folder, **objective)
        for step in range(3):
            if ahead:
                in_a_thread(trainer, batch_of(step)[::-1], step)
            metrics = trainer.train_step(batch_of(step), step)
        digests.append(digest(trainer))
        figures.append(
            {name: value for name, value in metrics.items() if not name.startswith(("seconds", "tflops"))}
        )
    assert digests[0] == digests[1]
    assert figures[0] == figures[1]


def unable(*_: Any, **__: Any) -> Any:
    raise AssertionError("the step packs")


def test_nothing_of_it_is_left_to_the_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(folder)
    for step in range(2):  # the next batch is made ready before this one trains
        trainer.prepare(batch_of(step)[::-1], step)
    monkeypatch.setattr(trainer, "_fit", unable)
    for step in range(2):
        trainer.train_step(batch_of(step), step)
    with pytest.raises(AssertionError, match="the step packs"):
        trainer.train_step(batch_of(2), 2)


def test_what_was_made_of_other_groups_is_not_trained(folder: Path) -> None:
    """One was struck since; or a fork put another batch in its place."""
    digests = []
    for ahead in (batch_of(0)[1:], batch_of(0), batch_of(5)):
        trainer = make_trainer(folder)
        trainer.prepare(ahead, 0)
        trainer.train_step(batch_of(0)[1:], 0)
        digests.append(digest(trainer))
    assert digests[0] == digests[1] == digests[2]


def test_old_batches_are_let_go(folder: Path) -> None:
    trainer = make_trainer(folder)
    for step in (0, 0, 1):
        trainer.prepare(batch_of(step), step)
    trainer.train_step(batch_of(0), 0)
    assert trainer._preparation._made.keys() == {1}
    trainer.train_step(batch_of(1), 1)
    assert not trainer._preparation._made


def test_a_batch_that_cannot_be_trained_is_refused_ahead(tmp_path: Path) -> None:
    from tests.unit.learner.families import make_family

    make_family("qwen3_moe", tmp_path)
    trainer = make_trainer(tmp_path, routing_replay=True)
    with pytest.raises(BatchError, match="routed experts: got none"):
        trainer.prepare(batch_of(0), 0)
