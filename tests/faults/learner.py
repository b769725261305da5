"""A scripted learner, a process of its own: `python -m tests.faults.learner SETTINGS_JSON`.

It restores from its newest checkpoint whose digest is the committed one, replays the manifests since,
trains on, and publishes no version at or below the newest committed one. Its points, in order:
`joined restored feeding assigned read struck trained committed ckpt-... ckpt-committed`; and `sending`.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from buffer.batches import Assigned
from buffer.client import Stream
from buffer.config import StreamConfig
from buffer.errors import Behind, NoRun, RedisFull, RedisUnavailable, StreamError
from buffer.ledger import Ledger, Snapshot
from buffer.members import Rules
from buffer.prompts import encode_prompt
from buffer.session import Session
from buffer.stream import read_frames
from tests.faults import checkpoints
from tests.faults.points import Faults, Log, to_the_end
from tests.faults.policy import digest, initial, prompt_of, train, untrue

if TYPE_CHECKING:
    from weightsync.offer import Offers


class LearnerSettings(msgspec.Struct, kw_only=True):
    """What the test tells it."""

    url: str
    run: str
    log: str
    folder: str
    """Where its checkpoints lie."""
    stream: StreamConfig
    seed: int = 0
    checkpoint_every: int = 2
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    step_s: float = 0.0
    """Seconds a step takes."""
    patience_s: float = 30.0
    clock_s: float = 0.0
    """How far this process's wall clock is off."""
    weights: bool = False
    """Whether it offers its weights, as `tests.faults.weights` says."""


