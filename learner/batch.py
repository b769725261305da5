"""Waiting for a safe batch and fetching this rank's share of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec

from buffer.batches import Manifest
from buffer.session import Session
from buffer.stream import Frame

TICK_S = 0.5
"""How long the learner sleeps on the bell; each look also advances the run's clock."""


class PayloadGone(Exception):
    """A step that was trained before cannot be trained again: the record of a group is gone or damaged."""


class Batch(msgspec.Struct, eq=False):
    """What one step is to train, as fetched."""

    step: int
    """Number of the step, from 0."""
    manifest: Manifest
    """Of all ranks, as assigned."""
    frames: list[Frame]
    """This rank's share: each row with its group, or why there is none."""
    queued: int
    """Groups that were ready and stay queued."""
    fetched_s: float
    """How long reading, decoding and making ready took."""
    waited_s: float = 0.0
    """How long the learner had nothing to train."""


Fetch = Callable[[int, Manifest], list[Frame]]
"""Reads this rank's share of a step's manifest, and makes it ready."""


def look_for_batch(
    session: Session, step: int, fetch: Fetch, on_wait: Callable[[str], None], stopped: threading.Event
) -> Batch | None:
    """The batch of a step once there is one; None when the run is over, or `stopped` is set while it waits.

    `on_wait` hears each reason to wait.
    """
    stream = session.stream
    while not stopped.is_set():
        answer = session.assign(step)
        if answer.status == "end":
            return None
        if answer.status == "batch":
            began, manifest = time.monotonic(), answer.manifest
            frames = fetch(step, manifest)
            return Batch(step, manifest, frames, answer.ready, time.monotonic() - began)
        on_wait(answer.reason)
        stream.take(stream.key("bell"), TICK_S)
    return None
