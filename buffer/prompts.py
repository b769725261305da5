"""The prompt queue. The learner feeds it; leases take from its head."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from buffer.client import Call
from buffer.schema import Prompt


class Fed(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Feed`."""

    tail: int
    """Position the next prompt will have."""
    queued: int
    """Prompts that wait in the queue."""


class Feed(Call[Fed], frozen=True):
    """Appends prompts at `position`, which must be the queue's tail; a repeat changes nothing."""

    function: ClassVar[str] = "feed"
    epoch: str
    position: int
    prompts: tuple[bytes, ...]
    """Records made by `encode_prompt`."""


def encode_prompt(prompt: Prompt) -> bytes:
    """The record of a prompt (msgpack)."""
    return msgspec.msgpack.encode(prompt)


def decode_prompt(record: bytes) -> Prompt:
    """The prompt of a record."""
    return msgspec.msgpack.decode(record, type=Prompt)
