"""Joining, fencing, feeding, ending and leaving: who may write, and what a repeat does."""

from __future__ import annotations

import pytest

from buffer.admission import Admit, Drop
from buffer.batches import Assign, Strike
from buffer.client import LIBRARY, Call, Stream
from buffer.errors import Fenced, NoRun, SchemaMismatch, SettingsMismatch, StreamError
from buffer.ledger import Snapshot
from buffer.members import Applied, Heartbeat, JoinActor, JoinRecorder, LearnerBeat, Leave
from buffer.prompts import Feed, Requeue
from buffer.recovery import Known, Reconcile
from buffer.stream import Publish
from buffer.versions import Commit, CommitCheckpoint, Fork
from tests.contract.harness import Run, digest, make_group


@pytest.fixture
def run(stream: Stream) -> Run:
    """A started run with the actors `a` and `b`."""
    return Run(stream).start("a", "b")


def test_the_first_learner_makes_the_run(stream: Stream) -> None:
    run = Run(stream, batch=3, eta=2)
    assert run.join_learner("r1") == "1:r1"
    ledger = run.snapshot()
    assert ledger.state["nonce"] == "nonce"
    assert [ledger.number(name) for name in ("batch", "eta", "head", "version", "tail")] == [3, 2, 0, -1, 0]
    assert ledger.counts.conserved


def test_joining_again_with_the_same_bits_is_the_same_join(run: Run) -> None:
    run.join_learner("same")
    run.join_actor("a", "same")
    before = run.keys()
    assert run.join_learner("same") == "2:same"
    assert run.join_actor("a", "same") == "2:same"
    assert run.keys() == before


def test_a_join_that_arrives_late_fences_nobody(run: Run) -> None:
    run.join_actor("a", "first")
    assert run.join_actor("a", "second") == "3:second"
    before = run.keys()
    assert run.join_actor("a", "first") == "2:first"
    assert run.keys() == before


def test_an_actor_of_another_release_is_refused_with_both_versions(run: Run) -> None:
    before = run.keys()
    with pytest.raises(
        SchemaMismatch, match=r"actor c writes records of schema version 9, this run reads \d"
    ):
        run.stream.call(JoinActor("r", "c", "host", schema=9))
    assert run.keys() == before


def test_a_learner_with_other_settings_is_refused(run: Run) -> None:
    before = run.keys()
    other = Run(run.stream, eta=7)
    with pytest.raises(SettingsMismatch, match=r"^eta: this run has 1, the learner asks for 7$"):
        other.join_learner()
    assert run.keys() == before


@pytest.mark.parametrize(
    "call",
    [
        JoinActor("r", "a", "host"),
        Admit("a", "1:r", 1, "r"),
        Heartbeat("a", "1:r", "running", "{}", ()),
        Drop("a", "1:r", "1:t", "released"),
        Assign("1:r", 0),
        Commit("1:r", 0, "d", -1),
        Applied("a", "1:r", 0, "d"),
        Leave("actor", "a", "1:r"),
        Leave("learner", "done", "1:r"),
        LearnerBeat("1:r"),
        JoinRecorder("r", "backup"),
        Strike("1:r", 0, "g", "poison"),
        CommitCheckpoint("1:r", 0, "d", 0),
        Fork("1:r", 0, 0, "test", Run(None).rules),  # type: ignore[arg-type]
        Reconcile("1:r", False, Known("nonce", 0, 0, 0, -1, 0, -1)),
        Requeue("1-1"),
        Feed("1:r", 0, (b"p",)),
        Snapshot(),
    ],
    ids=lambda call: type(call).__name__,
)
def test_an_unknown_run_is_named(stream: Stream, call: Call) -> None:
    with pytest.raises(NoRun, match=stream.run):
        stream.call(call)
    assert Run(stream).keys() == {}


def test_publishing_to_an_unknown_run_leaves_no_payload(stream: Stream) -> None:
    with pytest.raises(NoRun, match=stream.run):
        stream.publish(Publish.of(make_group(), epoch="1:r", token="1:t", size=7), b"payload")
    assert stream.redis.xlen(stream.key("stream")) == 0


def test_a_missing_library_is_no_run(run: Run) -> None:
    run.stream.redis.function_delete(LIBRARY)
    try:
        with pytest.raises(NoRun, match="function library"):
            run.snapshot()
    finally:
        run.stream.load_library()


@pytest.mark.parametrize("role", ["learner", "a"])
def test_a_replaced_epoch_may_not_write(run: Run, role: str) -> None:
    lease = run.admit("a")
    old = run.epochs[role]
    run.join_learner() if role == "learner" else run.join_actor("a")
    calls: list[Call] = [
        Feed(old, 20, (b"p",)),
        Assign(old, 0),
        Commit(old, 1, "d", -1),
        Leave("learner", "done", old),
    ]
    if role == "a":
        calls = [
            Admit("a", old, 9, "r"),
            Heartbeat("a", old, "running", "{}", (lease.token,)),
            Drop("a", old, lease.token, "released"),
            Applied("a", old, 0, digest(0)),
            Leave("actor", "a", old),
        ]
    before = run.keys()
    for call in calls:
        with pytest.raises(Fenced, match="is not the one that may write, 2:"):
            run.stream.call(call)
    assert run.keys() == before


