"""Arithmetic questions in GSM8K's schema, for the demo."""

from __future__ import annotations

import json
import random
from pathlib import Path

HELD_OUT_SHARE = 0.2


def write_arithmetic(folder: Path, *, seed: int) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `held_out.jsonl`, which share no question; their paths.

    A line is ``{"question": "47+8=", "answer": "#### 55"}``: a two-digit plus a one-digit number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question": f"{left}+{right}=", "answer": f"#### {left + right}"}
        for left in range(10, 100)
        for right in range(10)
    ]
    random.Random(seed).shuffle(rows)
    split = int(len(rows) * HELD_OUT_SHARE)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, part in zip(paths, (rows[split:], rows[:split]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    return paths
