"""The learner process: feed, batch, step, commit, offer, until the last step.

prompts -> queue ... replay stream -> batch -> step -> version -> commit -> weights to the engines
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from buffer.client import Stream
from buffer.config import StreamConfig
from buffer.errors import Fenced, StreamError
from buffer.keys import RUNS
from buffer.ledger import Snapshot
from buffer.members import Rules
from buffer.session import Session
from learner.batch import Batch, next_batch
from learner.config import DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, SftConfig
from learner.curriculum import Curriculum
from learner.datasets import PromptOrder, held_out
from learner.errors import LearnerError
from learner.evaluate import evaluate
from learner.feed import Feeder
from learner.record import START, RunRecord, environment
from learner.tokenizer import Tokenizer, model_files
from learner.verify import check_engines
from learner.warmup import warm_up_on
from weightsync.config import WeightSyncConfig
from weightsync.manifest import Manifest
from weightsync.offer import Offers, address_towards

if TYPE_CHECKING:
    from learner.ranks import Leader, Ranks
    from learner.sft import SftProgress

log = logging.getLogger("learner")

_PATIENCE_S = 10.0
"""Between two log lines that say why the learner waits."""
_CHECKED = 8
"""Sequences that engines and learner both score at the end."""
_ANSWER_TOKENS = 16


class Settings(msgspec.Struct, frozen=True):
    """The part of the run's configuration that concerns the learner."""

    name: str
    seed: int
    model: ModelConfig
    data: DataConfig
    stream: StreamConfig
    optimizer: OptimizerConfig
    objective: ObjectiveConfig
    weightsync: WeightSyncConfig
    sft: SftConfig | None = None
    """A supervised warm-up before version 0, or none."""


class Stopped(Exception):
    """The run was stopped before its first step, and has been ended."""


