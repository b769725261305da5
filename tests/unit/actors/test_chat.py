"""Conversations in messages: what is written as tokens, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from actors.config import SamplingConfig
from actors.environments.chat import Chat, ChatFormat, message_of, split
from actors.environments.policy import Batcher, Policy
from actors.environments.tool_use import ToolCall
from actors.errors import SampleError
from tests.unit.actors.scripted import Letters, ScriptedEngine, said

FORM = ChatFormat(messages={"user": "U:{content};", "tool": "T:{content};"}, opening="A:", after="|")
ASKED = [{"role": "user", "content": "2+2?"}]


def chat(*answers: str, room: int = 100) -> tuple[Chat, ScriptedEngine]:
    engine = ScriptedEngine(*map(said, answers))
    policy = Policy(Batcher(engine), lambda turn: turn, SamplingConfig(max_new_tokens=room), 2, Letters())
    return Chat(policy, [5, 6], ASKED, FORM), engine


def shown(tokens: list[int]) -> str:
    """Letters, markup in capitals."""
    return "".join(chr(token) if token < 1000 else f"{{{chr(token - 1000)}}}" for token in tokens)


def assistant(content: str, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


async def test_the_policys_turns_stay_and_what_follows_is_written_once() -> None:
    talk, engine = chat("4", "yes", "5")
    assert await talk.reply(ASKED) == ("4", [])
    told = [*ASKED, assistant("4"), {"role": "user", "content": "sure?"}]
    assert await talk.reply(told) == ("yes", [])
    parts: Any = [{"type": "text", "text": "o"}, {"type": "text", "text": "k"}]
    await talk.reply(
        [*told, assistant("yes"), {"role": "tool", "content": "1"}, {"role": "user", "content": parts}]
    )
    contexts = [shown(asked[0][2:]) for asked in engine.asked]
    assert contexts == [
        "",
        "4{|}{U}{:}sure?{;}{A}{:}",
        "4{|}{U}{:}sure?{;}{A}{:}yes{|}{T}{:}1{;}{U}{:}ok{;}{A}{:}",
    ]
    assert [token for turn in talk.turns for token in turn.tokens][:-1] == engine.asked[2][0][2:]
    assert [turn.completion is not None for turn in talk.turns].count(True) == 3


async def test_calls_are_taken_from_the_policys_text_and_its_tokens_stay() -> None:
    call = 'hm<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    talk, engine = chat(call, "2")
    assert await talk.reply(ASKED, tools=True) == ("hm", [ToolCall("add", {"a": 1})])
    await talk.reply([*ASKED, assistant("hm", tool_calls=[{}]), {"role": "tool", "content": "1"}], tools=True)
    assert shown(engine.asked[1][0][2:]) == f"{call}{{|}}{{T}}{{:}}1{{;}}{{A}}{{:}}"
    talk, _ = chat(call)
    assert await talk.reply(ASKED) == (call, [])


def test_a_text_with_a_call_that_is_none_is_a_text() -> None:
    two = '<tool_call>{"name": "a"}</tool_call>\n<tool_call>{"name": "b"}</tool_call>'
    assert split(two) == ("", [ToolCall("a"), ToolCall("b")])
    assert split(two + "<tool_call>c</tool_call>") == (two + "<tool_call>c</tool_call>", [])
    assert split('<tool_call>{"name": "a"}') == ('<tool_call>{"name": "a"}', [])


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([assistant("4")], r"message 0 of the conversation was Message\(role='user', content='2\+2\?'\)"),
        ([*ASKED, assistant("5")], "message 1 .* content='4'.*, is .*content='5'"),
        (ASKED, "message 1 .* is None"),
        (
            [*ASKED, assistant("4"), {"role": "critic", "content": "?"}],
            "got 'critic', expected one of user, tool",
        ),
        (
            [*ASKED, assistant("4"), {"role": "user", "content": [{"type": "image_url"}]}],
            "parts of type image_url, expected text alone",
        ),
    ],
)
async def test_what_is_said_cannot_be_changed(told: Any, message: str) -> None:
    talk, _ = chat("4", "5")
    await talk.reply(ASKED)
    with pytest.raises(SampleError, match=message) as raised:
        await talk.reply(told)
    assert raised.value.cause == "environment"


async def test_the_prompt_is_the_learners() -> None:
    for told in ([], [*ASKED, *ASKED]):
        talk, _ = chat("4")
        with pytest.raises(SampleError, match=r"message [01] of the conversation was"):
            await talk.reply(told)


async def test_without_room_the_turn_is_empty() -> None:
    talk, _ = chat("4", room=4)
    await talk.reply(ASKED)
    assert await talk.reply([*ASKED, assistant("4"), {"role": "user", "content": "sure?"}]) == ("", [])
    assert (talk.turns[-1].tokens, talk.finish_reason) == ([], "length")


def test_a_message_has_a_content_and_a_form_has_a_place_for_it() -> None:
    assert message_of({"role": "assistant", "content": None}).content == ""
    with pytest.raises(ValueError, match=r"messages.user: got 'U:', expected one {content} in it"):
        ChatFormat(messages={"user": "U:"})
