"""Environments: what the policy is asked, what tools do, what the tokens are."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from actors.config import EnvironmentConfig, SamplingConfig
from actors.continuation import Completion
from actors.environments import SingleTurn, ToolUse
from actors.environments.base import Environment, load_environment
from actors.environments.policy import Batcher, Policy
from actors.environments.text import Tokens
from actors.errors import EngineError, LoadError, ToolError
from actors.limited.tools import calculator, python
from actors.rollout import request_seed, rollout
from buffer.codec import decode, encode
from buffer.schema import Prompt
from launch.tiny_model import EOS, EOS_ID, make_tiny_qwen3
from tests.unit.actors.scripted import LEASE, Gsm8k, Letters, ScriptedEngine, environment, recipe, said

LETTERS = Letters()


@pytest.fixture(scope="module")
async def tools() -> AsyncIterator[ToolUse]:
    """The tools that ship, in the short form: `[2+3]`."""
    made = ToolUse(opening="[", closing="]", bare="calculator", before="<", after=">", limits={"workers": 1})
    yield made
    await made.close()


def policy(engine: Any, room: int = 64) -> Policy:
    sampling = SamplingConfig(max_new_tokens=room)
    return Policy(Batcher(engine), lambda turn: 100 + turn, sampling, 2, LETTERS)


async def converse(tools: ToolUse, *answers: str, room: int = 64) -> str:
    """The conversation as text; markup of the environment's in capitals of its code."""
    engine = ScriptedEngine(*map(said, answers))
    turns = await tools.run(Prompt(0, [5, 6], ""), policy(engine, room))
    marks = {1000 + ord("<"): "{", 1000 + ord(">"): "}"}
    return "".join(marks.get(token) or chr(token) for turn in turns for token in turn.tokens)


def test_without_their_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers", None)
    config = EnvironmentConfig(
        path="actors.environments.verifiers:Verifiers", arguments={"environment": "a:b"}
    )
    with pytest.raises(LoadError, match=r"environment: .*; install the extra: slipstream\[verifiers\]"):
        load_environment(config)


async def test_a_tool_answers_where_the_policy_calls(tools: ToolUse) -> None:
    assert await converse(tools, "[2+3]", "#### 5") == "[2+3]{5}#### 5"
    assert await converse(tools, "I add [2+3] ", "[5*2]", "ten") == "I add [2+3] {5}[5*2]{10}ten"
    assert await converse(tools, "[2+3] is 5") == "[2+3] is 5"
    assert await converse(tools, "2+3]") == "2+3]"


async def test_what_goes_wrong_in_a_tool_is_told_to_the_policy(tools: ToolUse) -> None:
    assert await converse(tools, "[1/0]", "oh", room=200) == (
        f"[1/0]{{error: raised: ZeroDivisionError: division by zero (tools.py:{line_of('BINARY[type')})}}oh"
    )
    assert "{error: raised: got 'a', expected numbers" in await converse(tools, "[a+1]", "oh", room=200)
    assert "{error: raised: SyntaxError" in await converse(tools, "[1+]", "oh", room=200)


def line_of(code: str) -> int:
    from actors.limited import tools as module

    lines = Path(module.__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if code in line)


async def test_a_conversation_ends_after_max_turns_or_without_room(tools: ToolUse) -> None:
    assert await converse(tools, *["[1+1]"] * 9) == "[1+1]{2}[1+1]{2}[1+1]{2}[1+1]"
    assert await converse(tools, "[1+1]", "not asked", room=8) == "[1+1]{2}"
    assert await converse(tools, "[1+1]", "not asked", room=5) == "[1+1]"
    engine = ScriptedEngine(said("[1+1]"), said("2"))
    await tools.run(Prompt(0, [5, 6], ""), policy(engine, 10))
    assert [asked[2].max_new_tokens for asked in engine.asked] == [10, 2]


