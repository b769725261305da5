"""Environments of the package `verifiers`: turns, tools, rubrics, and what they do wrong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import msgspec
import pytest

from actors.config import EnvironmentConfig, LimitsConfig, SamplingConfig
from actors.environments.base import load_environment
from actors.environments.verifiers import Verifiers
from actors.errors import EngineError, LoadError, RewardError
from actors.rewards.pool import RewardPool
from actors.rollout import rollout
from buffer.schema import Group, Prompt
from launch.verifiers import write_verifiers
from tests.unit.actors.scripted import LEASE, Letters, ScriptedEngine, recipe, said

pytest.importorskip("verifiers", reason="needs the extra `verifiers`")

MODULE = "tests.unit.actors.verifiers_environments"
CHAT = {"messages": {"user": "U:{content};", "tool": "T:{content};"}, "opening": "A:", "after": "|"}
FIRST = {
    "prompt": [{"role": "user", "content": "1+1?"}],
    "example_id": 0,
    "answer": "2",
    "task": "default",
    "info": {},
}


def made(function: str, arguments: dict[str, Any] | None = None, **limits: Any) -> Verifiers:
    path = "actors.environments.verifiers:Verifiers"
    given = {"environment": f"{MODULE}:{function}", "arguments": arguments or {}, "chat": CHAT}
    given["limits"] = {"workers": 1, **limits}
    environment = load_environment(EnvironmentConfig(path=path, arguments=given))
    assert isinstance(environment, Verifiers)
    return environment


async def run(
    environment: Verifiers, *answers: str, engine: Any = None, room: int = 200, **changes: Any
) -> Group:
    """The group of two samples with these answers, in the order in which they are asked for."""
    prompt = Prompt(9, [5, 6], json.dumps({**FIRST, **changes}))
    engine = engine or ScriptedEngine(*map(said, answers))
    parts = {"environment": environment, "rewards": RewardPool({}, LimitsConfig()), "text": Letters()}
    lease = msgspec.structs.replace(LEASE, prompt=prompt)
    try:
        return await rollout(
            engine,
            lease,
            recipe(2, timeout_s=120.0, sampling=SamplingConfig(max_new_tokens=room), **parts),
        )
    finally:
        await environment.close()


def shown(group: Group, sample: int) -> str:
    tokens = group.samples[sample].tokens.tolist()[2:]
    return "".join(chr(token) if token < 1000 else f"{{{chr(token - 1000)}}}" for token in tokens)


async def test_a_single_turn_is_scored_by_the_rubric() -> None:
    """Functions of weight 0 are not called, the others get what they ask for."""
    environment = made("single", {"right": 2.0, "turns": 0.5, "broken": 0.0})
    group = await run(environment, "2", "3", prompt=[{"role": "system", "content": "Add."}, *FIRST["prompt"]])
    assert [sample.reward for sample in group.samples] == [2.5, 0.5]
    assert [shown(group, 0), shown(group, 1)] == ["2", "3"]


async def test_several_turns_keep_their_tokens_and_only_the_policys_are_trained() -> None:
    group = await run(made("guess"), "3", "2", "2")
    assert [shown(group, 0), shown(group, 1)] == ["3{|}{U}{:}no 3{;}{A}{:}2", "2"]
    assert [sample.reward for sample in group.samples] == [pytest.approx(1.2), pytest.approx(1.1)]
    assert group.samples[0].loss_runs == [1, 10, 1]


async def test_tools_run_elsewhere_and_their_failures_are_told() -> None:
    def call(name: str, a: int) -> str:
        return f'<tool_call>{{"name": "{name}", "arguments": {{"a": {a}, "b": 1}}}}</tool_call>'

    answers = [call("add", 1), call("add", 0), "2", call("sub", 1), "no"]
    group = await run(made("tools"), *answers, room=400)
    assert shown(group, 0) == f"{answers[0]}{{|}}{{T}}{{:}}2{{;}}{{A}}{{:}}2"
    other = shown(group, 1).partition("{T}{:}")[2]
    assert str(os.getpid()) not in other
    assert "{T}{:}'sub'{;}{A}{:}no" in other
    assert [sample.reward for sample in group.samples] == [1.0, 0.0]


async def test_rewards_are_computed_in_another_process() -> None:
    group = await run(made("single", {"process": 1.0}), "2", "2")
    assert group.samples[0].reward not in (0.0, float(os.getpid()))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", r"raised 2\); the first: raised: KeyError: '2' \(verifiers_environments.py:"),
        ("slow", r"deadline 2\); the first: deadline: no answer within 1 s"),
        ("no_number", r"the first: raised: no_number returned nan, expected a finite number"),
    ],
)
async def test_a_sample_that_cannot_be_scored_is_invalid(function: str, message: str) -> None:
    environment = made("single", {function: 1.0}, deadline_s=1.0)
    with pytest.raises(RewardError, match=message):
        await run(environment, "2", "2")


async def test_a_history_that_is_rewritten_is_refused() -> None:
    with pytest.raises(RewardError, match=r"environment 2.*message 0 of the conversation was"):
        await run(made("guess", {"forgets": True}), "3", "3")


async def test_the_sampling_is_the_runs() -> None:
    with pytest.raises(RewardError, match=r"environment 2.*the environment sets temperature"):
        await run(made("greedy"), "2", "2")


async def test_a_full_context_ends_the_conversation() -> None:
    group = await run(made("guess"), "3", "4", room=5)
    assert [shown(group, 0), group.samples[0].finish_reason] == ["3", "length"]
    assert group.samples[0].reward == pytest.approx(0.1)


async def test_an_engines_failure_is_no_failure_of_the_environment() -> None:
    class Dead(ScriptedEngine):
        async def generate(self, *asked: Any) -> Any:
            raise EngineError("is the server gone?")

    with pytest.raises(EngineError, match="is the server gone"):
        await run(made("single"), engine=Dead())


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("nothing", {}, "it made a NoneType, expected an environment of verifiers"),
        ("missing", {}, "has no attribute 'missing'"),
        ("guess", {"tries": 3}, "unexpected keyword argument 'tries'"),
        ("completion", {}, "message_type is 'completion', expected 'chat'"),
        ("own_score", {}, "OwnScore has a score_rollout of its own, expected functions"),
        ("single", {"group": 1.0}, "group scores a group at once"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(function: str, arguments: Any, message: str) -> None:
    with pytest.raises(LoadError, match=f"rollout.environment.arguments.environment: .*{message}"):
        made(function, arguments)


async def test_signals_stay_the_actors_and_the_end_is_told_once() -> None:
    heard, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, heard.set)
    try:
        environment = made("guess")
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(heard.wait(), 5)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
    await environment.close()
    theirs = environment._environment
    assert (theirs.torn_down, theirs._teardown_handlers) == (1, [])


async def test_the_data_set_becomes_a_file_of_ours(tmp_path: Any) -> None:
    train, held_out = write_verifiers(f"{MODULE}:single", tmp_path, arguments={"right": 1.0})
    rows = [json.loads(line) for path in (train, held_out) for line in path.read_text().splitlines()]
    assert sorted(json.loads(row["answer"])["answer"] for row in rows) == ["2", "4", "6", "8"]
    assert len(held_out.read_text().splitlines()) == 1
    row = next(row for row in rows if row["question"][-1]["content"] == "1+1?")
    assert row["question"] == [
        {"role": "system", "content": "Add. <|im_end|>"},
        {"role": "user", "content": "1+1?"},
    ]
    group = await run(made("single"), "2", "3", **json.loads(row["answer"]))
    assert [sample.reward for sample in group.samples] == [1.0, 0.0]


def test_tools_stand_in_the_system_message(tmp_path: Any) -> None:
    train, _ = write_verifiers(f"{MODULE}:tools", tmp_path, arguments={})
    row = json.loads(train.read_text().splitlines()[0])
    system, user = row["question"]
    assert system["role"] == "system"
    assert '"name": "add", "description": "Adds two numbers ≥ 0."' in system["content"]
    assert json.loads(row["answer"])["prompt"] == [user]
