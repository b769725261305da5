"""Staleness without engines: the learner's own model generates, `eta` versions behind.

    run = Run("sums", "tis", eta=2, seed=0)
    train(run, warm_up("sums", 0, Path("warm"), FULL), FULL).reward_last

Every group of step t is written by version t - eta (version 0 before there is one), which is the worst that
`stream.max_staleness = eta` admits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np

from buffer.schema import Group, Sample, Span, Version
from launch.tiny_model import EOS_ID, make_tiny_qwen3
from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig, SftConfig
from learner.sft import warm_up as supervised
from learner.step import Trainer

METHODS = {
    "none": ObjectiveConfig(correction="none"),
    "tis": ObjectiveConfig(correction="tis"),
    "icepop": ObjectiveConfig(correction="icepop"),
    "bypass": ObjectiveConfig(mode="bypass", correction="none"),
    "vtrace": ObjectiveConfig(correction="vtrace"),
}
"""What is compared; `bypass` is PPO's clip on pi / mu."""
PLUS, EQUALS = 10, 11
"""Token ids; a digit is its own id."""


class Sizes(msgspec.Struct, frozen=True):
    """How much is trained."""

    steps: int
    """Steps of a run."""
    prompts: int
    """Groups a step of `sums`; `digits` has half as many, of half as many samples."""
    samples: int
    """Samples a group of `sums`."""
    target: tuple[float, float]
    """Accuracy at which the supervised warm-up of `sums` ends."""
    digit_steps: int
    """Supervised steps of `digits`."""


FULL = Sizes(100, 16, 16, (0.42, 0.48), 150)
QUICK = Sizes(3, 4, 4, (0.01, 0.99), 3)


class Run(msgspec.Struct, frozen=True):
    """One cell of the sweep on one seed."""

    task: str
    """Key of `TASKS`."""
    method: str
    """Key of `METHODS`."""
    eta: int
    """Staleness in steps of every group, but for the first eta steps."""
    seed: int
    """Of the start, the questions and the draws."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of a run."""

    run: Run
    """Which one."""
    rewards: list[float]
    """Mean reward of every step."""
    reward_last: float
    """Mean over the last fifth of the steps."""
    kl: float
    """KL(mu || pi_p) by k3, nats a token, mean over steps."""
    ess_raw: float
    """Effective sample size of the ratios as they are, mean over steps."""
    masked: float
    """Share of tokens masked, mean over steps."""
    seconds: float
    """Processor time."""


class Sums:
    """Two digits plus one: an exact answer of 2 or 3 digits and an end token. Reward 1 or 0."""

    shape: ClassVar = {"hidden": 128, "intermediate": 256}
    max_tokens, scale, lr = 4, 1, 3e-4

    def question(self, source: np.random.Generator) -> tuple[list[int], str]:
        """A prompt and its right answer."""
        left, right = int(source.integers(10, 100)), int(source.integers(10))
        return [*_digits(left), PLUS, right, EQUALS], str(left + right)

    def reward(self, answer: list[int], gold: str) -> float:
        """1 for the right digits."""
        return float(answer == _digits(int(gold)))

    def warm_up(self, trainer: Trainer, seed: int, sizes: Sizes) -> None:
        """On a teacher who is wrong half of the time, until two answers in five are right."""
        source = np.random.default_rng([seed, 1])

        def demonstrations() -> Iterator[tuple[list[int], list[int]]]:
            while True:
                prompt, gold = self.question(source)
                slip = int(source.integers(1, 10)) * int(source.integers(2))
                yield prompt, [*_digits(int(gold) + slip), EOS_ID]

        low, high = sizes.target
        config = SftConfig(
            lr=1.5e-3, target_accuracy_low=low, target_accuracy_high=high, max_answer_tokens=self.max_tokens
        )
        questions = [self.question(source) for _ in range(600)]
        supervised(trainer, demonstrations(), questions, self.reward, config, lambda _: None, EOS_ID)


