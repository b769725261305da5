"""A fixed record of 20 steps and the curve that training on it gave: `python -m tests.unit.learner.golden`
writes both anew, which is right only when the objective, the optimizer or the record is to change.

The tiny Qwen3 answers by itself, one version behind, so that corrections have something to do; what it is
rewarded for is to answer with small token ids. The file holds the groups as the stream carries them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import numpy as np
import torch
import zstandard

from buffer.codec import encode
from buffer.schema import Group, Sample, Span, Version
from launch.tiny_model import VOCABULARY, make_tiny_qwen3
from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.step import Trainer

FILE = Path(__file__).with_name("golden.msgpack.zst")
STEPS, GROUPS, SAMPLES, ANSWER = 20, 4, 4, 6
FIGURES = ("loss", "grad_norm", "entropy", "kl_k3", "weight_mean")
"""Figures of a step that are compared."""


class GoldenStep(msgspec.Struct, array_like=True):
    """One step of the file."""

    groups: list[bytes]
    """Records, encoded."""
    figures: list[float]
    """Of the training step, in the order of `FIGURES`."""


def make(folder: Path) -> Trainer:
    """The trainer of the curve, at version 0."""
    model = make_tiny_qwen3(folder / "model", seed=0)
    config = ModelConfig(path=str(model), micro_batch_tokens=128)
    return Trainer(model, config, OptimizerConfig(lr=2e-3, warmup_steps=5), ObjectiveConfig())


def read() -> list[GoldenStep]:
    """The file."""
    packed = zstandard.ZstdDecompressor().decompress(FILE.read_bytes())
    return msgspec.msgpack.decode(packed, type=list[GoldenStep])


def answers(trainer: Trainer, step: int) -> list[Group]:
    """Groups for a step, written by the trainer's version of now."""
    source = np.random.default_rng(step)
    prompts = [source.integers(3, VOCABULARY, 5).tolist() for _ in range(GROUPS)]
    asked = [prompt for prompt in prompts for _ in range(SAMPLES)]
    said = trainer.generate(asked, ANSWER, eos_id=-1, seed=step)
    scores = trainer.score([[*prompt, *answer] for prompt, answer in zip(asked, said, strict=True)])
    samples = [
        Sample(
            tokens=np.array([*prompt, *answer], np.int32),
            prompt_length=len(prompt),
            logprobs=score[len(prompt) - 1 :].astype(np.float32),
            loss_runs=[len(answer)],
            spans=[Span(len(answer), 0)],
            reward=float(np.mean(np.array(answer) < VOCABULARY / 2)),
            rewards={},
            finish_reason="length",
        )
        for prompt, answer, score in zip(asked, said, scores, strict=True)
    ]
    table = [Version(trainer.version, "00")]
    return [
        Group(0, step * GROUPS + number, 0, 0, "actor-0", 1, 1.0, table, 0.0, 1.0, samples[at : at + SAMPLES])
        for number, at in enumerate(range(0, len(samples), SAMPLES))
    ]


def write() -> None:
    """Makes the file."""
    torch.set_num_threads(1)
    steps = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(Path(folder))
        ahead = answers(trainer, 0)
        for step in range(STEPS):
            groups, ahead = ahead, answers(trainer, step + 1)
            metrics = trainer.train_step(groups, step)
            figures = [float(metrics[name] or 0.0) for name in FIGURES]
            steps.append(GoldenStep([encode(group) for group in groups], figures))
            print(step, dict(zip(FIGURES, figures, strict=True)), metrics["reward_mean"])
    FILE.write_bytes(zstandard.ZstdCompressor(level=19).compress(msgspec.msgpack.encode(steps)))


if __name__ == "__main__":
    write()
