"""The learner's side of a run: its calls, and the memory that survives a server which comes back older.

A session remembers what it was told: the head, the versions it committed, the manifests since the
oldest checkpoint. Before a call that follows a lost reply, and whenever the server turns out to be
behind, it reconciles: a Redis restored from an older file is brought forward, a wiped or foreign one
ends the process with `ForeignRun`.

    session = Session.join(stream, StreamConfig())
    session.commit(0, digest)
    answer = session.assign(0)              # -> Assigned(status="batch", ...), also after a restart
    session.commit(1, digest)
    session.memory()                        # goes into every checkpoint; `Session.join(..., memory=...)`
"""

from __future__ import annotations

import secrets
import threading
from typing import TypeVar

import msgspec

from buffer.batches import Assign, Assigned, Manifest, Strike, Struck
from buffer.client import Call, Stream
from buffer.connect import primaries
from buffer.errors import Behind, Fenced, ForeignRun, NoRun, SettingsMismatch
from buffer.ledger import Snapshot
from buffer.members import FIELDS, Joined, JoinLearner, LearnerBeat, Leave, Rules, Standing
from buffer.prompts import Fed, Feed
from buffer.recovery import Known, Reconcile
from buffer.versions import Commit, CommitCheckpoint, Committed, Fork, Forked

Reply = TypeVar("Reply")

KEPT_STEPS = 256
"""Steps whose manifests are remembered at least, checkpoints or not."""


