"""Offers and weight workers on a real Redis: who is told of what, what is applied, who is left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from buffer.ledger import Snapshot
from buffer.local_server import LocalServer
from tests.contract.offers import Make, Scene
from tests.unit.weightsync.versions import tensors
from weightsync import offer as module
from weightsync.config import WeightSyncConfig
from weightsync.manifest import Manifest
from weightsync.transports import round as rounds


@pytest.fixture
async def scene(redis_server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    monkeypatch.setattr(module, "_LOOK_S", 0.05)
    made: list[Scene] = []

    def make(**config: Any) -> Scene:
        made.append(Scene(redis_server, WeightSyncConfig(**config)))
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("transport", ["auto", "peer", "disk", "gloo"])
async def test_a_version_is_offered_staged_applied_and_said(
    scene: Make, tmp_path: Path, transport: str
) -> None:
    run = scene(transport=transport, folder=str(tmp_path) if transport == "disk" else "")
    one, other = run.member("a"), run.member("b")
    for member in (one, other):
        await member.join()
        member.work()
    label = run.publish(0)
    await until(lambda: one.engine.served == other.engine.served == [label])
    await until(lambda: {record.version for record in run.learner.call(Snapshot()).actors.values()} == {0})
    await until(lambda: one.worker.figures()["weights"] == "serving 0")  # once Redis has answered
    figures, way = one.worker.figures(), "shm" if transport == "auto" else transport
    assert (figures["transport"], figures["load"]) == (way, "plan")
    await one.beat()
    await until(lambda: "a" in run.offers.push_seconds())
    size = sum(tensor.nbytes for tensor in tensors(0).values())
    await until(lambda: run.offers.held_bytes() == 2 * size)  # of the next version, too
    await until(lambda: one.holder.held_bytes() == (size if way == "shm" else 2 * size))


async def test_a_round_with_all_live_actors_waits_for_nobody(
    scene: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "GATHER_S", 60.0)
    run = scene(transport="gloo")
    members = [run.member(name) for name in ("a", "b")]
    for member in members:
        await member.join()
        member.work()
    await run.member("c").join("starting")
    await until(lambda: len(run.offers._actors) == 3)
    label = run.publish(0)
    await until(lambda: all(member.engine.served == [label] for member in members))
    assert [member.worker.figures()["transport"] for member in members] == ["gloo", "gloo"]


async def test_only_what_changed_travels_where_that_is_offered(scene: Make) -> None:
    run = scene(transport="delta", delta=True)
    member = run.member("a")
    await member.join()
    member.work()
    label = run.publish(0)
    await until(lambda: member.engine.served == [label])
    assert member.worker.figures()["transport"] == "peer", "a newcomer holds nothing that could change"
    pulled = run.offers.holder.served_bytes
    weights = tensors(0)
    weights["up"][0, 0] += 1
    manifest = Manifest.of(1, weights)
    run.learner.redis.hset(run.learner.key("versions"), "1", manifest.digest)
    run.offers.publish(manifest, weights)
    await until(lambda: member.engine.served == [label, manifest.label])
    assert member.worker.figures()["transport"] == "delta"
    assert run.offers.holder.served_bytes == pulled


async def test_a_server_that_is_away_costs_the_learner_no_thread(
    scene: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = scene()
    member = run.member("a")
    await member.join()
    member.work()
    working = run.learner.redis.pipeline

    def broken(*_: Any, **__: Any) -> Any:
        raise redis.ConnectionError("away")

    monkeypatch.setattr(run.learner.redis, "pipeline", broken)
    label = run.publish(0)
    await until(lambda: any("cannot tell the actors" in line for line in run.log))
    await asyncio.sleep(0.2)
    monkeypatch.setattr(run.learner.redis, "pipeline", working)
    await until(lambda: member.engine.served == [label])
    label = run.publish(1)
    await until(lambda: member.engine.served[-1] == label)


async def test_a_newcomer_is_told_of_the_newest_only_and_of_it_once(scene: Make) -> None:
    run = scene()
    run.publish(0)
    await until(lambda: run.offers.holder.labels())
    late = run.member("late")
    await late.join(state="starting")
    label = run.publish(1)
    await until(lambda: len(run.offers.holder.labels()) == 2)
    await asyncio.sleep(0.3)
    assert await late.mail() == [], "its engine is not up yet"
    await late.beat()
    await asyncio.sleep(0.3)
    assert [offer.label for offer in await late.mail()] == [label]


async def test_what_was_written_for_an_earlier_life_is_cleared_away(scene: Make) -> None:
    run = scene()
    member = run.member("a")
    await member.join()
    run.publish(0)
    await asyncio.sleep(0.3)
    (first,) = await member.mail()
    await member.join()
    await asyncio.sleep(0.3)
    (again,) = await member.mail()
    assert (first.label, again.label) == (again.label, first.label)
    assert (first.actor_epoch, again.actor_epoch) != (again.actor_epoch, again.actor_epoch)
    assert again.actor_epoch == member.epoch


async def test_a_version_that_cannot_be_made_is_said_and_the_next_one_offered(
    scene: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module.write_image

    def failing(named: Manifest, weights: Any, **options: Any) -> Any:
        if named.version == 0:
            raise RuntimeError("no kernel image is available")
        return write(named, weights, **options)

    monkeypatch.setattr(module, "write_image", failing)
    run = scene()
    run.publish(0)
    await until(lambda: any("version 0 cannot be offered: no kernel image" in line for line in run.log))
    run.publish(1)
    await until(lambda: len(run.offers.holder.labels()) == 1)


async def test_a_version_that_is_overtaken_before_its_turn_is_never_made(
    scene: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner goes on at once; one snapshot waits at most."""
    begun, go_on, made, write = threading.Event(), threading.Event(), list[int](), module.write_image

    def slow(named: Manifest, weights: Any, **options: Any) -> Any:
        made.append(named.version)
        begun.set()
        assert go_on.wait(10)
        return write(named, weights, **options)

    monkeypatch.setattr(module, "write_image", slow)
    run = scene()
    run.publish(0)
    assert await asyncio.to_thread(begun.wait, 10)
    for number in (1, 2, 3):
        run.publish(number)
    go_on.set()
    await until(lambda: len(run.offers.holder.labels()) == 2)
    assert made == [0, 3]


