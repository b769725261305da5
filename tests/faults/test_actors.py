"""Rows 1, 2, 12, 23 and 24: actors die, are cut off, are of another release, or have a wrong clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from buffer.schema import SCHEMA_VERSION
from tests.faults.points import FAILED
from tests.faults.proxy import Proxy
from tests.faults.server import Server
from tests.faults.trial import Trial, until

Trials = Callable[..., Trial]
HOUR_MS = 3_600_000


def test_row_1_one_actor_is_killed_in_mid_generation(trial: Trials) -> None:
    """Only what it had in flight expires, and those prompts are groups of others within 15 s."""
    run = trial(eta=2, batch=4)
    run.learner()
    run.actor()
    killed = run.actor(fault="actor-1:generating:9", group_s=0.1)
    killed.wait_killed()
    died = time.monotonic()
    held = [lease for lease in run.ledger().leased if lease.actor == "actor-1"]
    assert held
    again = {f"{lease.group[:-2]}{lease.attempt + 1:02d}" for lease in held}
    until(lambda: again <= published(run), 15, f"{again} are published")
    assert time.monotonic() - died < 15
    assert run.finish().counts.dropped["expired"] == len(held)


def published(run: Trial) -> set[str]:
    """Groups that actors were told are accepted."""
    events = (one for actor in run.actors for one in actor.events("published"))
    return {one["group"] for one in events if one["status"] == "ok"}


def test_row_2_all_actors_are_killed(trial: Trials) -> None:
    """The learner waits, says that nobody is there, and goes on when somebody is."""
    run = trial()
    learner = run.learner()
    actors = [run.actor("a"), run.actor("b")]
    run.wait_steps(3)
    for actor in actors:
        actor.kill()
    before = len(learner.events("waiting"))
    until(
        lambda: [one["reason"] for one in learner.events("waiting")[before:]][-1:] == ["no live actors"],
        10,
        "the learner says that no actor lives",
    )
    run.actor("a"), run.actor("b")
    assert run.wait_more(3, seconds=10) < 10
    run.finish()


@pytest.fixture
def proxy(shared_server: Server) -> Iterator[Proxy]:
    """A proxy before the shared server."""
    with Proxy(shared_server.port, seed=3) as started:
        yield started


@pytest.mark.parametrize(
    ("how", "seconds"),
    [("cut", 3.0), ("black hole", 3.0), pytest.param("black hole", 60, marks=pytest.mark.faults)],
)
def test_row_12_an_actor_is_cut_off(trial: Trials, proxy: Proxy, how: str, seconds: float) -> None:
    """It takes no lease meanwhile; back, it publishes what is still wanted; the rest it closes."""
    run = trial(eta=2, batch=3)
    run.learner()
    run.actor(group_s=0.3, concurrency=5)
    alone = run.actor(url=run.server.url_at(proxy.port), group_s=0.4, concurrency=5)
    alone.wait_event("published", 2)
    if how == "cut":
        proxy.cut()
    proxy.mode = how
    gone = time.monotonic()
    assert run.wait_more(3, seconds=15) < 15
    time.sleep(max(0.0, seconds - (time.monotonic() - gone)))
    proxy.mode = "pass"
    back = time.monotonic()
    online = alone.wait_event("online", 2)
    before = len(alone.events("published"))
    until(lambda: len(alone.events("published")) > before + 2, 30, "it publishes again")
    assert not [one for one in alone.events("leased") if gone + 2.5 < one["t"] < back]
    assert alone.events("closed"), "leases that expired are closed"
    run.finish()
    away = next(one["t"] for one in alone.events("away") if one["t"] > gone)
    assert not [one for one in alone.events("published") if away < one["begun"] < online["t"]]


def test_row_23_an_actor_of_another_release(trial: Trials) -> None:
    """It is refused when it joins, and its record is struck; both times both schema versions are named."""
    run = trial(attempts=3)
    learner = run.learner()
    other = run.actor(schema=SCHEMA_VERSION + 1)
    other.wait(FAILED)
    reason = other.events("stopped")[0]["reason"]
    assert f"schema version {SCHEMA_VERSION + 1}" in reason
    assert f"this run reads {SCHEMA_VERSION}" in reason
    run.actor(poison=0, poison_kinds=("other_schema",))
    struck = learner.wait_event("struck")
    assert "got schema version" in struck["reason"]
    assert f"this release reads {SCHEMA_VERSION}" in struck["reason"]
    run.actor()
    run.wait_more(3)
    run.finish()


@pytest.mark.parametrize("jump", [-1, 1])
def test_row_24_clocks_are_off_by_an_hour(trial: Trials, jump: int) -> None:
    """Neither a process's wall clock nor a jump of the server's expires a lease or changes a step."""
    run = trial(eta=0, lease_s=3.0)
    run.learner(clock_s=jump * 3600)
    run.actor(clock_s=-jump * 3600), run.actor()
    run.wait_steps(3)
    for _ in range(3):  # the functions see the server's clock as its distance from `last`
        state: Any = run.stream.key("state")
        run.stream.redis.hincrby(state, "last", -jump * HOUR_MS)
        run.wait_more(2, seconds=10)
    ledger = run.finish()
    assert ledger.counts.dropped.get("expired", 0) == 0
    assert ledger.number("clock") < 60_000
