"""Figures are shown by a thread: nobody waits for Redis, and what was given last is seen in the end."""

from __future__ import annotations

import threading
from typing import Any

import redis

from learner.board import Board
from tests.waiting import wait_until


class SlowRedis:
    """Takes figures only when it is let, and fails when it is told to."""

    def __init__(self) -> None:
        self.redis, self.key = self, str
        self.taken: list[dict[str, Any]] = []
        self.asked, self.let, self.failures = 0, threading.Semaphore(0), 0

    def hset(self, _: str, mapping: dict[str, Any]) -> None:
        self.asked += 1
        assert self.let.acquire(timeout=5)
        if self.failures:
            self.failures -= 1
            raise redis.ConnectionError("away")
        self.taken.append(mapping)


def test_nobody_waits_and_the_newest_is_shown() -> None:
    slow = SlowRedis()
    with Board(slow) as board:  # type: ignore[arg-type]
        board.show({"step": 0, "loss": 1.0})
        wait_until(lambda: slow.asked == 1, 5, "the first figures to be on their way")
        for step in (1, 2):  # while the first ones wait
            board.show({"step": step, f"only at {step}": 1})
        slow.let.release(2)
        wait_until(lambda: len(slow.taken) == 2, 5, "the others to follow")
    assert slow.taken == [{"step": 0, "loss": 1.0}, {"step": 2, "only at 1": 1, "only at 2": 1}]


def test_a_redis_that_is_away_costs_the_display_alone() -> None:
    slow = SlowRedis()
    slow.failures = 1
    slow.let.release(2)
    with Board(slow) as board:  # type: ignore[arg-type]
        board.show({"step": 0})
        wait_until(lambda: slow.asked == 1, 5, "the first figures to be lost")
        board.show({"step": 1})
    assert slow.taken == [{"step": 1}]