class Digits:
    """64 tokens, as many of them as possible the digit that was asked for. Reward: their share."""

    shape: ClassVar = {
        "hidden": 32,
        "intermediate": 64,
        "layers": 1,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 16,
    }  # 64 forward passes an answer: small, so that the whole sweep takes an hour
    max_tokens, scale, lr = 64, 2, 3e-3

    def question(self, source: np.random.Generator) -> tuple[list[int], str]:
        """A prompt and its digit."""
        digit = int(source.integers(10))
        return [digit, EQUALS], str(digit)

    def reward(self, answer: list[int], gold: str) -> float:
        """The share of the right digit."""
        return answer.count(int(gold)) / self.max_tokens

    def warm_up(self, trainer: Trainer, seed: int, sizes: Sizes) -> None:
        """On a teacher who writes the right digit one time in four and else a random one."""
        source = np.random.default_rng([seed, 1])
        for step in range(sizes.digit_steps):
            asked = source.integers(0, 10, (16, 1))
            right = source.random((16, self.max_tokens)) < 0.25
            answers = np.where(right, asked, source.integers(0, 10, right.shape))
            samples = [
                ([int(d[0]), EQUALS], answer.tolist()) for d, answer in zip(asked, answers, strict=True)
            ]
            trainer.sft_step(samples, 3e-3 * min(1.0, (step + 1) / 20))


TASKS = {"sums": Sums(), "digits": Digits()}


def warm_up(task: str, seed: int, folder: Path, sizes: Sizes) -> Path:
    """The checkpoint that every run of a task and seed starts from, written into `folder`."""
    source = TASKS[task]
    start = make_tiny_qwen3(folder / "random", seed=seed, **source.shape)
    trainer = _trainer(start, task, ObjectiveConfig(), seed)
    source.warm_up(trainer, seed, sizes)
    trainer.save(folder / "warm")
    return folder / "warm"


def train(run: Run, start: Path, sizes: Sizes) -> Outcome:
    """Trains `sizes.steps` steps from the checkpoint `start`."""
    began = time.process_time()
    learner = _trainer(start, run.task, METHODS[run.method], run.seed)
    actor = _trainer(start, run.task, ObjectiveConfig(), run.seed)
    line = deque([learner.snapshot()], maxlen=run.eta + 1)
    found = []
    for step in range(sizes.steps):
        actor.restore(line[0])
        found.append(learner.train_step(_rollout(actor, run, step, sizes), step))
        line.append(learner.snapshot())
    assert max(metrics["staleness_max"] for metrics in found) == min(run.eta, sizes.steps - 1)
    rewards = [metrics["reward_mean"] for metrics in found]
    means = {name: float(np.mean([m[name] for m in found])) for name in ("kl_k3", "ess_raw", "masked")}
    last = float(np.mean(rewards[-max(1, len(rewards) // 5) :]))
    seconds = time.process_time() - began
    return Outcome(run, rewards, last, means["kl_k3"], means["ess_raw"], means["masked"], seconds)


def _rollout(actor: Trainer, run: Run, step: int, sizes: Sizes) -> list[Group]:
    """The groups of a step, written by the actor's version."""
    task = TASKS[run.task]
    size = sizes.samples // task.scale
    source = np.random.default_rng([run.seed, 2, step])
    questions = [task.question(source) for _ in range(sizes.prompts // task.scale)]
    prompts = [prompt for prompt, _ in questions for _ in range(size)]
    answers = actor.generate(prompts, task.max_tokens, EOS_ID, seed=int(source.integers(2**62)))
    ended = [answer if len(answer) == task.max_tokens else [*answer, EOS_ID] for answer in answers]
    scores = actor.score([prompt + answer for prompt, answer in zip(prompts, ended, strict=True)])
    samples = [
        Sample(
            tokens=np.array(prompt + answer, np.int32),
            prompt_length=len(prompt),
            logprobs=logprobs[len(prompt) - 1 :],
            loss_runs=[len(answer)],
            spans=[Span(len(answer), 0)],
            reward=task.reward([token for token in answer if token != EOS_ID], questions[index // size][1]),
            rewards={},
            finish_reason="stop",
        )
        for index, (prompt, answer, logprobs) in enumerate(zip(prompts, ended, scores, strict=True))
    ]
    table = [Version(actor.version, "00")]
    return [
        Group(
            0, step * len(questions) + i, 0, 0, "delay", 1, 1.0, table, 0.0, 0.0, samples[i * size :][:size]
        )
        for i in range(len(questions))
    ]


def _trainer(folder: Path, task: str, objective: ObjectiveConfig, seed: int) -> Trainer:
    model = ModelConfig(path=str(folder), micro_batch_tokens=4096)
    return Trainer(folder, model, OptimizerConfig(lr=TASKS[task].lr, warmup_steps=20), objective, seed)


def _digits(number: int) -> list[int]:
    return [int(digit) for digit in str(number)]
