"""From lease to trained: publish, assign, commit, applied, and the payloads that are kept meanwhile."""

from __future__ import annotations

import msgspec
import pytest

from buffer.admission import Drop
from buffer.batches import Assign
from buffer.client import Stream
from buffer.codec import encode
from buffer.errors import StreamError
from buffer.ledger import Counts, Snapshot
from buffer.members import Applied
from buffer.stream import Publish, read_frames
from buffer.versions import Commit, CommitCheckpoint
from tests.contract.harness import Run, digest, make_group


@pytest.fixture
def run(stream: Stream) -> Run:
    """B = 2, eta = 1, with the actors `a` and `b`."""
    return Run(stream).start("a", "b")


def test_a_group_travels_from_actor_to_learner(run: Run) -> None:
    leases = run.queue("b", 2)
    answer = run.assign(0)
    assert (answer.status, answer.reason, answer.ready) == ("batch", "", 0)
    groups = [frame.group for frame in read_frames(run.stream, answer.manifest.groups())]
    assert [group.id for group in groups if group] == [lease.group for lease in leases]
    assert [group.actor for group in groups if group] == ["b", "b"]
    assert groups[1] is not None
    assert groups[1].samples[0].tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert run.snapshot().counts == Counts(admitted=2, assigned=2)


def test_a_repeated_publish_changes_nothing(run: Run) -> None:
    lease = run.admit("a")
    call, payload = run.publish_call(lease, "a")
    first = run.stream.publish(call, payload)
    before = run.keys()
    again = run.stream.publish(call, payload)
    assert (first.status, again.status, again.entry) == ("ok", "ok", first.entry)
    assert run.keys() == before


def test_a_repeated_publish_is_known_while_its_payload_is_kept(run: Run) -> None:
    lease = run.admit("a")
    run.queue("b", 1)
    entry = run.publish(lease, "a").entry
    run.assign(0)
    run.commit(1)
    assert run.publish(lease, "a").entry == entry
    run.queue("b", 2)
    run.assign(1)
    run.commit(2, covered=0)
    late = run.publish(lease, "a")
    assert (late.status, late.reason) == ("late", "unknown")
    assert run.snapshot().sizes["payloads"] == 2


def test_a_group_of_an_expired_lease_is_late(stream: Stream) -> None:
    run = Run(stream, lease_ms=300).start("a", "b")
    lease = run.admit("a")
    run.elapse(300)
    assert run.heartbeat("a", lease.token).lost == [lease.token]
    again = run.admit("b")
    for _ in range(2):
        answer = run.publish(lease, "a")
        assert (answer.status, answer.reason, answer.entry) == ("late", "unknown", "")
    assert run.publish(again, "b").status == "ok"
    ledger = run.snapshot()
    assert (ledger.counts.refused, ledger.counts.dropped) == ({"unknown": 2}, {"expired": 1})
    assert (ledger.sizes["payloads"], ledger.counts.queued, ledger.counts.conserved) == (1, 1, True)


UNSOUND = {
    "a digest that was never committed": {"versions": ("1:other",)},
    "a version that was never committed": {"versions": (f"2:{digest(2)}",), "version_min": 2},
    "a version older than the lease's": {"versions": (f"0:{digest(0)}",), "version_min": 0},
    "an older version beside its own": {"versions": (f"0:{digest(0)}", f"1:{digest(1)}"), "version_min": 1},
    "no version": {"versions": ()},
    "no version but a number": {"versions": ("1",)},
    "a version_min that is no number": {"version_min": "x"},
    "another group's id": {"group": "0000-0000000099-00"},
}


@pytest.mark.parametrize("fault", UNSOUND)
def test_a_group_its_lease_does_not_allow_is_refused(run: Run, fault: str) -> None:
    run.queue("a", 2)
    run.assign(0)
    run.commit(1, covered=0)
    run.applied("a", 1)
    lease = run.admit("a")
    call, payload = run.publish_call(lease, "a")
    answer = run.stream.publish(msgspec.structs.replace(call, **UNSOUND[fault]), payload)
    assert (answer.status, answer.reason, answer.entry) == ("refused", "engine", "")
    ledger = run.snapshot()
    assert (ledger.counts.dropped, ledger.sizes["payloads"]) == ({"engine": 1}, 0)
    assert ledger.counts.conserved
    again = run.admit("b")
    assert (again.position, again.attempt) == (lease.position, lease.attempt + 1)


