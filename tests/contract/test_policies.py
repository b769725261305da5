"""What is done about late groups, slow actors, equal rewards, full memory, and the end of the data."""

from __future__ import annotations

import pytest

from buffer.admission import Drop, Lease
from buffer.client import Stream
from buffer.errors import StreamError
from buffer.prompts import Requeue
from tests.contract.harness import Run


def train(run: Run, actor: str, step: int, count: int) -> None:
    """`count` groups of an actor come in; the step is assigned, committed and served by the actor."""
    run.queue(actor, count)
    assert run.assign(step).status == "batch"
    run.commit(step + 1)
    run.applied(actor, step + 1)


def blocked(run: Run) -> Lease:
    """A lease of `a` that the next step has to wait for, while `b` has brought a batch of newer groups."""
    late = run.admit("a")
    train(run, "b", 0, 1)
    run.queue("b", 1)
    return late


def test_wait_waits_for_a_late_group(stream: Stream) -> None:
    run = Run(stream, batch=1, eta=1).start("a", "b")
    late = blocked(run)
    assert run.assign(1).reason == "unsafe"
    assert run.publish(late, "a").status == "ok"
    assert [row.group for row in run.assign(1).manifest.groups()] == [late.group]


def test_drop_gives_a_late_group_up_and_its_prompt_another_try_later(stream: Stream) -> None:
    run = Run(stream, batch=1, eta=1, policy="drop").start("a", "b", prompts=4)
    late = blocked(run)
    assert run.assign(1).status == "batch"
    assert run.snapshot().counts.dropped == {"stale": 1}
    assert run.heartbeat("a", late.token).lost == [late.token], "the actor is told"
    assert run.publish(late, "a").reason == "unknown"
    run.commit(2)
    run.applied("b", 2)
    leases = run.leases("b", 2)
    assert [(lease.position, lease.attempt) for lease in leases] == [(3, 0), (late.position, 1)], (
        "at the tail"
    )


def test_over_sampling_drops_what_is_over_when_it_is_due(stream: Stream) -> None:
    run = Run(stream, batch=2, eta=0, policy="drop", cap=3).start("a")
    slow, *leases = run.leases("a", 3)
    assert run.admit("a").reason == "full"
    for lease in leases:
        run.publish(lease, "a")
    assert run.assign(0).status == "batch", "the third is not waited for"
    assert run.snapshot().counts.dropped == {"stale": 1}
    run.commit(1)
    run.applied("a", 1)
    run.queue("a", 3)
    assert run.assign(1).status == "batch"
    assert run.snapshot().counts.dropped == {"stale": 1, "surplus": 1}
    assert slow.token


def test_a_slow_actor_is_told_so_and_gets_a_probe(stream: Stream) -> None:
    run = Run(stream, batch=1, eta=2).start("fast", "slow")
    run.heartbeat("slow")
    late = run.admit("slow")
    for step in range(2):
        run.elapse(100)
        train(run, "fast", step, 1)
    run.elapse(5000)
    run.heartbeat("fast")
    run.publish(late, "slow")
    run.applied("slow", 2)
    probe = run.admit("slow")
    assert (probe.status, run.admit("slow").reason) == ("lease", "slow")
    assert run.admit("fast").status == "lease"
    run.elapse(60_000)
    run.heartbeat("fast"), run.heartbeat("slow", probe.token)
    assert run.admit("slow").status == "lease", "one probe a minute"


def test_equal_rewards_are_filtered_only_with_dynamic_sampling(stream: Stream) -> None:
    run = Run(stream, dynamic=1).start("a")
    lease = run.admit("a")
    assert run.stream.call(Drop("a", run.epochs["a"], lease.token, "filtered")).dropped
    ledger = run.snapshot()
    assert (ledger.counts.dropped, ledger.outstanding) == ({"filtered": 1}, {})
    assert run.admit("a").position == 1, "its prompt does not return"
    other = Run(Stream(stream.redis, stream.run + "-2")).start("a")
    lease = other.admit("a")
    with pytest.raises(StreamError, match="does no dynamic sampling"):
        other.stream.call(Drop("a", other.epochs["a"], lease.token, "filtered"))


