"""Answers that outlive the weights which began them.

Before it takes new weights an engine ends what it is generating, and hands over the tokens so far. The
answer then goes on from prompt and tokens under the new weights. Each part keeps its log-probabilities
and the label of the version that wrote it.

Worked example: prompt ``[5, 6]``, at most 4 tokens, new weights in mid-answer::

    asked [5, 6], at most 4       got [7, 8], ended by abort, label "3:aa"
    asked [5, 6, 7, 8], at most 2 got [9], ended by stop, label "4:bb"
    the answer                    [7, 8, 9], stop, labels [(2, "3:aa"), (1, "4:bb")]

The seed stays the same: a drawn number is a function of the seed and the position in the sequence, and
each position is drawn once. So an answer that is interrupted without new weights comes out as if it
had not been. Of routed experts each part adds those of its own tokens' predictors: in the example the
first part's of 5, 6, 7, the second's of 8.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Literal

import msgspec
import numpy as np

from actors.config import Sampling
from actors.errors import EngineError

FRUITLESS = 20
"""So many times in a row an answer may be ended without a token; then somebody else ends the requests."""


class Completion(msgspec.Struct, frozen=True):
    """One answer."""

    tokens: list[int]
    """Token ids; an end-of-sequence or stop token that ended the answer is the last of them."""
    logprobs: list[float]
    """Log-probability of each token over the full vocabulary, after temperature, under the version that
    wrote it."""
    finish_reason: Literal["stop", "length"]
    """`stop`: an end-of-sequence or stop token; `length`: the token limit."""
    labels: list[tuple[int, str]]
    """Runs of tokens and the label of the version that wrote them; lengths sum to that of `tokens`,
    neighbours differ."""
    routed: np.ndarray | None = None
    """uint16 [T - 1, L, k], T with the prompt: the experts that each token but the last was sent to, when the
    token after it was drawn; None: not asked for."""


class Part(msgspec.Struct, frozen=True):
    """What one call generated of an answer."""

    tokens: list[int]
    """Ids of what it added."""
    logprobs: list[float]
    """Of each of them, nats."""
    finish_reason: Literal["stop", "length", "abort"]
    """`abort`: ended before its time, to be continued."""
    labels: list[tuple[int, str]]
    """As in `Completion`."""
    routed: np.ndarray | None = None
    """uint16 [T - 1, L, k], T with the context: experts of each token; None: not asked for."""


class Ask(msgspec.Struct, frozen=True):
    """What one call is to generate of an answer."""

    context: list[int]
    """Prompt and the tokens so far."""
    seed: int
    """Of the draws; the same for all parts of an answer."""
    max_new_tokens: int
    """How many tokens are still allowed, at least 1."""


Generate = Callable[[list[Ask]], Awaitable[list[Part]]]
"""One call of the engine, a part for each ask."""


async def complete(
    generate: Generate,
    prompt: list[int],
    seeds: Sequence[int],
    sampling: Sampling,
    ends: Collection[int],
) -> list[Completion]:
    """Answers one prompt once for each seed, through any number of interruptions; in the order of seeds.

    `ends`: the tokens that end an answer. Raises `EngineError`.
    """
    last = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else ends)}
    drafts = [_Draft(prompt, seed, sampling.max_new_tokens, last) for seed in seeds]
    while unfinished := [draft for draft in drafts if not draft.finish_reason]:
        parts = await generate([draft.ask() for draft in unfinished])
        for draft, part in zip(unfinished, parts, strict=True):
            draft.add(part)
    return [draft.completion() for draft in drafts]


class _Draft:
    """One answer under way."""

    def __init__(self, prompt: list[int], seed: int, most: int, ends: set[int]) -> None:
        self._prompt, self._seed, self._most, self._ends = prompt, seed, most, ends
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._labels: list[tuple[int, str]] = []
        self._routed: list[np.ndarray] = []
        self._fruitless = 0
        self.finish_reason: Literal["stop", "length", ""] = ""
        """Empty while it is to go on."""

    def ask(self) -> Ask:
        return Ask(self._prompt + self._tokens, self._seed, self._most - len(self._tokens))

    def add(self, part: Part) -> None:
        self._tokens += part.tokens
        self._logprobs += part.logprobs
        for length, label in part.labels:
            self._label(length, label)
        if part.tokens and part.routed is not None:
            # What went before was fed again, to newer weights; what counts is when its token was drawn.
            self._routed.append(part.routed[sum(map(len, self._routed)) :])
        if part.finish_reason != "abort":
            self.finish_reason = part.finish_reason
        elif part.tokens and part.tokens[-1] in self._ends:
            # SGLang looks for an abort before it looks for the end of the answer.
            self.finish_reason = "stop"
        elif len(self._tokens) >= self._most:
            self.finish_reason = "length"
        self._fruitless = 0 if part.tokens or self.finish_reason else self._fruitless + 1
        if self._fruitless == FRUITLESS:
            raise EngineError(
                f"an answer was ended {FRUITLESS} times in a row without a token; does somebody else send "
                "/abort_request to this engine?"
            )

    def completion(self) -> Completion:
        assert self.finish_reason
        routed = np.concatenate(self._routed) if self._routed else None
        return Completion(self._tokens, self._logprobs, self.finish_reason, self._labels, routed)

    def _label(self, length: int, label: str) -> None:
        if self._labels and self._labels[-1][1] == label:
            length += self._labels.pop()[0]
        if length:
            self._labels.append((length, label))
