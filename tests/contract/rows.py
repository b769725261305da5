"""What a run consists of: leases, groups, and what is known of each actor's pace."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, exp, log

PROBE_MS = 60_000
PAYLOAD = b"payload"


@dataclass(frozen=True)
class HeldLease:
    """A lease as the model knows it."""

    token: str
    group: str
    position: int
    attempt: int
    limit: int
    """Attempts after which the prompt is retired."""
    actor: str
    version: int
    deadline: int
    born: int
    probe: bool
    suspect: bool = False
    """Whether it is from before the server came back older, and was not renewed since."""

    @property
    def number(self) -> int:
        """Leases are numbered in the order in which they are granted."""
        return int(self.token.partition(":")[0])


@dataclass
class Row:
    """A queued or assigned group."""

    position: int
    attempt: int
    limit: int
    deadline: int
    version_min: int
    strikes: int = 0


GONE = Row(-1, -1, -1, -1, -1)
"""What is kept of a struck group."""


@dataclass
class Work:
    """What is known of an actor's pace."""

    times: list[int] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)
    """Its leases -> their births."""
    probe: int = -PROBE_MS


def p90(times: list[int]) -> int:
    """The 90th percentile by nearest rank."""
    return sorted(times)[ceil(0.9 * len(times)) - 1] if times else 0


def usual(times: list[int]) -> float:
    """The geometric mean."""
    total = 0.0
    for ms in times:
        total += log(max(1, ms))
    return exp(total / len(times))
