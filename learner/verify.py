"""Whether engines really serve the learner's weights: both score the same token sequences."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import numpy as np

from buffer.client import Stream
from buffer.ledger import Ledger, Snapshot
from weightsync.manifest import Manifest
from weightsync.scoring import ask_scores

_LOOK_S = 0.2


class WeightCheck(msgspec.Struct, frozen=True):
    """How far engines are from the learner, at one version."""

    version: int
    """The version that all were to serve."""
    tokens: int
    """Tokens that were scored."""
    max_difference: dict[str, float]
    """Largest |log p(engine) - log p(learner)| of a token, by actor."""
    missing: list[str]
    """Live actors, those still starting apart, that did not reach the version or did not answer in time."""

    def passed(self, tolerance: float) -> bool:
        """Whether every live engine was checked and is within `tolerance`."""
        checked = bool(self.max_difference) and not self.missing
        return checked and max(self.max_difference.values()) <= tolerance


def check_engines(
    stream: Stream,
    manifest: Manifest,
    sequences: Sequence[Sequence[int]],
    expected: Sequence[np.ndarray],
    *,
    timeout_s: float,
) -> WeightCheck:
    """Asks every live actor to score `sequences` once it serves `manifest`.

    `expected` holds the learner's log-probabilities of tokens 1.. of each sequence.
    """
    deadline = time.monotonic() + timeout_s
    differences: dict[str, float] = {}
    ledger = _wait_applied(stream, manifest.version, deadline)
    live = _serving(ledger)
    for name in live:
        if ledger.actors[name].version != manifest.version:
            continue
        scores = ask_scores(stream, name, ledger.actors[name].epoch, sequences, deadline)
        if scores is not None and scores.label == manifest.label:
            pairs = zip(scores.logprobs, expected, strict=True)
            differences[name] = max(float(np.abs(np.array(got) - want).max()) for got, want in pairs)
    missing = [name for name in live if name not in differences]
    return WeightCheck(manifest.version, sum(map(len, expected)), differences, missing)


def _wait_applied(stream: Stream, version: int, deadline: float) -> Ledger:
    """The ledger once every live actor serves `version`, or at the deadline."""
    while True:
        ledger = stream.call(Snapshot())
        behind = any(ledger.actors[name].version != version for name in _serving(ledger))
        if not behind or time.monotonic() > deadline:
            return ledger
        time.sleep(_LOOK_S)


def _serving(ledger: Ledger) -> list[str]:
    """Live actors whose engine is up."""
    return [n for n, actor in ledger.actors.items() if ledger.alive(n) and actor.state != "starting"]
