"""The supervised warm-up on a data set's own answers, before a run or by itself (`launch sft`)."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from learner.config import DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, SftConfig
from learner.datasets import PromptOrder, alone
from learner.errors import LearnerError
from learner.evaluate import mark
from learner.tokenizer import Tokenizer

if TYPE_CHECKING:
    from learner.sft import SftProgress, SftReport
    from learner.step import Trainer

log = logging.getLogger("sft")


class Settings(msgspec.Struct, frozen=True):
    """The part of the run's configuration that concerns a warm-up."""

    seed: int
    """Of the orders of questions and demonstrations."""
    model: ModelConfig
    """What is warmed up."""
    data: DataConfig
    """The questions, with the answers to learn."""
    optimizer: OptimizerConfig
    """Its learning rate gives way to that of `sft`."""
    sft: SftConfig
    """How long, and how fast."""


def warm_up_on(
    trainer: Trainer,
    tokenizer: Tokenizer,
    data: DataConfig,
    sft: SftConfig,
    seed: int,
    on_progress: Callable[[SftProgress], None],
) -> SftReport:
    """Trains on the demonstrations until the accuracy on the training questions, which are what a run's
    reward is measured on, lies in the target."""
    from learner.sft import warm_up

    endless = msgspec.structs.replace(data, epochs=None)
    order, _ = PromptOrder.load(endless, tokenizer, seed)
    shown = order
    if data.demonstrations:
        shown, _ = PromptOrder.load(alone(data, data.demonstrations), tokenizer, seed)
    questions = [(prompt.tokens, prompt.answer) for prompt in islice(order, len(order))]

    def demonstrations() -> Iterator[tuple[list[int], list[int]]]:
        for prompt in shown:
            answer = prompt.answer
            if sft.demonstrate == "final":
                answer = "#### " + answer.rpartition("####")[2].strip()
            yield prompt.tokens, [*tokenizer.encode(answer), tokenizer.eos_id]

    def score(answer: list[int], gold: str) -> float:
        return mark(tokenizer.decode(answer), gold)

    return warm_up(trainer, demonstrations(), questions, score, sft, on_progress, tokenizer.eos_id)


def log_progress(progress: SftProgress) -> None:
    """Logs an interval of a warm-up."""
    log.info("%d steps, loss %.3f, accuracy %.3f", progress.steps, progress.loss, progress.accuracy)


def main() -> int:
    """Entry point of `launch sft`: `python -m learner.warmup --config FILE --out FOLDER`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level="WARNING", format="%(message)s")
    log.setLevel("INFO")
    settings = msgspec.json.decode(args.config.read_bytes(), type=Settings)
    try:
        folder = Path(settings.model.path)
        tokenizer = Tokenizer(folder)
        from learner.step import Trainer

        trainer = Trainer(
            folder, settings.model.alone(), settings.optimizer, ObjectiveConfig(), settings.seed
        )
        report = warm_up_on(trainer, tokenizer, settings.data, settings.sft, settings.seed, log_progress)
        trainer.save(args.out)
    except LearnerError as error:
        log.error("%s", error)
        return 2
    log.info("%d steps, accuracy %.3f: %s", report.steps, report.accuracy, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