async def test_a_tool_that_hangs_or_floods_costs_its_call_alone() -> None:
    """Only what hangs meets a deadline; what ends by itself has one that it cannot meet on a busy machine."""

    async def output(tools: ToolUse, code: str) -> str:
        call = f'<tool_call>{{"name": "python", "arguments": {{"code": "{code}"}}}}</tool_call>'
        turns = await tools.run(Prompt(0, [5, 6], ""), policy(ScriptedEngine(said(call), said("")), 1000))
        return LETTERS.decode(turns[2].tokens)

    hasty = ToolUse(limits={"workers": 1, "deadline_s": 0.5})
    for _ in range(2):
        assert await output(hasty, "while True: pass") == "error: deadline: no answer within 0.5 s"
    await hasty.close()

    tools = ToolUse(limits={"workers": 1, "deadline_s": 120.0}, output_characters=150)
    assert await output(tools, "while True: print(0)") == "0\n" * 75
    stubborn = r"while True:\n try: print(0, flush=True)\n except OSError: pass"
    assert await output(tools, stubborn) == "0\n" * 75
    assert await output(tools, "x = 'y' * (1 << 30)") == (
        'Traceback (most recent call last):\n  File "<string>", line 1, in <module>\nMemoryError\n'
    )
    assert "NameError: name 'x' is not defined" in (await output(tools, "print(x)"))
    assert await output(tools, "print(7)") == "7\n"
    await tools.close()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("{", "error: no tool call: "),
        ('{"name": "plough"}', "error: raised: no tool 'plough', there are calculator, python"),
        ('{"name": "calculator", "arguments": {"x": "1"}}', "error: raised: TypeError"),
        ('{"name": "calculator", "arguments": {"expression": "2*(3+4)"}}', "14"),
    ],
)
async def test_calls_as_qwen_and_hermes_write_them(call: str, told: str) -> None:
    tools = ToolUse(limits={"workers": 1})
    engine = ScriptedEngine(said(f"<tool_call>{call}</tool_call>"), said("#### 14"))
    turns = await tools.run(Prompt(0, [5, 6], ""), policy(engine, 1000))
    assert LETTERS.decode(turns[2].tokens).startswith(told)
    await tools.close()


async def test_the_group_masks_what_tools_say_and_asks_with_the_very_tokens(tools: ToolUse) -> None:
    engine = ScriptedEngine(said("[3+4]"), said("#### 1", "4:bb"), said("#### 7", "4:bb"))
    rewards = Gsm8k()
    group = await rollout(engine, LEASE, recipe(2, environment=tools, text=LETTERS, rewards=rewards))
    called = [5, 6, *LETTERS.encode("[3+4]"), *LETTERS.encode("<", markup=True), ord("7"), 1000 + ord(">")]
    assert [asked[:2] for asked in engine.asked] == [
        ([5, 6], [request_seed(11, 41, 1, 0), request_seed(11, 41, 1, 1)]),
        (called, [request_seed(11, 41, 1, 0, 1)]),
    ]
    first, second = group.samples
    assert first.tokens.tolist() == [*called, *LETTERS.encode("#### 7")]
    assert first.loss_runs == [5, 3, 6]
    assert [(span.length, group.versions[span.version].number) for span in first.spans] == [(8, 3), (6, 4)]
    assert first.logprobs.tolist() == [
        *(-float(i) for i in range(5)),
        0,
        0,
        0,
        *(-float(i) for i in range(6)),
    ]
    assert (first.reward, second.reward) == (1.0, pytest.approx(0.1))
    assert sorted(rewards.read) == [("#### 1", 6), ("#### 7", 11)]
    assert (group.version_min, second.loss_runs) == (3, [6])
    assert decode(encode(group)).samples[0].loss_runs == [5, 3, 6]


async def test_samples_that_part_are_asked_for_apart() -> None:
    async def run(example: Prompt, policy: Policy) -> Any:
        first = await policy.generate(example.tokens)
        return [first, await policy.generate([*example.tokens, *first.tokens])]

    engine = ScriptedEngine(said("a"), said("b"), said("a"), *[said("c")] * 3)
    group = await rollout(engine, LEASE, recipe(3, environment=environment(run), text=LETTERS))
    assert [(asked[0][2:], len(asked[1])) for asked in engine.asked] == [([], 3), ([97], 2), ([98], 1)]
    assert [sample.tokens.tolist()[2:] for sample in group.samples] == [[97, 99], [98, 99], [97, 99]]


