"""One lease to one group: what is asked of the engine, and what the record says of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from actors.config import LimitsConfig, SamplingConfig
from actors.continuation import Completion
from actors.errors import EngineError, LoadError, RewardError
from actors.publish import publish
from actors.rewards.pool import RewardPool, Verdict
from actors.rollout import request_seed, rollout
from buffer.codec import decode, encode
from tests.unit.actors.scripted import LEASE, Refusing, ScriptedEngine, environment, recipe

SEVEN = Completion([7], [-0.5], "stop", [(1, "3:aa")])
EIGHT = Completion([8, 9], [-1.0, -2.0], "length", [(2, "4:bb")])


async def test_the_record_says_what_the_engine_said() -> None:
    group = await rollout(ScriptedEngine(SEVEN, EIGHT), LEASE, recipe(2))
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
    engine = ScriptedEngine(*[SEVEN] * 4)
    await rollout(engine, LEASE, recipe(4))
    ((prompt, seeds, sampling),) = engine.asked
    assert (prompt, sampling) == ([5, 6], SamplingConfig(temperature=0.7))
    assert seeds == [request_seed(11, 41, 1, sample) for sample in range(4)]
    assert len(set(seeds)) == 4


def test_a_seed_depends_on_everything_that_is_sampled_and_on_nothing_else() -> None:
    base = (11, 41, 1, 0, 0)
    others = [(12, 41, 1, 0, 0), (11, 42, 1, 0, 0), (11, 41, 2, 0, 0), (11, 41, 1, 1, 0), (11, 41, 1, 0, 1)]
    assert len({request_seed(*numbers) for numbers in [base, *others]}) == 6
    assert request_seed(*base) == request_seed(*base[:4])
    assert all(0 <= request_seed(*numbers) < 2**31 for numbers in others)


async def test_weights_that_nobody_committed_are_not_recorded() -> None:
    engine = ScriptedEngine(*[Completion([7], [-0.5], "stop", [(1, "default")])] * 2)
    with pytest.raises(EngineError, match="weights nobody committed"):
        await rollout(engine, LEASE, recipe(2))


async def test_a_logprob_that_is_no_number_is_the_engines_fault() -> None:
    engine = ScriptedEngine(*[Completion([7], [float("nan")], "stop", [(1, "3:aa")])] * 2)
    group = await rollout(engine, LEASE, recipe(2))
    with pytest.raises(EngineError, match=r"samples\[0\].logprobs: got a value that is not finite"):
        await publish(None, group, epoch="2:x", token="7:x")  # type: ignore[arg-type]


async def test_invalid_samples_are_left_out_and_never_score_nothing() -> None:
    """Their versions are left out as well: nothing of the group was written by them."""
    engine = ScriptedEngine(EIGHT, SEVEN, SEVEN)
    made_by = recipe(3, rewards=Refusing("89"))
    group = await rollout(engine, LEASE, made_by)
    assert made_by.invalid == {"deadline": 1}
    assert [s.tokens.tolist() for s in group.samples] == [[5, 6, 7], [5, 6, 7]]
    assert [s.reward for s in group.samples] == [1.0, 1.0]
    assert [v.number for v in group.versions] == [3]
    assert len(decode(encode(group)).samples) == 2


async def test_fewer_than_two_valid_samples_are_no_group() -> None:
    engine = ScriptedEngine(EIGHT, SEVEN, EIGHT)
    message = r"1 of 3 samples are valid, expected 2 or more \(deadline 2\); the first: deadline: no answer"
    with pytest.raises(RewardError, match=message):
        await rollout(engine, LEASE, recipe(3, rewards=Refusing("89")))


async def test_a_reward_that_raises_is_named() -> None:
    pool = RewardPool("tests.unit.actors.test_rollout:broken_reward", LimitsConfig(workers=1))
    with pytest.raises(RewardError, match=r"\(raised 2\); the first: raised: ZeroDivisionError"):
        await rollout(ScriptedEngine(SEVEN, SEVEN), LEASE, recipe(2, rewards=pool))
    await pool.close()


async def test_a_reward_that_cannot_be_loaded_is_not_the_groups_fault() -> None:
    pool = RewardPool("tests.unit.actors.test_rollout:nothing", LimitsConfig(workers=1))
    with pytest.raises(LoadError, match="has no attribute 'nothing'"):
        await rollout(ScriptedEngine(SEVEN, SEVEN), LEASE, recipe(2, rewards=pool))
    await pool.close()


def broken_reward(text: str, answer: str) -> float:
    """A user's reward with a defect."""
    return len(text) / 0


