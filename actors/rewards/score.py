"""The worker's side of rewards: the configured functions and their weighted sum."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import msgspec

from actors.config import RewardPart
from actors.errors import LoadError, RewardError
from actors.loading import Caller, find

FIELD = "rollout.reward"
"""Where the configuration names reward functions."""

Value = tuple[float, dict[str, float]]
"""A reward and its named parts before weighting."""


def scorer(reward: str | dict[str, Any]) -> Callable[[str, str, int], Value]:
    """What `rollout.reward` names, as one function of (text, gold answer, answer tokens).

    One function: its value and its parts. Several by name: the sum of weight times value, and each value
    under its name, each part under `name.part`. Raises `LoadError` for a function that cannot be found
    or cannot be called so; the scorer itself raises `RewardError` for a result that is no reward.
    """
    caller = Caller()
    if isinstance(reward, str):
        alone = Function(FIELD, RewardPart(function=reward), caller)
        return alone.value
    parts = msgspec.convert(reward, dict[str, RewardPart])
    functions = {name: Function(f"{FIELD}.{name}", part, caller) for name, part in parts.items()}

    def weighted(text: str, answer: str, tokens: int) -> Value:
        total, named = 0.0, dict[str, float]()
        for name, function in functions.items():
            value, parts = function.value(text, answer, tokens)
            total += function.weight * value
            named |= {name: value} | {f"{name}.{part}": number for part, number in parts.items()}
        return total, named

    return weighted


class Function:
    """One reward function with its arguments, checked before the first answer."""

    def __init__(self, field: str, part: RewardPart, caller: Caller) -> None:
        self.weight = part.weight
        """What its value counts in the sum."""
        self._field, self._path, self._caller = field, part.function, caller
        self._function, self._arguments = find(part.function, field), part.arguments
        try:
            signature = inspect.signature(self._function)
            self._counts = "tokens" in signature.parameters
            signature.bind("", "", **self._arguments, **({"tokens": 0} if self._counts else {}))
        except (TypeError, ValueError) as error:
            raise LoadError(
                f"{field}: {part.function} cannot be called with a text, an answer and {self._arguments}: "
                f"{error}; correct {field}.arguments, or the function's parameters"
            ) from error

    def value(self, text: str, answer: str, tokens: int) -> Value:
        """Its value and parts for one answer. Raises what the function raises, and `RewardError`."""
        counted = {"tokens": tokens} if self._counts else {}
        result = self._caller(self._function, text, answer, **self._arguments, **counted)
        match result if isinstance(result, tuple) else (result, {}):
            case (int() | float() as value, dict() as parts) if all(
                isinstance(number, int | float) and math.isfinite(number)
                for number in (value, *parts.values())
            ):
                return float(value), {str(name): float(number) for name, number in parts.items()}
        raise RewardError(
            f"{self._field}: {self._path} returned {result!r:.200}, expected a finite number, or a pair of "
            "one and a dict of finite numbers"
        )
