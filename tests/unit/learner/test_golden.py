"""Twenty steps on a fixed record give the curve of when it was made: nothing has changed by the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from buffer.codec import decode
from tests.unit.learner.golden import FIGURES, STEPS, make, read

TOLERANCE = 1e-3
"""Relative to every figure's largest value on the curve. Where the file was made all are equal bit for bit;
another instruction set differs in the last bits, which 20 steps of Adam spread."""


def test_the_curve_is_the_golden_one(tmp_path: Path) -> None:
    trainer, steps = make(tmp_path), read()
    found = []
    for number, step in enumerate(steps):
        metrics = trainer.train_step([decode(record) for record in step.groups], number)
        found.append([metrics[name] or 0.0 for name in FIGURES])
    expected = np.array([step.figures for step in steps])
    assert len(steps) == STEPS
    scale = np.abs(expected).max(axis=0)
    assert (scale > 0).all()
    worst = np.abs(np.array(found) - expected).max(axis=0) / scale
    assert (worst < TOLERANCE).all(), dict(zip(FIGURES, worst, strict=True))