class Learner:
    """One life of the learner."""

    def __init__(self, settings: LearnerSettings, log: Log, faults: Faults) -> None:
        self.settings, self.log, self.faults = settings, log, faults
        self.folder = Path(settings.folder)
        self.stream = self._connect()
        self.rules = Rules.of(settings.stream)
        self.session, self.weights, self.version = self._restore()
        self._said = ""
        self.offers: Offers | None = None
        if settings.weights:
            from tests.faults import weights

            epoch = int(self.session.epoch.partition(":")[0])
            self.offers, self._publish = weights.offers(self.stream, epoch, log, faults), weights.publish

    def _connect(self) -> Stream:
        """A connection, also if Redis is away just now."""
        deadline = time.monotonic() + self.settings.patience_s
        while True:
            try:
                return Stream.connect(
                    self.settings.url, self.settings.run, patience_s=self.settings.patience_s
                )
            except RedisUnavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _restore(self) -> tuple[Session, np.ndarray, int]:
        self.folder.mkdir(parents=True, exist_ok=True)
        found = checkpoints.saved(self.folder)
        session = Session.join(self.stream, self.rules, memory=found[0].memory() if found else b"")
        self.faults.at("joined")
        weights, version = initial(self.settings.seed), 0
        for one in found:
            if session.known.versions.get(one.version) == digest(one.weights()):
                weights, version = one.weights(), one.version
                break
            self.log("passed over", folder=one.folder.name)
        known = session.known
        self.log("joined", epoch=session.epoch, restored=version, head=session.head, version=session.version)
        if version > known.checkpoint:  # complete, but its commit never came
            self._commit_checkpoint(session, version, digest(weights))
        self.faults.at("restored")
        return session, weights, version

    def live(self) -> str:
        """Steps until the run is over; why it is."""
        with self.offers or nullcontext():
            return self._live()

    def _live(self) -> str:
        if self.session.version < 0:
            self.session.commit(0, digest(self.weights))
        self._offer()
        while True:
            ledger = self._look()
            self._feed(ledger)
            answer = self.session.assign(self.version)
            if answer.status == "batch":
                self._step(answer)
            elif answer.status == "end":
                break
            elif answer.reason == "uncovered":
                self._checkpoint()
            else:
                self._wait(answer, ledger)
        reason = f"the run is over at version {self.version}"
        self.session.leave(reason)
        return reason

    def _look(self) -> Ledger:
        try:
            return self.stream.call(Snapshot())
        except NoRun:
            self.session.reconcile()  # which tells a server that was wiped from one that came back older
            return self.stream.call(Snapshot())

    def _feed(self, ledger: Ledger) -> None:
        batch, queued = self.rules.batch, ledger.sizes["prompts"]
        if queued >= (self.rules.eta + 2) * batch:
            return
        tail = self.session.tail
        prompts = (encode_prompt(prompt_of(position)) for position in range(tail, tail + 2 * batch))
        self.faults.at("feeding")
        try:
            self.session.feed(tail, tuple(prompts))
        except Behind as error:
            self.log("fed elsewhere", tail=self.session.tail, reason=str(error))
        except RedisFull as error:
            self.log("full", reason=str(error))  # what is queued can be trained all the same

    def _step(self, answer: Assigned) -> None:
        step, manifest = self.version, answer.manifest
        ids = [row.group for row in manifest.rows]
        self.log("assigned", step=step, groups=ids, repeat=answer.reason == "repeat")
        self.faults.at("assigned")
        frames = read_frames(self.stream, manifest.groups())
        self.faults.at("read")
        for frame in frames:
            if frame.problem is not None:
                self.session.strike(step, frame.row.group, frame.reason, frame.payload)
                self.log("struck", step=step, group=frame.row.group, reason=str(frame.problem))
                self.faults.at("struck")
        groups = [frame.group for frame in frames if frame.group is not None]
        if self.settings.step_s:
            time.sleep(self.settings.step_s)
        self.weights, self.version = train(self.weights, groups), step + 1
        found = [
            problem for group in groups for problem in untrue(group, self.settings.seed, self._digests())
        ]
        replayed = self.version <= self.session.version
        self.log(
            "trained",
            step=step,
            lineage=self.session.known.lineage,
            groups=[group.id for group in groups],
            oldest=[group.version_min for group in groups],
            digest=digest(self.weights),
            untrue=found,
            replayed=replayed,
        )
        self.faults.at("trained")
        if replayed:
            self._compare()
        else:
            self.session.commit(self.version, digest(self.weights))
            self.log("committed", version=self.version, digest=digest(self.weights), epoch=self.session.epoch)
        self._offer()
        self.faults.at("committed")
        if self.version % self.settings.checkpoint_every == 0:
            self._checkpoint()

    def _offer(self) -> None:
        """Offers the version of now if it is the newest one."""
        if self.offers is not None and self.version >= self.session.version:
            self._publish(self.offers, self.version, self.weights)

    def _digests(self) -> dict[int, str]:
        return self.session.known.versions

    def _compare(self) -> None:
        known = self._digests().get(self.version)
        if known != digest(self.weights):
            raise StreamError(
                f"replay of step {self.version - 1}: got weights {digest(self.weights)}, committed {known}"
            )

    def _checkpoint(self) -> None:
        epoch = int(self.session.epoch.partition(":")[0])
        checkpoints.write(self.folder, self.version, epoch, self.weights, self.session.memory(), self.faults)
        self._commit_checkpoint(self.session, self.version, digest(self.weights))

    def _commit_checkpoint(self, session: Session, version: int, of: str) -> None:
        # Another learner may have pruned what this one wrote; it then learns at the call that it is fenced.
        found = {one.version for one in checkpoints.saved(self.folder) if one.version < version}
        kept = [*sorted(found), version]
        oldest = kept[-self.settings.keep :][0]
        session.checkpoint(version, of, oldest)
        self.faults.at("ckpt-committed")
        checkpoints.prune(self.folder, oldest)
        self.log("checkpoint", version=version, oldest=oldest, epoch=session.epoch)

    def _wait(self, answer: Assigned, ledger: Ledger) -> None:
        reason = answer.reason
        if reason == "few" and not any(ledger.alive(actor) for actor in ledger.actors):
            reason = "no live actors"
        if reason != self._said:
            self.log("waiting", reason=reason, step=self.version)
        self._said = reason
        self.stream.take(self.stream.key("bell"), 0.3)


def main() -> int:
    """Entry point of the process."""
    settings = msgspec.json.decode(sys.argv[1], type=LearnerSettings)
    now = time.time
    time.time = lambda: now() + settings.clock_s
    log = Log(settings.log)
    return to_the_end(log, lambda: Learner(settings, log, Faults("learner")).live())


if __name__ == "__main__":
    sys.exit(main())