def test_a_replaced_actor_may_not_publish(run: Run) -> None:
    lease = run.admit("a")
    call, payload = run.publish_call(lease, "a")
    run.join_actor("a")
    answer = run.stream.publish(call, payload)
    assert (answer.status, answer.reason, answer.entry) == ("late", "fenced", "")
    ledger = run.snapshot()
    assert ledger.counts.refused == {"fenced": 1}
    assert (ledger.sizes["payloads"], ledger.counts.dropped) == (0, {"released": 1})


def test_an_actor_that_left_is_fenced_and_its_leases_are_released(run: Run) -> None:
    lease, other = run.admit("a"), run.admit("b")
    assert run.leave("a") == 1
    assert run.leave("a") == 0
    with pytest.raises(Fenced, match="may write, none"):
        run.admit("a")
    ledger = run.snapshot()
    assert ledger.counts.dropped == {"released": 1}
    assert list(ledger.actors) == ["b"]
    assert run.heartbeat("b", lease.token, other.token).lost == [lease.token]
    assert (run.admit("b").position, ledger.counts.conserved) == (lease.position, True)


def test_feeding_appends_only_at_the_tail(run: Run) -> None:
    assert run.feed(20, 3).tail == 23
    before = run.keys()
    assert run.feed(20, 3).tail == 23
    assert run.feed(5, 2).tail == 23
    for position, count in [(24, 1), (22, 3), (-1, 30)]:
        with pytest.raises(StreamError, match=f"got position {position}, the queue's tail is 23"):
            run.feed(position, count)
    with pytest.raises(StreamError, match="prompts"):
        run.feed(23, 0)
    assert run.keys() == before


def test_prompts_reach_the_actors_in_order(run: Run) -> None:
    leases = run.leases("a", 4)
    assert [lease.prompt.tokens for lease in leases if lease.prompt] == [[0], [1], [2], [3]]
    assert [lease.group for lease in leases[:2]] == ["0000-0000000000-00", "0000-0000000001-00"]


def test_a_stop_ends_leases_and_batches_until_the_next_learner(run: Run) -> None:
    run.queue("a", 2)
    run.stream.redis.set(run.stream.key("stop"), 1)
    assert run.admit("a").reason == "end"
    assert run.assign(0).status == "end"
    beat = run.heartbeat("a")
    assert (beat.over, beat.ended) == (True, "")
    assert run.snapshot().sizes["stopping"] == 1
    run.join_learner()
    assert run.assign(0).status == "batch"


def test_the_learner_ends_the_run_for_a_reason(run: Run) -> None:
    run.stream.call(Leave("learner", "finished", run.epochs["learner"]))
    beat = run.heartbeat("a")
    assert (beat.over, beat.ended) == (True, "finished")
    assert run.admit("a").reason == "end"


def test_the_last_steps_are_not_over_subscribed(stream: Stream) -> None:
    run = Run(stream, batch=2, eta=3, max_steps=2).start("a")
    run.queue("a", 4)
    assert run.admit("a").reason == "enough"
    run.assign(0)
    assert run.admit("a").reason == "enough"
    run.assign(1)
    assert run.admit("a").reason == "end"
    assert (run.assign(2).status, run.heartbeat("a").over) == ("end", True)
    assert (run.commit(1), run.commit(2)) == (1, 2)


@pytest.mark.parametrize(
    "stats", ["", "[1", "3", "[1, 2]", '{"rate": NaN}', "[" * 2000 + "]" * 2000], ids=lambda text: text[:14]
)
def test_stats_must_be_a_json_object(run: Run, stats: str) -> None:
    lease = run.admit("a")
    before = run.keys()
    with pytest.raises(StreamError, match=r"^stats: got .*, expected a JSON object$"):
        run.heartbeat("a", lease.token, stats=stats)
    assert run.keys() == before


def test_stats_are_kept_for_status(run: Run) -> None:
    run.heartbeat("a", stats='{"tokens_per_second": 12.5, "engine": {"pid": 7}}')
    record = run.snapshot().actors["a"]
    assert (record.state, record.host) == ("running", "host")
    assert record.stats == {"tokens_per_second": 12.5, "engine": {"pid": 7}}


def test_silence_is_measured_on_the_runs_clock(run: Run) -> None:
    run.heartbeat("a")
    run.elapse(60_500)
    run.heartbeat("b")
    ledger = run.snapshot()
    assert 60.5 <= ledger.silent_s("a") < 65
    assert (ledger.alive("a"), ledger.alive("b")) == (False, True)
