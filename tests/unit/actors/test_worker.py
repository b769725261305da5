"""One lease in an actor's hands: published, or closed with the reason. The stream is written down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock, call

import msgspec
import pytest

from actors.config import EngineConfig, LimitsConfig, RolloutConfig
from actors.errors import EngineError, LoadError
from actors.fetch import Settings
from actors.rewards.pool import Verdict
from actors.worker import Actor, _cancel
from buffer.admission import Admit, Drop
from buffer.codec import decode
from buffer.config import StreamConfig
from buffer.members import Beat, Leave, Left
from buffer.schema import Group
from buffer.stream import Published
from launch.tiny_model import make_tiny_qwen3
from tests.unit.actors.scripted import LEASE, ScriptedEngine, said


class Written:
    """A stream that takes every group and remembers it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.groups: list[Group] = []
        self.redis = MagicMock()
        self.counts = MagicMock(execute=AsyncMock())
        self.redis.pipeline.return_value.__aenter__.return_value = self.counts

    def key(self, name: str) -> str:
        return name

    async def call(self, call: Any) -> None:
        self.calls.append(call)

    async def publish(self, call: Any, payload: bytes) -> Published:
        self.groups.append(decode(payload))
        return Published("ok", "", "1-0")


def obey(text: str, answer: str) -> float:
    """Hangs on an answer of two tokens; a longer one ends the process."""
    if len(text) == 2:
        asyncio.run(asyncio.sleep(600))
    if len(text) > 2:
        raise SystemExit(1)
    return 1.0


async def work(
    folder: Path, engine: ScriptedEngine, reward: str, size: int, dynamic: bool = False
) -> tuple[Written, Actor]:
    """One lease, worked on by an actor with that reward."""
    model = make_tiny_qwen3(folder / "model", seed=0)
    rollout = RolloutConfig(reward=reward, limits=LimitsConfig(workers=2, deadline_s=2.0))
    settings = Settings(3, StreamConfig(group_size=size, dynamic_sampling=dynamic), rollout, EngineConfig())
    stream = Written()
    actor = Actor(stream, "actor-0", settings, model, folder)  # type: ignore[arg-type]
    actor.epoch = "2:x"
    actor._on_applied(LEASE.version)
    place = await actor._slots.acquire()
    task = asyncio.create_task(actor._work(engine, LEASE, actor._recipe(), place))  # type: ignore[arg-type]
    actor._tasks[LEASE.token] = task
    await task
    await actor._rewards.close()
    return stream, actor


async def test_a_hanging_and_a_crashing_reward_cost_their_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine(*map(said, ["a", "ab", "b", "abc", "ab"]))
    with caplog.at_level(logging.WARNING):
        stream, actor = await work(tmp_path, engine, f"{__name__}:obey", 5)
    (group,) = stream.groups
    assert [sample.reward for sample in group.samples] == [1.0, 1.0]
    assert actor._invalid == {"deadline": 2, "died": 1}
    assert stream.calls == []
    assert stream.counts.hincrby.call_args_list == [
        call("difficulty", f"{group.row}:asked", 1),
        call("difficulty", f"{group.row}:solved", 1),
    ]
    assert f"group {LEASE.group}: 3 invalid samples left out; so far" in caplog.text


@pytest.mark.parametrize("dynamic", [True, False])
async def test_equal_rewards_are_filtered_under_dynamic_sampling_alone(tmp_path: Path, dynamic: bool) -> None:
    engine = ScriptedEngine(*map(said, ["a", "b"]))
    stream, _ = await work(tmp_path, engine, f"{__name__}:obey", 2, dynamic)
    assert len(stream.groups) == (0 if dynamic else 1)
    assert stream.calls == ([Drop("actor-0", "2:x", LEASE.token, "filtered")] if dynamic else [])


