r"""MATH: the last `\boxed{...}` of a text against that of the gold answer.

`math_exact` compares strings after Hendrycks' normalisation; what they mean is for `actors.rewards.verify`.
"""

from __future__ import annotations

import re

_FRACTION = re.compile(r"\\frac(?!\{[^{}]*\}\{)\s*(\{[^{}]*\}|[^{}\s\\])\s*(\{[^{}]*\}|[^{}\s\\])")
_SLASH = re.compile(r"(-?\d+)/(\d+)")
_UNITS = re.compile(r"\\text\{ .*$")
_ROOT = re.compile(r"\\sqrt(?![\[{])\s*([^\\\s])")
_BRACKETED = re.compile(r"[(\[][^()\[\]]*(?:\([^()]*\)[^()\[\]]*)*,.*[)\]]")
"""A tuple or an interval."""
_BASED = re.compile(r"[0-9A-Z]+_(?:[0-9]+|\{[0-9]+\})")
"""A number and its base."""
_NAME = re.compile(r"\\?[A-Za-z]+(?:_\w|_\{\w+\})?'*(?:\([a-z](?:,[a-z])*\))?")
"""A name, of a function too: `x`, `\theta`, `a_1`, `f(x,y)`."""
_REPLACED = [
    *(("\n", ""), (r"\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), (r"\left", "")),
    *((r"\right", ""), (r"^{\circ}", ""), (r"^\circ", ""), (r"\$", ""), ("$", "")),
]
"""In this order."""


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` (or `\fbox{...}`) of a text; None without a whole one.

    >>> last_boxed(r"no: \boxed{3}, so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    depth, begin = 0, text.index("{", start)
    for index in range(begin, len(text)):
        escaped = text[index - 1] == "\\" and text[index - 2] != "\\"
        if text[index] in "{}" and not escaped:
            depth += 1 if text[index] == "{" else -1
        if depth == 0:
            return text[begin + 1 : index]
    return None


def normalised(answer: str) -> str:
    r"""An answer as MATH's own scorer writes it (`math_equivalence.py` of arXiv 2103.03874): layout,
    degrees, dollars, percent signs and trailing units gone, fractions and roots with braces.

    >>> normalised(r"x = \dfrac12 \text{ cm}"), normalised("0.5"), normalised(r"\sqrt3")
    ('\\frac{1}{2}', '\\frac{1}{2}', '\\sqrt{3}')
    """
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    answer = _UNITS.sub("", answer).replace(r"\%", "").replace("%", "")
    answer = re.sub(r"(^|[ {])\.", r"\g<1>0.", answer)
    left, equals, right = answer.partition("=")
    if equals and "=" not in right and len(left.strip()) <= 2:
        answer = right
    answer = _ROOT.sub(r"\\sqrt{\1}", answer).replace(" ", "")
    answer = _FRACTION.sub(_braced, answer)
    if answer == "0.5":
        return r"\frac{1}{2}"
    if slash := _SLASH.fullmatch(answer):
        return rf"\frac{{{slash[1]}}}{{{slash[2]}}}"
    return answer


def _braced(found: re.Match[str]) -> str:
    r"""`\frac12` as `\frac{1}{2}`."""
    above, below = (part if part.startswith("{") else f"{{{part}}}" for part in found.groups())
    return rf"\frac{above}{below}"


def math_exact(text: str, answer: str) -> tuple[float, dict[str, float]]:
    r"""1.0 if the last `\boxed{...}` equals the gold one after normalisation, else 0.0.

    The gold answer is what its own last `\boxed{...}` holds, or all of it if there is none. The parts are
    `correct` and `boxed`, whether the text has a whole box at all.

    >>> math_exact(r"It is \boxed{\dfrac12}.", r"\frac{1}{2}")
    (1.0, {'correct': 1.0, 'boxed': 1.0})
    """
    given, gold = last_boxed(text), last_boxed(answer)
    correct = given is not None and normalised(given) == normalised(answer if gold is None else gold)
    return float(correct), {"correct": float(correct), "boxed": float(given is not None)}


def comparable(given: str, gold: str) -> bool:
    r"""Whether two answers are of one kind. math-verify 0.9.0 alone takes a pair in brackets for the list
    of its members, an equation for its right side, and drops the base of a number.

    >>> comparable("(-2,1)", "-2,1"), comparable("x+y=0", "0"), comparable("40_9", "40")
    (False, False, False)
    >>> comparable("f(x)=2x", "2x"), comparable(r"[1,\infty)", r"\left[1,\infty\right)")
    (True, True)
    """
    given, gold = normalised(given), normalised(gold)
    for kind in (_BRACKETED, _BASED):
        if bool(kind.fullmatch(given)) != bool(kind.fullmatch(gold)):
            return False
    left, equals, _ = given.partition("=")
    return "=" in gold or not equals or bool(_NAME.fullmatch(left))
