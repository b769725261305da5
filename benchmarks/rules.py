"""Who may generate and what is trained, for `benchmarks.simulation`: our rules on a real server, and others'.

Both answer at a virtual time in milliseconds. Ours are the run's own functions; before each call its
clock is set to that time, so that group times, step times and leases are virtual.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from buffer.batches import Assign
from buffer.client import Call, PublishCall, Stream
from buffer.members import Rules
from buffer.stream import Publish
from tests.contract.harness import Run, digest

NEVER = 1 << 50
"""A reading of the server's time so late that the run's clock does not advance by itself."""


class Ticket(msgspec.Struct, frozen=True):
    """Leave to generate one group."""

    name: str
    """Unique in a run of the simulation; of ours, the lease's token."""
    actor: str
    """Who may."""
    position: int
    """Of the prompt in the queue, from 0."""
    attempt: int
    """How many tickets of this prompt ended without a group before; always 0 with others' rule."""
    version: int
    """Newest version when it was given."""


class Rule(Protocol):
    """Admission and batches."""

    def admit(self, actor: str, now: int) -> Ticket | str:
        """A ticket, or why there is none."""

    def publish(self, ticket: Ticket, now: int) -> bool:
        """A group is there; whether it was taken."""

    def assign(self, step: int, now: int) -> list[str]:
        """Names of the tickets whose groups the step trains, empty for none yet."""

    def commit(self, version: int, now: int) -> None:
        """A step is trained, and all actors serve its weights."""

    def given_up(self) -> set[str]:
        """Names of tickets that were withdrawn by the last `assign`."""


class Ours:
    """The functions of the replay stream."""

    def __init__(self, stream: Stream, actors: list[str], **settings: Any) -> None:
        self.run = Run(stream, lease_ms=NEVER, max_steps=1 << 30, **settings)
        self.stream, self.actors, self.fed = stream, actors, 0
        self.open: dict[str, Ticket] = {}
        self.held: set[str] = set()
        self.withdrawn: set[str] = set()
        self.queued, self.asked = 0, -1
        self.run.start(*actors, prompts=0)
        self._feed(0)

    @property
    def rules(self) -> Rules:
        """The settings of the run."""
        return self.run.rules

    def _set_clock(self, pipe: Any, now: int) -> None:
        pipe.hset(self.stream.key("state"), mapping={"clock": now, "last": NEVER})

    def _call(self, call: Call[Any], now: int) -> Any:
        with self.stream.redis.pipeline(transaction=False) as pipe:
            self._set_clock(pipe, now)
            if isinstance(call, PublishCall):
                pipe.xadd(self.stream.key("stream"), {"g": b"."})
            pipe.execute_command(*call.command(self.stream.run))
            return call.answer(pipe.execute()[-1])

    def _feed(self, now: int) -> None:
        count = 4 * self.rules.cap * (self.rules.eta + 1)
        self.run.feed(self.fed, count)
        self.fed += count

    def admit(self, actor: str, now: int) -> Ticket | str:
        lease = self._call(self.run.next_admit(actor), now)
        if lease.status == "wait" and lease.reason == "no-prompts":
            self._feed(now)
            lease = self._call(self.run.next_admit(actor), now)
        if lease.status == "wait":
            return str(lease.reason)
        ticket = Ticket(lease.token, actor, lease.position, lease.attempt, lease.version)
        self.open[lease.group] = ticket
        self.held.add(lease.token)
        return ticket

    def publish(self, ticket: Ticket, now: int) -> bool:
        group = f"0000-{ticket.position:010d}-{ticket.attempt:02d}"
        versions = (f"{ticket.version}:{digest(ticket.version)}",)
        epoch = self.run.epochs[ticket.actor]
        call = Publish(group, "", ticket.actor, epoch, ticket.name, 1, ticket.version, versions)
        self.held.discard(ticket.name)
        taken = self._call(call, now).status == "ok"
        self.queued += taken
        return taken

    def assign(self, step: int, now: int) -> list[str]:
        self.withdrawn = set()
        if self.queued < self.rules.batch and self.asked == step:
            return []  # asking again before a batch is ready changes nothing
        self.asked = step
        call = Assign(self.run.epochs["learner"], step)
        with self.stream.redis.pipeline(transaction=False) as pipe:
            self._set_clock(pipe, now)
            pipe.execute_command(*call.command(self.stream.run))
            pipe.hkeys(self.stream.key("leased"))
            *_, raw, leased = pipe.execute()
        answer = call.answer(raw)
        self.queued = answer.ready
        self.withdrawn = self.held - {token.decode() for token in leased}
        self.held -= self.withdrawn
        if answer.status != "batch":
            return []
        return [self.open.pop(row.group).name for row in answer.manifest.rows]

    def commit(self, version: int, now: int) -> None:
        with self.stream.redis.pipeline(transaction=False) as pipe:
            self._set_clock(pipe, now)
            pipe.execute()
        self.run.commit(version, covered=version - 1)
        for actor in self.actors:
            self.run.applied(actor, version)

    def given_up(self) -> set[str]:
        return self.withdrawn


class Others:
    """Admit while accepted + running < (eta + version + 1) B; train the first B that are ready. No bound."""

    def __init__(self, batch: int, eta: int) -> None:
        self.batch, self.eta, self.version, self.admitted = batch, eta, 0, 0
        self.ready: list[str] = []

    def admit(self, actor: str, now: int) -> Ticket | str:
        if self.admitted >= (self.eta + self.version + 1) * self.batch:
            return "full"
        self.admitted += 1
        return Ticket(str(self.admitted), actor, self.admitted - 1, 0, self.version)

    def publish(self, ticket: Ticket, now: int) -> bool:
        self.ready.append(ticket.name)
        return True

    def assign(self, step: int, now: int) -> list[str]:
        if len(self.ready) < self.batch:
            return []
        taken, self.ready = self.ready[: self.batch], self.ready[self.batch :]
        return taken

    def commit(self, version: int, now: int) -> None:
        self.version = version

    def given_up(self) -> set[str]:
        return set()
