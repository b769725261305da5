"""`launch verify --weights`: are the recent samples what the weights say that they name?

Every live engine is asked to score recent samples again. The label with which it answers must be a committed
version, and each token that carries this label must have the log-probability that its record says. An engine
that serves other weights under a right label cannot do that. Tokens of versions that no engine serves any
more are scored by the learner's model, under the version that the run's folder keeps.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from buffer.client import Stream
from buffer.codec import decode
from buffer.errors import RecordError
from buffer.keys import shard_key
from buffer.ledger import Ledger, Snapshot
from buffer.schema import Group, Sample
from launch.errors import LaunchError
from launch.local import run_folder
from launch.supervise import process_environment
from weightsync.manifest import parse_label
from weightsync.scoring import ask_scores

TOLERANCE = 1e-3
"""Largest difference of a log-probability in fp32, where it is below 1e-4."""
ROUNDED = 0.1
"""Mean difference with an engine or a learner in bf16: some 0.01, where single tokens may differ much."""
_PATIENCE_S = 30.0
_LONGEST = 4096
"""Longer samples are left out, tokens."""


class Difference(msgspec.Struct, frozen=True):
    """How far log-probabilities of now are from those of the record, nats."""

    tokens: int
    """Tokens compared."""
    largest: float
    """Of a token; 0 without tokens."""
    mean: float
    """Over the tokens; 0 without any."""

    def problem(self, rounded: bool) -> str:
        """What is wrong with it, empty if nothing is; `rounded`: something computes in bf16."""
        if rounded and not self.mean <= ROUNDED:  # nan is no agreement
            return f"log-probabilities are {self.mean:.2g} off the record's on average"
        if not rounded and not self.largest <= TOLERANCE:
            return f"log-probabilities are {self.largest:.2g} off the record's"
        return ""


class EngineCheck(msgspec.Struct, frozen=True):
    """One engine."""

    actor: str
    """Name of the engine's actor."""
    label: str
    """Of the version with which it scored; empty if it did not answer."""
    tokens: int
    """Tokens of recent samples that carry this label."""
    max_difference: float
    """Between their log-probabilities in the record and those that the engine gives them now."""
    problem: str
    """What is wrong; empty if nothing is."""


class VersionCheck(msgspec.Struct, frozen=True):
    """A version that recent samples name and no engine serves."""

    label: str
    """`<number>:<digest>`, see `Manifest.label`."""
    tokens: int
    """Tokens of recent samples that carry this label."""
    kept: bool
    """Whether the run's folder has the version; if not, the tokens could not be scored again."""
    max_difference: float
    """Between their log-probabilities in the record and those that the learner's model gives them."""
    problem: str
    """What is wrong; empty if nothing is."""


class WeightChecks(msgspec.Struct, frozen=True):
    """What became of recent samples."""

    engines: list[EngineCheck]
    """By actor's name: those that are live and serve a version."""
    versions: list[VersionCheck]
    """By rising version."""

    @property
    def hold(self) -> bool:
        """Whether nothing is wrong."""
        problems = [one.problem for one in self.engines] + [one.problem for one in self.versions]
        return not any(problems)


class Span(msgspec.Struct, frozen=True):
    """Tokens of one sample that one version wrote."""

    sequence: int
    """Which of the sequences asked for."""
    begin: int
    """Place of the first one's score in the sequence's scores."""
    logprobs: list[float]
    """Of each token as recorded, nats."""
    policy: list[bool]
    """Which of them the policy wrote."""


class Samples(msgspec.Struct):
    """Recent samples, ready to be scored again."""

    sequences: list[list[int]]
    """Token ids of each sample, prompt and answer."""
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


def check_weights(stream: Stream, count: int) -> WeightChecks:
    """Has recent samples scored again, by every live engine and under the versions that are kept.

    Raises `NoRun`, `RedisUnavailable`, `LaunchError` if the learner's model cannot be built.
    """
    ledger = stream.call(Snapshot())
    packed: Any = stream.redis.get(stream.key("config"))
    config: dict[str, Any] = msgspec.json.decode(packed) if packed else {}
    rounded = "bfloat16" in [config.get(part, {}).get("dtype") for part in ("engine", "model")]
    samples = recent_samples(stream, ledger.number("shards"), count)
    with held_versions(run_folder(stream.run) / "weights", samples.spans) as held:
        engines = [
            _check(stream, ledger, name, samples, rounded)
            for name, record in ledger.actors.items()
            if ledger.alive(name) and record.state != "starting" and record.version >= 0
        ]
        served = {one.label for one in engines}
        left = {label: spans for label, spans in samples.spans.items() if label not in served}
        return WeightChecks(engines, check_kept(held, config.get("model", {}), samples, left, rounded))


