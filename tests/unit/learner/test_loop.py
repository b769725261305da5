"""What a step is said to have spent, by a clock that only the parts of the step move."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from learner import loop as module
from learner.loop import Loop
from weightsync.manifest import Manifest


class Clock:
    """Seconds, which pass in the calls made by `taking` alone."""

    def __init__(self) -> None:
        self.now = 100.0

    def time(self) -> float:
        return self.now

    def taking(self, seconds: float, answer: Any = None) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            self.now += seconds
            return answer

        return call


def test_each_wait_of_a_step_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rows = Clock(), list[dict[str, float]]()
    weights = {"w": torch.ones(2)}
    committed = SimpleNamespace(digest=Manifest.of(1, weights).digest)
    trainer = SimpleNamespace(
        version=1, train_step=clock.taking(5.0, {"tokens": 8.0}), export=clock.taking(1.0, weights)
    )
    session = SimpleNamespace(version=1, commit=clock.taking(2.0, committed))
    offers = SimpleNamespace(publish=clock.taking(0), push_seconds=dict, export_s=0.25, held_bytes=lambda: 16)
    checkpoints = SimpleNamespace(after_step=clock.taking(7.0), stalled_s=7.0, saving_s=30.0)
    record = SimpleNamespace(trained=clock.taking(0), generated=clock.taking(0), step=rows.append)
    monkeypatch.setattr(module, "time", clock)
    made: Any = Loop
    run = made(
        trainer,
        session,
        offers,
        record,
        None,
        checkpoints,
        None,
        SimpleNamespace(put=clock.taking(0)),
        max_steps=2,
        mismatch=1.0,
        stop=lambda: None,
    )
    run._training_since = 100.0
    run._step(SimpleNamespace(step=0, queued=3, waited_s=0.5, fetched_s=0.25), [])
    (row,) = rows
    spent = {name: row[f"seconds_{name}"] for name in ("wait", "fetch", "publish", "checkpoint", "saving")}
    assert spent == {"wait": 0.5, "fetch": 0.25, "publish": 3.0, "checkpoint": 7.0, "saving": 30.0}
    assert (row["time_batch"], row["time"], row["tokens_per_second"]) == (99.5, 115.0, 8 / 15)
