"""Waiting for the next safe batch and reading its groups."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from buffer.batches import Manifest
from buffer.schema import Group
from buffer.session import Session

TICK_S = 0.5
"""How long the learner sleeps on the bell; each look also advances the run's clock."""


class PayloadGone(Exception):
    """A step that was trained before cannot be trained again: the record of a group is gone or damaged."""


class Batch(msgspec.Struct, eq=False):
    """What one step trains."""

    step: int
    groups: list[Group]
    """Those of this rank, in canonical order, by group id."""
    queued: int
    """Groups that were ready and stay queued."""
    waited_s: float
    """How long the learner had nothing to train."""
    fetched_s: float
    """How long reading and decoding took."""


Reader = Callable[[Session, int, Manifest], list[Group]]
"""Reads the groups of a step's manifest, in canonical order, and strikes those that cannot be read."""


def next_batch(session: Session, step: int, read: Reader, on_wait: Callable[[str], None]) -> Batch | None:
    """The batch of a step, or None once the run is over. `on_wait` hears each reason to wait."""
    stream, began = session.stream, time.monotonic()
    while True:
        answer = session.assign(step)
        if answer.status == "end":
            return None
        if answer.status == "batch":
            break
        on_wait(answer.reason)
        stream.take(stream.key("bell"), TICK_S)
    found = time.monotonic()
    groups = read(session, step, answer.manifest)
    return Batch(step, groups, answer.ready, found - began, time.monotonic() - found)