@contextmanager
def held_versions(root: Path, labels: Iterable[str]) -> Iterator[dict[str, Path]]:
    """Folders with those of the versions that `root` keeps, by label, for the time of the block: a learner
    that trains removes them meanwhile."""
    from learner.kept import hold, kept_versions  # no torch comes with it

    kept = {f"{one.version}:{one.digest}": one for one in kept_versions(root).values()}
    if not (wanted := kept.keys() & set(labels)):
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="verifying-", dir=root.parent) as folder:
        folders = {label: Path(folder, str(kept[label].version)) for label in wanted}
        yield {label: path for label, path in folders.items() if hold(root, kept[label], path)}


def _check(stream: Stream, ledger: Ledger, name: str, samples: Samples, rounded: bool) -> EngineCheck:
    deadline = time.monotonic() + _PATIENCE_S
    scores = ask_scores(stream, name, ledger.actors[name].epoch, samples.sequences or [[0, 0]], deadline)
    if scores is None:
        return EngineCheck(name, "", 0, 0.0, f"no answer within {_PATIENCE_S:g} s; see its log")
    version, _, digest = scores.label.partition(":")
    known: Any = stream.redis.hget(stream.key("versions"), version)
    committed = known.decode() if known else "none"
    found = compare(samples.spans.get(scores.label, []), scores.logprobs)
    problem = found.problem(rounded)
    if digest != committed:
        problem = f"serves version {version} with digest {digest}, committed is {committed}"
    elif problem:
        problem += ": it serves other weights"
    return EngineCheck(name, scores.label, found.tokens, found.largest, problem)


def check_kept(
    kept: dict[str, Path], model: dict[str, Any], samples: Samples, left: dict[str, list[Span]], rounded: bool
) -> list[VersionCheck]:
    """Scores the spans `left`, by label, under the versions in the folders `kept`; `model` is that of the
    run's configuration. Raises `LaunchError`."""
    ordered = sorted(left, key=parse_label)
    wanted = [label for label in ordered if label in kept]
    asked = {label: sorted({span.sequence for span in left[label]}) for label in wanted}
    jobs = [
        {"folder": str(kept[label]), "sequences": [samples.sequences[index] for index in asked[label]]}
        for label in wanted
    ]
    scored = dict(zip(wanted, _rescored(model, jobs) if jobs else [], strict=True))
    checks = []
    for label in ordered:
        spans, scores = left[label], scored.get(label)
        if scores is None:
            checks.append(VersionCheck(label, sum(sum(span.policy) for span in spans), False, 0.0, ""))
            continue
        places = {sequence: place for place, sequence in enumerate(asked[label])}
        found = compare([msgspec.structs.replace(s, sequence=places[s.sequence]) for s in spans], scores)
        problem = found.problem(rounded)
        problem += ": other weights wrote them than those that are kept" if problem else ""
        checks.append(VersionCheck(label, found.tokens, True, found.largest, problem))
    return checks


def _rescored(model: dict[str, Any], wanted: list[dict[str, Any]]) -> list[list[list[float]] | None]:
    """What `learner.rescore` makes of it, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "learner.rescore"],
        input=msgspec.json.encode({"model": model, "wanted": wanted}),
        env={**os.environ, **process_environment("")},
        capture_output=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise LaunchError(f"kept versions cannot be scored: {said[-1]}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=list[list[list[float]] | None])


def compare(spans: list[Span], scores: list[list[float]]) -> Difference:
    """Recorded log-probabilities against those of now.

    >>> compare([Span(0, 1, [-1.0, 0.0, -3.0], [True, False, True])], [[-9.0, -1.0, -9.0, -2.5]])
    Difference(tokens=2, largest=0.5, mean=0.25)
    """
    differences = [
        abs(recorded - scores[span.sequence][span.begin + place])
        for span in spans
        for place, (recorded, own) in enumerate(zip(span.logprobs, span.policy, strict=True))
        if own
    ]
    count = len(differences)
    return Difference(count, max(differences, default=0.0), sum(differences) / max(1, count))


def render(checks: WeightChecks) -> str:
    """The checks as lines of text."""
    lines = [
        f"weights    {one.actor}: {one.label or 'no answer'}, {one.tokens} tokens scored again, at most "
        f"{one.max_difference:.1e} off" + (f"\nVIOLATED   {one.actor}: {one.problem}" if one.problem else "")
        for one in checks.engines
    ] or ["weights    no engine is up"]
    for one in checks.versions:
        kept = f"scored again as it is kept, at most {one.max_difference:.1e} off"
        lines.append(
            f"weights    {one.label}: {one.tokens} tokens " + (kept if one.kept else "of weights not kept")
        )
        lines += [f"VIOLATED   {one.label}: {one.problem}"] if one.problem else []
    return "\n".join(lines)
