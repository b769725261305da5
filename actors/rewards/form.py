"""The form of an answer, whatever it says: boxes, tags, length."""

from __future__ import annotations

import re

from actors.errors import RewardError
from actors.rewards.mathematics import last_boxed


def boxed(text: str, answer: str) -> float:
    r"""1.0 if the text has exactly one `\boxed{...}` and that is whole, else 0.0.

    >>> boxed(r"so \boxed{4}", ""), boxed(r"\boxed{4} or \boxed{5}", "")
    (1.0, 0.0)
    """
    return float(text.count(r"\boxed{") == 1 and last_boxed(text) is not None)


def tagged(text: str, answer: str, tags: tuple[str, ...] = ("think", "answer")) -> float:
    """1.0 if the text is `<think>...</think><answer>...</answer>`, each tag once, nothing but blanks
    between and around them; else 0.0. `tags` are other names, in order.

    >>> tagged("<think>2+2</think> <answer>4</answer>", ""), tagged("<think>2+2</think> 4", "")
    (1.0, 0.0)
    """
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    form = r"\s*".join(rf"<{re.escape(tag)}>.*?</{re.escape(tag)}>" for tag in tags)
    whole = re.fullmatch(rf"\s*{form}\s*", text, re.DOTALL)
    return float(whole is not None and all(text.count(mark) == 1 for mark in marks))


def brevity(text: str, answer: str, *, tokens: int, longest: int) -> float:
    """1 - tokens / longest, at least 0: 1.0 for an empty answer, 0.0 from `longest` tokens on.

    >>> brevity("", "", tokens=25, longest=100)
    0.75
    """
    return max(0.0, 1.0 - tokens / longest)


def overlong(text: str, answer: str, *, tokens: int, longest: int, cushion: int) -> float:
    """DAPO's soft penalty (arXiv 2503.14476, equation 13): 0 up to `longest - cushion` tokens, then
    falling linearly to -1 at `longest` tokens, and -1 beyond. Raises `RewardError` for a cushion that is
    not between 0 and `longest`.

    >>> [overlong("", "", tokens=n, longest=100, cushion=20) for n in (80, 90, 101)]
    [0.0, -0.5, -1.0]
    """
    if not 0 < cushion <= longest:
        raise RewardError(f"overlong: cushion: got {cushion}, expected more than 0 and at most {longest}")
    return min(0.0, max(-1.0, (longest - cushion - tokens) / cushion))
