"""The rules of the replay stream once more, in plain Python and by brute force: what the server must do.

Nothing here is clever on purpose. `out` walks over every group, the bounds are the formulas of the
admission rule word for word, and time is a number that only the test moves.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from buffer.schema import group_id


@dataclass(frozen=True)
class HeldLease:
    """A lease as the model knows it."""

    token: str
    position: int
    attempt: int
    actor: str
    version: int
    deadline: int

    @property
    def group(self) -> str:
        """The id of its group."""
        return group_id(0, self.position, self.attempt)


@dataclass
class Model:
    """A run: B, eta and the other settings, then its state at one instant."""

    batch: int
    eta: int
    max_steps: int
    attempts_max: int
    lease_ms: int
    head: int = 0
    version: int = 0
    clock: int = 0
    tail: int = 0
    admitted: int = 0
    dead: int = 0
    prompts: list[tuple[int, int]] = field(default_factory=list)
    """(position, attempt) in the order in which leases take them."""
    leases: dict[str, HeldLease] = field(default_factory=dict)
    expiry: dict[str, int] = field(default_factory=dict)
    """Lease token -> when it expires."""
    ready: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Queued group -> (deadline, version_min)."""
    manifests: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    """Step -> (group, version_min), for all steps ever assigned."""
    covered: int = -1
    dropped: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    serving: dict[str, int] = field(default_factory=dict)
    """Joined actor -> the version it serves, -1 for none."""

    def deadlines(self) -> list[int]:
        """The deadline of every outstanding group: leased ones and queued ones."""
        return [lease.deadline for lease in self.leases.values()] + [due for due, _ in self.ready.values()]

    def out(self, due: float) -> int:
        """Outstanding groups with a deadline of at most `due`."""
        return sum(deadline <= due for deadline in self.deadlines())

    def tick(self, advance: int = 0) -> None:
        """Moves the clock and expires what is due, in order of expiry."""
        self.clock += advance
        due = [token for token in self.expiry if self.expiry[token] <= self.clock]
        for token in sorted(due, key=lambda token: (self.expiry[token], token)):
            self.close(token, "expired")

    def refusal(self, actor: str) -> str | None:
        """Why an actor gets no lease, or None."""
        version = self.serving[actor]
        if self.head >= self.max_steps:
            return "end"
        if version < 0:
            return "no-weights"
        deadline = min(version, self.head) + self.eta
        if deadline < self.head:
            return "old-weights"
        for due in range(deadline, self.head + self.eta + 1):
            if self.out(due) + 1 > (due - self.head + 1) * self.batch:
                return "full"
        if self.out(float("inf")) + 1 > (self.max_steps - self.head) * self.batch:
            return "enough"
        return None if self.prompts else "no-prompts"

    def grant(self, actor: str, token: str) -> HeldLease:
        """The lease that an admission not refused must give."""
        version = self.serving[actor]
        position, attempt = self.prompts.pop(0)
        lease = HeldLease(token, position, attempt, actor, version, min(version, self.head) + self.eta)
        self.leases[token], self.expiry[token] = lease, self.clock + self.lease_ms
        self.admitted += 1
        return lease

    def close(self, token: str, reason: str) -> None:
        """A lease ends without a group."""
        lease = self.leases.pop(token)
        del self.expiry[token]
        self.dropped[reason] += 1
        if lease.attempt + 1 < self.attempts_max:
            self.prompts.insert(0, (lease.position, lease.attempt + 1))
        else:
            self.dead += 1

    def queue(self, token: str, version_min: int) -> None:
        """A lease ends with a group."""
        lease = self.leases.pop(token)
        del self.expiry[token]
        self.ready[lease.group] = (lease.deadline, version_min)

    def batch_or_wait(self) -> tuple[str, list[tuple[str, int]]]:
        """(`batch`, its rows), or why the learner waits or ends."""
        if self.head >= self.max_steps:
            return "end", []
        if len(self.ready) < self.batch:
            return "few", []
        chosen = sorted(self.ready, key=lambda group: (self.ready[group][0], group))[: self.batch]
        for due in range(self.head, self.head + self.eta + 1):
            taken = sum(self.ready[group][0] <= due for group in chosen)
            if self.out(due) - taken > (due - self.head) * self.batch:
                return "unsafe", []
        return "batch", [(group, self.ready[group][1]) for group in chosen]

    def assign(self, rows: list[tuple[str, int]]) -> None:
        """The head moves on by one batch."""
        for group, _ in rows:
            del self.ready[group]
        self.manifests[self.head] = rows
        self.head += 1

    def commit(self, covered: int) -> None:
        """The next version is committed."""
        self.version += 1
        self.covered = max(self.covered, covered)

    def counts(self) -> dict[str, int]:
        """The ledger but for the reasons."""
        return {
            "admitted": self.admitted,
            "leased": len(self.leases),
            "queued": len(self.ready),
            "assigned": (self.head - self.version) * self.batch,
            "trained": self.version * self.batch,
        }

    def staleness(self) -> dict[int, int]:
        """Trained groups by staleness: the step that trained them less their version_min."""
        return Counter(step - version for step in range(self.version) for _, version in self.manifests[step])

    def payloads(self) -> int:
        """Payloads that must be kept: queued groups and all of manifests that are not covered."""
        return len(self.ready) + sum(len(self.manifests[s]) for s in self.manifests if s > self.covered)
