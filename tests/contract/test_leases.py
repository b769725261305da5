"""Leases: the bound, repeats, renewal, expiry, hand-backs and dead letters."""

from __future__ import annotations

import pytest

from buffer.admission import Admit, Drop
from buffer.client import Stream
from buffer.errors import StreamError
from tests.contract.harness import Run


@pytest.fixture
def run(stream: Stream) -> Run:
    """B = 2, eta = 1: four leases at version 0."""
    return Run(stream, lease_ms=1000, attempts_max=2).start("a", "b")


def test_a_repeated_admission_is_the_first_one(run: Run) -> None:
    call = run.next_admit("a")
    lease = run.stream.call(call)
    before = run.keys()
    assert run.stream.call(call) == lease
    assert run.keys() == before


def test_the_bound_holds_across_actors(run: Run) -> None:
    deadlines = [run.admit(actor).deadline for actor in "abab"]
    assert deadlines == [1, 1, 1, 1]
    assert [run.admit(actor).reason for actor in "ab"] == ["full", "full"]
    assert run.snapshot().outstanding == {1: 4}


def test_every_assigned_step_frees_a_batch_of_places(run: Run) -> None:
    run.queue("a", 4)
    run.assign(0)
    run.commit(1)
    run.applied("b", 1)
    # The two queued groups are due at step 1, so an actor at version 0 has no place, one at 1 has.
    assert run.admit("a").reason == "full"
    assert [lease.deadline for lease in run.leases("b", 2)] == [2, 2]
    assert run.admit("b").reason == "full"


def test_without_weights_nothing_is_leased(run: Run) -> None:
    run.join_actor("c")
    assert run.admit("c").reason == "no-weights"
    run.applied("c", 0)
    assert run.admit("c").status == "lease"
    run.join_actor("c")
    assert run.admit("c").reason == "no-weights"


def test_weights_beyond_the_bound_get_nothing(run: Run) -> None:
    for step in range(2):
        run.queue("a", 2)
        run.assign(step)
        run.commit(step + 1)
        run.applied("a", step + 1)
    assert run.admit("b").reason == "old-weights"


def test_an_empty_queue_is_named(stream: Stream) -> None:
    run = Run(stream).start("a", prompts=1)
    assert [run.admit("a").reason for _ in range(2)] == ["", "no-prompts"]


def test_a_lease_without_a_heartbeat_expires_and_its_prompt_returns_first(run: Run) -> None:
    lease, kept = run.leases("a", 2)
    run.elapse(600)
    assert run.heartbeat("a", kept.token).lost == []
    run.elapse(600)
    assert run.heartbeat("a", lease.token, kept.token).lost == [lease.token]
    again = run.admit("b")
    assert (again.position, again.attempt, again.group) == (0, 1, "0000-0000000000-01")
    assert run.snapshot().counts.dropped == {"expired": 1}


@pytest.mark.parametrize("call", ["admit", "assign", "heartbeat"])
def test_every_regular_call_expires_what_is_due(run: Run, call: str) -> None:
    run.leases("a", 2)
    run.elapse(1000)
    {
        "admit": lambda: run.admit("b"),
        "assign": lambda: run.assign(0),
        "heartbeat": lambda: run.heartbeat("b"),
    }[call]()
    assert run.snapshot().counts.dropped == {"expired": 2}


@pytest.mark.parametrize("last", [0, 1 << 50], ids=["a jump ahead", "a jump back"])
def test_a_clock_that_jumps_expires_nothing(run: Run, last: int) -> None:
    lease = run.admit("a")
    run.elapse(-10)
    before = run.snapshot().number("clock")
    run.stream.redis.hset(run.stream.key("state"), "last", last)
    assert run.heartbeat("a", lease.token).lost == []
    assert run.snapshot().number("clock") - before == (1000 if last == 0 else 0)


def test_real_time_moves_the_clock(run: Run) -> None:
    """The only test that waits: 50 ms between two calls are 50 ms on the run's clock, within a second."""
    import time

    run.heartbeat("a")
    before, start = run.snapshot().number("clock"), time.monotonic()
    time.sleep(0.05)
    run.heartbeat("a")
    passed = run.snapshot().number("clock") - before
    assert 49 <= passed <= (time.monotonic() - start) * 1000 + 50


def test_one_call_expires_at_most_64_leases(stream: Stream) -> None:
    run = Run(stream, batch=80, eta=0, lease_ms=1000).start("a", prompts=80)
    run.leases("a", 70)
    run.elapse(1000)
    run.heartbeat("a")
    assert run.snapshot().counts.dropped == {"expired": 64}
    run.heartbeat("a")
    ledger = run.snapshot()
    assert (ledger.counts.dropped, ledger.counts.conserved) == ({"expired": 70}, True)


@pytest.mark.parametrize("reason", ["released", "engine", "reward", "poison"])
def test_a_lease_can_be_handed_back_once(run: Run, reason: str) -> None:
    lease = run.admit("a")
    call = Drop("a", run.epochs["a"], lease.token, reason)
    assert run.stream.call(call).dropped
    before = run.keys()
    assert not run.stream.call(call).dropped
    assert run.keys() == before
    assert run.snapshot().counts.dropped == {reason: 1}


def test_an_unknown_reason_is_refused(run: Run) -> None:
    lease = run.admit("a")
    before = run.keys()
    with pytest.raises(StreamError, match="reason: got stale"):
        run.stream.call(Drop("a", run.epochs["a"], lease.token, "stale"))
    assert run.keys() == before


def test_a_prompt_that_fails_too_often_becomes_a_dead_letter(run: Run) -> None:
    for attempt in range(2):
        lease = run.admit("a")
        assert (lease.position, lease.attempt) == (0, attempt)
        run.stream.call(Drop("a", run.epochs["a"], lease.token, "poison"))
    assert run.admit("a").position == 1
    ((_, letter),) = run.stream.redis.xrange(run.stream.key("dead"))
    assert (letter[b"group"], letter[b"reason"]) == (b"0000-0000000000-01", b"poison")
    assert letter[b"prompt"]
    assert not run.stream.redis.hexists(run.stream.key("prompt"), 0)
    ledger = run.snapshot()
    assert (ledger.sizes["dead"], ledger.counts.dropped, ledger.counts.conserved) == (1, {"poison": 2}, True)


def test_freed_places_wake_waiting_actors_and_are_capped(run: Run) -> None:
    places = run.stream.key("places")
    assert run.stream.redis.llen(places) == 4, "a feed wakes as many as could be admitted, B (eta + 1)"
    run.feed(20, 4)
    assert run.stream.redis.llen(places) == 4
    run.stream.redis.delete(places)
    lease = run.admit("a")
    assert run.stream.take(places, 0.05) is None
    run.stream.call(Drop("a", run.epochs["a"], lease.token, "released"))
    assert run.stream.take(places, 1.0) == b"1"
    run.queue("a", 2)
    run.assign(0)
    assert run.stream.redis.llen(places) == 2


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (Admit("", "e", 1, "r"), "actor: got nothing, expected text"),
        (Admit("a", "e", "x", "r"), "request: got x, expected an integer"),  # type: ignore[arg-type]
        (Admit("a", "e", 1, ""), "random: got nothing, expected text"),
    ],
)
def test_arguments_are_checked(run: Run, call: Admit, problem: str) -> None:
    before = run.keys()
    with pytest.raises(StreamError, match=f"^{problem}$"):
        run.stream.call(call)
    assert run.keys() == before
