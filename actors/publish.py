"""Handing in a finished group."""

from __future__ import annotations

from actors.errors import EngineError
from buffer.client import AsyncStream
from buffer.codec import encode
from buffer.errors import RecordError
from buffer.schema import Group
from buffer.stream import Publish, Published


async def publish(stream: AsyncStream, group: Group, *, epoch: str, token: str) -> Published:
    """Encodes the group and publishes it under its lease; a lost reply is asked for again.

    Raises `EngineError` if the engine's answer makes no valid record, such as a log-probability that
    is not a number.
    """
    try:
        payload = encode(group)
    except RecordError as error:
        raise EngineError(f"the engine's answer makes no valid record: {error}") from error
    return await stream.publish(Publish.of(group, epoch=epoch, token=token), payload)