class Session:
    """A learner that has joined a run. Safe to share between threads."""

    def __init__(self, stream: Stream, joined: Joined, known: Known) -> None:
        self.stream, self.epoch, self.known = stream, joined.epoch, known
        self.data_end = joined.data_end
        """Position at which the data ends, -1 while that is not known."""
        self._lock = threading.RLock()
        self._lost, self._server = stream.lost, _server_id(stream)

    @classmethod
    def join(cls, stream: Stream, rules: Rules, *, nonce: str = "", memory: bytes = b"") -> Session:
        """Creates the run, or takes it over; loads the library. `memory` is that of a restored checkpoint.

        Raises `SettingsMismatch`, or `ForeignRun` if the memory is of another run.
        """
        stream.load_library()
        try:
            joined = stream.call(JoinLearner(secrets.token_hex(16), nonce or secrets.token_hex(16), rules))
        except SettingsMismatch as error:
            rule, _, said = str(error).partition(": ")
            raise SettingsMismatch(
                f"stream.{FIELDS.get(rule, rule)}: {said}; give run {stream.run} its own again, a new run "
                "another name, or go on in a new lineage (launch learner --fork)"
            ) from error
        known = msgspec.json.decode(memory, type=Known) if memory else None
        if known is not None and known.nonce != joined.nonce:
            raise ForeignRun(
                f"run {stream.run}: the checkpoint is of the run with nonce {known.nonce}, the server holds "
                f"{joined.nonce}; it was wiped or swapped: give the new run another name"
            )
        session = cls(stream, joined, _merged(stream, joined, known))
        session.reconcile()
        return session

    @property
    def head(self) -> int:
        """The next step to assign."""
        return self.known.head

    @property
    def version(self) -> int:
        """The newest committed version, -1 for none."""
        return self.known.version

    @property
    def tail(self) -> int:
        """Position of the next prompt to feed, as Redis last had it."""
        return self.known.tail

    def feed(self, position: int, prompts: tuple[bytes, ...], *, final: bool = False) -> Fed:
        """Appends prompts; raises `Behind` if `position` is not the tail, which `tail` then tells."""
        try:
            fed = self._call(Feed(self.epoch, position, prompts, final))
        except (Behind, NoRun):
            self.reconcile()
            raise
        except Fenced as error:
            self.reconcile()  # raises, unless the server came back older
            raise Behind(f"the server came back older; the queue's tail is {self.tail}") from error
        self.known.tail = fed.tail
        self.data_end = fed.tail if final else -1
        return fed

    def beat(self) -> Standing:
        """Lets the run's clock advance; at least every half second, whatever else the learner does."""
        return self._repeating(LearnerBeat(self.epoch))

    def assign(self, step: int) -> Assigned:
        """The batch of a step, or why there is none."""
        answer = self._repeating(Assign(self.epoch, step))
        if answer.status == "batch":
            with self._lock:
                self.known.manifests[step] = answer.manifest
                self.known.head = max(self.known.head, step + 1)
        return answer

    def strike(self, step: int, group: str, reason: str, payload: bytes = b"") -> Struck:
        """A record that cannot be read: its step trains without it."""
        answer = self._repeating(Strike(self.epoch, step, group, reason, payload))
        if answer.status == "struck" and step in self.known.manifests:
            with self._lock:
                manifest = self.known.manifests[step]
                self.known.manifests[step] = Manifest(manifest.rows, {**manifest.strikes, group: reason})
        return answer

    def commit(self, version: int, digest: str, *, covered: int = -1) -> Committed:
        """The weights of a version; of one committed before, the answer's digest counts."""
        trained = self.known.manifests.get(version - 1)
        struck = len(trained.strikes) if trained else -1
        answer = self._repeating(Commit(self.epoch, version, digest, covered, struck))
        with self._lock:
            self.known.versions[version] = answer.digest
            self.known.version = max(self.known.version, version)
            self.known.covered = max(self.known.covered, covered)
            self.known.forget(min(self.known.covered + 1, self.known.head - KEPT_STEPS))
        return answer

    def checkpoint(self, version: int, digest: str, oldest: int) -> Committed:
        """A complete checkpoint becomes the latest; payloads before the oldest kept one are deleted."""
        answer = self._repeating(CommitCheckpoint(self.epoch, version, digest, oldest))
        with self._lock:
            self.known.checkpoint = max(self.known.checkpoint, version)
            self.known.covered = max(self.known.covered, oldest - 1)
            self.known.forget(min(oldest, self.known.head - KEPT_STEPS))
        return answer

    def fork(self, at: int, reason: str, rules: Rules) -> Forked:
        """A new lineage from the weights of version `at`."""
        answer = self._repeating(Fork(self.epoch, self.known.lineage, at, reason, rules))
        with self._lock:
            known = self.known
            known.lineage, known.head, known.version = answer.lineage, answer.head, answer.version
            known.checkpoint, known.covered = min(known.checkpoint, at), min(known.covered, at - 1)
            known.manifests = {step: rows for step, rows in known.manifests.items() if step < at}
            known.versions = {version: digest for version, digest in known.versions.items() if version <= at}
            known.tail = answer.tail
        return answer

    def leave(self, reason: str) -> int:
        """Ends the run; how many leases were released."""
        return self._repeating(Leave("learner", reason, self.epoch)).released

    def memory(self) -> bytes:
        """What a checkpoint keeps of this session."""
        with self._lock:
            return msgspec.json.encode(self.known)

    def reconcile(self) -> None:
        """Brings the server forward, if it came back older. Raises `ForeignRun`, `Fenced`, `LostSteps`."""
        with self._lock:
            server = _server_id(self.stream)
            if server != self._server:
                self.stream.load_library()
            try:
                answer = self.stream.call(Reconcile(self.epoch, server != self._server, self.known))
            except NoRun as error:
                raise ForeignRun(
                    f"run {self.stream.run} is gone from its server, which was wiped or swapped: {error}"
                ) from error
            self._server, self._lost = server, self.stream.lost
            self.known.tail = answer.tail
            self.data_end = -1

    def _call(self, call: Call[Reply]) -> Reply:
        if self.stream.lost != self._lost:
            self.reconcile()
        return self.stream.call(call)

    def _repeating(self, call: Call[Reply]) -> Reply:
        """A call, made again after reconciling if the server was behind or knew an older epoch."""
        try:
            return self._call(call)
        except (Behind, NoRun, Fenced):
            self.reconcile()  # raises if another learner has taken over, or this is another run
        return self.stream.call(call)


def _server_id(stream: Stream) -> str:
    """Random name of the server process; on a cluster, of all its primaries."""
    found = stream.patiently(lambda: [node.info("server")["run_id"] for node in primaries(stream.redis)])
    return " ".join(sorted(map(str, found)))


def _merged(stream: Stream, joined: Joined, known: Known | None) -> Known:
    """What the server says, and what a checkpoint remembers beyond it."""
    ledger = stream.call(Snapshot(full=True))
    versions = stream.patiently(lambda: stream.redis.hgetall(stream.key("versions")))
    fresh = Known(
        nonce=joined.nonce,
        lineage=joined.lineage,
        head=joined.head,
        tail=joined.tail,
        version=joined.version,
        checkpoint=joined.checkpoint,
        covered=ledger.number("wanted"),
        manifests=ledger.manifests,
        versions={int(version): digest.decode() for version, digest in versions.items()},
    )
    if known is None or known.lineage != fresh.lineage:
        return fresh
    fresh.head, fresh.version = max(fresh.head, known.head), max(fresh.version, known.version)
    fresh.checkpoint, fresh.covered = (
        max(fresh.checkpoint, known.checkpoint),
        max(fresh.covered, known.covered),
    )
    fresh.manifests = {**known.manifests, **fresh.manifests}
    fresh.versions = {**known.versions, **fresh.versions}
    return fresh
