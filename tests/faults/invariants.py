"""I1 to I6 after a trial, from Redis and from the logs; one line for each thing that does not hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from buffer.ledger import Ledger, violations

if TYPE_CHECKING:
    from tests.faults.trial import Process


def broken(ledger: Ledger, learners: Sequence[Process], actors: Sequence[Process], eta: int) -> list[str]:
    """Everything that does not hold."""
    trained = [one for learner in learners for one in learner.events("trained")]
    assigned = [one for learner in learners for one in learner.events("assigned")]
    return [
        *violations(ledger),  # I1, I3 and the structure of Redis
        *_trained_once(trained),
        *_same_again(trained, assigned),
        *(f"I3: step {one['step']} trained version {min(one['oldest'])}, eta is {eta}"
          for one in trained if one["oldest"] and one["step"] - min(one["oldest"]) > eta),
        *(f"I4: {problem}" for one in trained for problem in one["untrue"]),
        *_acknowledged(ledger, trained, learners, actors),
        *(line for process in [*learners, *actors] for line in _endings(process)),
    ]  # fmt: skip


def _trained_once(trained: Sequence[dict[str, Any]]) -> Iterator[str]:
    """I2: no group in two steps of a lineage. (The same step again is a replay.)"""
    steps: dict[tuple[int, str], int] = {}
    for one in trained:
        for group in one["groups"]:
            step = steps.setdefault((one["lineage"], group), one["step"])
            if step != one["step"]:
                yield f"I2: group {group} was trained in steps {step} and {one['step']}"


def _same_again(trained: Sequence[dict[str, Any]], assigned: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A step that was assigned, or trained, is the same each time, bit for bit."""
    for kind, events, fields in (
        ("assigned", assigned, ("groups",)),
        ("trained", trained, ("groups", "digest")),
    ):
        first: dict[int, dict[str, Any]] = {}
        for one in events:
            before = first.setdefault(one["step"], one)
            if [before[name] for name in fields] != [one[name] for name in fields]:
                yield f"I2: step {one['step']} was {kind} as {before}, and again as {one}"


def _acknowledged(
    ledger: Ledger, trained: Sequence[dict[str, Any]], learners: Sequence[Process], actors: Sequence[Process]
) -> Iterator[str]:
    """What was acknowledged is there: groups are trained, assigned or queued, and commits stand."""
    if ledger.counts.rollbacks == 0:
        yield from _acknowledged_groups(ledger, trained, learners, actors)
    versions: dict[int, str] = {}
    for learner in learners:
        for one in learner.events("committed"):
            if versions.setdefault(one["version"], one["digest"]) != one["digest"]:
                yield f"I4: version {one['version']} was committed with two digests"
    if max(versions, default=0) > ledger.number("version"):
        yield f"version {max(versions)} was acknowledged, the server is at {ledger.number('version')}"


def _acknowledged_groups(
    ledger: Ledger, trained: Sequence[dict[str, Any]], learners: Sequence[Process], actors: Sequence[Process]
) -> Iterator[str]:
    there = {group for one in trained for group in one["groups"]} | set(ledger.ready)
    there |= {row.group for manifest in ledger.manifests.values() for row in manifest.rows}
    there |= {one["group"] for learner in learners for one in learner.events("struck")}
    for actor in actors:
        for one in actor.events("published"):
            if one["status"] == "ok" and one["group"] not in there:
                yield f"acknowledged group {one['group']} of {actor.name} is lost"


def _endings(process: Process) -> Iterator[str]:
    """I6: the exit code is right, a process that ended itself said why in one line, and no traceback."""
    code = process.code
    if code is not None and code != process.expected:
        yield f"I6: {process.name} ended with {code}, expected {process.expected}"
    if errors := process.errors.read_text():
        yield f"I6: {process.name} wrote {errors[-600:]!r}"
    if code is not None and code >= 0:
        last = process.events()[-1]
        if last["event"] != "stopped" or not last["reason"] or "\n" in last["reason"] or last["code"] != code:
            yield f"I6: {process.name} ended with {code} and said {last}"
