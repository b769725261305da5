"""The prompt queue. The learner feeds it; leases take from its head, and return to it."""

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
    """Epoch of the learner, see `Joined.epoch`."""
    position: int
    """Position of the first of these prompts in the queue, from 0."""
    prompts: tuple[bytes, ...]
    """Records made by `encode_prompt`."""
    final: bool = False
    """No prompt will follow these."""

    def arguments(self) -> list[object]:
        """The prompts come last, as many as there are."""
        return [self.epoch, self.position, int(self.final), *self.prompts]


class Requeued(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Requeue`."""

    position: int
    """Position of the prompt, -1 if there is no such letter (any more)."""


class Requeue(Call[Requeued], frozen=True):
    """Puts the prompt of a dead letter back into the queue: new admissions, never the old group."""

    function: ClassVar[str] = "requeue"
    entry: str
    """Entry id of the letter."""


def encode_prompt(prompt: Prompt) -> bytes:
    """The record of a prompt (msgpack)."""
    return msgspec.msgpack.encode(prompt)


def decode_prompt(record: bytes) -> Prompt:
    """The prompt of a record."""
    return msgspec.msgpack.decode(record, type=Prompt)