def test_payloads_in_store_and_to_come_stay_below_the_limit(stream: Stream) -> None:
    run = Run(stream, batch=2, eta=2, bytes_limit=700).start("a")
    run.queue("a", 1)
    size = run.snapshot().number("bytes_held")
    granted = 0
    while run.admit("a").status == "lease":
        granted += 1
    assert run.admit("a").reason == "memory"
    assert (granted + 1) * size <= 700 < (granted + 2) * size


def test_the_data_ends_with_a_short_batch_and_then_the_run(stream: Stream) -> None:
    run = Run(stream, batch=2, eta=1, max_steps=100).start("a", prompts=0)
    run.feed(0, 3, final=True)
    train(run, "a", 0, 2)
    assert run.assign(1).reason == "few", "a prompt is still queued"
    lease = run.admit("a")
    assert run.assign(1).reason == "few", "a group is still generated"
    run.publish(lease, "a")
    assert [row.group for row in run.assign(1).manifest.groups()] == [lease.group]
    assert run.assign(2).status == "end"


def test_a_lease_that_comes_back_at_the_end_of_the_data_is_waited_for(stream: Stream) -> None:
    run = Run(stream, batch=1, attempts_max=2).start("a", prompts=0)
    run.feed(0, 1, final=True)
    lease = run.admit("a")
    run.stream.call(Drop("a", run.epochs["a"], lease.token, "reward"))
    assert run.assign(0).reason == "few"
    run.stream.call(Drop("a", run.epochs["a"], run.admit("a").token, "reward"))
    assert run.assign(0).status == "end", "its prompt is retired"


def test_a_run_that_ends_releases_what_is_leased(stream: Stream) -> None:
    run = Run(stream).start("a")
    lease = run.admit("a")
    run.leave_learner("done")
    assert run.snapshot().counts.dropped == {"released": 1}
    assert run.heartbeat("a", lease.token).lost == [lease.token]


def test_a_group_that_cannot_be_read_is_struck_and_its_payload_kept(stream: Stream) -> None:
    run = Run(stream, attempts_max=2).start("a")
    run.queue("a", 2)
    group = run.assign(0).manifest.groups()[0].group
    assert run.strike(0, group, payload=b"broken").status == "struck"
    manifest = run.assign(0).manifest
    assert (len(manifest.groups()), manifest.strikes) == (1, {group: "poison"}), "a replay applies it"
    ((entry, letter),) = stream.redis.xrange(stream.key("dead"))
    assert (letter[b"reason"], letter[b"payload"], letter[b"prompt"]) == (b"poison", b"broken", b"")
    run.commit(1)
    assert run.snapshot().counts.trained == 1
    again = run.admit("a")
    assert (again.position, again.attempt) == (0, 1), "its prompt returns"
    with pytest.raises(StreamError, match="holds no prompt"):
        stream.call(Requeue(entry.decode()))


def test_a_dead_letter_put_back_is_a_new_admission(stream: Stream) -> None:
    run = Run(stream, attempts_max=1).start("a", prompts=1)
    run.stream.call(Drop("a", run.epochs["a"], run.admit("a").token, "reward"))
    assert run.admit("a").reason == "no-prompts"
    ((entry, _),) = stream.redis.xrange(stream.key("dead"))
    assert [stream.call(Requeue(entry.decode())).position for _ in range(2)] == [0, -1]
    lease = run.admit("a")
    assert (lease.group, lease.prompt.row if lease.prompt else None) == ("0000-0000000000-01", 0)
    assert run.snapshot().counts.dead == {"reward": 1}


def test_dead_letters_take_a_bounded_space(stream: Stream) -> None:
    run = Run(stream, batch=4, eta=1, attempts_max=9).start("a")
    run.queue("a", 4)
    big = bytes(12 << 20)
    for row in run.assign(0).manifest.groups():
        run.strike(0, row.group, payload=big)
    ledger = run.snapshot()
    assert (ledger.sizes["dead"], ledger.counts.dead) == (2, {"poison": 4})
    assert ledger.number("dead_bytes") == 2 * len(big)
