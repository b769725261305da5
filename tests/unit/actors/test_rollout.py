"""One lease to one group: what is asked of the engine, and what the record says of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from actors.config import SamplingConfig
from actors.engine import Completion
from actors.errors import EngineError, RewardError
from actors.publish import publish
from actors.rewards import load_reward
from actors.rollout import Recipe, request_seed, rollout
from buffer.admission import Lease
from buffer.codec import decode, encode
from buffer.schema import Prompt

LEASE = Lease("lease", "", "7:x", "0000-0000000041-01", 41, 1, 3, 5, Prompt(9, [5, 6], "#### 7"))


class ScriptedEngine:
    """Answers every prompt with what the test wrote down, and remembers what it was asked."""

    def __init__(self, *answers: Completion) -> None:
        self.answers, self.asked = list(answers), []

    async def generate(
        self, prompt: list[int], seeds: Sequence[int], sampling: SamplingConfig
    ) -> list[Completion]:
        self.asked.append((prompt, list(seeds), sampling))
        return self.answers


def recipe(size: int, **changes: Any) -> Recipe:
    fields = {
        "actor": "actor-0",
        "actor_epoch": 2,
        "run_seed": 11,
        "group_size": size,
        "sampling": SamplingConfig(temperature=0.7),
        "reward": load_reward("actors.rewards:gsm8k"),
        "decode": lambda tokens: "#### " + "".join(map(str, tokens)),
    }
    return Recipe(**{**fields, **changes})


async def test_the_record_says_what_the_engine_said() -> None:
    engine = ScriptedEngine(
        Completion([7], [-0.5], "stop", "3:aa"), Completion([8, 9], [-1.0, -2.0], "length", "4:bb")
    )
    group = await rollout(engine, LEASE, recipe(2))  # type: ignore[arg-type]
    assert (group.id, group.row, group.actor, group.actor_epoch) == (LEASE.group, 9, "actor-0", 2)
    assert (group.temperature, group.version_min) == (0.7, 3)
    assert [(v.number, v.digest) for v in group.versions] == [(3, "aa"), (4, "bb")]
    assert [s.tokens.tolist() for s in group.samples] == [[5, 6, 7], [5, 6, 8, 9]]
    assert [s.logprobs.tolist() for s in group.samples] == [[-0.5], [-1.0, -2.0]]
    assert [s.reward for s in group.samples] == [1.0, pytest.approx(0.1)]
    assert [[(span.length, span.version) for span in s.spans] for s in group.samples] == [[(1, 0)], [(2, 1)]]
    assert [s.finish_reason for s in group.samples] == ["stop", "length"]
    assert decode(encode(group)).id == LEASE.group


async def test_one_call_asks_for_all_samples_with_a_seed_each() -> None:
    engine = ScriptedEngine(*[Completion([7], [-0.5], "stop", "3:aa")] * 4)
    await rollout(engine, LEASE, recipe(4))  # type: ignore[arg-type]
    ((prompt, seeds, sampling),) = engine.asked
    assert (prompt, sampling.temperature) == ([5, 6], 0.7)
    assert seeds == [request_seed(11, 41, 1, sample) for sample in range(4)]
    assert len(set(seeds)) == 4


def test_a_seed_depends_on_everything_that_is_sampled_and_on_nothing_else() -> None:
    base = (11, 41, 1, 0)
    others = [(12, 41, 1, 0), (11, 42, 1, 0), (11, 41, 2, 0), (11, 41, 1, 1)]
    assert len({request_seed(*numbers) for numbers in [base, *others]}) == 5
    assert request_seed(*base) == request_seed(*base)
    assert all(0 <= request_seed(*numbers) < 2**31 for numbers in others)


async def test_weights_that_nobody_committed_are_not_recorded() -> None:
    engine = ScriptedEngine(Completion([7], [-0.5], "stop", "default"))
    with pytest.raises(EngineError, match="weights nobody committed"):
        await rollout(engine, LEASE, recipe(1))  # type: ignore[arg-type]


async def test_a_logprob_that_is_no_number_is_the_engines_fault() -> None:
    engine = ScriptedEngine(Completion([7], [float("nan")], "stop", "3:aa"))
    group = await rollout(engine, LEASE, recipe(1))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"samples\[0\].logprobs: got a value that is not finite"):
        await publish(None, group, epoch="2:x", token="7:x")  # type: ignore[arg-type]


async def test_a_reward_that_raises_is_named() -> None:
    engine = ScriptedEngine(Completion([7], [-0.5], "stop", "3:aa"))
    broken = load_reward("tests.unit.actors.test_rollout:broken_reward")
    with pytest.raises(RewardError, match="broken_reward raised ZeroDivisionError"):
        await rollout(engine, LEASE, recipe(1, reward=broken))  # type: ignore[arg-type]


def broken_reward(text: str, answer: str) -> float:
    """A user's reward with a defect."""
    return len(text) / 0
