"""The learner process: joins or goes on with a run, trains it, exports the result.

prompts -> queue ... replay stream -> batch -> step -> version -> commit -> weights to the engines
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from buffer.client import Stream
from buffer.config import StreamConfig
from buffer.errors import Fenced, StreamError
from buffer.keys import RUNS
from buffer.members import Rules
from buffer.session import Session
from learner.checkpoint.folder import Checkpoint
from learner.checkpoint.restore import Restore, join
from learner.checkpoint.schedule import Checkpoints
from learner.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SftConfig,
    WeightsConfig,
)
from learner.curriculum import Curriculum
from learner.datasets import PromptOrder, held_out
from learner.errors import Aborted, LearnerError
from learner.evaluate import evaluate
from learner.feed import Feeder
from learner.kept import KEPT, KeptVersions, forget_versions
from learner.loop import Loop
from learner.record import START, RunRecord, environment
from learner.tokenizer import Tokenizer, model_files
from learner.verify import check_engines
from learner.warmup import warm_up_on
from weightsync.config import WeightSyncConfig
from weightsync.errors import WeightSyncError
from weightsync.lanes import Lanes
from weightsync.manifest import Manifest
from weightsync.offer import Offers, open_offers

if TYPE_CHECKING:
    from learner.ranks import Leader, Ranks
    from learner.sft import SftProgress

log = logging.getLogger("learner")

_CHECKED = 8
"""Sequences that engines and learner both score at the end."""
_ANSWER_TOKENS = 16


class Evaluated(msgspec.Struct, frozen=True):
    """The part of `evaluation` that concerns the learner."""

    every: int = 0
    """Versions that are multiples of this are to be evaluated; 0: none."""


class Settings(msgspec.Struct, frozen=True):
    """The part of the run's configuration that concerns the learner."""

    name: str
    """Of the run, in Redis and of its folder."""
    seed: int
    """Of the orders of prompts and demonstrations, and of the control run's permutation."""
    model: ModelConfig
    """What is trained, and how it is laid out on the ranks."""
    data: DataConfig
    """The questions that are fed."""
    stream: StreamConfig
    """Of which the run's rules are made."""
    optimizer: OptimizerConfig
    """How gradients become updates."""
    objective: ObjectiveConfig
    """What is maximised, and how stale tokens are corrected for."""
    weightsync: WeightSyncConfig
    """How new weights are offered to the engines."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the learner's state is saved."""
    weights: WeightsConfig = WeightsConfig()
    """Which versions are kept as Hugging Face folders."""
    evaluation: Evaluated = Evaluated()
    """Which versions an evaluator will want kept."""
    sft: SftConfig | None = None
    """A supervised warm-up before version 0, or none."""


class Stopped(Exception):
    """The run was stopped before its first step, and has been ended."""


