"""Rewards: how functions are named, called and added up, in this process and in workers."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from typing import Any

import pytest

from actors.config import LimitsConfig, RewardPart
from actors.errors import LoadError, RewardError, SampleError
from actors.rewards import boxed, brevity, multiple_choice, overlong, tagged
from actors.rewards.pool import RewardPool, Verdict
from actors.rewards.score import scorer


def scalar(text: str, answer: str) -> float:
    return float(text == answer)


async def slow_scalar(text: str, answer: str) -> tuple[float, dict[str, float]]:
    await asyncio.sleep(0.01)
    return 2.0 * (text == answer), {"same": float(text == answer)}


def own_loop(text: str, answer: str) -> float:
    """As a client library does that is async inside."""
    return asyncio.run(asyncio.sleep(0, 8.0))


LOOPS: list[asyncio.AbstractEventLoop] = []


async def one_loop(text: str, answer: str) -> float:
    """How many event loops the calls of a process have run in."""
    if asyncio.get_running_loop() not in LOOPS:
        LOOPS.append(asyncio.get_running_loop())
    return float(len(LOOPS))


def scaled(text: str, answer: str, *, by: float, tokens: int) -> float:
    return by * tokens


def nan(text: str, answer: str) -> tuple[float, dict[str, float]]:
    return 0.0, {"part": math.nan}


def words(text: str, answer: str) -> str:
    return "good"


def obey(text: str, answer: str) -> float:
    """Does what the answer says."""
    if text == "hang":
        time.sleep(600)
    if text == "raise":
        raise KeyError(text)
    return len(text)


def named(function: str, **fields: Any) -> RewardPart:
    return RewardPart(function=f"{__name__}:{function}", **fields)


def test_one_function_gives_its_value_and_its_parts() -> None:
    assert scorer("actors.rewards:gsm8k")("#### 4", "#### 4", 1) == (
        1.0,
        {"correct": 1.0, "format": 1.0},
    )
    assert scorer(f"{__name__}:scalar")("a", "a", 1) == (1.0, {})


async def test_several_functions_are_weighted_and_named() -> None:
    pool = RewardPool(
        {
            "right": named("slow_scalar", weight=0.5),
            "long": named("scaled", weight=-0.25, arguments={"by": 3.0}),
            "judged": named("own_loop"),
        },
        LimitsConfig(workers=1),
    )
    verdicts = [await pool.score("a", "a", 4) for _ in range(2)]
    await pool.close()
    parts = {"right": 2.0, "right.same": 1.0, "long": 12.0, "judged": 8.0}
    assert verdicts == [Verdict(0.5 * 2.0 - 0.25 * 12.0 + 8.0, parts)] * 2


async def test_calls_share_an_event_loop_so_that_clients_can_stay_open() -> None:
    pool = RewardPool(f"{__name__}:one_loop", LimitsConfig(workers=1))
    assert [(await pool.score("a", "a", 1)).value for _ in range(3)] == [1.0] * 3
    await pool.close()


async def test_no_function_leaves_the_reward_to_the_environment() -> None:
    pool = RewardPool({}, LimitsConfig())
    assert await pool.score("a", "a", 4) == Verdict(0.0, {})
    await pool.close()


@pytest.mark.parametrize("name", ["nan", "words"])
def test_a_result_that_is_no_finite_number_is_an_error(name: str) -> None:
    with pytest.raises(RewardError, match=f"{name} returned .* expected a finite number"):
        scorer(f"{__name__}:{name}")("a", "a", 1)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("gsm8k", "rollout.reward: got 'gsm8k', expected `module:name`"),
        (":gsm8k", "expected `module:name`"),
        ("actors.rewards:", "expected `module:name`"),
        ("actors.nowhere:gsm8k", "rollout.reward: cannot load .* No module named"),
        ("actors.rewards:nothing", "has no attribute"),
        ("actors.rewards.gsm8k:FORMAT_REWARD", "is float, expected a function"),
        ({"a": named("nowhere")}, "rollout.reward.a: cannot load .* has no attribute"),
        ({"a": named("scaled")}, "rollout.reward.a: .*scaled cannot be called .* missing a required"),
        ({"a": named("scalar", arguments={"x": 1})}, "unexpected keyword argument 'x'"),
    ],
)
async def test_what_cannot_be_called_is_found_before_any_answer(reward: Any, message: str) -> None:
    pool = RewardPool(reward, LimitsConfig(workers=1))
    with pytest.raises(LoadError, match=message):
        await pool.score("a", "a", 1)
    await pool.close()


async def test_a_sample_without_a_verdict_costs_no_other() -> None:
    pool = RewardPool(f"{__name__}:obey", LimitsConfig(workers=2, deadline_s=2))
    texts = ["four", "hang", "raise", "to", "raise"]
    verdicts = await asyncio.gather(*(pool.score(t, "", 1) for t in texts), return_exceptions=True)
    assert [v.value if isinstance(v, Verdict) else v.cause for v in verdicts] == [  # type: ignore[union-attr]
        *(4.0, "deadline", "raised", 2.0, "raised")
    ]
    assert all(isinstance(v, Verdict | SampleError) for v in verdicts)
    await pool.close()


@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        ("B", "B", 1.0),
        ("(b)", "B", 0.0),
        (" (B). ", "(B)", 1.0),
        ("The answer is B", "B", 1.0),
        ("Answer: **B**", "B", 1.0),
        ("#### B", "#### B", 1.0),
        (r"\boxed{B}", r"\boxed{\text{B}}", 1.0),
        (r"The answer is B. \boxed{\text{(C)}}", "B", 0.0),
        ("The answer is A. No, the answer is B.", "B", 1.0),
        ("Both A and B", "B", 0.0),
        ("The answer is Boston", "B", 0.0),
        ("", "B", 0.0),
        (r"\boxed{B or C}", "B", 0.0),
    ],
)
def test_multiple_choice(text: str, gold: str, value: float) -> None:
    assert multiple_choice(text, gold)[0] == value


def test_a_gold_answer_without_a_letter_is_an_error() -> None:
    with pytest.raises(RewardError, match="expected a capital letter"):
        multiple_choice("B", "42")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\boxed{4}", 1.0),
        (r"\boxed{\frac{1}{2}} and more", 1.0),
        ("4", 0.0),
        (r"\boxed{4} \boxed{4}", 0.0),
        (r"\boxed{4", 0.0),
    ],
)
def test_boxed(text: str, value: float) -> None:
    assert boxed(text, "") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>a\nb</think>\n <answer></answer>\n", 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think><think>a</think></think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a<answer>b</answer>", 0.0),
    ],
)
def test_tagged(text: str, value: float) -> None:
    assert tagged(text, "") == value
    assert tagged(text.replace("think", "plan"), "", ("plan", "answer")) == value


def test_length() -> None:
    assert [brevity("", "", tokens=n, longest=8) for n in (0, 2, 8, 9)] == [1.0, 0.75, 0.0, 0.0]
    lengths = (0, 80, 85, 100, 500)
    assert [overlong("", "", tokens=n, longest=100, cushion=20) for n in lengths] == [0, 0, -0.25, -1, -1]
    for cushion in (0, 101):
        with pytest.raises(RewardError, match="cushion"):
            overlong("", "", tokens=1, longest=100, cushion=cushion)


def test_without_math_verify_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "actors.rewards.verify", raising=False)
    with pytest.raises(
        LoadError, match=r"rollout.reward: cannot load .*; install the extra: slipstream\[math\]"
    ):
        scorer("actors.rewards:math_verify")