async def test_a_group_without_two_verdicts_is_closed_as_reward(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream, actor = await work(tmp_path, ScriptedEngine(*map(said, ["a", "ab", "ab"])), f"{__name__}:obey", 3)
    assert stream.groups == []
    assert stream.calls == [Drop("actor-0", "2:x", LEASE.token, "reward")]
    assert not actor._failed.done()
    assert "1 of 3 samples are valid, expected 2 or more (deadline 2)" in caplog.text
    assert (actor._slots.taken, actor._slots.behind) == (0, 0)


async def test_a_reward_that_cannot_be_loaded_ends_the_actor_and_closes_nothing(tmp_path: Path) -> None:
    engine = ScriptedEngine(said("a"), said("a"))
    stream, actor = await work(tmp_path, engine, f"{__name__}:nothing", 2)
    assert (stream.groups, stream.calls) == ([], [])
    with pytest.raises(LoadError, match=r"rollout\.reward: cannot load .* has no attribute 'nothing'"):
        await actor._failed


async def test_an_engine_that_returns_nothing_closes_the_group_as_engine(tmp_path: Path) -> None:
    stream, actor = await work(tmp_path, ScriptedEngine(), "actors.rewards:gsm8k", 2)
    assert stream.calls == [Drop("actor-0", "2:x", LEASE.token, "engine")]
    with pytest.raises(EngineError, match="got 0 answers, expected 2"):
        await actor._failed


async def test_whatever_else_goes_wrong_ends_the_actor_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the lease would run out unseen, and the next one meet the same."""
    monkeypatch.setattr("actors.worker.teaches_nothing", lambda _: [][0])
    _, actor = await work(tmp_path, ScriptedEngine(*map(said, ["a", "b"])), f"{__name__}:obey", 2, True)
    with pytest.raises(IndexError):
        await actor._failed


async def test_a_lease_waits_until_the_engine_serves_its_version(tmp_path: Path) -> None:
    """As after a restart: the engine serves something older, or nothing yet."""
    model, stream = make_tiny_qwen3(tmp_path / "model", seed=0), Written()
    settings = Settings(3, StreamConfig(group_size=2), RolloutConfig(reward={}), EngineConfig())
    actor = Actor(stream, "actor-0", settings, model, tmp_path)  # type: ignore[arg-type]
    actor.epoch = "2:x"
    actor._on_applied(LEASE.version - 1)
    engine = ScriptedEngine(said("a"), said("b"))
    place = await actor._slots.acquire()
    task = asyncio.create_task(actor._work(engine, LEASE, actor._recipe(), place))  # type: ignore[arg-type]
    actor._tasks[LEASE.token] = task
    await asyncio.sleep(0.05)
    assert engine.asked == []
    actor._on_applied(LEASE.version)
    await task
    assert len(engine.asked) == 1
    await actor._rewards.close()


async def test_a_group_that_is_being_scored_leaves_the_engine_to_another(tmp_path: Path) -> None:
    """Its place is free for the next lease, and both counts are back at 0 when it has been handed in."""
    model, stream = make_tiny_qwen3(tmp_path / "model", seed=0), Written()
    rollout = RolloutConfig(concurrency=1)
    settings = Settings(3, StreamConfig(group_size=2), rollout, EngineConfig())
    actor = Actor(stream, "actor-0", settings, model, tmp_path)  # type: ignore[arg-type]
    actor.epoch = "2:x"
    actor._on_applied(LEASE.version)
    place, scoring = await actor._slots.acquire(), asyncio.Event()

    class Slow:
        async def score(self, text: str, answer: str, tokens: int) -> Verdict:
            await scoring.wait()
            return Verdict(1.0, {})

    recipe = msgspec.structs.replace(actor._recipe(), rewards=Slow())
    engine = ScriptedEngine(said("a"), said("b"))
    task = asyncio.create_task(actor._work(engine, LEASE, recipe, place))  # type: ignore[arg-type]
    actor._tasks[LEASE.token] = task
    second = await asyncio.wait_for(actor._slots.acquire(), 5)
    await second.begin()
    assert (task.done(), actor._slots.taken, actor._slots.behind) == (False, 1, 1)
    scoring.set()
    await task
    second.release()
    assert (len(stream.groups), actor._slots.taken, actor._slots.behind) == (1, 0, 0)


@pytest.mark.parametrize("publishing", [True, False])
async def test_a_lost_lease_ends_its_group_unless_that_is_being_published(
    tmp_path: Path, publishing: bool
) -> None:
    """A heartbeat that overtakes the answer to a publish hears that the lease is gone: it was published."""
    stream = Written()
    actor = Actor(
        stream, "actor-0", Settings(3, StreamConfig(), RolloutConfig(), EngineConfig()), tmp_path, tmp_path
    )  # type: ignore[arg-type]
    actor.epoch = "2:x"
    stream.call = AsyncMock(return_value=Beat(0, 0, False, "done", [LEASE.token]))  # type: ignore[method-assign]
    task = actor._tasks[LEASE.token] = asyncio.create_task(asyncio.sleep(0.1))
    if publishing:
        actor._publishing.add(LEASE.token)
    stop = asyncio.Event()
    beating = asyncio.create_task(actor._beat(stop))
    await stop.wait()
    beating.cancel()
    await asyncio.wait([task, beating])
    assert task.cancelled() != publishing


class Granting(Written):
    """A stream that grants or refuses leases as it was told, and remembers what was waited for."""

    def __init__(self, *answers: str) -> None:
        super().__init__()
        self.answers, self.asked, self.taken = list(answers), 0, 0

    async def call(self, call: Any) -> Any:
        if not isinstance(call, Admit):
            return await super().call(call)
        self.asked += 1
        if not self.answers:
            await asyncio.Event().wait()
        reason = self.answers.pop(0)
        if reason:
            return msgspec.structs.replace(LEASE, status="wait", reason=reason, token="")
        group = f"0000-00000000{self.asked:02}-00"
        return msgspec.structs.replace(LEASE, token=f"{self.asked}:x", group=group, position=self.asked)

    async def take(self, key: str, seconds: float) -> None:
        self.taken += 1


class Held(ScriptedEngine):
    """Answers a prompt when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.free: asyncio.Queue[None] = asyncio.Queue()

    async def generate(self, prompt: Any, seeds: Any, sampling: Any) -> Any:
        self.asked.append((prompt, list(seeds), sampling))
        await self.free.get()
        return [said("a") for _ in seeds]


@contextlib.asynccontextmanager
async def leasing(
    folder: Path, stream: Granting, eta: int = 1
) -> AsyncIterator[tuple[Actor, Held, asyncio.Task[None]]]:
    """An actor that asks for leases, for two groups at a time, and the task that does."""
    model = make_tiny_qwen3(folder / "model", seed=0)
    rules = StreamConfig(group_size=2, max_staleness=eta)
    settings = Settings(3, rules, RolloutConfig(concurrency=2, reward={}), EngineConfig())
    actor, engine = Actor(stream, "actor-0", settings, model, folder), Held()  # type: ignore[arg-type]
    actor.epoch = "2:x"
    actor._on_applied(LEASE.version)
    asking = asyncio.create_task(actor._lease(engine, AsyncMock()))  # type: ignore[arg-type]
    yield actor, engine, asking
    await _cancel(asking, *actor._tasks.values())
    await actor._rewards.close()


async def settled() -> None:
    """All that can go on without waiting has."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_a_lease_in_advance_begins_when_a_group_ends_and_one_alone(tmp_path: Path) -> None:
    """The request goes out before the next lease is there."""
    stream = Granting("", "", "")
    async with leasing(tmp_path, stream) as (actor, engine, _):
        await settled()
        assert (stream.asked, len(actor._tasks), len(engine.asked)) == (3, 3, 2)
        engine.free.put_nowait(None)
        await settled()
        assert (stream.asked, len(stream.groups), len(engine.asked)) == (4, 1, 3)
        assert (actor._slots.ahead, actor._slots.taken, actor._ahead) == (1, 2, set())


async def test_where_leases_are_short_none_is_taken_in_advance(tmp_path: Path) -> None:
    """After a refusal the next one is asked for when it can begin, and then no freed place is waited for."""
    stream = Granting("", "", "full", "", "full")
    async with leasing(tmp_path, stream) as (actor, engine, _):
        await settled()
        assert (stream.asked, stream.taken, actor._slots.ahead) == (3, 0, 0)
        engine.free.put_nowait(None)
        await settled()
        assert (stream.asked, stream.taken, len(engine.asked)) == (5, 0, 3)
        engine.free.put_nowait(None)
        await settled()
        assert (stream.asked, stream.taken) == (6, 0), "this one could begin at once"


async def test_synchronous_training_takes_none_in_advance(tmp_path: Path) -> None:
    stream = Granting("", "", "")
    async with leasing(tmp_path, stream, eta=0) as (actor, _, _):
        await settled()
        assert (stream.asked, actor._slots.ahead, actor._slots.taken) == (2, 0, 2)


async def test_an_actor_that_drains_hands_back_at_once_what_has_not_begun(tmp_path: Path) -> None:
    """And finishes what has, while its heartbeats renew that alone."""
    stream = Granting("", "", "")
    async with leasing(tmp_path, stream) as (actor, engine, asking):
        await settled()
        await _cancel(asking)
        stream.call = AsyncMock(return_value=Left(0))  # type: ignore[method-assign]
        draining = asyncio.create_task(actor._drain())
        await settled()
        assert stream.call.call_args_list == [call(Drop("actor-0", "2:x", "3:x", "released"))]
        assert (sorted(actor._tasks), draining.done()) == (["1:x", "2:x"], False)
        engine.free.put_nowait(None)
        engine.free.put_nowait(None)
        await draining
        assert (len(stream.groups), len(engine.asked)) == (2, 2)
        assert stream.call.call_args_list[1:] == [call(Leave("actor", "actor-0", "2:x"))]
