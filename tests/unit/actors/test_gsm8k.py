"""GSM8K: what counts as a final answer, and what it earns."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import RewardError
from actors.rewards.gsm8k import final_answer, gsm8k

RIGHT = [
    "#### 1450",
    "####1450",
    "#### 1,450",
    "#### $1,450",
    "#### $+1450",
    "#### +1450.",
    "#### 1450.00",
    "#### 1450 dollars",
    "#### 01450",
    "so 3 * 4 = 12\n#### 12\n#### 1450\n",
]
WRONG = ["#### 1451", "#### -1450", "#### 145", "#### 1450.5", "#### 1450 #### 3"]
MALFORMED = [
    "",
    "1450",
    "### 1450",
    "##### 1450",
    "####",
    "####\n1450",
    "#### 1450x",
    "#### 1450.5.6",
    "#### 14,50",
    "#### - 1450",
    "#### ١٤٥٠",
]


@pytest.mark.parametrize("text", RIGHT)
def test_right_answers_score_one(text: str) -> None:
    assert gsm8k(text, "work\n#### 1,450") == (1.0, {"correct": 1.0, "format": 1.0})


@pytest.mark.parametrize("text", WRONG)
def test_wrong_numbers_score_the_format(text: str) -> None:
    assert gsm8k(text, "work\n#### 1,450") == (0.1, {"correct": 0.0, "format": 1.0})


@pytest.mark.parametrize("text", MALFORMED)
def test_anything_else_scores_nothing(text: str) -> None:
    assert gsm8k(text, "work\n#### 1,450") == (0.0, {"correct": 0.0, "format": 0.0})


@pytest.mark.parametrize(("text", "value"), [("#### -3", -3), ("#### $-.5", -0.5), ("#### -0", 0)])
def test_signs_and_fractions(text: str, value: float) -> None:
    assert final_answer(text) == value


@pytest.mark.parametrize("answer", ["72", "", "#### seventy"])
def test_a_gold_answer_without_a_number_is_an_error(answer: str) -> None:
    with pytest.raises(RewardError, match=r"gold answer: got .* expected it to end in `#### <number>`"):
        gsm8k("#### 72", answer)


@pytest.mark.parametrize(("name", "rows"), [("gsm8k_train.jsonl", 7473), ("gsm8k_test.jsonl", 1319)])
def test_every_gold_answer_of_gsm8k_scores_one_against_itself(test_data: Path, name: str, rows: int) -> None:
    answers = [json.loads(line)["answer"] for line in (test_data / name).read_text().splitlines()]
    assert len(answers) == rows
    assert [answer for answer in answers if gsm8k(answer, answer)[0] != 1.0] == []
    # The final line alone decides, and another number is never right.
    finals = [answer.rpartition("\n")[2] for answer in answers]
    assert [f for f, a in zip(finals, answers, strict=True) if gsm8k(f, a)[0] != 1.0] == []
    assert [a for a in answers if gsm8k(f"#### {final_answer(a) + 1}", a)[0] != 0.1] == []


@given(st.text() | st.text(alphabet="#0123456789.,$-+ \n", max_size=60))
def test_no_text_is_too_strange(text: str) -> None:
    value, parts = gsm8k(text, "#### 46")
    assert value == (1.0 if parts["correct"] else 0.1 * parts["format"])
    assert gsm8k(text + "\n#### 46", "#### 46")[0] == 1.0


@given(st.integers() | st.decimals(-(10**9), 10**9, places=3))
def test_every_number_equals_itself_however_written(number: int | Decimal) -> None:
    assert gsm8k(f"#### {number:,}", f"#### {number}")[0] == 1.0
    assert gsm8k(f"#### {number + 1}", f"#### {number}")[0] == 0.1
