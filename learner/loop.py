"""The steps of a run: batch, step, version, commit, offer, checkpoint, until the last.

After a restart the first of them are steps that were trained or assigned before: the same batches, from
their manifests, to the same versions, which are not committed or offered a second time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from buffer.ledger import Snapshot
from buffer.schema import Group
from buffer.session import Session
from learner.batch import Batch, PayloadGone
from learner.checkpoint.restore import Restore
from learner.checkpoint.schedule import Checkpoints
from learner.feed import Feeder
from learner.gate import check
from learner.kept import KeptVersions
from learner.prefetch import Prefetch
from learner.record import RunRecord
from weightsync.lanes import Lanes
from weightsync.manifest import Manifest
from weightsync.offer import Offers

if TYPE_CHECKING:
    from learner.ranks import Leader

log = logging.getLogger("learner")

_PATIENCE_S = 10.0
"""Between two log lines that say why the learner waits."""


class Loop:
    """Trains from the version that the trainer is at.

    loop = Loop(trainer, session, offers, record, feeder, checkpoints, restore, kept, max_steps=200, ...)
    loop.run()          # the manifest of the last version
    """

    def __init__(
        self,
        trainer: Leader,
        session: Session,
        offers: Offers | Lanes,
        record: RunRecord,
        feeder: Feeder,
        checkpoints: Checkpoints | None,
        restore: Restore,
        kept: KeptVersions,
        *,
        max_steps: int,
        mismatch: float,
        stop: Callable[[], None],
    ) -> None:
        """`checkpoints`: absent, payloads are deleted as soon as they are trained. `mismatch`: see
        `objective.abort`. `stop` is called often; it hands on a stop that a signal asked for."""
        self._trainer, self._session, self._offers, self._record = trainer, session, offers, record
        self._feeder, self._checkpoints, self._restore, self._kept = feeder, checkpoints, restore, kept
        self._max_steps, self._mismatch, self._pass_on_stop = max_steps, mismatch, stop
        self._trained_tokens, self._training_since, self._waiting_since = 0.0, 0.0, 0.0

    def run(self) -> Manifest:
        """All steps; the last version's manifest."""
        manifest = self._publish()
        self._training_since = time.time()
        with Prefetch(self._session, partial(self._trainer.fetch, self._session)) as batches:
            manifest = self._steps(batches, manifest)
        if self._checkpoints is not None:
            self._checkpoints.last(self._trainer, manifest.digest)
        return manifest

    def _steps(self, batches: Prefetch, manifest: Manifest) -> Manifest:
        """Steps until the last or the run's end; `manifest` is that of the version now."""
        while self._trainer.version < self._max_steps:
            self._pass_on_stop()
            self._waiting_since = time.monotonic()
            batch = batches.next(self._trainer.version, partial(self._on_wait, manifest))
            if batch is None:
                break
            try:
                groups = self._trainer.read(self._session, batch)
            except PayloadGone as gone:
                self._restore.fork(self._trainer.version, str(gone))
                manifest = self._publish()
                continue
            batches.ahead(batch.step + 1)
            if batch.step == 0:
                check(groups, 0, self._trainer.score, self._mismatch)
            manifest = self._step(batch, groups)
        return manifest

    def _publish(self) -> Manifest:
        """Commits the version of now and offers it to the engines.

        Of a version committed before, the digest of then counts: weights that came out differently, as they
        may on a GPU, go on being trained and are saved, but not offered.
        """
        session, tensors = self._session, self._trainer.export()
        manifest = Manifest.of(self._trainer.version, tensors)
        newest = manifest.version >= session.version
        if newest:
            covered = -1 if self._checkpoints is not None else manifest.version - 1
            committed = session.commit(manifest.version, manifest.digest, covered=covered).digest
        else:
            committed = session.known.versions.get(manifest.version, manifest.digest)
        if committed != manifest.digest:
            log.warning("version %d is %s again, it was %s", manifest.version, manifest.digest, committed)
        else:
            self._kept.put(manifest, tensors)
            if newest:
                self._offers.publish(manifest, tensors)
        return manifest

    def _step(self, batch: Batch, groups: list[Group]) -> Manifest:
        """Trains one batch, commits the version it makes, saves it now and then, records what happened."""
        record, began = self._record, time.time()
        metrics = self._trainer.train_step(groups, batch.step)
        trained = time.time()
        manifest = self._publish()
        published = time.time()
        if self._checkpoints is not None:
            self._checkpoints.after_step(self._trainer, manifest.digest)
        ended = time.time()
        record.trained(batch.step, began, trained)
        record.generated(groups)
        self._trained_tokens += metrics["tokens"]
        record.step(
            {
                "step": batch.step,
                **metrics,
                "queued": batch.queued,
                "seconds_wait": batch.waited_s,
                "seconds_fetch": batch.fetched_s,
                "seconds_publish": published - trained,
                "seconds_checkpoint": self._checkpoints.stalled_s if self._checkpoints else 0.0,
                "seconds_saving": self._checkpoints.saving_s if self._checkpoints else 0.0,
                "seconds_push": self._offers.push_seconds(),
                "seconds_export": self._offers.export_s,
                "weights_bytes": float(self._offers.held_bytes()),
                "tokens_per_second": self._trained_tokens / (ended - self._training_since),
                "time_batch": began - batch.waited_s,
                "time": ended,
            }
        )
        return manifest

    def _on_wait(self, manifest: Manifest, reason: str) -> None:
        """Called at each look for a batch that finds none."""
        self._pass_on_stop()
        self._feeder.check()
        if self._checkpoints is not None:
            if reason in ("uncovered", "memory"):
                self._checkpoints.needed(self._trainer, manifest.digest)
            else:
                self._checkpoints.look()
        if time.monotonic() - self._waiting_since > _PATIENCE_S:
            self._waiting_since = time.monotonic()
            log.info("waiting for groups (%s): %s", reason, self._who())

    def _who(self) -> str:
        ledger = self._session.stream.call(Snapshot())
        live = [name for name in ledger.actors if ledger.alive(name)]
        return f"{len(live)} actors are live" if live else "no live actors; start some with `launch actors`"
