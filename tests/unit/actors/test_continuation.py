"""Answers that are interrupted: no token lost, none twice, each under the label of its version."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.config import SamplingConfig
from actors.continuation import FRUITLESS, Ask, Completion, Part, complete
from actors.errors import EngineError

END = 99
PROMPT = [5, 6]


def token(label: str, seed: int, position: int) -> int:
    """The token that a version draws at a position of a sequence; never `END` below position 12."""
    return END if position == 12 else (len(label) * 31 + ord(label[0]) * 7 + seed * 5 + position * 3) % 50


class Interrupted:
    """An engine that ends each call after some tokens, and serves another version from the next one on."""

    def __init__(self, *script: tuple[int, str]) -> None:
        """`script`: for each call, the tokens it lasts and the label it serves; the last one is endless."""
        self.script, self.asked = list(script), []

    async def __call__(self, asks: list[Ask]) -> list[Part]:
        self.asked.append(asks)
        lasts, label = self.script.pop(0) if len(self.script) > 1 else (10**6, self.script[0][1])
        return [self._part(ask, lasts, label) for ask in asks]

    def _part(self, ask: Ask, lasts: int, label: str) -> Part:
        tokens: list[int] = []
        while True:
            if len(tokens) == lasts:
                return Part(tokens, [-float(one) for one in tokens], "abort", [(len(tokens), label)])
            tokens.append(token(label, ask.seed, len(ask.context) + len(tokens)))
            if len(tokens) == lasts:  # as in SGLang, an abort hides that the answer has just ended
                return Part(tokens, [-float(one) for one in tokens], "abort", [(len(tokens), label)])
            if tokens[-1] == END or len(tokens) == ask.max_new_tokens:
                reason = "stop" if tokens[-1] == END else "length"
                return Part(tokens, [-float(one) for one in tokens], reason, [(len(tokens), label)])


async def answers(engine: Interrupted, seeds: Sequence[int], **sampling: object) -> list[Completion]:
    return await complete(engine, PROMPT, seeds, SamplingConfig(**sampling), {END})  # type: ignore[arg-type]


async def test_the_worked_example() -> None:
    engine = Interrupted((2, "3:aa"), (0, "4:bb"))
    (answer,) = await answers(engine, [1], max_new_tokens=4)
    first = [token("3:aa", 1, position) for position in (2, 3)]
    assert answer.tokens == first + [token("4:bb", 1, position) for position in (4, 5)]
    assert answer.labels == [(2, "3:aa"), (2, "4:bb")]
    assert answer.finish_reason == "length"
    assert engine.asked == [[Ask(PROMPT, 1, 4)], [Ask(PROMPT + first, 1, 2)]]


LABELS = st.sampled_from(["1:a", "2:b", "3:c"])


@given(
    script=st.lists(st.tuples(st.integers(0, 6), LABELS), min_size=1, max_size=8),
    room=st.integers(1, 20),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=4),
)
async def test_every_token_is_drawn_once_under_the_version_served_then(script, room, seeds) -> None:
    for seed, answer in zip(
        seeds, await answers(Interrupted(*script), seeds, max_new_tokens=room), strict=True
    ):
        by = [label for lasts, label in script[:-1] for _ in range(lasts)]
        by = [*by, *[script[-1][1]] * room]
        expected = [token(label, seed, 2 + place) for place, label in enumerate(by[:room])]
        if END in expected:
            expected = expected[: expected.index(END) + 1]
        assert answer.tokens == expected
        assert answer.logprobs == [-float(one) for one in expected]
        assert answer.finish_reason == ("stop" if expected[-1] == END else "length")
        assert [label for length, label in answer.labels for _ in range(length)] == by[: len(expected)]
        assert all(one[1] != other[1] for one, other in zip(answer.labels, answer.labels[1:], strict=False))


async def test_only_unfinished_answers_are_asked_for_again() -> None:
    calls = [
        [Part([1], [-1.0], "stop", [(1, "1:a")]), Part([2], [-2.0], "abort", [(1, "1:a")])],
        [Part([3, 4], [-3.0, -4.0], "stop", [(1, "1:a"), (1, "2:b")])],
    ]
    asked: list[list[Ask]] = []

    async def generate(asks: list[Ask]) -> list[Part]:
        asked.append(asks)
        return calls[len(asked) - 1]

    whole, interrupted = await complete(generate, PROMPT, [7, 8], SamplingConfig(max_new_tokens=5), set())
    assert asked[1] == [Ask([*PROMPT, 2], 8, 4)]
    assert whole == Completion([1], [-1.0], "stop", [(1, "1:a")])
    labels = [(2, "1:a"), (1, "2:b")]  # the server itself saw new weights come in the second part
    assert interrupted == Completion([2, 3, 4], [-2.0, -3.0, -4.0], "stop", labels)


async def test_an_end_that_the_abort_hid_is_an_end_unless_it_is_to_be_ignored() -> None:
    engine = Interrupted((11, "1:a"), (0, "2:b"))
    (answer,) = await answers(engine, [1], max_new_tokens=30)
    assert (answer.tokens[-1], answer.finish_reason, answer.labels) == (END, "stop", [(11, "1:a")])
    assert len(engine.asked) == 1
    (answer,) = await answers(
        Interrupted((11, "1:a"), (5, "2:b"), (0, "3:c")), [1], max_new_tokens=13, ignore_eos=True
    )
    assert (len(answer.tokens), answer.finish_reason) == (13, "length")


async def test_answers_that_somebody_ends_again_and_again_are_given_up() -> None:
    engine = Interrupted(*[(0, "1:a")] * (FRUITLESS + 1))
    with pytest.raises(EngineError, match=f"ended {FRUITLESS} times in a row without a token"):
        await answers(engine, [1])
    engine = Interrupted(
        *[(0, "1:a")] * (FRUITLESS - 1), (1, "1:a"), *[(0, "1:a")] * (FRUITLESS - 1), (9, "1:a")
    )
    (answer,) = await answers(engine, [1], max_new_tokens=3)
    assert len(answer.tokens) == 3
