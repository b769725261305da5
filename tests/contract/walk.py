"""One step of a run at a time, on the server and on the model, with every answer and all state compared.

`Walk` has a method for each thing that can happen; choices come in as integers and are taken modulo
what there is to choose from. Hypothesis drives it in `test_machine.py`, scripts and a seeded
generator (`scripts.py`) in `test_mutants.py`. Time stands still but for `elapse` and `clock_jumps`.
The learner's calls go through a real `Session`, which also brings an older server forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from buffer.admission import Admit, Drop, Lease
from buffer.batches import Assign
from buffer.client import Stream
from buffer.errors import Behind, Fenced, StreamError
from buffer.members import Applied, LearnerBeat
from buffer.prompts import Requeue
from buffer.session import Session
from buffer.stream import Publish
from tests.contract.harness import Run, digest, encoded_prompts
from tests.contract.model import Model
from tests.contract.reading import nothing_assigned_comes_again, read_model
from tests.contract.rows import PAYLOAD, HeldLease, Work

LEASE_MS = 1000
REASONS = ("released", "engine", "reward", "poison", "filtered")


class Walk:
    """A run with some actors, beside its model."""

    def __init__(self, stream: Stream, *, actors: int, **rules: Any) -> None:
        rules = {"cap": rules["batch"], **rules}
        self.run = Run(stream, lease_ms=LEASE_MS, **rules)
        self.model = Model(**rules, lease_ms=LEASE_MS)
        self.names = [f"a{number}" for number in range(actors)]
        self.session = Session.join(stream, self.run.rules, nonce="nonce")
        self.run.epochs["learner"] = self.session.epoch
        self.session.commit(0, digest(0))
        for name in self.names:
            self.run.join_actor(name)
            self.run.applied(name, 0)
        self.model = read_model(self.run)
        self.assigned: set[str] = set()
        self.saved: dict[bytes, bytes] = {}
        self.saved_lineage, self.came_back_older = 0, False
        self._forget_calls()

    def _forget_calls(self) -> None:
        self.published: list[tuple[Publish, str]] = []
        self.over: list[Publish] = []
        """Publish calls of leases that ended without a group."""

    # What the learner does.

    def feed(self, count: int) -> None:
        """Feeds 1 to 8 prompts, unless the data has ended."""
        count = count % 8 + 1
        if self.model.data_end < 0:
            self.session.feed(self.model.tail, encoded_prompts(self.model.tail, count))
            self.model.feed(count)
        with pytest.raises(Behind):
            self.session.feed(self.model.tail + 1, encoded_prompts(self.model.tail + 1, 1))

    def end_data(self, choice: int) -> None:
        """One time in four: no prompt will follow."""
        if choice % 4 == 0 and self.model.data_end < 0:
            self.session.feed(self.model.tail, (), final=True)
            self.session.feed(self.model.tail, (), final=True)
            self.model.data_end = self.model.tail

    def assign(self) -> None:
        """Asks for the batch at the head."""
        with self._ticking():
            answer = self.session.assign(self.model.head)
            self.model.tick()
            status, groups = self.model.choose()
        assert (answer.reason or answer.status) == status
        if status != "batch":
            return
        assert {row.group: row.version_min for row in answer.manifest.rows} == {
            group: row.version_min for group, row in groups.items()
        }
        for group, row in groups.items():
            assert group not in self.assigned, "a group in two manifests"
            assert self.model.head - row.version_min <= self.model.eta, "staleness above eta"
            self.assigned.add(group)
        self.model.assign(groups)

    def assign_again(self, choice: int) -> None:
        """Asks for a batch below the head: the stored manifest, or a refusal once it is covered."""
        if self.model.head:
            step = choice % self.model.head
            if step <= self.model.covered:
                with pytest.raises(StreamError, match="covered"):
                    self.session.assign(step)
            else:
                groups = {row.group for row in self.session.assign(step).manifest.groups()}
                assert groups == set(self.model.assigned(step))

    def strike(self, choice: int) -> None:
        """A group of the newest assigned step, or a queued one, cannot be read; a trained one stays."""
        step, model = self.model.head - 1, self.model
        groups = sorted(model.assigned(step))
        if groups and choice % 2:
            group = groups[choice % len(groups)]
            if step < model.version:
                with pytest.raises(StreamError, match="was trained in step"):
                    self.session.strike(step, group, "poison", b"bad")
                return
            for _ in range(2):
                assert self.session.strike(step, group, "poison", b"bad").status == "struck"
            model.strike(step, group, "poison")
        elif model.ready:
            group = sorted(model.ready)[choice % len(model.ready)]
            assert self.session.strike(-1, group, "poison", b"bad").status == model.strike_queued(group)
        else:
            assert self.session.strike(-1, "0000-0000000000-99", "poison").status == "gone"

    def commit(self, lag: int) -> None:
        """Commits the next version if its step was assigned; keeps the payloads of 0 to 2 steps."""
        model = self.model
        if model.version < model.head:
            covered, version = model.version - lag % 3, model.version + 1
            value = f"{digest(version)}-{model.lineage}"
            for _ in range(2):
                assert self.session.commit(version, value, covered=covered).digest == value
            assert self.session.commit(version, "a twin's", covered=covered).digest == value
            model.commit(value, covered)

    def checkpoint(self, choice: int) -> None:
        """A checkpoint of a recent version becomes the latest; one or two are kept."""
        model = self.model
        version = max(0, model.version - choice % 2)
        oldest = max(0, version - choice // 2 % 2)
        with pytest.raises(StreamError, match="committed is"):
            self.session.checkpoint(version, "other", oldest)
        self.session.checkpoint(version, model.versions[version], oldest)
        model.checkpoint = max(model.checkpoint, version)
        model.cover(oldest - 1)

    def fork(self, choice: int) -> None:
        """A new lineage from one of the last three versions; the old lineage cannot be left twice."""
        at = max(0, self.model.version - choice % 3)
        self.session.fork(at, "test", self.run.rules)
        self.model.fork(at)
        self._forget_calls()

    def learner_restarts(self) -> None:
        """A learner crashes and is restored; its zombie is fenced out of everything."""
        old, memory = self.session, self.session.memory()
        self.session = Session.join(self.run.stream, self.run.rules, memory=memory)
        for call in (Assign(old.epoch, self.model.head), LearnerBeat(old.epoch)):
            with pytest.raises(Fenced) as caught:
                self.run.stream.call(call)
            assert not caught.value.came_back_older
        with pytest.raises(Fenced):
            old.reconcile()

    # What the server does.

    def save(self) -> None:
        """The server writes its file."""
        self.saved, self.saved_lineage = self.run.dump(), self.model.lineage

    def roll_back(self) -> None:
        """The server comes back as of its file, and is brought forward; actors join again if they must."""
        if not self.saved or self.saved_lineage != self.model.lineage:
            return
        before = self.model
        self.run.come_back(self.saved)
        self.run.stop_clock()
        self.session.reconcile()
        for name in self.names:
            self._beat_or_join(name)
        self.came_back_older = True
        after = self.model = self._read()
        assert (after.lineage, after.head, after.version) == (before.lineage, before.head, before.version)
        assert after.trained == before.trained, "trained less, or more"
        nothing_assigned_comes_again(after, self.session.known.manifests)
        self._forget_calls()
        self.saved = {}

    def _beat_or_join(self, name: str) -> None:
        try:
            self.run.heartbeat(name)
        except Fenced as error:
            if not error.came_back_older:
                raise
            self.run.join_actor(name)

    # What the actors do.

    def admit(self, choice: int, repeat: int = 0) -> None:
        """An actor asks for a lease; with an odd `repeat` as one whose reply was lost."""
        actor = self._actor(choice)
        call = self.run.next_admit(actor)
        with self._ticking():
            lease = self.run.stream.call(call)
            self.model.tick()
            reason, probe = self.model.refusal(actor)
        assert (lease.reason or None) == reason
        if reason is None:
            self._same_lease(lease, actor, probe)
        if repeat % 2:
            assert self.run.stream.call(call) == lease
        if call.request > 1:
            overtaken = Admit(actor, call.epoch, call.request - 1, "late")
            with pytest.raises(StreamError, match="was answered already"):
                self.run.stream.call(overtaken)

    def publish(self, choice: int, newer: int = 0) -> None:
        """A lease's group comes in, written by its version or, in part, by newer ones."""
        if lease := self._lease(choice):
            version_min = lease.version + newer % (self.model.version - lease.version + 1)
            call = self._publish_call(lease, *range(version_min, self.model.version + 1))
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
            kept = set(self.model.ready)
            kept.update(*(self.model.assigned(step) for step in self.model.manifests))
            if call.group in kept:
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
            call = self._publish_call(lease, lease.version)
            changes: dict[str, object] = {"versions": (f"{lease.version}:other",)}
            older = max(0, lease.version - 1)
            if fault % 5 == 1:
                changes = {"versions": ()}
            elif fault % 5 == 2:
                changes = {"group": lease.group[:-2] + "77"}
            elif fault % 5 == 3 and lease.version:
                changes = {"version_min": older, "versions": (f"{older}:{self.model.versions[older]}",)}
            elif fault % 5 == 4 and lease.version:
                changes = {"versions": (*call.versions, f"{older}:{self.model.versions[older]}")}
            answer = self.run.stream.publish(msgspec.structs.replace(call, **changes), PAYLOAD)
            assert (answer.status, answer.reason) == ("refused", "engine")
            self.over.append(call)
            self.model.close(lease.token, "engine")

    def drop(self, choice: int, reason: int) -> None:
        """A lease is handed back, then once more; another actor may not."""
        if lease := self._lease(choice):
            name = REASONS[reason % (4 + self.model.dynamic)]
            call = Drop(lease.actor, self.run.epochs[lease.actor], lease.token, name)
            other = next(actor for actor in self.names if actor != lease.actor)
            not_mine = Drop(other, self.run.epochs[other], lease.token, name)
            assert not self.run.stream.call(not_mine).dropped
            self.over.append(self._publish_call(lease, lease.version))
            assert self.run.stream.call(call).dropped
            assert not self.run.stream.call(call).dropped
            self.model.close(lease.token, name)

    def heartbeat(self, choice: int, mask: int) -> None:
        """An actor beats for some of all leases, of which it renews its own; the others go on ageing."""
        actor = self._actor(choice)
        listed = [token for index, token in enumerate(sorted(self.model.leases)) if mask >> index & 1]
        with self._ticking():
            beat = self.run.heartbeat(actor, *listed, "1:unknown")
            self.model.tick()
        held = [token for token in listed if token in self.model.leases]
        mine = [token for token in held if self.model.leases[token].actor == actor]
        assert beat.lost == [token for token in listed if token not in mine] + ["1:unknown"]
        assert (beat.head, beat.version) == (self.model.head, self.model.version)
        assert beat.over == (self.model.head >= self.model.max_steps)
        self.model.beats[actor] = self.model.clock
        for token in mine:
            self.model.renew(token)

    def applied(self, choice: int, back: int) -> None:
        """An actor serves the newest version or one of the two before it; a wrong digest is refused."""
        actor, model = self._actor(choice), self.model
        version = max(0, model.version - back % 3)
        with pytest.raises(StreamError, match="digest"):
            self.run.stream.call(Applied(actor, self.run.epochs[actor], version, "other"))
        call = Applied(actor, self.run.epochs[actor], version, model.versions[version])
        model.serving[actor] = max(version, model.serving[actor])
        assert self.run.stream.call(call).version == model.serving[actor]

    def actor_restarts(self, choice: int, leaves: int) -> None:
        """An actor dies, or for an odd `leaves` leaves, and joins again; its old epoch is fenced."""
        actor, model = self._actor(choice), self.model
        old, held = self.run.epochs[actor], [x for x in model.leases.values() if x.actor == actor]
        self.over += [self._publish_call(lease, lease.version) for lease in held]
        if leaves % 2:
            assert self.run.leave(actor) == len(held)
        self.run.join_actor(actor)
        self.run.requests[actor] = 0
        for lease in sorted(held, key=lambda lease: -lease.number):
            model.close(lease.token, "released")
        model.serving[actor], model.beats[actor], model.work[actor] = -1, model.clock, Work()
        with pytest.raises(Fenced) as caught:
            self.run.stream.call(Applied(actor, old, 0, digest(0)))
        assert not caught.value.came_back_older
        late = Publish("group", "", actor, old, "1:any", 7, 0, ("0:" + digest(0),))
        answer = self.run.stream.publish(late, PAYLOAD)
        assert (answer.status, answer.reason) == ("late", "fenced")
        model.refused["fenced"] += 1

    def requeue(self, choice: int) -> None:
        """The prompt of a dead letter is put back, once; letters of returned prompts hold none."""
        letters: Any = self.run.stream.redis.xrange(self.run.stream.key("dead"))
        if letters:
            entry, letter = letters[choice % len(letters)]
            if not letter[b"prompt"]:
                with pytest.raises(StreamError, match="holds no prompt"):
                    self.run.stream.call(Requeue(entry.decode()))
                return
            attempt = int(letter[b"attempt"]) + 1
            assert self.run.stream.call(Requeue(entry.decode())).position == int(letter[b"position"])
            assert self.run.stream.call(Requeue(entry.decode())).position == -1
            row = (int(letter[b"position"]), attempt, attempt + self.model.attempts_max)
            self.model.prompts.append(row)

    # What time does.

    def elapse(self, choice: int) -> None:
        """Four tenths of a lease pass."""
        self.run.elapse(LEASE_MS * 4 // 10)
        self.model.clock += LEASE_MS * 4 // 10
        self.heartbeat(choice, 0)

    def clock_jumps(self, choice: int) -> None:
        """The server's clock jumps by years: the run's clock advances by one second."""
        actor = self._actor(choice)
        self.run.stream.redis.hset(self.run.stream.key("state"), "last", 0)
        with self._expiring():
            self.run.heartbeat(actor)
            self.model.tick(1000)
            self.model.beats[actor] = self.model.clock

    def check(self) -> None:
        """What must hold after each of these."""
        found, expected = vars(self._read()), vars(self.model)
        unlike = {name: (found[name], expected[name]) for name in found if found[name] != expected[name]}
        assert not unlike, f"(server, model): {unlike}"

    def _read(self) -> Model:
        return read_model(self.run, came_back_older=self.came_back_older)

    def _actor(self, choice: int) -> str:
        return self.names[choice % len(self.names)]

    def _lease(self, choice: int) -> HeldLease | None:
        tokens = sorted(self.model.leases)
        return self.model.leases[tokens[choice % len(tokens)]] if tokens else None

    def _publish_call(self, lease: HeldLease, *versions: int) -> Publish:
        table = tuple(f"{version}:{self.model.versions.get(version)}" for version in versions)
        epoch = self.run.epochs[lease.actor]
        return Publish(lease.group, "", lease.actor, epoch, lease.token, len(PAYLOAD), min(versions), table)

    def _same_lease(self, lease: Lease, actor: str, probe: bool) -> None:
        granted = self.model.grant(actor, lease.token, probe)
        same = ("group", "position", "attempt", "version", "deadline")
        assert [getattr(lease, name) for name in same] == [getattr(granted, name) for name in same]
        assert lease.prompt is not None
        assert lease.prompt.row == granted.position

    @contextmanager
    def _ticking(self) -> Iterator[None]:
        """Around a call that expires leases, and the model's same: its time stands still."""
        self.run.stop_clock()
        with self._expiring():
            yield

    @contextmanager
    def _expiring(self) -> Iterator[None]:
        calls = {held.token: self._publish_call(held, held.version) for held in self.model.leases.values()}
        yield
        self.over += [calls[token] for token in calls.keys() - self.model.leases.keys()]
