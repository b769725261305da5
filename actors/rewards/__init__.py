"""Reward functions: the text of an answer and the gold answer of its data row, to a number.

A reward function takes (text, gold answer) and returns a finite number, or a pair of it and its named
parts. What ships is named here, `actors.rewards:<name>`; docs/rewards.md says what each does.
"""

from actors.rewards.choice import multiple_choice
from actors.rewards.form import boxed, brevity, overlong, tagged
from actors.rewards.gsm8k import gsm8k
from actors.rewards.mathematics import math_exact, math_verify

__all__ = ["boxed", "brevity", "gsm8k", "math_exact", "math_verify", "multiple_choice", "overlong", "tagged"]
