"""The next batch is fetched while this one trains, one step ahead; errors come out at their own step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from buffer.batches import Assigned, Manifest
from buffer.errors import Fenced
from learner import batch
from learner.batch import PayloadGone
from learner.errors import LearnerError
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


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeSession]:
    """Makes sessions whose records are read by nobody."""
    made: list[FakeSession] = []

    def read(session: Any, step: int, manifest: Manifest) -> list[Any]:
        time.sleep(READ_S)
        if error := made[-1].errors.pop(step, None):
            raise error
        return []

    def make(**settings: int) -> FakeSession:
        made.append(FakeSession(**settings))
        return made[-1]

    monkeypatch.setattr(batch, "read_batch", read)
    return make


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def never(reason: str) -> None:
    raise AssertionError(reason)


def test_one_step_ahead_and_no_further(session: Callable[..., FakeSession]) -> None:
    run = session(ready=10)
    with Prefetch(run) as batches:  # type: ignore[arg-type]
        first = batches.next(0, never)
        assert first is not None
        assert first.waited_s >= READ_S * 0.9
        wait_until(lambda: run.assigned == [0, 1], 5, "step 1 to be assigned while step 0 trains")
        time.sleep(2 * READ_S)
        assert run.assigned == [0, 1]
        second = batches.next(1, never)
        assert second is not None
        assert (second.step, second.queued) == (1, 3)
        assert second.waited_s < READ_S / 2 < READ_S * 0.9 <= second.fetched_s


def test_reasons_to_wait_are_heard_where_the_batch_is_wanted(session: Callable[..., FakeSession]) -> None:
    run, heard = session(ready=0, last=2), []

    def on_wait(reason: str) -> None:
        heard.append((reason, threading.current_thread() is threading.main_thread()))
        run.ready = 1

    with Prefetch(run) as batches:  # type: ignore[arg-type]
        assert batches.next(0, never) is not None
        found = batches.next(1, on_wait)
        assert found is not None
        assert heard == [("unsafe", True)]
        assert batches.next(2, never) is None


def test_an_error_comes_out_at_its_own_step_and_the_step_can_be_asked_for_again(
    session: Callable[..., FakeSession],
) -> None:
    run = session(ready=10)
    run.errors[1] = PayloadGone("gone")
    with Prefetch(run) as batches:  # type: ignore[arg-type]
        assert batches.next(0, never) is not None
        with pytest.raises(PayloadGone, match="gone"):
            batches.next(1, never)
        found = batches.next(1, never)
        assert found is not None
        run.errors[3] = Fenced("learner: epoch 1:a is not the one that may write, 2:b")
        assert batches.next(2, never) is not None
        with pytest.raises(Fenced):
            batches.next(3, never)


def test_a_thread_that_waits_ends_with_the_run(session: Callable[..., FakeSession]) -> None:
    began = time.monotonic()
    with Prefetch(session(ready=0)) as batches:  # type: ignore[arg-type]
        assert batches.next(0, never) is not None
    assert time.monotonic() - began < 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_died_is_noticed(session: Callable[..., FakeSession]) -> None:
    run = session(ready=10)
    run.errors[0] = ZeroDivisionError()
    with Prefetch(run) as batches, pytest.raises(LearnerError, match="has died"):  # type: ignore[arg-type]
        batches.next(0, never)