class Learner:
    """One run, from joining to the export of its last version.

    `folder` receives `metrics.jsonl` (a line a step), `timeline.jsonl` (spans of generation and
    training), `checkpoints/`, `weights/` (kept versions), `export/` (the trained model) and `report.json`.
    """

    def __init__(
        self, stream: Stream, settings: Settings, config: bytes, folder: Path, fork: int | None = None
    ) -> None:
        """`fork`: of which checkpoint's version a new lineage goes on, -1: the newest; None: no fork."""
        self._stream, self._settings, self._config, self._folder = stream, settings, config, folder
        self._fork = fork
        self._stopping = False
        self._ranks: Ranks | None = None

    def stop(self, *_: Any) -> None:
        """Ends the run after the step under way (a signal handler)."""
        self._stopping = True

    def run(self) -> None:
        """Trains the run, from where it was cut off. Raises `LearnerError`, `StreamError`, `Stopped`.

        One that `Aborted` ends is over, as every reader of Redis sees; the next learner goes on with it.
        """
        settings = self._settings
        tokenizer = Tokenizer(Path(settings.model.path))
        order, left_out = PromptOrder.load(settings.data, tokenizer, settings.seed)
        if left_out:
            log.warning(
                "%d prompts are shorter or longer than data.min_ and max_prompt_tokens allow: left out",
                left_out,
            )
        session, found = self._join()
        rules = Rules.of(settings.stream)
        restore = Restore(session, found, self._start, settings.checkpoint, rules, self._fork)
        with RunRecord(self._folder, self._stream, going_on=session.version >= 0) as record:
            if session.version >= 0:
                kl = settings.objective.kl
                trainer = restore.trainer(start_matters=bool(kl.coefficient) and not kl.reference)
                record.rewind(trainer.version)
            else:
                trainer = self._version_0(tokenizer, record, session)
            self._put("environment", msgspec.json.encode(environment()))
            with ExitStack() as stack, _over_if_aborted(session):
                checkpoints = self._checkpoints(session, saved=trainer.version)
                with self._kept(session) as kept:
                    loop = Loop(
                        trainer,
                        session,
                        stack.enter_context(self._offers(session)),
                        record,
                        stack.enter_context(self._feeder(session, order)),
                        stack.enter_context(checkpoints) if checkpoints is not None else None,
                        restore,
                        kept,
                        max_steps=settings.stream.max_steps,
                        mismatch=settings.objective.abort.mismatch,
                        stop=self._pass_on_stop,
                    )
                    manifest = loop.run()
                self._report(self._finish(trainer, tokenizer, manifest))
                reason = "stopped" if self._asked_to_stop() else "done"
                session.leave(reason)
        self._dismiss()

    def _join(self) -> tuple[Session, list[Checkpoint]]:
        """Creates the run, or takes it over, and puts there what actors need."""
        stream = self._stream
        rules, folder = Rules.of(self._settings.stream), self._folder / "checkpoints"
        session, found = join(stream, rules, folder, self._fork)
        files = model_files(Path(self._settings.model.path))
        stream.patiently(lambda: stream.redis.sadd(RUNS, self._settings.name))
        stream.patiently(lambda: stream.redis.hset(stream.key("files"), mapping=files))
        self._put("config", self._config)
        return session, found

    def _put(self, name: str, value: bytes | str) -> None:
        """Sets a key of the run, however long Redis takes."""
        self._stream.patiently(lambda: self._stream.redis.set(self._stream.key(name), value))

    def _asked_to_stop(self) -> bool:
        """Whether somebody asked for the run's end."""
        return bool(self._stream.patiently(lambda: self._stream.redis.exists(self._stream.key("stop"))))

    def _trainer(self, folder: Path) -> Leader:
        from learner.ranks import Leader, Ranks  # brings torch and Megatron-Core: after all cheap checks

        settings, self._ranks = self._settings, self._ranks or Ranks.meet(self._settings.model.parallel)
        return Leader(
            self._ranks, folder, settings.model, settings.optimizer, settings.objective, settings.seed
        )

    def _start(self) -> Leader:
        """The trainer that step 0 trains with."""
        folder = self._folder / START if self._settings.sft is not None else Path(self._settings.model.path)
        return self._trainer(folder)

    def _version_0(self, tokenizer: Tokenizer, record: RunRecord, session: Session) -> Leader:
        """The trainer of a new run, after the warm-up if there is one.

        A warm-up ends with version 0 as a checkpoint and a fresh optimizer: what a replay and a run that goes
        on start from, too.
        """
        self._report({}, anew=True)
        forget_versions(self._folder)
        if self._settings.sft is not None:
            trainer = self._trainer(Path(self._settings.model.path))
            self._report({"sft": self._warm_up(trainer, tokenizer, record, session)})
            trainer.save(self._folder / START)
        return self._start()

    def _checkpoints(self, session: Session, saved: int) -> Checkpoints | None:
        config, folder = self._settings.checkpoint, self._folder / "checkpoints"
        ranks = self._ranks.size if self._ranks is not None else 1
        return Checkpoints(session, config, folder, saved, ranks=ranks) if config.every else None

    def _report(self, found: dict[str, Any], *, anew: bool = False) -> None:
        """Adds to `report.json`, which a run that is cut off goes on with."""
        path = self._folder / "report.json"
        before = msgspec.json.decode(path.read_bytes()) if path.exists() and not anew else {}
        partial = path.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(before | found))
        partial.rename(path)

    def _feeder(self, session: Session, order: PromptOrder) -> Feeder:
        rules, data = self._settings.stream, self._settings.data
        asked: PromptOrder | Curriculum = order
        if data.skip_solved or data.skip_failed:
            asked = Curriculum(order, self._stream, solved=data.skip_solved, failed=data.skip_failed)
        return Feeder(session, asked, ahead=rules.groups_per_step * (rules.max_staleness + 2))

    def _offers(self, session: Session) -> Offers | Lanes:
        return open_offers(
            self._stream,
            self._settings.weightsync,
            learner_epoch=int(session.epoch.partition(":")[0]),
            lineage=lambda: session.known.lineage,
            kept_on_disk=self._settings.stream.max_staleness + 2,
            log=log.info,
        )

    def _kept(self, session: Session) -> KeptVersions:
        settings, keep = self._settings, self._settings.weights.keep
        return KeptVersions(
            self._folder / KEPT,
            Path(settings.model.path),
            keep=settings.stream.max_staleness + 2 if keep is None else keep,
            every=settings.evaluation.every,
            lineage=lambda: session.known.lineage,
        )

    def _pass_on_stop(self) -> None:
        """A signal becomes the run's stop, which actors see, too."""
        if self._stopping:
            self._put("stop", "signal")

    def _warm_up(
        self, trainer: Leader, tokenizer: Tokenizer, record: RunRecord, session: Session
    ) -> dict[str, Any]:
        """The supervised warm-up, shown in `{run}:progress`; what goes into the report. Raises `Stopped`."""

        def show(progress: SftProgress) -> None:
            record.progress({"sft_steps": progress.steps, "sft_accuracy": f"{progress.accuracy:.3f}"})
            log.info("warm-up: %d steps, accuracy %.3f", progress.steps, progress.accuracy)
            if self._stopping or self._asked_to_stop():
                session.leave("stopped")
                self._dismiss()
                raise Stopped

        assert self._settings.sft is not None
        settings = self._settings
        report = warm_up_on(trainer, tokenizer, settings.data, settings.sft, settings.seed, show)
        log.info("warm-up ended after %d steps at accuracy %.3f", report.steps, report.accuracy)
        return {"steps": report.steps, "accuracy": report.accuracy, "loss": report.loss}

    def _dismiss(self) -> None:
        """Ends the other ranks."""
        if self._ranks is not None:
            self._ranks.dismiss()

    def _finish(self, trainer: Leader, tokenizer: Tokenizer, manifest: Manifest) -> dict[str, Any]:
        """Exports the model and checks that every engine serves it; what goes into the report."""
        settings = self._settings
        trainer.save(self._folder / "export")
        prompts = held_out(settings.data, tokenizer)
        sequences = [[*prompt.tokens, tokenizer.eos_id] for prompt in prompts[:_CHECKED]]
        check = check_engines(
            self._stream,
            manifest,
            sequences,
            trainer.score(sequences),
            timeout_s=settings.weightsync.timeout_s,
        )
        log.info("engines against learner at version %d: %s", check.version, check.max_difference)
        found = evaluate(trainer, tokenizer, prompts, _ANSWER_TOKENS)
        return {"weights": msgspec.to_builtins(check), "held_out": msgspec.to_builtins(found)}


