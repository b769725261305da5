"""Environments of the package `verifiers`, for the tests of their adapter."""

from __future__ import annotations

import os
import time
from typing import Any

import verifiers as vf
from datasets import Dataset

QUESTIONS = Dataset.from_list([{"question": f"{n}+{n}?", "answer": str(2 * n)} for n in range(1, 5)])


def right(completion: Any, answer: str) -> float:
    return float(completion[-1]["content"] == answer)


def turns(state: Any, parser: Any) -> float:
    assert isinstance(parser, vf.Parser)
    return float(len(state["trajectory"]))


def broken(completion: Any, **others: Any) -> float:
    raise KeyError(completion[0]["content"])


def slow(completion: Any) -> float:
    time.sleep(60)
    return 1.0


def no_number(completion: Any) -> float:
    return float("nan")


async def process(completion: Any) -> float:
    return float(os.getpid())


def group(completions: Any) -> list[float]:
    return [0.0] * len(completions)


FUNCTIONS = {
    function.__name__: function for function in (right, turns, broken, slow, no_number, process, group)
}


def rubric(weights: dict[str, float]) -> vf.Rubric:
    return vf.Rubric(funcs=[FUNCTIONS[name] for name in weights], weights=list(weights.values()))


def single(**weights: float) -> vf.Environment:
    """One answer; `weights` of the functions above."""
    system = "Add. <|im_end|>"
    return vf.SingleTurnEnv(dataset=QUESTIONS, system_prompt=system, rubric=rubric(weights or {"right": 1.0}))


class Greedy(vf.SingleTurnEnv):
    """Wants the likeliest answer."""

    async def get_model_response(self, state: vf.State, prompt: Any, **others: Any) -> Any:
        return await super().get_model_response(state, prompt, sampling_args={"temperature": 0.0}, **others)


def greedy() -> vf.Environment:
    return Greedy(dataset=QUESTIONS, rubric=rubric({"right": 1.0}))


class Guess(vf.MultiTurnEnv):
    """Says `no <guess>` until the answer is right; `forgets` has it leave out what was said."""

    def __init__(self, forgets: bool = False, **others: Any) -> None:
        super().__init__(**others)
        self._forgets, self.torn_down = forgets, 0

    @vf.stop
    async def guessed(self, state: vf.State) -> bool:
        return bool(state["trajectory"]) and right(state["trajectory"][-1]["completion"], state["answer"]) > 0

    @vf.teardown
    async def tear_down(self) -> None:
        self.torn_down += 1

    async def get_prompt_messages(self, state: vf.State) -> Any:
        messages = await super().get_prompt_messages(state)
        return messages[1:] if self._forgets else messages

    async def env_response(self, messages: Any, state: vf.State, **others: Any) -> Any:
        return [{"role": "user", "content": f"no {messages[-1]['content']}"}]


def guess(forgets: bool = False) -> vf.Environment:
    """Several turns; 1.0 for a right end, 0.1 for each turn."""
    return Guess(forgets, dataset=QUESTIONS, max_turns=3, rubric=rubric({"right": 1.0, "turns": 0.1}))


def add(a: int, b: int) -> str:
    """Adds two numbers ≥ 0.

    Args:
        a: the first
        b: the second
    """
    return str(a + b) if a else f"{os.getpid()}"


def tools() -> vf.Environment:
    """Tool calls; 1.0 for a right last answer."""
    return vf.ToolEnv(tools=[add], dataset=QUESTIONS, max_turns=4, rubric=rubric({"right": 1.0}))


class OwnScore(vf.Rubric):
    async def score_rollout(self, state: Any, score_sem: Any) -> None:
        state["reward"] = 1.0


def own_score() -> vf.Environment:
    return vf.SingleTurnEnv(dataset=QUESTIONS, rubric=OwnScore())


def completion() -> vf.Environment:
    return vf.SingleTurnEnv(
        dataset=Dataset.from_list([{"prompt": "2+2=", "answer": "4"}]),
        message_type="completion",
        rubric=rubric({"right": 1.0}),
    )


def nothing() -> None:
    """Makes no environment."""
