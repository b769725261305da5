"""The policy as an environment sees it: token ids in, a turn out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from actors.config import Sampling
from actors.continuation import Completion
from actors.environments.base import Turn
from actors.errors import EngineError


class Generator(Protocol):
    """What generates: `actors.engine.Engine`."""

    async def generate(self, prompt: list[int], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        """One answer a seed, in their order."""
        ...


class Text(Protocol):
    """Text and token ids: `actors.environments.text.Tokens`."""

    def encode(self, text: str, *, markup: bool = False) -> list[int]:
        """Ids of a text; `markup`: strings such as `<|im_end|>` become the special tokens they name."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        ...


class Batcher:
    """Requests that are made in the same turn of the event loop and continue the same tokens, in one call.

    The G samples of a prompt begin so: the engine gets one list instead of G requests.
    Lifecycle: `ask` any number of times, then `close`, which gives up what is under way.
    """

    def __init__(self, engine: Generator) -> None:
        self._engine = engine
        self._waiting: dict[tuple[tuple[int, ...], int], _Batch] = {}
        self._calls: set[asyncio.Task[None]] = set()

    async def ask(self, context: list[int], seed: int, sampling: Sampling) -> Completion:
        """The completion of `context`. Raises `EngineError`."""
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._send)
        key = (tuple(context), sampling.max_new_tokens)
        batch = self._waiting.setdefault(key, _Batch(context, sampling, [], []))
        batch.seeds.append(seed)
        batch.answers.append(answer)
        return await answer

    async def close(self) -> None:
        """Cancels the calls under way."""
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def _send(self) -> None:
        for batch in self._waiting.values():
            call = asyncio.create_task(self._call(batch))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        self._waiting = {}

    async def _call(self, batch: _Batch) -> None:
        try:
            completions = await self._engine.generate(batch.context, batch.seeds, batch.sampling)
            if len(completions) != len(batch.seeds):
                problem = f"got {len(completions)} answers, expected {len(batch.seeds)}"
                raise EngineError(f"generate: {problem}; one for each seed")
        except Exception as error:  # noqa: BLE001 - raised again where each sample waits
            for answer in batch.answers:
                if not answer.done():
                    answer.set_exception(error)
            return
        for answer, completion in zip(batch.answers, completions, strict=True):
            if not answer.done():
                answer.set_result(completion)


class _Batch(msgspec.Struct):
    """One call to be: a context and a seed and future for each sample that waits."""

    context: list[int]
    """Token ids that all of them share."""
    sampling: Sampling
    """Its token limit is what room is left behind the context."""
    seeds: list[int]
    """One a sample."""
    answers: list[asyncio.Future[Completion]]
    """In the order of the seeds."""


class Policy:
    """The policy, for one sample.

    `rollout.sampling.max_new_tokens` bounds the whole answer, whoever wrote its tokens: an environment
    cannot make a sequence longer than a single turn can.
    """

    def __init__(
        self,
        batcher: Batcher,
        seed: Callable[[int], int],
        sampling: Sampling,
        prompt_length: int,
        text: Text,
    ) -> None:
        """`seed` gives the seed of the policy's n-th turn, from 0."""
        self._batcher, self._seed, self._sampling = batcher, seed, sampling
        self._prompt_length, self._text, self._turn = prompt_length, text, 0

    def room(self, context: Sequence[int]) -> int:
        """How many tokens may follow `context`, at least 0."""
        return max(0, self._sampling.max_new_tokens - (len(context) - self._prompt_length))

    async def generate(self, context: Sequence[int]) -> Turn:
        """The policy's turn after `context`, which is the prompt and all turns so far.

        Without room left the turn is empty and its finish reason `length`. Raises `EngineError`, which an
        environment lets pass.
        """
        room = self.room(context)
        if room == 0:
            return Turn([], Completion([], [], "length", []))
        sampling = self._sampling
        if room < sampling.max_new_tokens:
            sampling = msgspec.structs.replace(sampling, max_new_tokens=room)
        completion = await self._batcher.ask(list(context), self._seed(self._turn), sampling)
        self._turn += 1
        return Turn(completion.tokens, completion)

    def write(self, text: str, *, markup: bool = False, reward: float | None = None) -> Turn:
        """A turn of the environment's. Only with `markup` does a text such as `<|im_end|>` become the
        special token of that name: leave it off for what a tool or a user said."""
        return Turn(self._text.encode(text, markup=markup), reward=reward)

    def read(self, turn: Turn) -> str:
        """The text of a turn, special tokens left out."""
        return self._text.decode(turn.tokens)
