"""When checkpoints are begun, and what happens once one is complete.

A complete one is committed, which is what makes it the latest: a learner that was fenced off cannot. Then
payloads of steps before the oldest kept one go, and so do older checkpoints: in a thread, since a file system
takes its time to free gigabytes.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from buffer.session import Session
from learner.checkpoint.folder import State, oldest_kept, prune
from learner.config import CheckpointConfig

if TYPE_CHECKING:
    from learner.checkpoint.writer import Written
    from learner.ranks import Leader

log = logging.getLogger("learner")

_AGAIN_S = 5.0
"""After one that failed, the next is not begun sooner than this."""


class Checkpoints:
    """The checkpoints of a run that trains.

    with Checkpoints(session, config, folder, saved=0) as checkpoints:
        checkpoints.after_step(trainer, digest)   # begins one every so many steps; commits what is complete
        checkpoints.needed(trainer, digest)       # no step can be assigned before one is complete
        checkpoints.last(trainer, digest)         # of the last version, complete when it returns
    """

    def __init__(
        self, session: Session, config: CheckpointConfig, folder: Path, saved: int, *, ranks: int = 1
    ) -> None:
        """`saved`: version of the checkpoint that the run goes on from, 0 for a new run; `ranks`: processes
        that train, each of which writes its own share."""
        self._session, self._config, self._folder = session, config, folder
        from learner.checkpoint.saver import Saver  # brings torch

        self._saver = Saver(folder, ranks=ranks)
        self._state: State | None = None
        self._pruning: threading.Thread | None = None
        self._due, self._failed = False, -_AGAIN_S
        self._saved = self._stands = saved
        """The newest version that was begun, and the newest that is complete."""
        self._waited = 0.0
        self.stalled_s = 0.0
        """How long the last step waited for a checkpoint: to be begun, copied, or committed."""
        self.saving_s = 0.0
        """How long the newest complete one took to be written."""

    def after_step(self, trainer: Leader, digest: str) -> None:
        """Called with every committed version."""
        began = time.monotonic()
        self.look()
        self._due |= trainer.version % self._config.every == 0
        if self._due and trainer.version > self._saved and not self._saver.busy:
            self._begin(trainer, digest)
        waited = self._saver.stalled_s
        self.stalled_s = time.monotonic() - began + waited - self._waited
        self._waited = waited

    def needed(self, trainer: Leader, digest: str) -> None:
        """Called while the learner waits for one, again and again."""
        self.look()
        if (
            time.monotonic() - self._failed > _AGAIN_S
            and not self._saver.busy
            and trainer.version > self._saved
        ):
            self._begin(trainer, digest)

    def last(self, trainer: Leader, digest: str) -> None:
        """Saves the version that the run ends with, so that it can be taken up again."""
        self._conclude(self._saver.wait())
        if trainer.version > self._saved:
            self._begin(trainer, digest)
            self._conclude(self._saver.wait())

    def look(self) -> None:
        """Commits a checkpoint that has become complete."""
        self._conclude(self._saver.finished())

    def _begin(self, trainer: Leader, digest: str) -> None:
        session = self._session
        state = State(
            version=trainer.version,
            digest=session.known.versions.get(trainer.version, digest),
            weights=digest,
            epoch=int(session.epoch.partition(":")[0]),
            lineage=session.known.lineage,
            memory=msgspec.Raw(session.memory()),
            optimizer_steps=trainer.optimizer_steps(),
        )
        trainer.begin_checkpoint(self._saver, self._folder, state)
        self._state, self._saved, self._due = state, trainer.version, False

    def _conclude(self, written: Written | None) -> None:
        if written is None:
            return
        state = self._state
        assert state is not None
        if written.error:
            self._saved, self._failed = self._stands, time.monotonic()
            log.error(
                "the checkpoint of version %d failed: %s; the one before it, of version %d, stands",
                state.version,
                written.error,
                self._stands,
            )
            return
        self._pruned()
        oldest = oldest_kept(self._folder, self._config, state.version)
        self._stands, self.saving_s = state.version, written.seconds
        self._session.checkpoint(state.version, state.digest, oldest)
        self._pruning = threading.Thread(target=self._prune, args=(oldest,), name="prune")
        self._pruning.start()
        log.info("checkpoint of version %d, %.1f s", state.version, written.seconds)

    def _prune(self, oldest: int) -> None:
        try:
            prune(self._folder, self._config, oldest)
        except OSError as error:
            log.warning("older checkpoints stay: %s", error)

    def _pruned(self) -> None:
        """Returns once what is to go is gone."""
        if self._pruning is not None:
            self._pruning.join()
            self._pruning = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._saver.close()
        self._pruned()
