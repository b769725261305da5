"""Waiting for the next safe batch and reading its groups."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import msgspec

from buffer.batches import Manifest
from buffer.schema import Group
from buffer.session import Session
from buffer.stream import read_frames

log = logging.getLogger("learner")

TICK_S = 0.5
"""How long the learner sleeps on the bell; each look also advances the run's clock."""


class PayloadGone(Exception):
    """A step that was trained before cannot be trained again: the record of a group is gone or damaged."""


class Batch(msgspec.Struct, eq=False):
    """What one step trains."""

    step: int
    groups: list[Group]
    """In canonical order, by group id."""
    queued: int
    """Groups that were ready and stay queued."""
    fetched_s: float
    """How long reading and decoding took."""
    waited_s: float = 0.0
    """How long the learner had nothing to train."""


def look_for_batch(
    session: Session, step: int, on_wait: Callable[[str], None], stopped: threading.Event
) -> Batch | None:
    """The batch of a step once there is one; None when the run is over, or `stopped` is set while it waits.

    `on_wait` hears each reason to wait. Raises `PayloadGone`.
    """
    stream = session.stream
    while not stopped.is_set():
        answer = session.assign(step)
        if answer.status == "end":
            return None
        if answer.status == "batch":
            began = time.monotonic()
            groups = read_batch(session, step, answer.manifest)
            return Batch(step, groups, answer.ready, time.monotonic() - began)
        on_wait(answer.reason)
        stream.take(stream.key("bell"), TICK_S)
    return None


def read_batch(session: Session, step: int, manifest: Manifest) -> list[Group]:
    """The groups of a manifest in canonical order; the step trains without those that cannot be read.

    Raises `PayloadGone` if the step was trained, with all of them, before.
    """
    groups = []
    for frame in read_frames(session.stream, manifest.groups()):
        if frame.group is not None:
            groups.append(frame.group)
            continue
        if step < session.version:
            raise PayloadGone(f"step {step} cannot be trained again ({frame.reason}): {frame.problem}")
        log.warning("step %d trains without a group (%s): %s", step, frame.reason, frame.problem)
        session.strike(step, frame.row.group, frame.reason, frame.payload)
    return groups
