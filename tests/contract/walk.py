"""One step of a run at a time, on the server and on the model, with every answer and all state compared.

`Walk` has a method for each thing that can happen; choices come in as integers and are taken modulo
what there is to choose from. Hypothesis drives it in `test_machine.py`, scripts and a seeded
generator (`scripts.py`) in `test_mutants.py`. Time stands still but for `elapse` and `clock_jumps`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
import redis

from buffer.admission import Drop, Lease
from buffer.batches import Assign
from buffer.client import Stream
from buffer.errors import Fenced, StreamError
from buffer.members import Applied
from buffer.stream import Publish
from tests.contract.harness import Run, digest
from tests.contract.invariants import check
from tests.contract.model import HeldLease, Model

LEASE_MS = 1000
PAYLOAD = b"payload"
REASONS = ("released", "engine", "reward", "poison")


class Walk:
    """A run with some actors, beside its model."""

    def __init__(
        self, stream: Stream, *, batch: int, eta: int, max_steps: int, attempts: int, actors: int
    ) -> None:
        settings = {"batch": batch, "eta": eta, "max_steps": max_steps, "attempts_max": attempts}
        self.run = Run(stream, lease_ms=LEASE_MS, **settings)
        self.model = Model(**settings, lease_ms=LEASE_MS)
        self.names = [f"a{number}" for number in range(actors)]
        self.run.start(*self.names, prompts=0)
        self.model.serving = dict.fromkeys(self.names, 0)
        self.model.clock = self.run.snapshot().number("clock")
        self.published: list[tuple[Publish, str]] = []
        self.over: list[Publish] = []
        """Publish calls of leases that ended without a group."""
        self.assigned: set[str] = set()

    # What the learner does.

    def feed(self, count: int) -> None:
        """Feeds 1 to 8 prompts."""
        count = count % 8 + 1
        self.run.feed(self.model.tail, count)
        self.model.prompts += [(self.model.tail + index, 0) for index in range(count)]
        self.model.tail += count

    def assign(self) -> None:
        """Asks for the batch at the head."""
        with self._ticking():
            answer = self.run.assign(self.model.head)
        status, rows = self.model.batch_or_wait()
        assert (answer.reason or answer.status) == status
        if status != "batch":
            return
        assert [(row.group, row.version_min) for row in answer.groups()] == sorted(rows)
        for group, version_min in rows:
            assert group not in self.assigned, "a group in two manifests"
            assert self.model.head - version_min <= self.model.eta, "staleness above eta"
            self.assigned.add(group)
        self.model.assign(rows)

    def assign_again(self, choice: int) -> None:
        """Asks for a batch below the head: the stored manifest, or a refusal once it is covered."""
        if self.model.head:
            step = choice % self.model.head
            if step <= self.model.covered:
                with pytest.raises(StreamError, match="covered"):
                    self.run.assign(step)
            else:
                rows = [(row.group, row.version_min) for row in self.run.assign(step).groups()]
                assert rows == sorted(self.model.manifests[step])

    def commit(self, lag: int) -> None:
        """Commits the next version if its step was assigned; keeps the payloads of 0 to 2 steps."""
        if self.model.version < self.model.head:
            covered = self.model.version - lag % 3
            self.run.commit(self.model.version + 1, covered)
            self.model.commit(covered)
        else:
            with pytest.raises(StreamError, match="never assigned"):
                self.run.commit(self.model.version + 1)

    def learner_restarts(self) -> None:
        """A new learner joins; the old one is fenced out of the batches."""
        old = self.run.epochs["learner"]
        self.run.join_learner()
        with pytest.raises(Fenced):
            self.run.stream.call(Assign(old, self.model.head))

    # What the actors do.

    def admit(self, choice: int, repeat: int = 0) -> None:
        """An actor asks for a lease; with an odd `repeat` as one whose reply was lost."""
        actor = self._actor(choice)
        call = self.run.next_admit(actor)
        with self._ticking():
            lease = self.run.stream.call(call)
        reason = self.model.refusal(actor)
        assert (lease.reason or None) == reason
        if reason is None:
            self._same_lease(lease, actor)
        if repeat % 2 and reason is None:
            assert self.run.stream.call(call) == lease

    def publish(self, choice: int, newer: int = 0) -> None:
        """A lease's group comes in, written by its version or, in part, by newer ones."""
        if lease := self._lease(choice):
            version_min = lease.version + newer % (self.model.version - lease.version + 1)
            call = self._publish_call(lease.token, *range(version_min, self.model.version + 1))
            answer = self.run.stream.publish(call, PAYLOAD)
            assert answer.status == "ok"
            self.model.queue(lease.token, version_min)
            self.published.append((call, answer.entry))

    def publish_again(self, choice: int) -> None:
        """A publish is repeated: the same entry while the group's payload is kept, else `late`."""
        if self.published:
            call, entry = self.published[choice % len(self.published)]
            call = msgspec.structs.replace(call, epoch=self.run.epochs[call.actor])
            answer = self.run.stream.publish(call, PAYLOAD)
            kept = [
                row
                for step, rows in self.model.manifests.items()
                if step > self.model.covered
                for row in rows
            ]
            if call.group in self.model.ready or call.group in dict(kept):
                assert (answer.status, answer.entry) == ("ok", entry)
            else:
                assert (answer.status, answer.reason) == ("late", "unknown")
                self.model.refused["unknown"] += 1

    def publish_late(self, choice: int) -> None:
        """A group comes in whose lease is gone."""
        if self.over:
            call = self.over[choice % len(self.over)]
            call = msgspec.structs.replace(call, epoch=self.run.epochs[call.actor])
            answer = self.run.stream.publish(call, PAYLOAD)
            assert (answer.status, answer.reason) == ("late", "unknown")
            self.model.refused["unknown"] += 1

    def publish_unsound(self, choice: int, fault: int) -> None:
        """A group comes in with an uncommitted digest, no version, an older one, or as another group."""
        if lease := self._lease(choice):
            call = self._publish_call(lease.token, lease.version)
            changes: dict[str, object] = {"versions": (f"{lease.version}:other",)}
            older = max(0, lease.version - 1)
            if fault % 5 == 1:
                changes = {"versions": ()}
            elif fault % 5 == 2:
                changes = {"group": lease.group[:-2] + "77"}
            elif fault % 5 == 3 and lease.version:
                changes = {"version_min": older, "versions": (f"{older}:{digest(older)}",)}
            elif fault % 5 == 4 and lease.version:
                changes = {"versions": (*call.versions, f"{older}:{digest(older)}")}
            answer = self.run.stream.publish(msgspec.structs.replace(call, **changes), PAYLOAD)
            assert (answer.status, answer.reason) == ("refused", "engine")
            self.over.append(call)
            self.model.close(lease.token, "engine")

    def drop(self, choice: int, reason: int) -> None:
        """A lease is handed back, then once more."""
        if lease := self._lease(choice):
            self.over.append(self._publish_call(lease.token, lease.version))
            call = Drop(lease.actor, self.run.epochs[lease.actor], lease.token, REASONS[reason % 4])
            assert self.run.stream.call(call).dropped
            assert not self.run.stream.call(call).dropped
            self.model.close(lease.token, call.reason)

    def heartbeat(self, choice: int, mask: int) -> None:
        """An actor beats for some of all leases; the others go on ageing."""
        actor = self._actor(choice)
        listed = [token for index, token in enumerate(sorted(self.model.leases)) if mask >> index & 1]
        with self._ticking():
            beat = self.run.heartbeat(actor, *listed, "1:unknown")
        assert beat.lost == [token for token in listed if token not in self.model.leases] + ["1:unknown"]
        assert (beat.head, beat.version) == (self.model.head, self.model.version)
        assert beat.over == (self.model.head >= self.model.max_steps)
        for token in listed:
            if token in self.model.leases:
                self.model.expiry[token] = self.model.clock + LEASE_MS

    def applied(self, choice: int, back: int) -> None:
        """An actor serves the newest version or one of the two before it; a wrong digest is refused."""
        actor = self._actor(choice)
        version = max(0, self.model.version - back % 3)
        with pytest.raises(StreamError, match="digest"):
            self.run.stream.call(Applied(actor, self.run.epochs[actor], version, "other"))
        self.run.applied(actor, version)
        self.model.serving[actor] = version

    def actor_restarts(self, choice: int, leaves: int) -> None:
        """An actor dies, or for an odd `leaves` leaves, and joins again; its old epoch is fenced."""
        actor = self._actor(choice)
        held = [lease.token for lease in self.model.leases.values() if lease.actor == actor]
        if leaves % 2:
            calls = {token: self._publish_call(token, 0) for token in held}
            waiting = len(self.model.prompts)
            assert self.run.leave(actor) == len(held)
            for token in held:
                self.over.append(calls[token])
                self.model.close(token, "released")
            # They come back in the order of a hash, so take the server's, once it is a permutation.
            prompts = [
                tuple(map(int, row.split())) for row in self._redis().lrange(self._key("prompts"), 0, -1)
            ]
            back = len(self.model.prompts) - waiting
            assert sorted(prompts[:back]) == sorted(self.model.prompts[:back])
            assert prompts[back:] == self.model.prompts[back:]
            self.model.prompts = prompts
        old = self.run.epochs[actor]
        self.run.join_actor(actor)
        self.model.serving[actor] = -1
        with pytest.raises(Fenced):
            self.run.stream.call(Applied(actor, old, 0, digest(0)))
        late = self.run.stream.publish(Publish(actor, old, "1:any", "group", 0, ("0:" + digest(0),)), PAYLOAD)
        assert (late.status, late.reason) == ("late", "fenced")
        self.model.refused["fenced"] += 1

    # What time does.

    def elapse(self, choice: int) -> None:
        """Four tenths of a lease pass."""
        self.run.elapse(LEASE_MS * 4 // 10)
        self.model.clock += LEASE_MS * 4 // 10
        self.heartbeat(choice, 0)

    def clock_jumps(self, choice: int) -> None:
        """The server's clock jumps by years: the run's clock advances by one second."""
        self._redis().hset(self._key("state"), "last", 0)
        with self._expiring():
            self.run.heartbeat(self._actor(choice))
            self.model.tick(1000)

    def check(self) -> None:
        """What must hold after each of these."""
        check(self.run, self.model)

    # How the above is said.

    def _redis(self) -> redis.Redis:
        return self.run.stream.redis

    def _key(self, name: str) -> str:
        return self.run.stream.key(name)

    def _actor(self, choice: int) -> str:
        return self.names[choice % len(self.names)]

    def _lease(self, choice: int) -> HeldLease | None:
        tokens = sorted(self.model.leases)
        return self.model.leases[tokens[choice % len(tokens)]] if tokens else None

    def _publish_call(self, token: str, *versions: int) -> Publish:
        lease = self.model.leases[token]
        table = tuple(f"{version}:{digest(version)}" for version in versions)
        return Publish(lease.actor, self.run.epochs[lease.actor], token, lease.group, min(versions), table)

    def _same_lease(self, lease: Lease, actor: str) -> None:
        granted = self.model.grant(actor, lease.token)
        assert (lease.group, lease.position, lease.attempt) == (
            granted.group,
            granted.position,
            granted.attempt,
        )
        assert (lease.version, lease.deadline) == (granted.version, granted.deadline)
        assert lease.prompt is not None
        assert lease.prompt.row == granted.position

    @contextmanager
    def _ticking(self) -> Iterator[None]:
        """Around a call that expires leases: its time stands still, and the model expires the same."""
        self.run.stop_clock()
        with self._expiring():
            yield
            self.model.tick()

    @contextmanager
    def _expiring(self) -> Iterator[None]:
        calls = {
            token: self._publish_call(token, lease.version) for token, lease in self.model.leases.items()
        }
        yield
        for token in calls.keys() - self.model.leases.keys():
            self.over.append(calls[token])