def test_the_batch_takes_the_earliest_deadlines_then_the_lowest_ids(stream: Stream) -> None:
    run = Run(stream, batch=2, eta=2).start("a", "b")
    run.queue("a", 2)
    run.assign(0)
    run.commit(1)
    run.applied("b", 1)
    late, early = run.leases("b", 1), run.leases("a", 3)
    for lease, actor in [(late[0], "b"), (early[2], "a"), (early[0], "a"), (early[1], "a")]:
        assert run.publish(lease, actor).status == "ok"
    assert (early[0].deadline, late[0].deadline) == (2, 3)
    assert [row.group for row in run.assign(1).manifest.groups()] == [early[0].group, early[1].group]
    # The rows of a manifest stand by group id, whatever their deadlines: a batch trains in one order.
    assert [row.group for row in run.assign(2).manifest.groups()] == [late[0].group, early[2].group]


def test_the_learner_waits_for_too_few_and_for_earlier_deadlines(stream: Stream) -> None:
    run = Run(stream, batch=1, eta=1).start("a", "b")
    slow = run.admit("a")
    assert run.assign(0).reason == "few"
    run.queue("a", 1)
    run.assign(0)
    run.commit(1)
    run.applied("b", 1)
    run.queue("b", 1)
    # Step 1 is the last that may train the slow group, so the newer one must not take its place.
    answer = run.assign(1)
    assert (answer.status, answer.reason, answer.ready) == ("wait", "unsafe", 1)
    run.publish(slow, "a")
    assert [row.group for row in run.assign(1).manifest.groups()] == [slow.group]
    assert run.assign(2).status == "batch"


def test_a_lease_that_blocks_a_batch_frees_it_when_it_ends(stream: Stream) -> None:
    run = Run(stream, batch=1, eta=1).start("a", "b")
    slow = run.admit("a")
    run.queue("a", 1)
    run.assign(0)
    run.commit(1)
    run.applied("b", 1)
    run.queue("b", 1)
    assert run.assign(1).reason == "unsafe"
    run.stream.call(Drop("a", run.epochs["a"], slow.token, "reward"))
    assert run.assign(1).status == "batch"


def test_a_repeated_assign_is_the_stored_manifest(run: Run) -> None:
    run.queue("a", 4)
    first = run.assign(0)
    before = run.keys()
    assert run.assign(0).raw == first.raw
    assert run.keys() == before
    with pytest.raises(StreamError, match="got 2, the next to assign is 1"):
        run.assign(2)
    with pytest.raises(StreamError, match=r"^step: got 0\.5, expected an integer"):
        run.stream.call(Assign(run.epochs["learner"], 0.5))  # type: ignore[arg-type]


def test_a_commit_counts_staleness_and_deletes_only_what_is_covered(run: Run) -> None:
    for step in range(2):
        run.queue("a", 2)
        run.assign(step)
    run.commit(1)
    assert (run.snapshot().staleness, run.snapshot().sizes["payloads"]) == ({0: 2}, 4)
    run.commit(2, covered=0)
    ledger = run.snapshot()
    assert (ledger.staleness, ledger.sizes["payloads"]) == ({0: 2, 1: 2}, 2)
    assert (ledger.counts.trained, ledger.counts.assigned, ledger.counts.conserved) == (4, 0, True)
    assert run.assign(1).status == "batch"
    with pytest.raises(StreamError, match="manifest of step 0 was covered"):
        run.assign(0)
    assert run.stream.redis.get(run.stream.key("step")) == b"2"
    assert run.stream.redis.hlen(run.stream.key("prompt")) == 18, "the prompts of covered groups go, too"


