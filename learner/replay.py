"""Training a recorded run again: every version must come out with the digest it was committed with.

Bitwise on the same package versions, instruction set, thread count and layout, all of which the record
names; where one differs it is warned of, and the replay may end at the first version that differs.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import msgspec

from buffer.errors import RecordError, StreamError
from buffer.record import RecordFolder
from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.errors import LearnerError
from learner.record import environment
from weightsync.manifest import Manifest

log = logging.getLogger("replay")


class Settings(msgspec.Struct, frozen=True):
    """The part of a recorded configuration that decides the weights."""

    seed: int
    """Of the run; the weights depend on it only in the control run, whose permutation it drives."""
    model: ModelConfig
    """Trained on one rank here, whatever its layout was."""
    optimizer: OptimizerConfig
    """How gradients become updates."""
    objective: ObjectiveConfig
    """As in the run; with routing replay the record has to hold the experts."""


class Replayed(msgspec.Struct, frozen=True):
    """What a replay came to."""

    run: str
    """Name of the recorded run."""
    steps: int
    """Steps trained, each with the recorded digest unless `differs` names one."""
    version: int
    """Number of the last version trained, 0 if no step was."""
    digest: str
    """Of the last version trained."""
    identical: bool
    """Whether every version has the recorded digest."""
    differs: str
    """The first version that differs, with both digests; empty if none does."""
    unlike: dict[str, str]
    """What of the environment is not as recorded: name -> "<here>, recorded <there>"."""
    seconds: float
    """From the model's loading to the end."""


def replay(folder: RecordFolder, start: Path, steps: int | None) -> Replayed:
    """Trains the record again from the checkpoint in `start`, at most `steps` steps.

    Raises `StreamError` or `RecordError` for a record that is damaged or incomplete, `LearnerError` for
    a checkpoint that is not the one the run started from.
    """
    from learner.step import Trainer

    run, began = folder.run(), time.monotonic()
    settings = msgspec.json.decode(run.config, type=Settings)
    unlike = _unlike(run.environment)
    for name, difference in unlike.items():
        log.warning("%s is %s: the weights may come out differently", name, difference)
    trainer = Trainer(start, settings.model.alone(), settings.optimizer, settings.objective, settings.seed)
    digest, differs, trained = Manifest.of(0, trainer.export()).digest, "", 0
    if digest != run.start_digest:
        raise LearnerError(
            f"{start}: its weights have digest {digest}, step 0 of run {run.run} trained from "
            f"{run.start_digest}; name the right checkpoint with --weights"
        )
    for step in folder.steps():
        if steps is not None and step.step >= steps:
            break
        groups = step.groups(routed=settings.objective.routing_replay)
        trainer.train_step(groups, step.step)
        trained, digest = step.step + 1, Manifest.of(trainer.version, trainer.export()).digest
        log.info("version %d: %s%s", trained, digest, "" if digest == step.digest else " DIFFERS")
        if digest != step.digest:
            differs = f"version {trained}: got {digest}, recorded {step.digest}"
            break
    seconds = round(time.monotonic() - began, 2)
    return Replayed(run.run, trained, trainer.version, digest, not differs, differs, unlike, seconds)


def _unlike(recorded: dict[str, str]) -> dict[str, str]:
    here = environment()
    return {
        name: f"{here.get(name, 'absent')}, recorded {value}"
        for name, value in recorded.items()
        if here.get(name) != value
    }


def main() -> int:
    """Entry point of `launch replay`: `python -m learner.replay FOLDER`, with the options below."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level="WARNING", format="%(message)s")
    log.setLevel("INFO")
    try:
        found = replay(RecordFolder(args.folder), args.weights or args.folder / "start", args.steps)
    except (LearnerError, RecordError, StreamError) as error:
        log.error("launch replay: %s", error)
        return 2
    if args.json:
        print(msgspec.json.encode(found).decode())
    else:
        verdict = "the same weights, bit for bit" if found.identical else found.differs
        print(f"run {found.run}: {found.steps} steps again in {found.seconds:.1f} s: {verdict}")
    return 0 if found.identical else 1


if __name__ == "__main__":
    sys.exit(main())
