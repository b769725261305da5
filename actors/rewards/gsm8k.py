"""GSM8K: a number after `####` (arXiv 2110.14168)."""

from __future__ import annotations

import re
from decimal import Decimal

from actors.errors import RewardError

FORMAT_REWARD = 0.1
"""Reward of a wrong answer that at least ends in the asked form."""

_FINAL_ANSWER = re.compile(
    r"(?<!#)####[ \t]*"
    r"((?:[-+]?\$?|\$[-+])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.[0-9]+)?)"
    r"(?!\w|[.,][0-9])"
)
"""`#### ` and a number: sign, dollar, commas between thousands and decimals are optional. What
follows may not continue the number: `4 dollars`, `4.` and `4%` are four, `4x` and `4.5.6` are nothing."""


def final_answer(text: str) -> Decimal | None:
    """The number after the last well-formed `####` of a text, exact; None if there is none.

    The last one counts, so writing down several numbers earns nothing over writing down one.

    >>> final_answer("#### 3, no: #### $1,450.00."), final_answer("1450")
    (Decimal('1450.00'), None)
    """
    found = _FINAL_ANSWER.findall(text)
    return Decimal(found[-1].replace("$", "").replace(",", "")) if found else None


def gsm8k(text: str, answer: str) -> tuple[float, dict[str, float]]:
    """1.0 if the text's final answer is the gold one as a number, else 0.1 for the form alone, else 0.0.

    The parts are `correct` and `format`, each 0.0 or 1.0. Only the form `#### <number>` of GSM8K
    (arXiv 2110.14168) counts; numbers elsewhere in the text do not. Raises `RewardError` if the gold
    answer has no such form.

    >>> gsm8k("20 + 26 #### 46", "#### 46.0")
    (1.0, {'correct': 1.0, 'format': 1.0})
    """
    gold = final_answer(answer)
    if gold is None:
        raise RewardError(
            f"gold answer: got {answer[-60:]!r}, expected it to end in `#### <number>`; correct this row "
            "of the data set, or set rollout.reward to a function that reads such answers"
        )
    given = final_answer(text)
    correct = given == gold
    parts = {"correct": float(correct), "format": float(given is not None)}
    return (1.0 if correct else FORMAT_REWARD * parts["format"]), parts
