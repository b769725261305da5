"""What a real trial at eta = 0 must equal: a loop that generates, trains, generates, trains."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from buffer.schema import Group, Version
from launch.config import RunConfig
from learner.datasets import PromptOrder
from learner.step import Trainer
from learner.tokenizer import Tokenizer
from tests.faults.policy import finished_sample, speak
from tests.faults.real import VOCABULARY
from weightsync.manifest import Manifest


def answer(of: str, seed: int, position: int, sample: int) -> tuple[int, np.ndarray, np.ndarray]:
    """The one part of an answer, as a scripted actor gives it under one version."""
    tokens, logprobs = speak(of, seed, position, sample, 0, 8)
    return 0, tokens % VOCABULARY, logprobs


def synchronous(config: bytes, group_size: int) -> dict[int, str]:
    """Digest of every version of the same run without a stream: generate, train, generate, train."""
    settings = msgspec.json.decode(config, type=RunConfig)
    model, batch = Path(settings.model.path), settings.stream.groups_per_step
    order, _ = PromptOrder.load(settings.data, Tokenizer(model), settings.seed)
    trainer = Trainer(model, settings.model, settings.optimizer, settings.objective, settings.seed)
    versions = {0: Manifest.of(0, trainer.export()).digest}
    for step in range(settings.stream.max_steps):
        serving = Version(step, versions[step])
        groups = []
        for position in range(step * batch, (step + 1) * batch):
            prompt = order.at(position)
            assert prompt is not None
            samples = [
                finished_sample(prompt, [answer(serving.digest, settings.seed, position, index)])
                for index in range(group_size)
            ]
            groups.append(Group(0, position, 0, prompt.row, "", 1, 1.0, [serving], 0.0, 0.0, samples))
        trainer.train_step(groups, step)
        versions[trainer.version] = Manifest.of(trainer.version, trainer.export()).digest
    return versions
