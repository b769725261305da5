"""Difficulty statistics on a real Redis, and the questions that later epochs leave out."""

from __future__ import annotations

from pathlib import Path

import pytest

from buffer.client import AsyncStream, Stream
from buffer.difficulty import Difficulty, difficulties, note
from buffer.errors import StreamError
from buffer.local_server import LocalServer
from buffer.schema import Prompt
from learner.curriculum import Curriculum
from learner.datasets import PromptOrder

PROMPTS = [Prompt(row, [row], "#### 1") for row in range(6)]


async def tell(server: LocalServer, run: str, *groups: tuple[int, list[float]]) -> None:
    """What actors say of scored groups: (row, rewards)."""
    stream = AsyncStream.connect(server.socket_url, run)
    try:
        for row, rewards in groups:
            await note(stream, row, rewards, solved=1.0, failed=0.0)
    finally:
        await stream.close()


def rows(order: Curriculum, positions: range) -> list[int | None]:
    found = [order.at(position) for position in positions]
    return [None if prompt is None else prompt.row for prompt in found]


async def test_groups_are_counted_by_what_they_came_to(redis_server: LocalServer, stream: Stream) -> None:
    groups = [(3, [1.0, 1.0]), (3, [1.0, 0.0]), (3, [0.0, 0.0]), (3, [1.5, 1.0]), (5, [-1.0, 0.0])]
    await tell(redis_server, stream.run, *groups)
    assert difficulties(stream) == {3: Difficulty(4, 2, 1, 0.6875), 5: Difficulty(1, 0, 1, -0.5)}


async def test_a_redis_that_is_full_loses_a_count_and_no_group(tmp_path: Path) -> None:
    with LocalServer.start(tmp_path) as server:
        stream = Stream.connect(server.socket_url, "full")
        await tell(server, "full", (3, [1.0]))
        stream.redis.config_set("maxmemory", "1")
        await tell(server, "full", (3, [1.0]))
        stream.redis.config_set("maxmemory", "0")
        assert difficulties(stream) == {3: Difficulty(1, 1, 0, 1.0)}
        stream.close()


async def test_a_refusal_of_a_count_is_named(tmp_path: Path) -> None:
    with LocalServer.start(tmp_path) as server:
        stream = Stream.connect(server.socket_url, "refused")
        stream.redis.set(stream.key("difficulty"), "no hash")
        with pytest.raises(StreamError, match="WRONGTYPE"):
            await tell(server, "refused", (3, [1.0]))
        stream.close()


def test_a_run_that_nobody_asked_knows_nothing(stream: Stream) -> None:
    assert difficulties(stream) == {}


async def test_an_epoch_leaves_out_what_was_solved_or_failed_by_then(
    redis_server: LocalServer, stream: Stream
) -> None:
    order = Curriculum(PromptOrder(PROMPTS, 7), stream, solved=2, failed=1)
    assert rows(order, range(6)) == [p.row for p in PromptOrder(PROMPTS, 7).epoch(0)]
    await tell(redis_server, stream.run, (0, [1.0]), (0, [1.0]), (1, [1.0]), (2, [0.0]), (4, [0.5]))
    second = [p.row for p in PromptOrder(PROMPTS, 7).epoch(1) if p.row not in (0, 2)]
    assert rows(order, range(6, 10)) == second
    await tell(redis_server, stream.run, (1, [1.0]))
    third = [p.row for p in PromptOrder(PROMPTS, 7).epoch(2) if p.row not in (0, 1, 2)]
    assert rows(order, range(10, 13)) == third
    assert rows(order, range(6, 10)) == second, "an epoch that has begun stays as it is"


async def test_a_run_that_goes_on_asks_what_it_would_have_asked(
    redis_server: LocalServer, stream: Stream
) -> None:
    before = Curriculum(PromptOrder(PROMPTS, 7), stream, solved=1, failed=0)
    await tell(redis_server, stream.run, (0, [1.0]))
    asked = rows(before, range(20))
    await tell(redis_server, stream.run, (1, [1.0]), (3, [1.0]))
    after = Curriculum(PromptOrder(PROMPTS, 7), stream, solved=1, failed=0)
    assert [rows(after, range(place, place + 1))[0] for place in reversed(range(20))] == asked[::-1]


@pytest.mark.parametrize(("solved", "failed", "left"), [(0, 1, {1}), (1, 0, {0}), (0, 0, {0, 1})])
async def test_zero_leaves_nothing_out(
    redis_server: LocalServer, stream: Stream, solved: int, failed: int, left: set[int]
) -> None:
    await tell(redis_server, stream.run, (0, [0.0]), (1, [1.0]))
    order = Curriculum(PromptOrder(PROMPTS[:2], 7), stream, solved=solved, failed=failed)
    assert set(rows(order, range(2))) == left


async def test_the_data_ends_with_its_epochs_or_when_nothing_is_left(
    redis_server: LocalServer, stream: Stream
) -> None:
    order = Curriculum(PromptOrder(PROMPTS[:2], 7, epochs=2), stream, solved=1, failed=0)
    await tell(redis_server, stream.run, (0, [1.0]))
    assert rows(order, range(4)) == [1, 1, None, None]
    await tell(redis_server, stream.run, (1, [1.0]))
    spent = Curriculum(PromptOrder(PROMPTS[:2], 7), stream, solved=1, failed=0)
    assert rows(spent, range(4)) == [1, 1, None, None]
