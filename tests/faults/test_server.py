"""Rows 7 to 10: Redis is killed, comes back older or as another, or hangs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from buffer.client import Stream
from buffer.errors import RedisUnavailable
from buffer.ledger import Snapshot
from tests.faults.points import FOREIGN
from tests.faults.server import Server
from tests.faults.trial import Trial

BACK_S = 10
Servers = Callable[..., Server]
Trials = Callable[..., Trial]


@pytest.mark.parametrize(
    ("fsync", "kills"),
    [("always", 3), pytest.param("always", 50, marks=pytest.mark.faults),
     pytest.param("everysec", 50, marks=pytest.mark.faults)],
)  # fmt: skip
def test_rows_7_and_8_redis_is_killed(own_server: Servers, trial: Trials, fsync: str, kills: int) -> None:
    """Under `always` nothing acknowledged is lost, and the rest of I1 to I6; a step within 10 s each time.

    Under `everysec` the server may come back older; then the loss is counted.
    """
    server = own_server(appendfsync=fsync)
    run = trial(server, eta=2, batch=3)
    run.learner(step_s=0.01)
    run.actor(), run.actor()
    for _ in range(kills):
        run.wait_more(3)
        server.kill()
        server.start()
        assert run.wait_more(2, seconds=BACK_S) < BACK_S
    ledger = run.finish()
    if fsync == "always":
        assert ledger.counts.rollbacks == 0
        assert ledger.counts.dropped.get("lost", 0) == 0


@pytest.mark.parametrize("point", ["assigned", "struck", "committed", "ckpt-renamed", "ckpt-committed"])
def test_row_8_redis_comes_back_older(own_server: Servers, trial: Trials, point: str, tmp_path: Path) -> None:
    """At each point of a step: reconciled once, the loss counted, the steps since then stand."""
    server = own_server()
    run = trial(server, eta=2, batch=3)
    poison = 3 if point == "struck" else -1
    learner = run.learner(
        fault=f"learner:{point}:{8 if poison < 0 else 16}:stop", checkpoint_every=1, step_s=0.03
    )
    run.actor(poison=poison)
    run.actor()
    run.wait_steps(2)
    server.copy(tmp_path / "older")
    learner.wait_stopped()
    assert learner.events("trained")[-1]["step"] > 2
    server.restore(tmp_path / "older")
    learner.go_on()
    run.wait_more(4, seconds=BACK_S)
    ledger = run.finish()
    assert ledger.counts.rollbacks == 1
    assert trained_groups(run) == ledger.counts.trained
    for actor in run.actors:
        assert len(actor.events("joined")) <= 2  # the older server may not have known its epoch


def trained_groups(run: Trial) -> int:
    """Groups of all steps that were trained, each step once."""
    return sum(len(one["groups"]) for one in {one["step"]: one for one in run.trained()}.values())


def test_row_8_a_learner_and_redis_both_come_back_older(
    own_server: Servers, trial: Trials, tmp_path: Path
) -> None:
    """The learner starts again from a checkpoint that is newer than the server, which is brought forward.

    (Steps after that checkpoint would be gone: neither remembers them.)
    """
    server = own_server()
    run = trial(server, eta=2, batch=3)
    learner = run.learner(fault="learner:ckpt-committed:4")
    run.actor()
    run.wait_steps(2)
    server.copy(tmp_path / "older")
    learner.wait_killed()
    server.restore(tmp_path / "older")
    assert run.ledger().number("version") < 8
    again = run.learner()
    assert again.wait_event("joined")["restored"] == 8
    run.wait_more(3, seconds=BACK_S)
    assert run.finish().counts.rollbacks == 1


@pytest.mark.parametrize("how", ["wiped", "swapped"])
def test_row_9_another_run_in_its_place(own_server: Servers, trial: Trials, how: str, tmp_path: Path) -> None:
    """Nobody writes into a run that is not theirs: everyone stops, with one line that says so."""
    server = own_server()
    run = trial(server)
    learner = run.learner()
    actors = [run.actor(), run.actor()]
    run.wait_steps(3)
    server.kill()
    data = server.folder / "appendonlydir"
    shutil.rmtree(data)
    server.start()
    if how == "swapped":
        before = Stream(server.redis, run.run)
        other = trial(server)
        other.run = run.run
        other.learner(fault="learner:assigned:1"), other.actor("actor-9")
        other.learners[0].wait_killed()
        before.close()
    for process in [learner, *actors]:
        process.wait(FOREIGN)
        assert run.run in process.events("stopped")[0]["reason"]
    state = Stream(server.redis, run.run)
    if how == "wiped":
        assert not state.redis.exists(state.key("state"))
    else:
        ledger = state.call(Snapshot(full=True))
        assert ledger.number("version") == 0
        assert set(ledger.actors) == {"actor-9"}
    state.close()


@pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.faults)])
def test_row_10_redis_hangs(own_server: Servers, trial: Trials, seconds: int) -> None:
    """No process dies, none of the leases expires for it; a call returns when its patience is over."""
    server = own_server()
    run = trial(server, eta=2, lease_s=3.0)
    processes = [run.learner(), run.actor(), run.actor()]
    run.wait_steps(3)
    impatient = Stream(server.redis, run.run, patience_s=0.5)
    server.hang()
    begun = time.monotonic()
    with pytest.raises(RedisUnavailable, match="did not answer for"):
        impatient.call(Snapshot())
    assert time.monotonic() - begun < 0.5 + 2 * 1.0 + 1.0  # patience, two timeouts, a busy machine
    time.sleep(max(0.0, seconds - (time.monotonic() - begun)))
    assert all(process.running for process in processes)
    server.go_on()
    assert run.wait_more(3, seconds=BACK_S) < BACK_S
    ledger = run.finish()
    assert ledger.counts.dropped.get("expired", 0) == 0
    impatient.close()