async def test_a_hung_engine_holds_nobody_else_and_is_named_in_time(scene: Make) -> None:
    run = scene(timeout_s=0.5)
    hung, well = run.member("hung"), run.member("well")
    for member in (hung, well):
        await member.join()
        member.work()
    first = run.publish(0)
    await until(lambda: hung.engine.served == well.engine.served == [first])
    hung.engine.open.clear()
    labels = []
    for number in range(1, 6):
        labels.append(run.publish(number))
        await until(lambda: well.engine.served[-1] == labels[-1])
        await asyncio.sleep(0.2)
        await hung.beat()
    assert well.engine.served == [first, *labels]
    named = [line for line in run.log if "hung is left behind at version 0" in line]
    assert len(named) == 1, "once, though versions go on coming"
    assert "it said last: applying" in named[0]
    hung.engine.open.set()
    await until(lambda: hung.engine.served[-1] == labels[-1])
    assert len(hung.engine.served) < len(well.engine.served), "what it missed it never applies"


async def test_a_slow_engine_that_moves_on_is_not_named(scene: Make) -> None:
    run = scene(timeout_s=0.6)
    slow = run.member("slow")
    slow.engine.seconds = 0.25
    await slow.join()
    slow.work()
    for number in range(10):
        run.publish(number)
        await asyncio.sleep(0.2)
    assert 2 < len(slow.engine.served) < 9, "it was behind all the time, and moved on"
    assert run.log == []


async def test_an_offer_before_its_commit_waits_and_dies_with_the_learners_epoch(scene: Make) -> None:
    run = scene()
    member = run.member("a")
    await member.join()
    member.work()
    run.publish(0, commit=False)
    await until(lambda: member.worker.figures()["weights"] == "staged 0")
    await asyncio.sleep(0.2)
    assert member.engine.served == []
    await asyncio.to_thread(run.offers.__exit__, None, None, None)
    run.run.join_learner()
    run.offers = run._offers()
    await asyncio.sleep(0.2)
    assert member.engine.served == []
    label = run.publish(0)
    await until(lambda: member.engine.served == [label])


async def test_another_digest_than_the_committed_one_is_never_applied(scene: Make) -> None:
    """A twin of a version, retrained after a crash: the digest that was committed counts."""
    run = scene()
    member = run.member("a")
    await member.join()
    member.work()
    run.learner.redis.hset(run.learner.key("versions"), "0", "other")
    run.publish(0, commit=False)
    await asyncio.sleep(0.5)
    assert member.engine.served == []
    label = run.publish(1)
    await until(lambda: member.engine.served == [label])


async def test_what_the_learner_has_lost_comes_from_an_actor(scene: Make) -> None:
    """Rows 13 and 17: an actor joins while the learner's server cannot be reached."""
    run = scene(transport="peer")
    first = run.member("first")
    await first.join()
    first.work()
    label = run.publish(0)
    await until(lambda: first.engine.served == [label])
    await first.beat()
    run.offers.holder._server.shutdown()
    run.offers.holder._server.server_close()
    late = run.member("late")
    await late.join()
    late.work()
    await until(lambda: late.engine.served == [label])
    assert first.holder.served_bytes == sum(tensor.nbytes for tensor in tensors(0).values())


async def test_a_worker_that_is_cancelled_ends_though_no_source_is_left_and_the_client_swallows_it(
    scene: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 25: an actor that drains when its learner is gone."""
    run = scene(transport="peer")
    member = run.member("a")
    await member.join()
    run.publish(0)
    await until(lambda: run.learner.redis.llen(run.learner.key("mail:a")))
    await asyncio.to_thread(run.offers.__exit__, None, None, None)
    asked = asyncio.Event()

    async def swallows(*_: object) -> None:
        asked.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise redis.ConnectionError("closed") from None

    monkeypatch.setattr(run.actors.redis, "hgetall", swallows)
    member.work()
    await asyncio.wait_for(asked.wait(), 10)
    assert member.task is not None
    member.task.cancel()
    done, _ = await asyncio.wait([member.task], timeout=5)
    assert done
