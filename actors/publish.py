"""Handing in a finished group."""

from __future__ import annotations

import asyncio

from actors.errors import EngineError
from buffer.client import AsyncStream
from buffer.codec import encode
from buffer.errors import RecordError, RedisFull
from buffer.routed import detach, discard, store
from buffer.schema import Group
from buffer.stream import Publish, Published

BACK_OFF_S = 1.0
"""Pause before a server that takes nothing more is asked again."""


def teaches_nothing(group: Group) -> bool:
    """Whether all rewards are equal, so that every advantage is 0: what dynamic sampling filters."""
    rewards = [sample.reward for sample in group.samples]
    return max(rewards) == min(rewards)


async def publish(stream: AsyncStream, group: Group, *, epoch: str, token: str) -> Published:
    """Encodes the group and publishes it under its lease, its routed experts first; asks again after a lost
    reply or a full server.

    Raises `EngineError` if the engine's answer makes no valid record, such as a log-probability that
    is not a number.
    """
    try:
        group, chunks = detach(group)
        payload = encode(group)
    except RecordError as error:
        raise EngineError(f"the engine's answer makes no valid record: {error}") from error
    size = len(payload) + sum(map(len, chunks))
    call = Publish.of(group, epoch=epoch, token=token, size=size)
    while True:
        try:
            await store(stream, group.id, chunks)
            answer = await stream.publish(call, payload)
            if chunks and answer.status != "ok":
                await discard(stream, group.id)
            return answer
        except RedisFull:
            await asyncio.sleep(BACK_OFF_S)  # the learner drains; a lease that ends meanwhile makes it late
