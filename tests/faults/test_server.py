"""Rows 7 to 10: Redis is killed, comes back older or as another, or hangs."""

from __future__ import annotations

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
    run = trial(server, eta=2, batch=3, lease_s=5.0)
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


def test_row_18_the_disk_of_redis_is_full(own_server: Servers, trial: Trials) -> None:
    """It ends rather than acknowledge what it cannot keep; with room again it has all it acknowledged."""
    server = own_server()
    run = trial(server, eta=2, batch=3, lease_s=5.0)
    run.learner(step_s=0.01)
    run.actor(), run.actor()
    run.wait_more(3)
    assert server.fill_disk(left=20_000) == 1
    assert "AOF write error" in (server.folder / "redis.log").read_text().splitlines()[-1]
    assert all(process.running for process in [*run.learners, *run.actors])
    server.start()
    assert run.wait_more(2, seconds=BACK_S) < BACK_S
    ledger = run.finish()
    assert ledger.counts.rollbacks == 0
    assert ledger.counts.dropped.get("lost", 0) == 0


def test_row_7_redis_is_away_at_a_read(own_server: Servers, trial: Trials) -> None:
    """A step that was assigned is read and trained once Redis is back; nobody dies of it."""
    server = own_server()
    run = trial(server, eta=2, batch=3)
    learner = run.learner(fault="learner:assigned:4:stop")
    run.actor()
    learner.wait_stopped()
    server.kill()
    learner.go_on()
    time.sleep(0.5)
    server.start()
    run.wait_more(3, seconds=BACK_S)
    run.finish()


@pytest.mark.parametrize("point", ["assigned", "committed", "ckpt-committed"])
def test_row_8_redis_comes_back_older(own_server: Servers, trial: Trials, point: str, tmp_path: Path) -> None:
    """At each point of a step: reconciled once, the loss counted, the steps since then stand."""
    server = own_server()
    run = trial(server, eta=2, batch=3)
    learner = run.learner(fault=f"learner:{point}:16:stop", checkpoint_every=1, step_s=0.03)
    run.actor(), run.actor()
    run.wait_steps(2)
    server.copy(tmp_path / "older")
    learner.wait_stopped()
    assert learner.events("trained")[-1]["step"] > run.steps() - 3
    server.restore(tmp_path / "older")
    assert run.ledger().number("version") < run.steps()
    learner.go_on()
    run.wait_more(6, seconds=BACK_S)
    ledger = run.finish()
    assert ledger.counts.rollbacks == 1
    assert trained_groups(run) == ledger.counts.trained
    for actor in run.actors:
        assert len(actor.events("joined")) <= 2  # the older server may not have known its epoch


def trained_groups(run: Trial) -> int:
    """Groups of all steps that were trained, each step once."""
    return sum(len(one["groups"]) for one in {one["step"]: one for one in run.trained()}.values())


def test_row_8_only_a_strike_is_forgotten(own_server: Servers, trial: Trials, tmp_path: Path) -> None:
    """The step is committed without the group that was struck, though the server thinks that it is in."""
    server = own_server()
    run = trial(server, eta=2, batch=3)
    learner = run.learner(fault="learner:assigned:4:stop,learner:struck:1:stop")
    run.actor()
    learner.wait_stopped()
    gone = run.ledger().manifests[3].rows[0]
    run.stream.redis.xdel(run.stream.key("stream"), gone.entry)
    server.copy(tmp_path / "older")
    learner.go_on()
    learner.wait_event("struck", group=gone.group)
    learner.wait_stopped()
    server.restore(tmp_path / "older")
    run.forgot = True
    learner.go_on()
    run.wait_more(3, seconds=BACK_S)
    ledger = run.finish()
    assert ledger.counts.trained == trained_groups(run)
    assert ledger.counts.dropped["lost"] >= 1


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


def test_row_8_redis_has_forgotten_the_learner(own_server: Servers, trial: Trials, tmp_path: Path) -> None:
    """The older file is from before the learner joined: it goes on under the epoch that it has."""
    server = own_server()
    run = trial(server, eta=2, batch=3)
    before = run.learner()
    run.actor()
    run.wait_steps(2)
    server.copy(tmp_path / "older")
    before.kill()
    learner = run.learner(fault="learner:feeding:2:stop")
    learner.wait_stopped()
    server.restore(tmp_path / "older")
    learner.go_on()
    run.forgot = True
    run.wait_more(3, seconds=BACK_S)
    run.finish()


def test_row_8_a_lease_of_before_is_counted_as_lost(
    own_server: Servers, trial: Trials, tmp_path: Path
) -> None:
    """A lease that only the older file knows, and nobody renews, is `lost`; its prompt is leased again."""
    server = own_server()
    run = trial(server, eta=2, batch=3, lease_s=2.5)
    learner = run.learner(fault="learner:committed:6:stop")
    holder = run.actor(group_s=60.0, concurrency=1)
    holder.wait_event("leased")
    server.copy(tmp_path / "older")
    [held] = [lease for lease in run.ledger().leased if lease.actor == "actor-0"]
    holder.kill()
    run.actor()
    learner.wait_stopped()
    server.restore(tmp_path / "older")
    learner.go_on()
    run.wait_more(4, seconds=BACK_S)
    ledger = run.finish()
    assert ledger.counts.rollbacks == 1
    assert ledger.counts.dropped.get("lost", 0) >= 1, ledger.counts
    groups = {group for one in run.trained() for group in one["groups"]}
    assert held.group not in groups


@pytest.mark.parametrize("how", ["wiped", "swapped"])
def test_row_9_another_run_in_its_place(own_server: Servers, trial: Trials, how: str, tmp_path: Path) -> None:
    """Nobody writes into a run that is not theirs: everyone stops, with one line that says so."""
    server = own_server()
    run = trial(server)
    learner = run.learner(fault="learner:feeding:5:stop")
    actors = [run.actor(), run.actor()]
    learner.wait_stopped()
    if how == "swapped":
        elsewhere = own_server()
        other = trial(elsewhere)
        other.run = run.run
        others = [other.learner(fault="learner:assigned:1"), other.actor("actor-9")]
        others[0].wait_killed()
        others[1].kill()
        elsewhere.copy(tmp_path / "other")
        server.restore(tmp_path / "other")
    else:
        server.wipe()
    learner.go_on()
    for process in [learner, *actors]:
        process.wait(FOREIGN)
        assert process.events("stopped")[0]["reason"].startswith("foreign run: ")
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
