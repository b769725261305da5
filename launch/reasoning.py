"""Questions of reasoning-gym's tasks, made by its generators, in our schema."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from launch.errors import LaunchError

HELD_OUT_SHARE = 0.2
"""Share of the different questions that is never trained on."""


def write_reasoning(task: str, folder: Path, *, size: int, seed: int) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `held_out.jsonl`, which share no question, of `size` generated ones.

    A line is ``{"question": ..., "answer": ...}``. The answer is JSON: ``{"task": ..., "entry": ...}``, the
    latter reasoning-gym's whole entry as a Python literal, since its scorers tell tuples from lists and
    numbers from texts as keys, which JSON does not. Raises `LaunchError` for a task that is unknown, needs
    settings, cannot be written so, or has fewer than two different questions.
    """
    if size < 2:
        raise LaunchError(f"--size: got {size}, expected 2 or more")
    rows = {entry["question"]: _row(task, entry) for entry in _dataset(task, size, seed)}
    if len(rows) < 2:
        raise LaunchError(
            f"--reasoning-gym {task}: {len(rows)} different questions among {size}; raise --size"
        )
    lines = list(rows.values())
    split = max(1, int(len(lines) * HELD_OUT_SHARE))
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    train.write_text("".join(lines[split:]))
    held_out.write_text("".join(lines[:split]))
    return train, held_out


def _dataset(task: str, size: int, seed: int) -> Any:
    """The task's generator with its own settings."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise LaunchError(f"--reasoning-gym: {error}; install the extra: slipstream[environments]") from error
    if task not in DATASETS:
        raise LaunchError(f"--reasoning-gym: got {task!r}, expected one of {', '.join(sorted(DATASETS))}")
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed)
    except (AssertionError, TypeError) as error:
        raise LaunchError(f"--reasoning-gym: {task} cannot be made with its own settings: {error}") from error


def _row(task: str, entry: dict[str, Any]) -> str:
    """A line of the file. Raises `LaunchError` for an entry that would not come back as it is."""
    written = repr(entry)
    try:
        same = ast.literal_eval(written) == entry
    except (SyntaxError, ValueError):
        same = False
    if not same:
        raise LaunchError(
            f"--reasoning-gym: {task} keeps objects in its entries, expected plain values; take another task"
        )
    answer = json.dumps({"task": task, "entry": written})
    return json.dumps({"question": entry["question"], "answer": answer}) + "\n"