@contextmanager
def _over_if_aborted(session: Session) -> Iterator[None]:
    """Ends the run, with the reason, if the learner gives it up: else its actors would wait for ever."""
    try:
        yield
    except Aborted as error:
        session.leave(f"aborted: {error}")
        raise


def follow(settings: Settings, url: str) -> None:
    """What every rank but rank 0 does. Raises `LearnerError` when rank 0 is gone."""
    from learner.ranks import Follower, Ranks
    from learner.step import Trainer

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # rank 0 ends after its step, and then dismisses the others
    stream = Stream.connect(url, settings.name, shards=settings.stream.shards)

    def load(folder: Path) -> Trainer:
        return Trainer(folder, settings.model, settings.optimizer, settings.objective, settings.seed)

    Follower(Ranks.meet(settings.model.parallel), stream, load).follow()


def main() -> int:
    """Entry point: `python -m learner.worker --folder DIR [--fork VERSION]`, where `config.json` is.

    With torchrun's variables in the environment, one rank of several.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--fork", type=int)
    args = parser.parse_args()
    folder = args.folder
    logging.basicConfig(level="WARNING", format="%(asctime)s learner: %(message)s")
    log.setLevel("INFO")
    config = (folder / "config.json").read_bytes()
    settings = msgspec.json.decode(config, type=Settings)
    try:
        url, shards = os.environ["SLIPSTREAM_REDIS"], settings.stream.shards
        if int(os.environ.get("RANK", "0")):
            follow(settings, url)
            return 0
        stream = Stream.connect(url, settings.name, shards=shards)
        learner = Learner(stream, settings, config, folder, args.fork)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, learner.stop)
        learner.run()
    except Stopped:
        log.info("stopped during the warm-up")
    except Fenced as error:
        log.error("another learner took this run over: %s", error)
        return 1
    except (LearnerError, StreamError, WeightSyncError) as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
