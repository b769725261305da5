"""Routed experts from the engine's answer to the record: each row as its next token was drawn."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.answers import expert_layers, routed_experts
from actors.config import EngineConfig, SamplingConfig
from actors.continuation import Ask, Completion, Part, complete
from actors.environments.base import Turn
from actors.errors import EngineError, SampleError
from actors.server import command
from actors.trajectory import lay_out

PROMPT = [5, 6, 7]
FLAGS = {"--enable-return-routed-experts", "--disable-shared-experts-fusion"}


def rows(version: int, tokens: int) -> np.ndarray:
    """What version v says of a sequence: v * 1000 + place, for each of its tokens but the last."""
    return (1000 * version + np.arange(tokens - 1)).astype(np.uint16).reshape(-1, 1, 1)


class Interrupted:
    """Ends each call after so many tokens, and serves the next version from then on."""

    def __init__(self, lasts: list[int]) -> None:
        self.lasts, self.version = lasts, 0

    async def __call__(self, asks: list[Ask]) -> list[Part]:
        self.version += 1
        lasts = self.lasts.pop(0) if self.lasts else 1000
        return [self._part(ask, min(lasts, ask.max_new_tokens)) for ask in asks]

    def _part(self, ask: Ask, count: int) -> Part:
        reason = "length" if count == ask.max_new_tokens else "abort"
        routed = rows(self.version, len(ask.context) + count) if count else None
        return Part([1] * count, [-1.0] * count, reason, [(count, f"{self.version}:a")], routed)


@given(lasts=st.lists(st.integers(0, 5), max_size=6), room=st.integers(1, 16))
async def test_a_row_is_of_the_version_that_drew_the_token_after_it(lasts: list[int], room: int) -> None:
    (answer,) = await complete(Interrupted(lasts), PROMPT, [0], SamplingConfig(max_new_tokens=room), ())
    assert answer.routed is not None
    drawn = [int(label.partition(":")[0]) for length, label in answer.labels for _ in range(length)]
    versions = [drawn[0]] * (len(PROMPT) - 1) + drawn
    expected = [1000 * version + place for place, version in enumerate(versions)]
    assert answer.routed[:, 0, 0].tolist() == expected
    assert len(answer.routed) == len(PROMPT) + room - 1


async def test_an_engine_that_returns_none_gives_none() -> None:
    async def generate(asks: list[Ask]) -> list[Part]:
        return [Part([1], [-1.0], "stop", [(1, "1:a")]) for _ in asks]

    (answer,) = await complete(generate, PROMPT, [0], SamplingConfig(), ())
    assert answer.routed is None


def own(version: int, tokens: list[int], context: int) -> Turn:
    routed = rows(version, context + len(tokens)) if tokens else None
    labels = [(len(tokens), f"{version}:a")] if tokens else []
    return Turn(tokens, Completion(tokens, [-1.0] * len(tokens), "stop", labels, routed))


def test_a_conversation_takes_each_row_from_the_turn_that_went_on_from_it() -> None:
    turns = [Turn([20]), own(1, [8, 9], 4), Turn([40, 41]), own(2, [10], 8), Turn([50]), own(2, [], 10)]
    path = lay_out(PROMPT, turns)
    assert path.tokens == [5, 6, 7, 20, 8, 9, 40, 41, 10]
    assert path.routed[:, 0, 0].tolist() == [1000, 1001, 1002, 1003, 1004, 2005, 2006, 2007]
    sample = path.sample(0.0, {}, {"1:a": 0, "2:a": 1})
    assert sample.routed is path.routed
    assert lay_out(PROMPT, [Turn([8], Completion([8], [-1.0], "stop", [(1, "1:a")]))]).routed is None


def test_a_turn_after_something_else_than_the_conversation_is_refused() -> None:
    with pytest.raises(SampleError, match=r"a turn after 4 tokens, where its turns have 6; routed experts"):
        lay_out(PROMPT, [own(1, [8], 3), Turn([40, 41]), own(1, [9], 4)])


def encoded(values: object) -> str:
    return base64.b64encode(np.array(values, np.int32).tobytes()).decode()


def test_an_engine_s_answer_is_read() -> None:
    found = routed_experts(encoded([[[1, 2]], [[511, 0]]]), (1, 2), 3)
    assert (found.dtype, found.tolist()) == (np.uint16, [[[1, 2]], [[511, 0]]])


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("", "got 0 routed experts, expected 2 x 1 x 2"),
        (encoded([1, 2, 3]), "got 3 routed experts, expected 2 x 1 x 2"),
        (encoded([1, 2, -1, 4]), "got experts -1 to 4, expected 0 to 65535"),
        (encoded([1, 2, 1 << 16, 4]), "got experts 1 to 65536"),
        ("no base64!", "base64|Non-base64|padding"),
    ],
)
def test_an_answer_that_lacks_them_is_refused(answer: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        routed_experts(answer, (1, 2), 3)


def test_a_model_says_how_many_there_are(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 4, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert expert_layers(tmp_path) == (4, 2)
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    with pytest.raises(EngineError, match=r"no num_experts_per_tok.*set objective.routing_replay to false"):
        expert_layers(tmp_path)


def test_the_server_is_asked_for_them_on_demand_only() -> None:
    for routed in (False, True):
        line = command(Path("m"), EngineConfig(), port=1, seed=2, load_format="dummy", routed=routed)
        assert FLAGS & set(line) == (FLAGS if routed else set())
