"""Waiting for the next safe batch and reading its groups."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from buffer.admission import Assign
from buffer.client import Stream
from buffer.schema import Group
from buffer.stream import read_groups

TICK_S = 0.5
"""How long the learner sleeps on the bell; each look also advances the run's clock."""


class Batch(msgspec.Struct, eq=False):
    """What one step trains."""

    step: int
    groups: list[Group]
    """In canonical order, by group id."""
    queued: int
    """Groups that were ready and stay queued."""
    waited_s: float
    """How long the learner had nothing to train."""
    fetched_s: float
    """How long reading and decoding took."""


def next_batch(stream: Stream, epoch: str, step: int, on_wait: Callable[[str], None]) -> Batch | None:
    """The batch of a step, or None once the run is over. `on_wait` hears each reason to wait."""
    began = time.monotonic()
    while True:
        answer = stream.call(Assign(epoch, step))
        if answer.status == "end":
            return None
        if answer.status == "batch":
            break
        on_wait(answer.reason)
        stream.take(stream.key("bell"), TICK_S)
    found = time.monotonic()
    groups = read_groups(stream, answer.groups())
    return Batch(step, groups, answer.ready, found - began, time.monotonic() - found)
