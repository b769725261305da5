"""How hard the questions are: what the groups of each came to, over a whole run.

`{run}:difficulty` counts by row of the data, `<row>:asked`, `<row>:solved`, `<row>:failed`, and sums up the
groups' mean rewards in `<row>:reward`. Statistics, not the ledger: a lost write is not repeated.

    await note(stream, 17, [1.0, 1.0], solved=1.0, failed=0.0)
    difficulties(stream)[17]                # Difficulty(asked=1, solved=1, failed=0, reward=1.0)
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from redis.exceptions import ResponseError

from buffer.client import AsyncStream, Stream
from buffer.connect import LOST, translate
from buffer.errors import RedisFull
from buffer.rights import user_of


class Difficulty(msgspec.Struct):
    """What the groups of one question came to."""

    asked: int = 0
    """Groups that were generated and scored, also those that were filtered or came too late."""
    solved: int = 0
    """Those in which every sample reached the reward that counts as solved."""
    failed: int = 0
    """Those in which none passed the reward that counts as failed."""
    reward: float = 0.0
    """Mean reward of a group, mean over the groups."""


async def note(
    stream: AsyncStream, row: int, rewards: Sequence[float], *, solved: float, failed: float
) -> None:
    """Counts a scored group of the question `row`, unless Redis is away or full.

    Raises `StreamError` for a server that refuses it, such as `RightMissing`.
    """
    name = stream.key("difficulty")
    async with stream.redis.pipeline(transaction=False) as pipe:
        pipe.hincrby(name, f"{row}:asked", 1)
        if min(rewards) >= solved:
            pipe.hincrby(name, f"{row}:solved", 1)
        if max(rewards) <= failed:
            pipe.hincrby(name, f"{row}:failed", 1)
        pipe.hincrbyfloat(name, f"{row}:reward", sum(rewards) / len(rewards))
        try:
            await pipe.execute()
        except LOST:
            stream.lost += 1
        except ResponseError as error:
            problem = translate(error, user_of(stream.redis))
            if not isinstance(problem, RedisFull):
                raise problem from error


def difficulties(stream: Stream) -> dict[int, Difficulty]:
    """Every question that was asked, by its row."""
    found: dict[int, Difficulty] = {}
    for field, value in stream.patiently(lambda: stream.redis.hgetall(stream.key("difficulty"))).items():
        row, _, what = field.decode().partition(":")
        question = found.setdefault(int(row), Difficulty())
        setattr(question, what, float(value) if what == "reward" else int(value))
    for question in found.values():
        question.reward /= max(1, question.asked)
    return found
