"""reasoning-gym's tasks, each by its own scorer; a package of its own extra, so this module stands alone."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec

from actors.errors import RewardError

try:
    import reasoning_gym as gym
    from reasoning_gym.utils import extract_answer
except ImportError as error:
    raise ImportError(f"{error}; install the extra: slipstream[environments]") from error


class Gold(msgspec.Struct, frozen=True):
    """A gold answer as `launch data --reasoning-gym` writes it."""

    task: str
    """reasoning-gym's name of the task."""
    entry: str
    """The entry that its generator made, as a Python literal."""


def reasoning_gym(text: str, answer: str, *, tag: str = "answer") -> tuple[float, dict[str, float]]:
    """What the task's `score_answer` gives the last ``<answer>...</answer>`` of the text, in [0, 1].

    Without one the value is 0, and so it is when the scorer cannot read it, a ValueError. An empty `tag`
    has the whole text scored. The parts are `score`, the value, and `format`, whether there was something
    to score. Needs the extra `environments`. Raises `RewardError` for a gold answer of another form or
    of an unknown task.
    """
    scored, entry = _gold(answer)
    given = extract_answer(text, tag) if tag else text.strip()
    try:
        value = 0.0 if given is None else float(scored(given, entry))
    except ValueError:
        value = 0.0
    return value, {"score": value, "format": float(given is not None)}


def _gold(answer: str) -> tuple[Callable[[str, dict[str, Any]], float], dict[str, Any]]:
    """The scorer of a gold answer, and its entry."""
    try:
        gold = msgspec.json.decode(answer, type=Gold)
        return _scorer(gold.task), ast.literal_eval(gold.entry)
    except (msgspec.MsgspecError, SyntaxError, ValueError) as error:
        raise RewardError(
            f"gold answer: got {answer[:60]!r}: {error}; expected what `launch data --reasoning-gym` writes"
        ) from error


@cache
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    """A task's scorer; its data set is made once."""
    scorer: Callable[[str, dict[str, Any]], float] = gym.get_score_answer_fn(task)
    return scorer
