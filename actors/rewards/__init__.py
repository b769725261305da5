"""Reward functions: the text of an answer and the gold answer of its data row, to a number.

A reward function takes (text, gold answer) and returns a finite number, or a pair of it and its named
parts. What ships is named here, `actors.rewards:<name>`; docs/rewards.md says what each does.
"""

from __future__ import annotations

from typing import Any

from actors.rewards.choice import multiple_choice
from actors.rewards.form import boxed, brevity, overlong, tagged
from actors.rewards.gsm8k import gsm8k
from actors.rewards.mathematics import math_exact

__all__ = ["boxed", "brevity", "gsm8k", "math_exact", "multiple_choice", "overlong", "tagged"]


def __getattr__(name: str) -> Any:
    """`math_verify` and `reasoning_gym`, imported when asked for: extras, slow to import."""
    if name == "math_verify":
        from actors.rewards.verify import math_verify

        return math_verify
    if name == "reasoning_gym":
        from actors.rewards.reasoning import reasoning_gym

        return reasoning_gym
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
