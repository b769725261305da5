"""reasoning-gym: what its tasks generate, as our data, back to their own scorers."""

from __future__ import annotations

import json
import sys
from ast import literal_eval
from importlib.util import find_spec
from pathlib import Path

import pytest

from actors.config import LimitsConfig
from actors.errors import LoadError, RewardError, SampleError
from actors.loading import find
from actors.rewards.pool import RewardPool
from actors.rollout import rollout
from buffer.admission import Lease
from buffer.schema import Prompt
from launch.cli import main
from learner.rows import Example, load_rows
from tests.unit.actors.scripted import Letters, ScriptedEngine, recipe, said

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
needs_gym = pytest.mark.skipif(
    find_spec("reasoning_gym") is None,
    reason="the extra `environments` is not installed: 44 MB, with a package to compile",
)


def test_without_the_extra_both_sides_say_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.delitem(sys.modules, "actors.rewards.reasoning", raising=False)
    assert main(["data", "--reasoning-gym", "coin_flip", "--out", str(tmp_path)]) == 2
    assert "install the extra: slipstream[environments]" in capsys.readouterr().err
    with pytest.raises(
        LoadError, match=r"rollout.reward: cannot load .*; install the extra: slipstream\[env"
    ):
        find("actors.rewards:reasoning_gym", "rollout.reward")


def written(folder: Path, task: str, *more: str) -> list[Example]:
    assert main(["data", "--reasoning-gym", task, "--out", str(folder), *more]) == 0
    return load_rows(str(folder / "train.jsonl"), marker='"entry"')


@needs_gym
async def test_a_task_from_its_generator_to_the_rewards_of_a_group(tmp_path: Path) -> None:
    example = written(tmp_path, "basic_arithmetic", "--size", "10", "--seed", "1")[0]
    gold = literal_eval(json.loads(example.answer)["entry"])["answer"]
    assert example.question.startswith("Calculate ")
    lease = Lease("lease", "", "7:x", "0000-0000000041-01", 41, 1, 3, 5, Prompt(0, [5, 6], example.answer))
    engine = ScriptedEngine(
        said(f"<answer>9</answer> no: <answer> {gold} </answer>"), said("<answer>x</answer>"), said(gold)
    )
    pool = RewardPool("actors.rewards:reasoning_gym", LimitsConfig(workers=1))
    group = await rollout(engine, lease, recipe(3, text=Letters(), rewards=pool))
    await pool.close()
    assert [sample.reward for sample in group.samples] == [1.0, 0.0, 0.0]
    assert [sample.rewards for sample in group.samples] == [
        {"score": 1.0, "format": 1.0},
        {"score": 0.0, "format": 1.0},
        {"score": 0.0, "format": 0.0},
    ]


@needs_gym
@pytest.mark.parametrize("task", ["rearc", "simple_equations", "sudoku", "letter_counting"])
def test_gold_answers_score_one_though_written_down(task: str, tmp_path: Path) -> None:
    from actors.rewards import reasoning_gym

    for example in written(tmp_path, task, "--size", "4"):
        entry = literal_eval(json.loads(example.answer)["entry"])
        assert entry["question"] == example.question
        assert reasoning_gym(entry["answer"], example.answer, tag="")[0] == 1.0
        assert reasoning_gym("none of it", example.answer, tag="")[0] < 1.0


@needs_gym
def test_a_scorer_without_an_answer_of_its_own_gets_keys_as_they_were(tmp_path: Path) -> None:
    from actors.rewards import reasoning_gym

    example = written(tmp_path, "graph_color", "--size", "2")[0]
    puzzle = literal_eval(json.loads(example.answer)["entry"])["metadata"]["puzzle"]
    colours: dict[int, int] = {}
    assert colour(puzzle, colours)
    assert reasoning_gym(json.dumps(colours), example.answer, tag="")[0] == 1.0
    same = dict.fromkeys(puzzle["vertices"], 1)
    assert reasoning_gym(json.dumps(same), example.answer, tag="")[0] < 1.0


def colour(puzzle: dict[str, list], colours: dict[int, int]) -> bool:
    """Colours a graph by trying."""
    left = [vertex for vertex in puzzle["vertices"] if vertex not in colours]
    if not left:
        return True
    near = {b if a == left[0] else a for a, b in puzzle["edges"] if left[0] in (a, b)}
    for one in puzzle["color_options"]:
        if one not in [colours.get(vertex) for vertex in near]:
            colours[left[0]] = one
            if colour(puzzle, colours):
                return True
            del colours[left[0]]
    return False


@needs_gym
def test_an_answer_that_the_scorer_cannot_read_is_worth_nothing(tmp_path: Path) -> None:
    from actors.rewards import reasoning_gym

    example = written(tmp_path, "prime_factorization", "--size", "4")[0]
    verdict = (0.0, {"score": 0.0, "format": 1.0})
    assert reasoning_gym("<answer>no numbers</answer>", example.answer) == verdict


@needs_gym
def test_files_share_no_question_and_follow_the_seed(tmp_path: Path) -> None:
    def files(name: str, seed: str) -> list[str]:
        written(tmp_path / name, "coin_flip", "--size", "100", "--seed", seed)
        return [(tmp_path / name / file).read_text() for file in ("train.jsonl", "held_out.jsonl")]

    first = files("a", "1")
    questions = [[json.loads(line)["question"] for line in text.splitlines()] for text in first]
    assert len({*questions[0], *questions[1]}) == len(questions[0]) + len(questions[1])
    assert len(questions[1]) == int(0.2 * (len(questions[0]) + len(questions[1])))
    assert files("b", "1") == first
    assert files("c", "2") != first


@needs_gym
@pytest.mark.parametrize(
    ("task", "size", "said"),
    [
        ("ploughing", "5", "--reasoning-gym: got 'ploughing', expected one of "),
        ("composite", "5", "composite cannot be made with its own settings: Must specify at least one"),
        ("knights_knaves", "5", "knights_knaves keeps objects in its entries, expected plain values"),
        ("coin_flip", "1", "--size: got 1, expected 2 or more"),
    ],
)
def test_what_cannot_be_written_is_named(
    task: str, size: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "--reasoning-gym", task, "--size", size, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


@needs_gym
@pytest.mark.parametrize(
    "answer", ["#### 7", '{"task": "ploughing", "entry": "{}"}', '{"task": "coin_flip", "entry": "f()"}']
)
async def test_a_gold_answer_of_another_form_is_named(answer: str) -> None:
    from actors.rewards import reasoning_gym

    with pytest.raises(RewardError, match="expected what `launch data --reasoning-gym` writes"):
        reasoning_gym("<answer>7</answer>", answer)
    pool = RewardPool("actors.rewards:reasoning_gym", LimitsConfig(workers=1))
    with pytest.raises(SampleError, match="gold answer"):
        await pool.score("x", answer, tokens=1)
    await pool.close()
