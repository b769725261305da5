"""The next batch is fetched while this one trains, one step ahead; errors come out at their own step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from buffer.batches import Assigned, Manifest
from buffer.errors import Fenced, RedisUnavailable
from learner.errors import BatchError, LearnerError
from learner.prefetch import Prefetch
from tests.waiting import wait_until

READ_S = 0.2


class FakeSession:
    """Steps are ready up to `ready`; reading one takes READ_S. Counts how often each was assigned."""

    def __init__(self, ready: int, last: int = 100) -> None:
        self.ready, self.last, self.version = ready, last, 0
        self.assigned: list[int] = []
        self.errors: dict[int, Exception] = {}
        self.stream = SimpleNamespace(key=str, take=lambda key, seconds: time.sleep(0.01))

    def assign(self, step: int) -> Assigned:
        if step >= self.last:
            return Assigned("end", "", "", 0)
        if step > self.ready:
            return Assigned("wait", "unsafe", "", 0)
        self.assigned.append(step)
        return Assigned("batch", "", '{"rows": []}', 3)

    def fetch(self, step: int, manifest: Manifest) -> list[Any]:
        """Takes READ_S, or raises the step's error, once."""
        time.sleep(READ_S)
        if error := self.errors.pop(step, None):
            raise error
        return []


def prefetch(run: FakeSession) -> Prefetch:
    return Prefetch(run, run.fetch)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def never(reason: str) -> None:
    raise AssertionError(reason)


def test_one_step_ahead_and_no_further() -> None:
    run = FakeSession(ready=10)
    with prefetch(run) as batches:
        first = batches.next(0, never)
        assert first is not None
        assert first.waited_s >= READ_S * 0.9
        time.sleep(READ_S)
        assert run.assigned == [0]
        batches.ahead(1)
        wait_until(lambda: run.assigned == [0, 1], 5, "step 1 to be assigned while step 0 trains")
        time.sleep(2 * READ_S)
        assert run.assigned == [0, 1]
        second = batches.next(1, never)
        assert second is not None
        assert (second.step, second.queued) == (1, 3)
        assert second.waited_s < READ_S / 2 < READ_S * 0.9 <= second.fetched_s


def test_reasons_to_wait_are_heard_where_the_batch_is_wanted() -> None:
    run, heard = FakeSession(ready=0, last=2), []

    def on_wait(reason: str) -> None:
        heard.append((reason, threading.current_thread() is threading.main_thread()))
        run.ready = 1

    with prefetch(run) as batches:
        assert batches.next(0, never) is not None
        batches.ahead(1)
        found = batches.next(1, on_wait)
        assert found is not None
        assert heard == [("unsafe", True)]
        assert batches.next(2, never) is None


def test_an_error_comes_out_at_its_own_step_and_the_step_can_be_asked_for_again() -> None:
    run = FakeSession(ready=10)
    run.errors[1] = RedisUnavailable("gone")
    with prefetch(run) as batches:
        assert batches.next(0, never) is not None
        batches.ahead(1)
        with pytest.raises(RedisUnavailable, match="gone"):
            batches.next(1, never)
        found = batches.next(1, never)
        assert found is not None
        run.errors[3] = Fenced("learner: epoch 1:a is not the one that may write, 2:b")
        assert batches.next(2, never) is not None
        batches.ahead(3)
        with pytest.raises(Fenced):
            batches.next(3, never)
        run.errors[4] = BatchError("another model's experts")
        with pytest.raises(BatchError):
            batches.next(4, never)


def test_a_thread_that_waits_ends_with_the_run() -> None:
    began = time.monotonic()
    with prefetch(FakeSession(ready=0)) as batches:
        assert batches.next(0, never) is not None
        batches.ahead(1)
    assert time.monotonic() - began < 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_died_is_noticed() -> None:
    run = FakeSession(ready=10)
    run.errors[0] = ZeroDivisionError()
    with prefetch(run) as batches, pytest.raises(LearnerError, match="has died"):
        batches.next(0, lambda _: None)  # on a busy machine it takes a while to die
