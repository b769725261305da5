"""The rules of the replay stream once more, in plain Python and by brute force: what the server must do.

Nothing here is clever on purpose. `out` walks over every group, the bounds are the formulas of the
admission rule word for word, and time is a number that only the test moves. `reading.py` reads the
same structure from a server, so that the two can be compared whole.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from math import ceil, floor, inf, log, sqrt

from buffer.schema import group_id
from tests.contract.rows import GONE, PAYLOAD, PROBE_MS, HeldLease, Row, Work, p90, usual


@dataclass
class Model:
    """A run: its rules, then its state at one instant."""

    batch: int
    eta: int
    max_steps: int
    attempts_max: int
    lease_ms: int
    policy: str = "wait"
    cap: int = 0
    dynamic: int = 0
    uncovered_max: int = 0
    bytes_limit: int = 0
    lineage: int = 0
    head: int = 0
    version: int = 0
    clock: int = 0
    tail: int = 0
    data_end: int = -1
    checkpoint: int = 0
    wanted: int = -1
    """The last step that no restore asks for, as far as the learner has said."""
    covered: int = -1
    """The last step whose payloads are gone."""
    admitted: int = 0
    dead: int = 0
    step_ms: int = 0
    fleet_ms: int = 0
    live: int = 0
    p99_ms: int = 0
    unsafe_since: int = 0
    unsafe_ms: int = 0
    assigned_at: int = 0
    times: list[int] = field(default_factory=list)
    """Group times, the newest first."""
    prompts: list[tuple[int, int, int]] = field(default_factory=list)
    """(position, attempt, limit) in the order in which leases take them."""
    skip: dict[int, int] = field(default_factory=dict)
    """Position still to be fed -> the attempt that feeding it queues, -1 for none."""
    leases: dict[str, HeldLease] = field(default_factory=dict)
    expiry: dict[str, int] = field(default_factory=dict)
    ready: dict[str, Row] = field(default_factory=dict)
    manifests: dict[int, dict[str, Row]] = field(default_factory=dict)
    """Step -> its groups, for all steps that are kept."""
    strikes: dict[int, dict[str, str]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    trained: Counter[int] = field(default_factory=Counter)
    """Staleness -> trained groups."""
    versions: dict[int, str] = field(default_factory=dict)
    serving: dict[str, int] = field(default_factory=dict)
    """Joined actor -> the version it serves, -1 for none."""
    beats: dict[str, int] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=dict)

    # What is there.

    def deadlines(self) -> list[int]:
        """The deadline of every outstanding group: leased ones and queued ones."""
        held = [lease.deadline for lease in self.leases.values()]
        return held + [row.deadline for row in self.ready.values()]

    def out(self, due: float) -> int:
        """Outstanding groups with a deadline of at most `due`."""
        return sum(deadline <= due for deadline in self.deadlines())

    def assigned(self, step: int) -> dict[str, Row]:
        """The groups that a step trains."""
        struck = self.strikes.get(step, {})
        return {group: row for group, row in self.manifests.get(step, {}).items() if group not in struck}

    def payloads(self) -> int:
        """Payloads that are still needed: of the queue, and of every step that is kept."""
        return len(self.ready) + sum(len(self.assigned(step)) for step in self.manifests)

    def feed(self, count: int) -> None:
        """Prompts are appended, but for positions assigned before the server came back older."""
        for position in range(self.tail, self.tail + count):
            attempt = self.skip.pop(position, 0)
            if attempt >= 0:
                self.prompts.append((position, attempt, attempt + self.attempts_max))
        self.tail += count

    # Time and leases.

    def tick(self, advance: int = 0) -> None:
        """Moves the clock and expires what is due, in order of expiry."""
        self.clock += advance
        due = [token for token in self.expiry if self.expiry[token] <= self.clock]
        for token in sorted(due, key=lambda token: (self.expiry[token], token)):
            self.close(token, "lost" if self.leases[token].suspect else "expired")

    def slow(self, actor: str, deadline: int) -> bool:
        """Whether the actor's groups would come too late while others' do not."""
        work = self.work.get(actor, Work())
        ages = [self.clock - born for born in work.held.values()]
        times = sorted(work.times + [age for age in ages if age > self.fleet_ms])
        if not times or self.live < 2 or self.step_ms == 0:
            return False
        beyond = log(usual(times) / max(1, self.fleet_ms))
        late = p90(times) > (deadline - self.head + 1) * self.step_ms
        return late and beyond > 0.7 + 1.7 / sqrt(len(times))

    def refusal(self, actor: str) -> tuple[str | None, bool]:
        """Why an actor gets no lease, or None and whether it gets a probe."""
        version = self.serving[actor]
        if self.head >= self.max_steps:
            return "end", False
        if version < 0:
            return "no-weights", False
        deadline = min(version, self.head) + self.eta
        if deadline < self.head:
            return "old-weights", False
        probe = self.slow(actor, deadline)
        if probe and (deadline == self.head or self.clock - self.work[actor].probe < PROBE_MS):
            return "slow", False
        for due in range(deadline, self.head + self.eta + 1):
            if self.out(due) + 1 > (due - self.head + 1) * self.cap:
                return "full", False
        if self.out(inf) + 1 > (self.max_steps - self.head) * self.cap:
            return "enough", False
        peak = len(PAYLOAD) if self.times else 0
        expected = self.payloads() * len(PAYLOAD) + (len(self.leases) + 1) * peak
        if self.bytes_limit and expected > self.bytes_limit:
            return "memory", False
        return (None if self.prompts else "no-prompts"), probe

    def grant(self, actor: str, token: str, probe: bool) -> HeldLease:
        """The lease that an admission not refused must give."""
        version = self.serving[actor]
        position, attempt, limit = self.prompts.pop(0)
        group, deadline = group_id(self.lineage, position, attempt), min(version, self.head) + self.eta
        lease = HeldLease(token, group, position, attempt, limit, actor, version, deadline, self.clock, probe)
        self.leases[token], self.expiry[token] = lease, self.clock + self.lease_ms
        self.work[actor].held[token] = self.clock
        self.work[actor].probe = self.clock if probe else self.work[actor].probe
        self.admitted += 1
        return lease

    def renew(self, token: str) -> None:
        """A heartbeat lists the lease; none lives longer than 10 x p99 or six leases."""
        expiry = self.clock + self.lease_ms
        if self.p99_ms:
            expiry = min(expiry, self.leases[token].born + max(10 * self.p99_ms, 6 * self.lease_ms))
        self.expiry[token] = expiry
        self.leases[token] = replace(self.leases[token], suspect=False)

    def _forget(self, token: str) -> HeldLease:
        lease = self.leases.pop(token)
        del self.expiry[token]
        self.work[lease.actor].held.pop(token, None)
        return lease

    def close(self, token: str, reason: str) -> None:
        """A lease ends without a group."""
        lease = self._forget(token)
        self.dropped[reason] += 1
        if reason != "filtered":
            self.give_back(lease, reason)

    def give_back(self, row: HeldLease | Row, reason: str) -> None:
        """A prompt returns with one more attempt, or is retired."""
        attempt = row.attempt + (reason != "lineage")
        if attempt >= row.limit:
            self.dead += 1
        elif row.position >= self.tail:  # a server that came back older has not been fed it again
            self.skip[row.position] = attempt
        elif reason == "stale":
            self.prompts.append((row.position, attempt, row.limit))
        else:
            self.prompts.insert(0, (row.position, attempt, row.limit))

    def queue(self, token: str, version_min: int) -> None:
        """A lease ends with a group."""
        lease = self._forget(token)
        ms, work = self.clock - lease.born, self.work[lease.actor]
        if lease.probe and ms <= 2 * self.fleet_ms:
            work.times = work.times[: len(work.times) // 2]
        work.times = [ms, *work.times][:20]
        self.times.insert(0, ms)
        if len(self.times) <= 16 or len(self.times) % 16 == 0:
            self.p99_ms = sorted(self.times)[ceil(0.99 * len(self.times)) - 1]
        row = Row(lease.position, lease.attempt, lease.limit, lease.deadline, version_min)
        self.ready[lease.group] = row

    # Batches.

    def _excess(self, chosen: list[str], due: int) -> int:
        taken = sum(self.ready[group].deadline <= due for group in chosen)
        return self.out(due) - taken - (due - self.head) * self.batch

    def _safe(self, chosen: list[str]) -> bool:
        horizon = self.head if self.cap > self.batch else self.head + self.eta
        return all(self._excess(chosen, due) <= 0 for due in range(self.head, horizon + 1))

    def _abandon(self, chosen: list[str]) -> None:
        """Tries every number of leases, earliest deadline and youngest first, from the fewest."""
        late = {actor: self.slow(actor, self.head + self.eta) for actor in self.work}
        open_to = [
            lease
            for lease in self.leases.values()
            if self.policy == "drop" or lease.probe or late.get(lease.actor)
        ]
        horizon = self.head if self.cap > self.batch else self.head + self.eta
        gone: list[HeldLease] = []
        for due in range(self.head, horizon + 1):
            need = self._excess(chosen, due) - sum(lease.deadline <= due for lease in gone)
            left = [lease for lease in open_to if lease not in gone and lease.deadline <= due]
            left.sort(key=lambda lease: (lease.deadline, -lease.number))
            gone += left[: max(0, need)]
            if need > len(left) and self.cap == self.batch:
                return
        for lease in sorted(gone, key=lambda lease: (lease.deadline, -lease.number)):
            work = self.work[lease.actor]
            work.times = [self.clock - lease.born, *work.times][:20]
            self.close(lease.token, "slow" if lease.probe or late.get(lease.actor) else "stale")

    def choose(self) -> tuple[str, dict[str, Row]]:
        """(`batch`, its groups), or why the learner waits or ends. Abandons what the policy abandons."""
        exhausted = self.data_end >= 0 and not self.prompts and not self.leases
        if self.head >= self.max_steps or (exhausted and not self.ready):
            return "end", {}
        if len(self.ready) < self.batch and not exhausted:
            peak = len(PAYLOAD) if self.times else 0
            expected = self.payloads() * len(PAYLOAD) + (len(self.leases) + 1) * peak
            if self.out(inf) >= (self.eta + 1) * self.cap:
                self.unsafe_since = self.unsafe_since or max(1, self.clock)
            return ("memory" if self.bytes_limit and expected > self.bytes_limit else "few"), {}
        if self.uncovered_max and self.head - max(self.checkpoint, self.wanted + 1) >= self.uncovered_max:
            return "uncovered", {}
        order = sorted(self.ready, key=lambda group: (self.ready[group].deadline, group))
        chosen = order[: self.batch]
        if not self._safe(chosen):
            self._abandon(chosen)
        if self.cap > self.batch:
            for group in [g for g in order[self.batch :] if self.ready[g].deadline <= self.head]:
                del self.ready[group]
                self.dropped["surplus"] += 1
        if not self._safe(chosen):
            self.unsafe_since = self.unsafe_since or max(1, self.clock)
            return "unsafe", {}
        return "batch", {group: self.ready[group] for group in chosen}

    def assign(self, groups: dict[str, Row]) -> None:
        """The head moves on by one batch."""
        for group in groups:
            del self.ready[group]
        self.manifests[self.head], self.strikes[self.head] = groups, {}
        waited = self.unsafe_ms + (self.clock - self.unsafe_since if self.unsafe_since else 0)
        if self.assigned_at:
            ms = max(1, self.clock - self.assigned_at - waited)
            self.step_ms = int(0.7 * self.step_ms + 0.3 * ms) if self.step_ms else ms
        self.assigned_at, self.unsafe_since, self.unsafe_ms = self.clock, 0, 0
        self.head += 1

    def strike(self, step: int, group: str, reason: str) -> None:
        """A step trains without a group."""
        row = self.manifests[step][group]
        self.manifests[step][group], self.strikes[step][group] = GONE, reason
        self.dropped[reason] += 1
        self.dead += row.attempt + 1 < row.limit  # the payload's letter; a retired prompt has its own
        self.give_back(row, reason)

    def strike_queued(self, group: str) -> str:
        """A queued group cannot be read."""
        row = self.ready[group]
        if row.strikes < 2:
            row.strikes += 1
            return "counted"
        del self.ready[group]
        self.dropped["poison"] += 1
        self.dead += row.attempt + 1 < row.limit
        self.give_back(row, "poison")
        return "struck"

    # Versions.

    def commit(self, digest: str, covered: int) -> None:
        """The next version is committed."""
        step = self.version
        for row in self.assigned(step).values():
            self.trained[step - row.version_min] += 1
        self.version += 1
        self.versions[self.version] = digest
        self.cover(covered)
        living = [
            a for a, v in self.serving.items() if v >= 0 and self.clock - self.beats[a] <= self.lease_ms
        ]
        paces = sorted(usual(self.work[actor].times) for actor in living if self.work[actor].times)
        self.live = len(living)
        self.fleet_ms = floor(paces[ceil(len(paces) / 2) - 1] + 0.5) if paces else 0

    def cover(self, covered: int) -> None:
        """No restore asks for steps up to this one any more."""
        self.wanted = self.covered = max(self.wanted, covered)
        for step in [step for step in self.manifests if step <= self.covered]:
            del self.manifests[step], self.strikes[step]

    def fork(self, at: int) -> None:
        """A new lineage from version `at`."""
        for lease in sorted(self.leases.values(), key=lambda lease: -lease.number):
            self.close(lease.token, "lineage")
        for group in sorted(self.ready, key=lambda g: (self.ready[g].deadline, g), reverse=True):
            self.dropped["lineage"] += 1
            self.give_back(self.ready.pop(group), "lineage")
        for step in range(self.head - 1, at - 1, -1):
            for row in reversed(self.assigned(step).values()):
                self.dropped["lineage"] += 1
                if step < self.version:
                    self.trained[step - row.version_min] -= 1
                self.give_back(row, "lineage")
            self.manifests.pop(step, None)
            self.strikes.pop(step, None)
        self.trained = +self.trained
        self.versions = {version: value for version, value in self.versions.items() if version <= at}
        self.serving = {actor: v if v <= at else -1 for actor, v in self.serving.items()}
        self.lineage, self.head, self.version = self.lineage + 1, at, at
        self.checkpoint, self.covered = min(self.checkpoint, at), min(self.covered, at - 1)
        self.wanted = min(self.wanted, at - 1)
        self.step_ms = self.assigned_at = self.unsafe_since = self.unsafe_ms = 0
