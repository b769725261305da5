"""Multiple choice: a letter."""

from __future__ import annotations

import re

from actors.errors import RewardError
from actors.rewards.mathematics import last_boxed

_ALONE = re.compile(r"\W*(?:\\text\{|\\textbf\{)?\W*([A-Z])\W*", re.ASCII)
_SAID = re.compile(r"(?i:\banswer(?:\s+is)?|####)\s*:?\s*[*($]*([A-Z])(?![A-Za-z'\u2019])")
"""`Answer: B`, `the answer is (B)`, `#### B`; an article such as in `the answer is A dog` is one, too,
and loses to a box."""


def chosen(text: str) -> str | None:
    r"""The letter a text settles on: in its last `\boxed{...}`, else the last one that it calls the
    answer, else the whole text if that is a letter; None if there is none.

    >>> chosen(r"A? No. \boxed{\text{(B)}}"), chosen("Answer: **C**"), chosen("(D)"), chosen("A dog")
    ('B', 'C', 'D', None)
    """
    box = last_boxed(text)
    if box is not None:
        found = _ALONE.fullmatch(box)
        return found[1] if found else None
    if said := _SAID.findall(text):
        return str(said[-1])
    found = _ALONE.fullmatch(text)
    return found[1] if found else None


def multiple_choice(text: str, answer: str) -> tuple[float, dict[str, float]]:
    """1.0 if the text settles on the gold letter, else 0.0; the parts are `correct` and `format`, whether
    it settles on any. Raises `RewardError` if the gold answer names no letter.

    >>> multiple_choice("The answer is (B).", "B")
    (1.0, {'correct': 1.0, 'format': 1.0})
    """
    gold, given = chosen(answer), chosen(text)
    if gold is None:
        raise RewardError(
            f"gold answer: got {answer[-60:]!r}, expected a capital letter, such as `B`; correct this row of "
            "the data set"
        )
    return float(given == gold), {"correct": float(given == gold), "format": float(given is not None)}
