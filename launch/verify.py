"""`launch verify`: proves from one snapshot of Redis that nothing is lost, trained twice or too old."""

from __future__ import annotations

import msgspec

from buffer.client import Stream
from buffer.ledger import Ledger, Snapshot, violations
from launch.status import GroupCounts


class Verification(msgspec.Struct, frozen=True):
    """What was found."""

    run: str
    """Name of the run."""
    holds: bool
    """Whether nothing is violated."""
    conserved: bool
    """Whether admitted = leased + queued + assigned + trained + dropped."""
    violations: list[str]
    """A line each, empty if it holds."""
    groups: GroupCounts
    """admitted = leased + queued + assigned + trained + dropped."""
    head: int
    """The next step to assign."""
    version: int
    """The newest committed version, -1 before the first."""
    lineage: int
    """Number of forks the run has been through."""
    staleness: dict[int, int]
    """Trained groups by staleness in steps."""
    max_staleness: int
    """The bound."""
    refused: dict[str, int]
    """Publishes that came too late, by reason; never admitted twice, so outside the identity."""
    dead: int
    """Dead letters that are kept."""
    dead_by_reason: dict[str, int]
    """Dead letters ever written."""
    rollbacks: int
    """Times the server came back older and was brought forward."""
    notes: list[str]
    """What is no violation, but worth knowing."""


def verify(stream: Stream) -> Verification:
    """Checks a run. Raises `NoRun`, `RedisUnavailable`."""
    ledger = stream.call(Snapshot(full=True))
    found = violations(ledger)
    return Verification(
        run=stream.run,
        holds=not found,
        conserved=ledger.counts.conserved,
        violations=found,
        groups=GroupCounts.of(ledger.counts),
        head=ledger.number("head"),
        version=ledger.number("version"),
        lineage=ledger.number("lineage"),
        staleness=ledger.staleness,
        max_staleness=ledger.number("eta"),
        refused=ledger.counts.refused,
        dead=ledger.sizes["dead"],
        dead_by_reason=ledger.counts.dead,
        rollbacks=ledger.counts.rollbacks,
        notes=_notes(ledger),
    )


def _notes(ledger: Ledger) -> list[str]:
    notes = []
    missing = ledger.sizes["groups"] - ledger.sizes["payloads"]
    if ledger.number("shards") == 0 and missing > 0:
        notes.append(f"{missing} payloads are gone with an older server; a restore that needs them must fork")
    if ledger.number("shards") == 0 and missing < 0:
        notes.append(f"{-missing} payloads belong to no group; the learner sweeps them")
    if ledger.sizes["dead"]:
        notes.append("`launch inspect --dead` shows the dead letters")
    if lost := ledger.counts.dropped.get("lost", 0):
        notes.append(f"{lost} groups were lost by a server that came back older, and counted")
    return notes


def render(found: Verification) -> str:
    """The verification as a page of text."""
    staleness = ", ".join(f"{count} at {steps}" for steps, count in found.staleness.items()) or "none trained"
    refused = ", ".join(f"{count} {reason}" for reason, count in found.refused.items()) or "none"
    dead = ", ".join(f"{count} {reason}" for reason, count in found.dead_by_reason.items()) or "none"
    lines = [
        f"run        {found.run}: lineage {found.lineage}, version {found.version}, next step {found.head}",
        f"groups     {found.groups.identity(found.conserved)}",
        f"staleness  {staleness}; bound {found.max_staleness}",
        f"refused    {refused} (late publishes, never admitted twice)",
        f"dead       {dead}",
        f"rollbacks  {found.rollbacks}",
        *(f"note       {note}" for note in found.notes),
        *(f"VIOLATED   {problem}" for problem in found.violations),
        "holds      nothing lost, nothing trained twice, nothing too old" if found.holds else "DOES NOT HOLD",
    ]
    return "\n".join(lines)
