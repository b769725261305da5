"""Rows 13, 16, 17 and 25: actors that pull their weights are cut off from them, come, go, hang and drain."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from tests.faults.proxy import Proxy
from tests.faults.real import RealTrial
from tests.faults.trial import Process, Trial, until
from tests.faults.weights import CHUNKS, TIMEOUT_S

Trials = Callable[..., Trial]
DRAIN_S = 20.0
"""What an actor has to finish what is in flight."""
LATE_S = 5.0
"""How much later than the deadline a busy machine may say something."""


def drain(actors: Sequence[Process]) -> None:
    """SIGTERM; they must have handed back what they hold, and ended with 0."""
    for actor in actors:
        os.kill(actor.pid, signal.SIGTERM)
    for actor in actors:
        actor.wait(0, seconds=DRAIN_S)


def named(learner: Process, actor: str) -> list[float]:
    """When the learner said that an actor is left behind."""
    said = learner.events("weights")
    return [one["t"] for one in said if f"{actor} is left behind" in one["text"]]


def published(actor: Process, since: float) -> int:
    """Groups of an actor that were accepted since then."""
    done = actor.events("published")
    return sum(one["status"] == "ok" and one["t"] > since for one in done)


@pytest.mark.parametrize("how", [pytest.param("cut", marks=pytest.mark.faults), "black hole"])
def test_row_13_an_actor_is_cut_off_from_the_weights(trial: Trials, how: str) -> None:
    """The others go on, admission holds it back, the learner names it in time; it rejoins by pull."""
    run = trial(batch=2, eta=1)
    learner = run.learner(weights=True, step_s=0.1)
    with Proxy(learner.wait_event("serves")["port"]) as proxy:
        others = [run.actor(weights=True), run.actor(weights=True)]
        alone = run.actor(weights=True, weights_port=proxy.port)
        alone.wait_event("published", 2)
        proxy.cut() if how == "cut" else setattr(proxy, "mode", how)
        since = time.monotonic()
        alone.wait_event("waiting: old-weights")
        refused = time.monotonic()
        run.wait_more(10)
        until(lambda: named(learner, "actor-2"), TIMEOUT_S + LATE_S, "the learner names it")
        held = alone.events("applied")[-1]["version"]
        assert run.steps() - held > run.config.max_staleness
        assert not [one for one in alone.events("leased") if one["t"] > refused], "it is given nothing more"
        assert all(other.events("applied")[-1]["version"] > held + 1 for other in others)
        proxy.mode = "pass"
        alone.wait_event("applied", len(alone.events("applied")) + 1, seconds=15)
        back = time.monotonic()
        until(lambda: published(alone, back) >= 2, 15, "it publishes again")
    first = next(one["t"] for one in learner.events("committed") if one["version"] > held)
    assert named(learner, "actor-2")[0] - max(first, since) < TIMEOUT_S + LATE_S
    run.finish()


def test_row_16_the_learner_dies_at_every_chunk_of_its_pushes(trial: Trials) -> None:
    """Each life of the learner is killed as it sends its n-th chunk; no token is of two versions."""
    run = trial(batch=2, eta=1)
    actors = [run.actor(weights=True), run.actor(weights=True)]
    for number in range(1, 2 * CHUNKS + 1):
        run.learner(weights=True, fault=f"learner:sending:{number}").wait_killed()
    run.learner(weights=True)
    run.wait_more(4)
    assert all(published(actor, 0) for actor in actors)
    assert min(len(one.events("loaded")) for one in actors) > 1
    run.finish()


def test_row_16_an_engine_dies_while_it_loads(trial: Trials) -> None:
    """It is out, and its successor has the newest version before it is given a lease."""
    run = trial(batch=2, eta=1)
    run.learner(weights=True), run.actor(weights=True)
    for number in (1, 2, 3):
        run.actor("b", weights=True, fault=f"b:loading:{number}").wait_killed()
        run.wait_more(2)
    last = run.actor("b", weights=True)
    until(lambda: published(last, 0), 15, "it publishes")
    assert last.events("published")[0]["t"] > last.events("applied")[0]["t"]
    run.finish()


def test_a_hung_actor_delays_no_other_and_is_named_in_time(trial: Trials) -> None:
    """SIGSTOP: the steps of the others come as before, and the log names it within the deadline."""
    run = trial(batch=2, eta=1)
    learner = run.learner(weights=True, step_s=0.1)
    hung = run.actor(weights=True)
    run.actor(weights=True), run.actor(weights=True)
    hung.wait_event("published", 2)
    hung.stop()
    since, held = time.monotonic(), hung.events("applied")[-1]["version"]
    run.wait_more(5)
    until(lambda: named(learner, hung.name), TIMEOUT_S + LATE_S, "the learner names it")
    # Its leases end after `lease_s`; nothing else waits for it.
    done = [one["t"] for one in learner.events("committed") if one["t"] > since]
    assert max(after - before for before, after in pairwise(done)) < run.config.lease_s + LATE_S
    hung.go_on()
    until(lambda: hung.events("applied")[-1]["version"] > held, 15, "it has moved on")
    run.finish()


@pytest.mark.parametrize(("every_s", "changes"), [(1.5, 5), pytest.param(10.0, 12, marks=pytest.mark.faults)])
def test_row_17_actors_join_and_leave(trial: Trials, every_s: float, changes: int) -> None:
    """No learner restarts, nothing is lost, and groups come the faster the more actors live."""
    run = trial(batch=4, eta=3, lease_s=3.0)
    learner, live, windows = run.learner(weights=True), list[Process](), list[tuple[int, float]]()
    for change in range(changes):
        if change % 4 == 3:
            drain([live.pop(0)])
        else:
            live.append(run.actor(weights=True, group_s=0.2, concurrency=2))
        until(lambda: published(live[-1], 0), 15, "the newest publishes")
        begun = time.monotonic()
        time.sleep(every_s)
        done = sum(published(actor, begun) for actor in live)
        windows.append((len(live), done / (time.monotonic() - begun)))
    assert len(learner.events("joined")) == 1
    # With three times the actors half as much again at least: machines are shared.
    most, fewest = max(windows), min(windows)
    assert most[0] >= 3 * fewest[0]
    assert most[1] > 1.5 * fewest[1], windows
    print(f"actors and groups a second: {windows}")
    counts = run.finish().counts
    assert counts.dropped.get("expired", 0) == 0


@pytest.mark.parametrize("rounds", [1, pytest.param(5, marks=pytest.mark.faults)])
def test_row_25_scale_8_to_2_to_8(trial: Trials, rounds: int) -> None:
    """Those that leave finish or hand back what they hold in time, and end with 0; nothing expires."""
    run = trial(batch=4, eta=2, lease_s=3.0)
    run.learner(weights=True)
    live = [run.actor(weights=True, group_s=0.2) for _ in range(8)]
    for _ in range(rounds):
        until(lambda: all(published(actor, 0) for actor in live), 30, "all publish")
        drain(live[2:])
        assert len(run.ledger().actors) == 2
        run.wait_more(3)
        live[2:] = [run.actor(weights=True, group_s=0.2) for _ in range(6)]
        run.wait_more(3)
    counts = run.finish().counts
    assert counts.dropped.get("expired", 0) == 0


def test_row_25_the_learner_drains(real_trial: Callable[..., RealTrial]) -> None:
    """SIGTERM to the real one: it ends its step and the run, and everybody ends with 0."""
    run = real_trial(eta=1, max_steps=100_000)
    learner = run.learner()
    actors = [run.actor(), run.actor()]
    run.wait_steps(3)
    os.kill(learner.pid, signal.SIGTERM)
    learner.wait(0)
    for actor in actors:
        actor.wait(0)
    assert run.newest() == run.ledger().number("version"), "its last version is in a checkpoint"
    run.check()
