"""Turns laid end to end: every token where it was, its mask, its log-probability, its version."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.continuation import Completion
from actors.environments.base import Turn
from actors.errors import SampleError
from actors.trajectory import lay_out


def own(tokens: list[int], label: str = "3:aa", finish: Any = "stop") -> Turn:
    """A turn of the policy's, with minus each token as its log-probability."""
    labels = [(len(tokens), label)] if tokens else []
    return Turn(tokens, Completion(tokens, [-float(token) for token in tokens], finish, labels))


def test_a_conversation_with_a_tool() -> None:
    turns = [own([7, 8]), Turn([40], reward=0.5), Turn([41]), own([9], "4:bb", "length"), Turn([50])]
    path = lay_out([5, 6], turns)
    assert (path.tokens, path.prompt_length) == ([5, 6, 7, 8, 40, 41, 9], 2)
    assert path.logprobs == [-7.0, -8.0, 0.0, 0.0, -9.0]
    assert path.loss_runs == [2, 2, 1]
    assert path.labels == [(4, "3:aa"), (1, "4:bb")]
    assert (path.finish_reason, path.final, path.trained, path.award) == ("length", [9], 3, 0.5)
    sample = path.sample(1.0, {"a": 1.0}, {"3:aa": 1, "4:bb": 0})
    assert sample.loss_mask().tolist() == [True, True, False, False, True]
    assert [(span.length, span.version) for span in sample.spans] == [(4, 1), (1, 0)]
    assert (sample.tokens.dtype, sample.logprobs.dtype) == (np.int32, np.float32)


def test_one_version_is_one_span_and_an_answer_alone_has_no_mask() -> None:
    path = lay_out([5], [own([7]), own([8])])
    assert (path.loss_runs, path.labels, path.award) == ([2], [(2, "3:aa")], None)


def test_what_an_environment_says_first_is_prompt() -> None:
    path = lay_out([5], [Turn([40, 41]), own([7])])
    assert (path.tokens, path.prompt_length, path.loss_runs) == ([5, 40, 41, 7], 3, [1])


def test_an_empty_answer_has_no_run_and_no_version() -> None:
    path = lay_out([5], [own([], "")])
    assert (path.tokens, path.loss_runs, path.labels, path.logprobs) == ([5], [], [], [])
    path = lay_out([5], [own([7]), Turn([40]), own([], "", "length")])
    assert (path.tokens, path.loss_runs, path.labels) == ([5, 7], [1], [(1, "3:aa")])
    assert (path.final, path.finish_reason) == ([], "length")


def test_a_conversation_in_which_the_policy_says_nothing_is_none() -> None:
    with pytest.raises(SampleError, match="returned 1 turns, expected one of the policy's"):
        lay_out([5], [Turn([40])])


def test_tokens_of_the_policy_stay_as_drawn() -> None:
    turn = Turn([7, 9], own([7, 8]).completion)
    with pytest.raises(SampleError, match="changed the tokens of the policy's turn"):
        lay_out([5], [turn])


@pytest.mark.parametrize("tokens", [[40, 1.5], ["a"], [-1], [1 << 31]])
def test_an_environment_writes_token_ids(tokens: list[int]) -> None:
    assert lay_out([5], [own([7]), Turn([np.int64(40)]), own([8])]).tokens == [5, 7, 40, 8]
    for turns in ([own([7]), Turn(tokens), own([8])], [Turn(tokens), own([7])]):
        with pytest.raises(SampleError, match=r"got tokens \[.*, expected ids from 0"):
            lay_out([5], turns)


authors = st.lists(st.tuples(st.booleans(), st.lists(st.integers(1, 99), max_size=4), st.sampled_from("ab")))


@given(authors, st.lists(st.integers(1, 99), max_size=3))
def test_any_conversation_is_whole(script: list[tuple[bool, list[int], str]], last: list[int]) -> None:
    """Against a table with one row a token."""
    turns = [own(tokens, label) if policy else Turn(tokens) for policy, tokens, label in script]
    path = lay_out([5, 6], [*turns, own(last, "a")])
    whole = [
        (token, policy, label if policy else None)
        for policy, tokens, label in [*script, (True, last, "a")]
        for token in tokens
    ]
    drawn = [index for index, (_, policy, _) in enumerate(whole) if policy]
    opening = whole[: drawn[0]] if drawn else []
    rows = whole[drawn[0] : drawn[-1] + 1] if drawn else []
    assert path.tokens == [5, 6, *(token for token, _, _ in [*opening, *rows])]
    assert path.prompt_length == 2 + len(opening)
    assert path.logprobs == [-float(token) if policy else 0.0 for token, policy, _ in rows]
    labels = sorted({label for _, label in path.labels})
    sample = path.sample(0.0, {}, {label: index for index, label in enumerate(labels)})
    assert sample.loss_mask().tolist() == [policy for _, policy, _ in rows]
    written = [label for length, label in path.labels for _ in range(length)]
    assert len(written) == len(rows)
    assert all(label in (None, got) for (_, _, label), got in zip(rows, written, strict=True))
    assert all(one != other for (_, one), (_, other) in pairwise(path.labels))
