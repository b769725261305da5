"""The arithmetic data set: GSM8K's schema, right answers, disjoint files, a teacher as careless as said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from actors.rewards import gsm8k
from launch.arithmetic import DEMONSTRATIONS, HELD_OUT_SHARE, WRONG_SHARE, DataFiles, write_arithmetic

QUESTION = re.compile(r"(\d+)\+(\d+)=")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DataFiles:
    return write_arithmetic(tmp_path_factory.mktemp("arithmetic"), seed=0)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_right(row: dict[str, str]) -> bool:
    left, right = QUESTION.fullmatch(row["question"]).groups()
    return row["answer"] == f"#### {int(left) + int(right)}"


def test_questions_and_answers_are_right_and_score_one(files: DataFiles) -> None:
    for row in rows(files.train) + rows(files.held_out):
        assert row.keys() == {"question", "answer"}
        assert is_right(row)
        assert gsm8k(row["answer"], row["answer"])[0] == 1.0


def test_train_and_held_out_share_no_question(files: DataFiles) -> None:
    train = [row["question"] for row in rows(files.train)]
    held_out = [row["question"] for row in rows(files.held_out)]
    assert len({*train, *held_out}) == len(train) + len(held_out)
    assert len(held_out) == HELD_OUT_SHARE * (len(train) + len(held_out))


def test_the_teacher_is_wrong_as_often_as_said_and_never_malformed(files: DataFiles) -> None:
    shown = rows(files.demonstrations)
    train = {row["question"] for row in rows(files.train)}
    assert len(shown) == DEMONSTRATIONS * len(train)
    assert {row["question"] for row in shown} == train
    assert all(re.fullmatch(r"#### \d+", row["answer"]) for row in shown)
    wrong = sum(not is_right(row) for row in shown) / len(shown)
    # Four standard deviations of a binomial share.
    assert wrong == pytest.approx(WRONG_SHARE, abs=4 * (0.25 / len(shown)) ** 0.5)


def test_files_follow_the_seed(files: DataFiles, tmp_path: Path) -> None:
    same, other = write_arithmetic(tmp_path / "a", seed=0), write_arithmetic(tmp_path / "b", seed=1)
    assert [path.read_bytes() for path in same] == [path.read_bytes() for path in files]
    assert other.train.read_bytes() != files.train.read_bytes()
