"""Reward functions."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module

from actors.errors import RewardError

Reward = Callable[[str, str], tuple[float, dict[str, float]]]


def gsm8k(text: str, answer: str) -> tuple[float, dict[str, float]]:
    found = re.findall(r"####\s*(-?[\d,.]+)", text)
    gold = answer.rpartition("####")[2].strip()
    form = float(bool(found))
    correct = float(bool(found) and found[-1].replace(",", "").rstrip(".") == gold.replace(",", ""))
    return (1.0 if correct else 0.1 * form), {"correct": correct, "format": form}


def load_reward(path: str) -> Reward:
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"rollout.reward: cannot load {path!r}: {error}") from error