async def test_an_engine_that_fails_or_answers_too_little_ends_the_rollout() -> None:
    class Dead(ScriptedEngine):
        async def generate(
            self, prompt: list[int], seeds: Sequence[int], sampling: SamplingConfig
        ) -> list[Completion]:
            raise EngineError("is the server gone?")

    events = list[str]()
    with pytest.raises(EngineError, match="is the server gone"):
        await rollout(Dead(), LEASE, recipe(2), lambda: events.append("generated"))
    assert events == [], "another group would be begun on an engine that is gone"
    with pytest.raises(EngineError, match="generate: got 1 answers, expected 2"):
        await rollout(ScriptedEngine(SEVEN), LEASE, recipe(2))


async def test_an_engine_that_fails_one_sample_does_not_wait_for_the_others() -> None:
    turns = iter(range(4))

    async def run(example: Any, policy: Any) -> list[Any]:
        if next(turns) == 2:
            raise EngineError("is the server gone?")
        await asyncio.sleep(600)
        return []

    before = asyncio.all_tasks()
    async with asyncio.timeout(20):
        with pytest.raises(EngineError, match="is the server gone"):
            await rollout(ScriptedEngine(), LEASE, recipe(4, environment=environment(run), timeout_s=900.0))
    assert asyncio.all_tasks() <= before


async def test_a_sample_is_scored_when_it_ends_and_the_last_end_is_told() -> None:
    """Also of one that has no verdict, and of one that is refused: nothing more is asked of the engine."""
    events, last = list[str](), asyncio.Event()

    class Told(Refusing):
        async def score(self, text: str, answer: str, tokens: int) -> Verdict:
            events.append(f"scored {text}")
            last.set()
            return await super().score(text, answer, tokens)

    async def run(example: Any, policy: Any) -> list[Any]:
        turn = await policy.generate(example.tokens)
        if turn.tokens == [8, 9]:
            await last.wait()
            await asyncio.sleep(0.01)
            raise ValueError("none")
        return [turn]

    engine = ScriptedEngine(EIGHT, SEVEN, SEVEN)
    made_by = recipe(3, environment=environment(run), rewards=Told())
    group = await rollout(engine, LEASE, made_by, lambda: events.append("generated"))
    assert events == ["scored #### 7", "scored #### 7", "generated"]
    assert len(group.samples) == 2


async def test_a_rollout_that_is_cancelled_leaves_no_task_and_no_request_behind() -> None:
    cancelled = asyncio.Event()

    class Slow(ScriptedEngine):
        async def generate(
            self, prompt: list[int], seeds: Sequence[int], sampling: SamplingConfig
        ) -> list[Completion]:
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.set()
            return []

    before = asyncio.all_tasks()
    task = asyncio.create_task(rollout(Slow(), LEASE, recipe(4)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled.is_set()
    assert asyncio.all_tasks() <= before


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda: 1 / 0, "environment 2.*Written: ZeroDivisionError: division by zero"),
        (list, r"environment 2.*it returned 0 turns, expected one of the policy's"),
    ],
)
async def test_an_environment_that_fails_makes_its_samples_invalid(fault: object, message: str) -> None:
    async def run(example: object, policy: object) -> object:
        return fault()  # type: ignore[operator]

    made_by = recipe(2, environment=environment(run))
    with pytest.raises(RewardError, match=message):
        await rollout(ScriptedEngine(), LEASE, made_by)
    assert made_by.invalid == {"environment": 2}


async def test_an_environment_that_hangs_is_given_up() -> None:
    async def run(example: object, policy: object) -> None:
        await asyncio.sleep(60)

    with pytest.raises(RewardError, match=r"no end within rollout.environment.timeout_s \(0.1 s\)"):
        await rollout(ScriptedEngine(), LEASE, recipe(2, environment=environment(run), timeout_s=0.1))


async def test_an_award_of_the_environment_is_a_part_of_the_reward() -> None:
    async def run(example: Any, policy: Any) -> list[Any]:
        turn = await policy.generate(example.tokens)
        return [turn, policy.write("well done", reward=0.25), policy.write("", reward=0.5)]

    group = await rollout(ScriptedEngine(SEVEN, SEVEN), LEASE, recipe(2, environment=environment(run)))
    assert [(s.reward, s.rewards) for s in group.samples] == [
        (1.75, {"correct": 1.0, "format": 1.0, "environment": 0.75})
    ] * 2
    assert [s.tokens.tolist() for s in group.samples] == [[5, 6, 7]] * 2
