"""The feeder keeps the queue full on a real server, and says when it may not."""

from __future__ import annotations

import pytest

from buffer.client import Stream
from buffer.errors import Fenced
from buffer.schema import Prompt
from buffer.session import Session
from learner.datasets import PromptOrder
from learner.errors import LearnerError
from learner.feed import Feeder
from tests.contract.harness import Run
from tests.waiting import wait_until

ORDER = PromptOrder([Prompt(row, [row], f"#### {row}") for row in range(5)], seed=3)


def _take_over(stream: Stream) -> Session:
    return Session.join(stream, Run(stream).rules)


def queued(stream: Stream) -> int:
    return int(stream.redis.llen(stream.key("prompts")))  # type: ignore[arg-type]


def test_the_queue_is_topped_up_in_the_order_of_positions(stream: Stream) -> None:
    run, session = Run(stream).start("a", prompts=0), _take_over(stream)
    with Feeder(session, ORDER, ahead=8) as feeder:
        wait_until(lambda: queued(stream) == 8, 5, "the feeder")
        leases = run.leases("a", 4)
        wait_until(lambda: queued(stream) == 8, 5, "the feeder")
        feeder.check()
    assert [lease.prompt for lease in leases] == [ORDER.at(position) for position in range(4)]
    assert run.snapshot().number("tail") == 12


def test_a_feeder_of_an_older_learner_stops_and_says_so(stream: Stream) -> None:
    run, session = Run(stream).start("a", prompts=0), _take_over(stream)
    with Feeder(session, ORDER, ahead=2) as feeder:
        wait_until(lambda: queued(stream) == 2, 5, "the feeder")
        run.join_learner()
        run.leases("a", 1)
        wait_until(lambda: not feeder.is_alive(), 5, "the feeder")
        with pytest.raises(Fenced):
            feeder.check()
    assert queued(stream) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_feeder_that_died_is_noticed(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(position: int) -> Prompt:
        raise ZeroDivisionError(position)

    Run(stream).start(prompts=0)
    order = PromptOrder([], seed=0)
    monkeypatch.setattr(order, "at", break_down)
    with Feeder(_take_over(stream), order, ahead=2) as feeder:
        wait_until(lambda: not feeder.is_alive(), 5, "the feeder")
        with pytest.raises(LearnerError, match="has died; see above why"):
            feeder.check()
