"""MATH by meaning: math-verify and sympy, which take seconds to import, so this module stands alone."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from actors.rewards.mathematics import comparable, last_boxed, math_exact

try:
    from math_verify import LatexExtractionConfig, parse, verify
except ImportError as error:
    raise ImportError(f"{error}; install the extra: slipstream[math]") from error


def math_verify(text: str, answer: str) -> tuple[float, dict[str, float]]:
    r"""As `math_exact`, and 1.0 also for an answer that means the same, as math-verify and sympy see it.

    Needs the extra `math`. An expression that sympy cannot finish runs into the deadline, which makes
    the sample invalid, not wrong.

    >>> math_verify(r"\boxed{x(x+1)}", r"x^2 + x")
    (1.0, {'correct': 1.0, 'boxed': 1.0})
    """
    value, parts = math_exact(text, answer)
    given, gold = last_boxed(text), last_boxed(answer)
    gold = answer if gold is None else gold
    if value or given is None or not comparable(given, gold):
        return value, parts
    same = verify(list(_parsed(gold)), list(_parsed(given)), timeout_seconds=None)
    return float(same), {**parts, "correct": float(same)}


@lru_cache(maxsize=1024)
def _parsed(answer: str) -> tuple[Any, ...]:
    """What math-verify makes of an answer: sympy expressions and strings."""
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    return tuple(parse(rf"\boxed{{{answer}}}", config, parsing_timeout=None))
