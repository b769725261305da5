"""Going on with a run: from the newest checkpoint whose digest is the committed one, else from version 0.

The steps after it that were assigned already are trained again from their manifests, the same batches in
the same order; `learner.worker` does that like any other step. Where their payloads are gone, or where the
user asks for it, a fork undoes them; only then may the rules of the run change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from buffer.client import Stream
from buffer.errors import SettingsMismatch
from buffer.ledger import Snapshot
from buffer.members import FIELDS, Rules
from buffer.session import Session
from learner.checkpoint.folder import Checkpoint, complete, oldest_kept, remove, remove_unfinished, set_aside
from learner.config import CheckpointConfig
from learner.errors import CheckpointError
from weightsync.manifest import Manifest

if TYPE_CHECKING:
    from learner.ranks import Leader

log = logging.getLogger("learner")

NEWEST = -1
"""A fork from the newest checkpoint."""
_FIXED = ("schema", "shards")
"""Rules that no fork changes: they say where payloads lie, and how they are read."""
_OF_ACTORS = ("group_size", "lease_ms", "dynamic")
"""Rules that actors go by as long as they live."""


def join(
    stream: Stream, rules: Rules, folder: Path, fork: int | None = None
) -> tuple[Session, list[Checkpoint]]:
    """Creates the run or takes it over, with what the newest checkpoint remembers; all checkpoints.

    One that is to be forked is joined under the rules that it has. Raises `CheckpointError` if there are
    checkpoints of a run that the server does not know, or nothing to fork, `SettingsMismatch` for other
    rules, `ForeignRun` if the server holds another run.
    """
    found = complete(folder)
    known = stream.patiently(lambda: stream.redis.exists(stream.key("state")))
    if found and not known:
        raise CheckpointError(
            f"{folder} holds checkpoints of a run that the Redis does not know: it was wiped or is another; "
            "move the folder away for a new run, or give it another name"
        )
    if fork is not None:
        if not known:
            raise CheckpointError(f"--fork: the Redis knows no run {stream.run}; start it without --fork")
        if fork > 0 and fork not in (there := [one.version for one in found]):
            raise CheckpointError(f"--fork: got version {fork}, there are checkpoints of {there}")
        rules = _forkable(stream, rules)
    session = Session.join(stream, rules, memory=bytes(found[0].state.memory) if found else b"")
    remove_unfinished(folder)
    return session, found


def _forkable(stream: Stream, wanted: Rules) -> Rules:
    """The rules that the run has.

    Raises `SettingsMismatch` if a fork must not change them to `wanted`, `CheckpointError` for a run that
    has no version.
    """
    stream.load_library()
    ledger = stream.call(Snapshot())
    if ledger.number("version") < 0:
        raise CheckpointError(f"--fork: run {stream.run} has no version yet; give the new run another name")
    held, alive = Rules.held(ledger.state), [name for name in ledger.actors if ledger.alive(name)]
    for name in (*_FIXED, *(_OF_ACTORS if alive else ())):
        was, asked = getattr(held, name), getattr(wanted, name)
        if was != asked:
            remedy = (
                "no fork changes it: give the new run another name"
                if name in _FIXED
                else f"the actors {', '.join(alive)} go by it: stop them first (launch scale actors 0)"
            )
            field = FIELDS.get(name, name)
            raise SettingsMismatch(
                f"stream.{field}: this run has {was}, the learner asks for {asked}; {remedy}"
            )
    return held


class Restore:
    """Brings a trainer to where the run can go on.

    The trainer that `fresh` makes is at version 0. `trainer()` is that, or one at the version of a
    checkpoint; steps below `session.head` are then to be trained again.
    """

    def __init__(
        self,
        session: Session,
        found: list[Checkpoint],
        fresh: Callable[[], Leader],
        config: CheckpointConfig,
        rules: Rules,
        asked: int | None = None,
    ) -> None:
        """`asked`: version of the checkpoint from which a fork goes on, with `rules`; None: no fork."""
        self._session, self._found, self._fresh = session, found, fresh
        self._config, self._rules, self._asked = config, rules, asked

    def trainer(self, *, start_matters: bool) -> Leader:
        """The trainer to go on with. `start_matters`: the policy of version 0 is used, too.

        Raises `CheckpointError` if the run cannot go on.
        """
        session, trainer = self._session, self._fresh()
        started = _digest(trainer) == session.known.versions.get(0)
        if start_matters and not started:
            raise CheckpointError(
                "model.path: its weights are not those that step 0 trained from, which are the reference of "
                "objective.kl; put them back, or name them as objective.kl.reference"
            )
        for one in self._found:
            if self._asked not in (None, NEWEST, one.version):
                continue
            if self._load(trainer, one):
                return self._from(trainer, one)
            trainer = self._fresh()
        if self._asked is not None and started and self._asked <= 0:
            self.fork(0, "asked for")
            return trainer
        if self._asked is not None or not started or session.known.covered >= 0:
            raise CheckpointError(
                f"run {session.stream.run} is at version {session.version}, and there is no checkpoint to go "
                "on from; give the new run another name"
            )
        log.info("going on from version 0: steps up to %d are trained again", session.head - 1)
        return trainer

    def _load(self, trainer: Leader, one: Checkpoint) -> bool:
        """Whether the trainer is now at a checkpoint that is what the run committed."""
        committed = self._session.known.versions.get(one.version)
        if one.state.digest != committed:
            log.warning("%s is passed over: version %d has digest %s", one.path, one.version, committed)
            return False
        try:
            trainer.load_checkpoint(one.path)
        except CheckpointError as error:
            set_aside(one.path, str(error))
            return False
        if (found := _digest(trainer)) != one.state.weights:
            set_aside(one.path, f"its weights have digest {found}, {one.state.weights} were saved")
            return False
        return True

    def _from(self, trainer: Leader, one: Checkpoint) -> Leader:
        session = self._session
        if self._asked is not None:
            self.fork(one.version, "asked for")
        elif one.version <= session.known.covered:
            self.fork(one.version, f"payloads of step {one.version} are gone")
        elif one.version > session.known.checkpoint:  # complete, but its commit never came
            oldest = oldest_kept(one.path.parent, self._config, one.version)
            session.checkpoint(one.version, one.state.digest, oldest)
        log.info(
            "going on from the checkpoint of version %d: %d steps are trained again",
            one.version,
            session.head - one.version,
        )
        return trainer

    def fork(self, at: int, reason: str) -> None:
        """Undoes the steps from `at` on: a new lineage goes on from the weights of that version."""
        session = self._session
        log.warning("a new lineage from version %d, undoing %d steps: %s", at, session.version - at, reason)
        session.fork(at, reason, self._rules)
        for one in self._found:
            if one.version > at and one.path.exists():  # else it was put aside
                remove(one.path)
        self._found = [one for one in self._found if one.version <= at]


def _digest(trainer: Leader) -> str:
    return Manifest.of(trainer.version, trainer.export()).digest