class Learner:
    """One run, from joining to the export of its last version.

    `folder` receives `metrics.jsonl` (a line a step), `timeline.jsonl` (spans of generation and
    training), `export/` (the trained checkpoint) and `report.json`.
    """

    def __init__(self, stream: Stream, settings: Settings, config: bytes, folder: Path) -> None:
        self._stream, self._settings, self._config, self._folder = stream, settings, config, folder
        self._trained_tokens, self._training_since, self._waiting_since = 0.0, 0.0, 0.0
        self._stopping = False
        self._ranks: Ranks | None = None

    def stop(self, *_: Any) -> None:
        """Ends the run after the step under way (a signal handler)."""
        self._stopping = True

    def run(self) -> None:
        """Trains the run. Raises `LearnerError`, `StreamError`, `Stopped`."""
        settings = self._settings
        tokenizer = Tokenizer(Path(settings.model.path))
        order, left_out = PromptOrder.load(settings.data, tokenizer, settings.seed)
        if left_out:
            log.warning("%d prompts are longer than data.max_prompt_tokens and are left out", left_out)
        session = self._join()
        with RunRecord(self._folder, self._stream) as record:
            trainer = self._trainer(Path(settings.model.path))
            report: dict[str, Any] = {}
            if settings.sft is not None:
                report["sft"] = self._warm_up(trainer, tokenizer, record, session)
                trainer = self._start_over(trainer)
            self._stream.redis.set(self._stream.key("environment"), msgspec.json.encode(environment()))
            with self._feeder(session, order) as feeder, self._offers(session) as offers:
                manifest = self._train(trainer, session, offers, record, feeder)
                report |= self._finish(trainer, tokenizer, manifest)
                reason = "stopped" if self._stream.redis.exists(self._stream.key("stop")) else "done"
                session.leave(reason)
        self._dismiss()
        (self._folder / "report.json").write_bytes(msgspec.json.encode(report))

    def _join(self) -> Session:
        """Creates the run and puts there what actors need."""
        stream = self._stream
        session = Session.join(stream, Rules.of(self._settings.stream))
        if session.version >= 0:
            raise LearnerError(
                f"run {self._settings.name} has {session.version} steps already and no checkpoint to go on "
                "from; give the new run another name"
            )
        stream.redis.sadd(RUNS, self._settings.name)
        stream.redis.hset(stream.key("files"), mapping=model_files(Path(self._settings.model.path)))
        stream.redis.set(stream.key("config"), self._config)
        return session

    def _trainer(self, folder: Path) -> Leader:
        from learner.ranks import Leader, Ranks  # brings torch and Megatron-Core: after all cheap checks

        settings, self._ranks = self._settings, self._ranks or Ranks.meet(self._settings.model.parallel)
        return Leader(
            self._ranks, folder, settings.model, settings.optimizer, settings.objective, settings.seed
        )

    def _start_over(self, trainer: Leader) -> Leader:
        """Version 0 from its own checkpoint, with a fresh optimizer: what a replay starts from, too."""
        trainer.save(self._folder / START)
        return self._trainer(self._folder / START)

    def _feeder(self, session: Session, order: PromptOrder) -> Feeder:
        rules, data = self._settings.stream, self._settings.data
        asked: PromptOrder | Curriculum = order
        if data.skip_solved or data.skip_failed:
            asked = Curriculum(order, self._stream, solved=data.skip_solved, failed=data.skip_failed)
        return Feeder(session, asked, ahead=rules.groups_per_step * (rules.max_staleness + 2))

    def _offers(self, session: Session) -> Offers:
        settings = self._settings.weightsync
        return Offers(
            self._stream,
            learner_epoch=session.epoch.partition(":")[0],
            address=settings.address or address_towards(self._stream),
            timeout_s=settings.timeout_s,
            log=log.info,
        )

    def _train(
        self, trainer: Leader, session: Session, offers: Offers, record: RunRecord, feeder: Feeder
    ) -> Manifest:
        """All steps; the last version's manifest."""
        manifest = self._publish(trainer, session, offers)
        self._training_since = time.time()
        for step in range(self._settings.stream.max_steps):
            self._pass_on_stop()
            self._waiting_since = time.monotonic()
            batch = next_batch(session, step, trainer.read, partial(self._on_wait, feeder))
            if batch is None:
                break
            manifest = self._step(trainer, session, offers, record, batch)
        return manifest

    def _publish(self, trainer: Leader, session: Session, offers: Offers) -> Manifest:
        """Commits the current version and offers it to the engines."""
        tensors = trainer.export()
        manifest = Manifest.of(trainer.version, tensors)
        # No checkpoint can be restored yet, so no restore can ask for a trained step again.
        session.commit(manifest.version, manifest.digest, covered=manifest.version - 1)
        offers.publish(manifest, tensors)
        return manifest

    def _step(
        self, trainer: Leader, session: Session, offers: Offers, record: RunRecord, batch: Batch
    ) -> Manifest:
        """Trains one batch, commits the version it makes, records what happened."""
        began = time.time()
        metrics = trainer.train_step(batch.groups, batch.step)
        trained = time.time()
        manifest = self._publish(trainer, session, offers)
        ended = time.time()
        record.trained(batch.step, began, trained)
        record.generated(batch.groups)
        self._trained_tokens += metrics["tokens"]
        record.step(
            {
                "step": batch.step,
                **metrics,
                "queued": batch.queued,
                "seconds_wait": batch.waited_s,
                "seconds_fetch": batch.fetched_s,
                "seconds_publish": ended - trained,
                "seconds_push": offers.push_seconds(),
                "tokens_per_second": self._trained_tokens / (ended - self._training_since),
                "time_batch": began - batch.fetched_s - batch.waited_s,
                "time": ended,
            }
        )
        return manifest

    def _pass_on_stop(self) -> None:
        """A signal becomes the run's stop, which actors see, too."""
        if self._stopping:
            self._stream.redis.set(self._stream.key("stop"), "signal")

    def _on_wait(self, feeder: Feeder, reason: str) -> None:
        """Called at each look for a batch that finds none."""
        self._pass_on_stop()
        if feeder.error is not None:
            raise feeder.error
        if time.monotonic() - self._waiting_since > _PATIENCE_S:
            self._waiting_since = time.monotonic()
            ledger = self._stream.call(Snapshot())
            live = [name for name in ledger.actors if ledger.alive(name)]
            who = (
                f"{len(live)} actors are live" if live else "no live actors; start some with `launch actors`"
            )
            log.info("waiting for groups (%s): %s", reason, who)

    def _warm_up(
        self, trainer: Leader, tokenizer: Tokenizer, record: RunRecord, session: Session
    ) -> dict[str, Any]:
        """The supervised warm-up, shown in `{run}:progress`; what goes into the report. Raises `Stopped`."""

        def show(progress: SftProgress) -> None:
            record.progress({"sft_steps": progress.steps, "sft_accuracy": f"{progress.accuracy:.3f}"})
            log.info("warm-up: %d steps, accuracy %.3f", progress.steps, progress.accuracy)
            if self._stopping or self._stream.redis.exists(self._stream.key("stop")):
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
    """Entry point: `python -m learner.worker --folder DIR`, where `config.json` is. With torchrun's variables
    in the environment, one rank of several."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    logging.basicConfig(level="WARNING", format="%(asctime)s learner: %(message)s")
    log.setLevel("INFO")
    config = (folder / "config.json").read_bytes()
    settings = msgspec.json.decode(config, type=Settings)
    try:
        url, shards = os.environ["SLIPSTREAM_REDIS"], settings.stream.shards
        if int(os.environ.get("RANK", "0")):
            follow(settings, url)
            return 0
        learner = Learner(Stream.connect(url, settings.name, shards=shards), settings, config, folder)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, learner.stop)
        learner.run()
    except Stopped:
        log.info("stopped during the warm-up")
    except Fenced as error:
        log.error("another learner took this run over: %s", error)
        return 1
    except (LearnerError, StreamError) as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
