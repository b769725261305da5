"""`launch verify --weights`: do the engines serve what was committed, and is that what wrote the samples?

Every live engine is asked to score recent samples again. The label with which it answers must be a committed
version, and each token that carries this label must have the log-probability that its record says. An engine
that serves other weights under a right label cannot do that.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from buffer.client import Stream
from buffer.codec import decode
from buffer.errors import RecordError
from buffer.keys import shard_key
from buffer.ledger import Ledger, Snapshot
from buffer.schema import Group, Sample
from weightsync.scoring import ask_scores

TOLERANCE = 1e-3
"""Largest difference of a log-probability: fp32 engines stay below 1e-4."""
_PATIENCE_S = 30.0
_LONGEST = 4096
"""Longer samples are left out, tokens."""


class EngineCheck(msgspec.Struct, frozen=True):
    """One engine."""

    actor: str
    label: str
    """Of the version with which it scored; empty if it did not answer."""
    tokens: int
    """Tokens of recent samples that carry this label."""
    max_difference: float
    """Between their log-probabilities in the record and those that the engine gives them now."""
    problem: str
    """What is wrong; empty if nothing is."""


class Span(msgspec.Struct, frozen=True):
    """Tokens of one sample that one version wrote."""

    sequence: int
    """Which of the sequences asked for."""
    begin: int
    """Place of the first one's score in the sequence's scores."""
    logprobs: list[float]
    policy: list[bool]
    """Which of them the policy wrote."""


class Samples(msgspec.Struct):
    """Recent samples, ready to be scored again."""

    sequences: list[list[int]]
    spans: dict[str, list[Span]]
    """By label."""


def recent_samples(stream: Stream, shards: int, count: int) -> Samples:
    """The newest `count` samples at temperature 1 that are still in the stream."""
    names = [shard_key(stream.run, number) for number in range(shards)] or [stream.key("stream")]
    found = Samples([], {})
    for name in names:
        entries: Any = stream.redis.xrevrange(name, count=count)
        for _, fields in entries:
            try:
                group = decode(fields[b"g"])
            except RecordError:
                continue  # a dead letter to be: `launch verify` counts it
            if group.temperature == 1.0:
                _add(found, group, count)
    return found


def _add(found: Samples, group: Group, count: int) -> None:
    labels = [f"{version.number}:{version.digest}" for version in group.versions]
    for sample in group.samples:
        if len(found.sequences) < count and len(sample.tokens) <= _LONGEST:
            found.sequences.append(sample.tokens.tolist())
            _add_spans(found, sample, labels)


def _add_spans(found: Samples, sample: Sample, labels: list[str]) -> None:
    begin, mask = 0, sample.loss_mask().tolist()
    for span in sample.spans:
        part = slice(begin, begin + span.length)
        place = sample.prompt_length + begin - 1  # the score of token t stands at t - 1
        logprobs = [float(value) for value in sample.logprobs[part]]
        spans = found.spans.setdefault(labels[span.version], [])
        spans.append(Span(len(found.sequences) - 1, place, logprobs, mask[part]))
        begin += span.length


def check_weights(stream: Stream, count: int) -> list[EngineCheck]:
    """Has every live engine score recent samples again. Raises `NoRun`, `RedisUnavailable`."""
    ledger = stream.call(Snapshot())
    samples = recent_samples(stream, ledger.number("shards"), count)
    return [
        _check(stream, ledger, name, samples)
        for name, record in ledger.actors.items()
        if ledger.alive(name) and record.state != "starting" and record.version >= 0
    ]


def _check(stream: Stream, ledger: Ledger, name: str, samples: Samples) -> EngineCheck:
    deadline = time.monotonic() + _PATIENCE_S
    scores = ask_scores(stream, name, ledger.actors[name].epoch, samples.sequences or [[0, 0]], deadline)
    if scores is None:
        return EngineCheck(name, "", 0, 0.0, f"no answer within {_PATIENCE_S:g} s; see its log")
    version, _, digest = scores.label.partition(":")
    known: Any = stream.redis.hget(stream.key("versions"), version)
    committed = known.decode() if known else "none"
    tokens, difference = compare(samples.spans.get(scores.label, []), scores.logprobs)
    problem = ""
    if digest != committed:
        problem = f"serves version {version} with digest {digest}, committed is {committed}"
    elif difference > TOLERANCE:
        problem = f"log-probabilities are {difference:.2g} off the record's: it serves other weights"
    return EngineCheck(name, scores.label, tokens, difference, problem)


def compare(spans: list[Span], scores: list[list[float]]) -> tuple[int, float]:
    """(tokens compared, largest difference) of recorded log-probabilities and those of now.

    >>> compare([Span(0, 1, [-1.0, 0.0, -3.0], [True, False, True])], [[-9.0, -1.0, -9.0, -2.5]])
    (2, 0.5)
    """
    differences = [
        abs(recorded - scores[span.sequence][span.begin + place])
        for span in spans
        for place, (recorded, own) in enumerate(zip(span.logprobs, span.policy, strict=True))
        if own
    ]
    return len(differences), max(differences, default=0.0)


def render(checks: list[EngineCheck]) -> str:
    """The checks as lines of text."""
    lines = [
        f"weights    {one.actor}: {one.label or 'no answer'}, {one.tokens} tokens scored again, at most "
        f"{one.max_difference:.1e} off" + (f"\nVIOLATED   {one.actor}: {one.problem}" if one.problem else "")
        for one in checks
    ]
    return "\n".join(lines or ["weights    no engine is up"])
