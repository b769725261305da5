"""Going on with a run: from the newest checkpoint whose digest is the committed one, else from version 0.

The steps after it that were assigned already are trained again from their manifests, the same batches in
the same order; `learner.worker` does that like any other step. Where their payloads are gone, a fork undoes
them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from buffer.client import Stream
from buffer.errors import NoRun
from buffer.ledger import Snapshot
from buffer.members import Rules
from buffer.session import Session
from learner.checkpoint.folder import Checkpoint, complete, oldest_kept, remove, remove_unfinished, set_aside
from learner.config import CheckpointConfig
from learner.errors import CheckpointError
from weightsync.manifest import Manifest

if TYPE_CHECKING:
    from learner.ranks import Leader

log = logging.getLogger("learner")


def join(
    stream: Stream, rules: Rules, folder: Path, *, fork: bool = False
) -> tuple[Session, list[Checkpoint]]:
    """Creates the run or takes it over, with what the newest checkpoint remembers; all checkpoints.

    `fork`: a new lineage goes on from the newest checkpoint, under `rules`, whatever those of the run were.
    Raises `CheckpointError` if there are some of a run that the server does not know, or nothing to fork,
    `ForeignRun` if it holds another, `SettingsMismatch` for other rules without a fork.
    """
    found = complete(folder)
    if found and not stream.patiently(lambda: stream.redis.exists(stream.key("state"))):
        raise CheckpointError(
            f"{folder} holds checkpoints of a run that the Redis does not know: it was wiped or is another; "
            "move the folder away for a new run, or give it another name"
        )
    standing = _rules_of(stream) if fork else rules
    if standing.shards != rules.shards:
        raise CheckpointError(
            f"stream.shards: got {rules.shards}, run {stream.run} has {standing.shards}, and payloads stay "
            "where they are: give it its own again"
        )
    session = Session.join(stream, standing, memory=bytes(found[0].state.memory) if found else b"")
    remove_unfinished(folder)
    if fork:
        at = min(found[0].version if found else 0, session.version)
        log.warning("a new lineage from version %d, undoing %d steps: asked for", at, session.version - at)
        session.fork(at, "asked for", rules)
    return session, found


def _rules_of(stream: Stream) -> Rules:
    """The rules that a run has. Raises `CheckpointError` if there is none."""
    try:
        state = stream.call(Snapshot()).state
    except NoRun as error:
        raise CheckpointError(f"--fork: {error}; leave it out for a new run") from error
    return Rules(
        **{name: state[name] if name == "policy" else int(state[name]) for name in Rules.__struct_fields__}
    )


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
    ) -> None:
        self._session, self._found, self._fresh = session, found, fresh
        self._config, self._rules = config, rules

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
            if self._load(trainer, one):
                return self._from(trainer, one)
            trainer = self._fresh()
        if not started or session.known.covered >= 0:
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
        if one.version <= session.known.covered:
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
