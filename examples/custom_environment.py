"""An environment of your own: guess a number; it says `higher` or `lower`, and awards everything.

In a run's TOML file, with this repository on the actors' PYTHONPATH:

    [rollout]
    reward = {}
    environment = { path = "examples.custom_environment:GuessTheNumber", arguments = { guesses = 6 } }

`python -m examples.custom_environment` plays a round.
"""

import asyncio
from collections.abc import Sequence

from actors.continuation import Completion
from actors.environments import Environment, Policy, Turn
from buffer.schema import Prompt


class GuessTheNumber(Environment):
    """The gold answer is the number; it earns 1.0 less 0.1 for each wrong guess. What the environment
    says is context, and never trained."""

    def __init__(self, *, guesses: int) -> None:
        self._guesses = guesses

    async def run(self, example: Prompt, policy: Policy) -> list[Turn]:
        turns: list[Turn] = []
        for wrong in range(self._guesses):
            said = [token for turn in turns for token in turn.tokens]
            turns.append(await policy.generate(example.tokens + said))
            guess = policy.read(turns[-1]).strip()
            if guess == example.answer:
                return [*turns, policy.write("", reward=1.0 - 0.1 * wrong)]
            over = guess.isdecimal() and int(guess) > int(example.answer)
            turns.append(policy.write(" lower " if over else " higher "))
        return turns


class Halving(Policy):  # stands in for a model: its tokens are numbers, and it halves the interval
    def __init__(self) -> None:
        self._low, self._high, self._guess = 0, 100, 0

    async def generate(self, context: Sequence[int]) -> Turn:
        self._guess = (self._low + self._high) // 2
        return Turn([self._guess], Completion([self._guess], [-1.0], "stop", [(1, "0:demo")]))

    def write(self, text: str, *, markup: bool = False, reward: float | None = None) -> Turn:
        lower = text.strip() == "lower"
        self._low, self._high = (self._low, self._guess) if lower else (self._guess, self._high)
        print(f"policy {self._guess}, environment {text.strip()!r}, award {reward}")
        return Turn([], reward=reward)

    def read(self, turn: Turn) -> str:
        return str(turn.tokens[0])


if __name__ == "__main__":
    asyncio.run(GuessTheNumber(guesses=6).run(Prompt(0, [], "37"), Halving()))
