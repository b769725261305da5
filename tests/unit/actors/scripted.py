"""An engine, a tokenizer and a scorer that a test writes down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from actors.config import SamplingConfig
from actors.continuation import Completion
from actors.environments import Environment, SingleTurn
from actors.errors import SampleError
from actors.rewards.gsm8k import gsm8k
from actors.rewards.pool import Verdict
from actors.rollout import Recipe
from buffer.admission import Lease
from buffer.schema import Prompt

LEASE = Lease("lease", "", "7:x", "0000-0000000041-01", 41, 1, 3, 5, Prompt(9, [5, 6], "#### 7"))


class ScriptedEngine:
    """Answers what the test wrote down, in order, and remembers what it was asked."""

    def __init__(self, *answers: Completion) -> None:
        self.answers, self.asked = list(answers), []

    async def generate(
        self, prompt: list[int], seeds: Sequence[int], sampling: SamplingConfig
    ) -> list[Completion]:
        self.asked.append((prompt, list(seeds), sampling))
        given, self.answers = self.answers[: len(seeds)], self.answers[len(seeds) :]
        return given


class Letters:
    """A token is the code of a character; above 1,000 stands the markup `<n>`, without text."""

    def encode(self, text: str, *, markup: bool = False) -> list[int]:
        return [1000 + ord(letter) if markup else ord(letter) for letter in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token) for token in tokens if token < 1000)


class Digits(Letters):
    """Reads every answer as `#### ` and its token ids."""

    def decode(self, tokens: Sequence[int]) -> str:
        return "#### " + "".join(map(str, tokens))


class Gsm8k:
    """Scores as GSM8K does, in this process; remembers what it read."""

    def __init__(self) -> None:
        self.read: list[tuple[str, int]] = []

    async def score(self, text: str, answer: str, tokens: int) -> Verdict:
        self.read.append((text, tokens))
        return Verdict(*gsm8k(text, answer))


class Refusing:
    """Has no verdict on texts that contain one of some strings."""

    def __init__(self, *refused: str) -> None:
        self._refused = refused

    async def score(self, text: str, answer: str, tokens: int) -> Verdict:
        if any(part in text for part in self._refused):
            raise SampleError("deadline", "no answer within 1 s")
        return Verdict(1.0, {})


def recipe(size: int, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "actor": "actor-0",
        "actor_epoch": 2,
        "run_seed": 11,
        "group_size": size,
        "sampling": SamplingConfig(temperature=0.7),
        "environment": SingleTurn(),
        "timeout_s": 5.0,
        "rewards": Gsm8k(),
        "text": Digits(),
        "invalid": Counter(),
    }
    return Recipe(**{**fields, **changes})


def said(text: str, label: str = "3:aa", finish: Any = "stop") -> Completion:
    """What the policy says, in `Letters`, with a log-probability of -index for each token."""
    tokens = [ord(letter) for letter in text]
    return Completion(tokens, [-float(index) for index in range(len(tokens))], finish, [(len(tokens), label)])


def environment(run: Callable[..., Any]) -> Environment:
    """An environment whose `run` is a function of (example, policy)."""

    class Written(Environment):
        async def run(self, example: Prompt, policy: Any) -> Any:
            return await run(example, policy)

    return Written()
