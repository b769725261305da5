"""Arithmetic questions in GSM8K's schema, for the demo.

The demonstrations for the warm-up come from a careless teacher: every other answer is wrong. A model
that learns from them alone is right about half of the time, however long it learns; the reward, which
is computed from the right answers, then has something to teach.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

HELD_OUT_SHARE = 0.2
"""Share of the 900 questions that is never trained on."""
DEMONSTRATIONS = 40
"""Demonstrations of each training question."""
WRONG_SHARE = 0.5
"""Share of the demonstrations whose answer is wrong."""


class DataFiles(NamedTuple):
    """The files of a data set."""

    train: Path
    """Questions with their right answers."""
    held_out: Path
    """Shares no question with `train`."""
    demonstrations: Path
    """The training questions, with answers half of which are wrong."""


def write_arithmetic(folder: Path, *, seed: int) -> DataFiles:
    """Writes `train.jsonl`, `held_out.jsonl` and `demonstrations.jsonl`.

    A line is ``{"question": "47+8=", "answer": "#### 55"}``: a two-digit plus a one-digit number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(seed)
    questions = [(left, right) for left in range(10, 100) for right in range(10)]
    source.shuffle(questions)
    split = int(len(questions) * HELD_OUT_SHARE)
    held_out, train = questions[:split], questions[split:]
    shown = [(*question, _careless(sum(question), source)) for question in train * DEMONSTRATIONS]
    return DataFiles(
        _write(folder / "train.jsonl", ((*question, sum(question)) for question in train)),
        _write(folder / "held_out.jsonl", ((*question, sum(question)) for question in held_out)),
        _write(folder / "demonstrations.jsonl", shown),
    )


def _careless(answer: int, source: random.Random) -> int:
    """The answer, 10 or more, or with probability `WRONG_SHARE` another positive one at most 9 away."""
    if source.random() >= WRONG_SHARE:
        return answer
    return answer + source.choice([*range(-9, 0), *range(1, 10)])


def _write(path: Path, rows: Iterable[tuple[int, int, int]]) -> Path:
    with path.open("w") as file:
        for left, right, answer in rows:
            file.write(json.dumps({"question": f"{left}+{right}=", "answer": f"#### {answer}"}) + "\n")
    return path
