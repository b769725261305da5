"""MATH: boxes, Hendrycks' normalisation, mathematical equality, on real problems and on rubbish."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.config import LimitsConfig
from actors.errors import SampleError
from actors.rewards.mathematics import comparable, last_boxed, math_exact, normalised
from actors.rewards.pool import RewardPool, Verdict
from actors.rewards.verify import math_verify

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")

EQUAL = [{"-2,1", "1,-2"}, {"10,080", "10080"}, {"15", r"15\mbox{cm}^2"}]
"""All answers of MATH-500 that differ after normalisation and mean the same, read one by one."""


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{3}", "3"),
        (r"\boxed{1} or \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{x}", r"\{x"),
        (r"\fbox{7}", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{3", None),
        (r"\boxed 3", None),
        ("3", None),
    ],
)
def test_the_last_whole_box_counts(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    ("answer", "as_written"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\tfrac12", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\frac{1}2", r"\frac{1}{2}"),
        ("1/2", r"\frac{1}{2}"),
        ("-3/4", r"\frac{-3}{4}"),
        ("0.5", r"\frac{1}{2}"),
        (".25", "0.25"),
        ("{.25}", "{0.25}"),
        (r"\sqrt2 + \sqrt{3}", r"\sqrt{2}+\sqrt{3}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\$5", "5"),
        (r"50\%", "50"),
        (r"12 \text{ inches}", "12"),
        (r"\text{Evelyn}", r"\text{Evelyn}"),
        ("x = 5", "5"),
        ("x + y = 5", "x+y=5"),
        ("1,\\!000", "1,000"),
        ("  7\n", "7"),
    ],
)
def test_normalisation_is_that_of_the_data_set(answer: str, as_written: str) -> None:
    assert normalised(answer) == as_written


@pytest.mark.parametrize(
    ("given", "gold", "exact", "meant"),
    [
        (r"\dfrac{1}{2}", r"\frac12", 1.0, 1.0),
        (r"\frac{2}{4}", r"\frac{1}{2}", 0.0, 1.0),
        ("x(x+1)", "x^2 + x", 0.0, 1.0),
        (r"\sqrt{8}", r"2\sqrt{2}", 0.0, 1.0),
        (r"(3,4)\cup(1,2)", r"(1,2)\cup(3,4)", 0.0, 1.0),
        ("[2,4]", "(2,4)", 0.0, 0.0),
        ("(4,2)", "(2,4)", 0.0, 0.0),
        ("(-2,1)", "-2,1", 0.0, 0.0),
        ("40_9", "40", 0.0, 0.0),
        ("x+y=0", "0", 0.0, 0.0),
        ("f(x) = 2x", "2x", 0.0, 1.0),
        (r"\text{Evelyn}", r"\text{Eve}", 0.0, 0.0),
        ("", "0", 0.0, 0.0),
        (r"\text{(B)}", r"\text{(B)}", 1.0, 1.0),
    ],
)
def test_equal_as_written_and_as_meant(given: str, gold: str, exact: float, meant: float) -> None:
    for answer in (gold, rf"so it is \boxed{{{gold}}}."):
        assert math_exact(rf"It is \boxed{{{given}}}.", answer)[0] == exact
        assert math_verify(rf"It is \boxed{{{given}}}.", answer)[0] == meant
    assert math_verify(given, gold) == (0.0, {"correct": 0.0, "boxed": 0.0})


@given(st.text(alphabet=r"\{}()[]^_=,./0123456789 fracsqtxdle$%", max_size=40))
def test_normalising_never_fails_and_every_answer_equals_itself(answer: str) -> None:
    again = normalised(answer)
    assert comparable(answer, answer)
    assert " " not in again
    inside = last_boxed(rf"\boxed{{{answer}}}")
    if inside is not None:
        assert math_exact(rf"\boxed{{{inside}}}", rf"\boxed{{{inside}}}")[0] == 1.0


@pytest.fixture(scope="module")
def problems(test_data: Path) -> list[dict[str, str]]:
    """MATH-500."""
    rows = [json.loads(line) for line in (test_data / "math500.jsonl").read_text().splitlines()]
    assert len(rows) == 500
    return rows


def test_every_gold_solution_scores_one(problems: list[dict[str, str]]) -> None:
    for function in (math_exact, math_verify):
        for gold in ("solution", "answer"):
            assert [r["answer"] for r in problems if function(r["solution"], r[gold])[0] != 1.0] == []


def equal_pairs(answers: list[str], others: int) -> list[set[str]]:
    """Pairs of different answers, each against so many after it, that score 1 in either order."""
    found = []
    for index, gold in enumerate(answers):
        for other in (answers + answers)[index + 1 : index + 1 + others]:
            if other != gold and math_verify(rf"\boxed{{{other}}}", gold)[0]:
                found.append({gold, other})
    return found


def unlike(problems: list[dict[str, str]]) -> list[str]:
    """The answers that differ after normalisation, shuffled."""
    answers = sorted({normalised(row["answer"]) for row in problems})
    assert len(answers) == 293
    random.Random(0).shuffle(answers)
    return answers


def test_other_problems_answers_score_nothing(problems: list[dict[str, str]]) -> None:
    """Each against three others, and all that resemble one another; the rest under `make accept`."""
    answers = unlike(problems)
    assert [pair for pair in equal_pairs(answers, 3) if pair not in EQUAL] == []
    alike = sorted({"(-2,1)", "0", "40", "40_9", "5x-7y+11z+4=0", *set().union(*EQUAL)} & set(answers))
    pairs = equal_pairs(alike, len(alike) - 1)
    assert len(alike) == 11
    assert [pairs.count(pair) for pair in EQUAL] == [2, 2, 2]
    assert len(pairs) == 6


@pytest.mark.accept
def test_no_other_problems_answer_scores_one_unless_it_means_the_same(
    problems: list[dict[str, str]],
) -> None:
    """All 85,556 ordered pairs; about five minutes."""
    answers = unlike(problems)
    pairs = equal_pairs(answers, len(answers) - 1)
    assert sorted(map(sorted, pairs)) == sorted(sorted(pair) for pair in EQUAL * 2)


FRAGMENTS = [
    *(r"\frac", r"\sqrt", r"\left(", r"\right)", "{", "}", "(", ")", "^", "_", "=", ",", ".", "/", "!", "|"),
    *(r"\begin{pmatrix}", r"\end{pmatrix}", r"\int", r"\sum_{n=1}^{\infty}", r"\log", "^{9^{9}}", "9999999"),
    *("\x00", "\u2212", "\U0001f600", r"\text{", r"\boxed{", "%", "$", "&", r"\\", "10^{100000}", "x" * 300),
]


def fuzzed(answers: list[str], count: int, seed: int) -> list[str]:
    """Answers with pieces cut out, doubled, swapped and put in."""
    choose, made = random.Random(seed), []
    for _ in range(count):
        text = choose.choice(answers)
        for _ in range(choose.randint(1, 6)):
            a, b = sorted((choose.randint(0, len(text)), choose.randint(0, len(text))))
            piece = choose.choice([choose.choice(FRAGMENTS), choose.choice(answers), text[a:b], ""])
            text = text[:a] + piece + text[choose.choice([a, b]) :]
        made.append(text[:2000])
    return made


async def fuzz(answers: list[str], count: int, seed: int) -> Counter[str]:
    """How `count` fuzzed answers end, each against a gold answer, in worker processes."""
    texts = fuzzed(answers, count, seed)
    golds = [answers[index % len(answers)] for index in range(count)]
    pool = RewardPool("actors.rewards:math_verify", LimitsConfig(workers=2, deadline_s=4.0))
    began = time.monotonic()
    scores = [pool.score(rf"\boxed{{{text}}}", gold, 1) for text, gold in zip(texts, golds, strict=True)]
    ends = await asyncio.gather(*scores, return_exceptions=True)
    await pool.close()
    print(f"{count} fuzzed answers in {time.monotonic() - began:.1f} s")
    assert all(isinstance(end, Verdict | SampleError) for end in ends), ends
    return Counter(str(end.value) if isinstance(end, Verdict) else end.cause for end in ends)  # type: ignore[union-attr]


async def test_300_fuzzed_answers_end_in_a_verdict_or_at_the_deadline(
    problems: list[dict[str, str]],
) -> None:
    ends = await fuzz([row["answer"] for row in problems], 300, seed=1)
    print(ends)
    assert set(ends) <= {"0.0", "1.0", "deadline", "memory"}
    assert ends["deadline"] + ends["memory"] < 20


@pytest.mark.accept
async def test_10000_fuzzed_answers_end_in_a_verdict_or_at_the_deadline(
    problems: list[dict[str, str]],
) -> None:
    ends = await fuzz([row["answer"] for row in problems], 10_000, seed=0)
    print(ends)
    assert set(ends) <= {"0.0", "1.0", "deadline", "memory"}
    assert ends["deadline"] + ends["memory"] < 200