async def test_an_engines_failure_reaches_every_sample() -> None:
    class Dead(ScriptedEngine):
        async def generate(self, *_: Any) -> list[Completion]:
            raise EngineError("gone")

    batcher = Batcher(Dead())
    asked = [batcher.ask([1], seed, SamplingConfig()) for seed in range(3)]
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert [str(end) for end in ends] == ["gone"] * 3


async def test_text_of_a_tool_is_never_a_special_token(tmp_path: Path) -> None:
    text = Tokens(make_tiny_qwen3(tmp_path / "model", seed=0) / "tokenizer.json")
    letter = text.encode("a")
    assert text.encode(f"a{EOS}", markup=True) == [*letter, EOS_ID]
    plain = text.encode(f"a{EOS}")
    assert EOS_ID not in plain
    assert text.decode(plain) == f"a{EOS}"
    assert text.decode([*letter, EOS_ID]) == "a"


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2 * (3 + 4)", "14"), ("-7 // 2", "-4"), ("7 % 4", "3"), ("2 ** 10", "1024"), ("0.5 + 0.25", "0.75")],
)
def test_the_calculator_calculates(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize("expression", ["__import__('os')", "'a' * 9", "a", "[1]", "True", "(1, 2)", "1 < 2"])
def test_the_calculator_only_calculates(expression: str) -> None:
    with pytest.raises(ToolError, match=r"expected numbers, \+ - \* / // % \*\* and brackets"):
        calculator(expression)


def test_a_program_prints_or_fails() -> None:
    assert python("print('a'); print('b')") == "a\nb\n"
    assert python("1/0").endswith("ZeroDivisionError: division by zero\n")
    assert python("import sys; sys.stdout.write('x' * 100_000)") == "x" * (1 << 16)


class NoEnvironment:
    """Derived from nothing."""


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"path": "actors.environments"}, "rollout.environment.path: got 'actors.environments', expected"),
        ({"path": "actors.environments:Nothing"}, "has no attribute 'Nothing'"),
        ({"path": f"{__name__}:NoEnvironment"}, "made a NoEnvironment, expected a class derived from"),
        ({"arguments": {"x": 1}}, r"rollout.environment.arguments: .*SingleTurn refuses \{'x': 1\}"),
        (
            {"path": "actors.environments:ToolUse", "arguments": {"bare": "x"}},
            "bare: got 'x', expected one of",
        ),
        ({"path": "actors.environments:ToolUse", "arguments": {"max_turns": 0}}, "max_turns: got 0"),
        ({"path": "actors.environments:ToolUse", "arguments": {"closing": ""}}, "opening and closing"),
        (
            {"path": "actors.environments:ToolUse", "arguments": {"limits": {"workers": 0}}},
            r"Expected `int` >= 1 - at `\$.workers`",
        ),
    ],
)
def test_an_environment_that_cannot_be_made_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        load_environment(EnvironmentConfig(**config))


async def test_the_default_is_a_single_turn() -> None:
    made = load_environment(EnvironmentConfig())
    assert isinstance(made, SingleTurn)
    with pytest.raises(NotImplementedError, match=r"Environment defines no run\(example, policy\)"):
        await Environment().run(LEASE.prompt, policy(ScriptedEngine()))  # type: ignore[arg-type]


async def test_a_tool_that_cannot_be_loaded_ends_the_actor_not_the_sample() -> None:
    tools = ToolUse(tools={"mine": "tests.nowhere:tool"}, opening="[", closing="]", bare="mine")
    with pytest.raises(LoadError, match=r"arguments\.tools\.mine: cannot load 'tests.nowhere:tool'"):
        await rollout(ScriptedEngine(*[said("[1]")] * 2), LEASE, recipe(2, environment=tools, text=LETTERS))
    await tools.close()
