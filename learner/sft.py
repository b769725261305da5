"""A short supervised warm-up that ends at an accuracy, not at a time.

Accuracy of a tiny model can jump within one interval. So the weights of the last measurement below
the target are kept: after an overshoot they come back and the next intervals are half as long.
A stop needs two independent measurements, whose mean must lie in the target: a single noisy one
would stop early more often than not, because the first lucky draw ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from learner.config import SftConfig
from learner.errors import LearnerError
from learner.step import Trainer

RISE_STEPS = 20
"""Steps over which the learning rate rises from 0."""

Example = tuple[list[int], list[int]]
"""A demonstration: prompt ids and answer ids, the end-of-sequence id included."""

Question = tuple[list[int], str]
"""A prompt to measure on: its ids and the gold answer as the data set gives it."""


@dataclass(frozen=True)
class SftReport:
    """How a warm-up ended."""

    steps: int
    """Steps whose result was kept, undone ones excluded."""
    accuracy: float
    """Mean accuracy of the two measurements that ended it."""
    loss: float
    """Mean cross-entropy of the last step's answer tokens."""
    undone: int
    """Intervals that overshot and were taken back."""
    reached: bool
    """Whether the accuracy lies in the target; False if `max_steps` ended the warm-up below it."""


@dataclass(frozen=True)
class SftProgress:
    """One interval of a warm-up, for a progress line."""

    steps: int
    """Steps taken so far."""
    accuracy: float
    """Accuracy measured after the interval."""
    loss: float
    """Loss of the interval's last step."""


def warm_up(
    trainer: Trainer,
    examples: Iterator[Example],
    questions: Sequence[Question],
    score: Callable[[list[int], str], float],
    config: SftConfig,
    on_progress: Callable[[SftProgress], None],
    eos_id: int,
) -> SftReport:
    """Train `trainer` on `examples` until its accuracy on `questions` lies in the target.

    `score(answer ids, gold)` is the reward, 1.0 for a right answer; the mean of it is the accuracy.
    `max_steps`, undone ones included, end it below the target. Raises `LearnerError` when the examples
    run out, or when a single step jumps over the target.
    """
    measure = _Measurement(trainer, questions, score, config, eos_id)
    steps, taken, undone, interval = 0, 0, 0, config.measure_every
    before = trainer.snapshot()
    while taken < config.max_steps:
        interval = min(interval, config.max_steps - taken)
        for step in range(steps, steps + interval):
            batch = list(islice(examples, config.batch))
            if len(batch) < config.batch:
                raise LearnerError(
                    f"sft step {step}: got {len(batch)} demonstrations, expected {config.batch}; repeat them"
                )
            loss = trainer.sft_step(batch, config.lr * min(1.0, (step + 1) / RISE_STEPS))["loss"]
        steps, taken = steps + interval, taken + interval
        accuracy = measure(taken)
        on_progress(SftProgress(steps, accuracy, loss))
        if accuracy > config.target_accuracy_high:
            if interval == 1:
                raise LearnerError(
                    f"sft step {steps}: one step took the accuracy to {accuracy:.2f}, over the target "
                    f"{config.target_accuracy_low}-{config.target_accuracy_high}; lower sft.lr"
                )
            trainer.restore(before)
            steps, undone, interval = steps - interval, undone + 1, interval // 2
        elif accuracy >= config.target_accuracy_low:
            return SftReport(steps, accuracy, loss, undone, True)
        else:
            before = trainer.snapshot()
    return SftReport(steps, accuracy, loss, undone, False)


class _Measurement:
    """Accuracy on the questions at temperature 1, with a new seed and new prompts each time."""

    def __init__(
        self,
        trainer: Trainer,
        questions: Sequence[Question],
        score: Callable[[list[int], str], float],
        config: SftConfig,
        eos_id: int,
    ) -> None:
        self._trainer, self._questions, self._score = trainer, questions, score
        self._config, self._eos_id = config, eos_id

    def __call__(self, seed: int) -> float:
        """A quarter of the prompts while that is clearly below the target, else the mean of two full ones."""
        size = self._config.measure_prompts
        coarse = self._accuracy(-(-size // 4), [seed, 0])
        if coarse < self._config.target_accuracy_low - 0.1:
            return coarse
        return (self._accuracy(size, [seed, 1]) + self._accuracy(size, [seed, 2])) / 2

    def _accuracy(self, size: int, seed: list[int]) -> float:
        source = np.random.default_rng(seed)
        chosen = source.choice(len(self._questions), min(size, len(self._questions)), replace=False)
        prompts = [self._questions[index][0] for index in chosen]
        answers = self._trainer.generate(
            prompts, self._config.max_answer_tokens, self._eos_id, seed=int(source.integers(2**63))
        )
        marks = [
            self._score(answer, self._questions[i][1]) for answer, i in zip(answers, chosen, strict=True)
        ]
        return float(np.mean(marks))