def test_a_repeated_commit_changes_nothing_and_a_wrong_one_is_refused(run: Run) -> None:
    run.queue("a", 2)
    run.assign(0)
    run.commit(1, covered=0)
    before, epoch = run.keys(), run.epochs["learner"]
    assert run.commit(1, covered=0) == 1
    assert run.stream.call(Commit(epoch, 1, "a twin's", -1)).digest == digest(1), "the first digest counts"
    for call, problem in [
        (Commit(epoch, 3, "d", -1), "got version 3, the next to commit is 2 and the next step to assign 1"),
        (Commit(epoch, 2, "d", -1), "got version 2, the next to commit is 2 and the next step to assign 1"),
        (CommitCheckpoint(epoch, 1, "d", 0), "checkpoint of version 1: got digest d, committed is digest-1"),
        (CommitCheckpoint(epoch, 1, digest(1), 2), "oldest: got 2, newer than the checkpoint 1"),
        (Commit(epoch, 2, "", -1), "digest: got nothing, expected text"),
    ]:
        with pytest.raises(StreamError, match=f"^{problem}$"):
            run.stream.call(call)
    assert run.keys() == before


def test_only_a_committed_digest_can_be_applied(run: Run) -> None:
    before, epoch = run.keys(), run.epochs["a"]
    for version, value in [(0, "other"), (1, digest(1))]:
        with pytest.raises(StreamError, match=f"version {version}: got digest {value}, committed is"):
            run.stream.call(Applied("a", epoch, version, value))
    assert run.applied("a", 0) == 0
    assert run.keys() == before


def test_reading_a_batch_names_a_payload_that_is_missing_or_wrong(run: Run) -> None:
    lease, other = run.leases("a", 2)
    call, _ = run.publish_call(lease, "a")
    run.stream.publish(call, encode(make_group(7)))
    run.publish(other, "a")
    rows = run.assign(0).manifest.groups()
    wrong, right = read_frames(run.stream, rows)
    assert (wrong.reason, right.problem) == ("poison", None)
    assert "holds 0000-0000000007-00" in str(wrong.problem)
    run.stream.redis.xdel(run.stream.key("stream"), rows[0].entry)
    gone, _ = read_frames(run.stream, rows)
    assert (gone.reason, gone.payload) == ("lost", b"")
    assert gone.problem is not None
    assert (gone.problem.entry, gone.problem.group) == (rows[0].entry, lease.group)


def test_a_ready_batch_rings_the_learner_once(run: Run) -> None:
    bell = run.stream.key("bell")
    run.queue("a", 1)
    assert run.stream.redis.llen(bell) == 0
    run.queue("a", 3)
    assert run.stream.redis.llen(bell) == 1
    assert run.stream.take(bell, 1.0) == b"1"


def test_over_maxmemory_the_run_drains_but_takes_nothing_new(run: Run) -> None:
    run.queue("a", 2)
    lease = run.admit("a")
    redis = run.stream.redis
    redis.config_set("maxmemory", 1)
    try:
        for blocked in (lambda: run.admit("a"), lambda: run.publish(lease, "a"), lambda: run.feed(20, 1)):
            with pytest.raises(StreamError, match=r"OOM|maxmemory|EXECABORT"):
                blocked()
        assert run.heartbeat("a", lease.token).lost == []
        assert run.assign(0).status == "batch"
        assert run.commit(1, covered=0) == 1
        assert run.applied("a", 1) == 1
        assert run.join_learner()
        assert run.leave("a") == 1
        assert run.stream.call(Snapshot()).counts.conserved
    finally:
        redis.config_set("maxmemory", 0)
    assert run.snapshot().sizes["payloads"] == 0


def test_the_call_of_a_group_names_its_versions(run: Run) -> None:
    lease = run.admit("a")
    run.queue("b", 2)
    run.assign(0)
    run.commit(1)
    call, _ = run.publish_call(lease, "a", 1, 0)
    assert (call.version_min, call.versions) == (0, ("1:digest-1", "0:digest-0"))
    assert isinstance(call, Publish)
    assert run.publish(lease, "a", 1, 0).status == "ok"
