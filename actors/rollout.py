"""One lease to one scored group: G samples of the leased prompt, their rewards, the record."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

import msgspec
import numpy as np
import xxhash

from actors.config import SamplingConfig
from actors.engine import Completion, Engine
from actors.errors import EngineError
from actors.rewards import Reward
from buffer.admission import Lease
from buffer.schema import Group, Sample, Span, Version
from weightsync.manifest import parse_label


class Recipe(msgspec.Struct, frozen=True):
    """What turns any lease of a run into a group."""

    actor: str
    actor_epoch: int
    run_seed: int
    group_size: int
    sampling: SamplingConfig
    reward: Reward
    decode: Callable[[list[int]], str]
    """Token ids to text, special tokens left out."""


def request_seed(run_seed: int, position: int, attempt: int, sample: int) -> int:
    """Seed of one sample, 31 bits: a function of what is sampled, never of who samples it or when."""
    return xxhash.xxh3_64_intdigest(struct.pack("<4q", run_seed, position, attempt, sample)) & 0x7FFFFFFF


async def rollout(engine: Engine, lease: Lease, recipe: Recipe) -> Group:
    """Generates and scores the group of a lease.

    Raises `EngineError` if the engine fails or returns what cannot be trained, `RewardError` if the
    reward function fails.
    """
    assert lease.prompt is not None
    prompt, started = lease.prompt, time.time()
    seeds = [
        request_seed(recipe.run_seed, lease.position, lease.attempt, i) for i in range(recipe.group_size)
    ]
    completions = await engine.generate(prompt.tokens, seeds, recipe.sampling)
    table = [Version(*_parse(label)) for label in dict.fromkeys(c.version_label for c in completions)]
    numbers = {f"{version.number}:{version.digest}": index for index, version in enumerate(table)}
    samples = []
    for completion in completions:
        score = recipe.reward(recipe.decode(completion.tokens), prompt.answer)
        samples.append(_sample(prompt.tokens, completion, numbers[completion.version_label], score))
    return Group(
        lineage=int(lease.group.partition("-")[0]),
        position=lease.position,
        attempt=lease.attempt,
        row=prompt.row,
        actor=recipe.actor,
        actor_epoch=recipe.actor_epoch,
        temperature=recipe.sampling.temperature,
        versions=table,
        started=started,
        finished=time.time(),
        samples=samples,
    )


def _parse(label: str) -> tuple[int, str]:
    try:
        return parse_label(label)
    except ValueError as error:
        raise EngineError(f"the engine serves weights nobody committed: {error}") from error


def _sample(
    prompt: list[int], completion: Completion, version: int, score: tuple[float, dict[str, float]]
) -> Sample:
    length = len(completion.tokens)
    return Sample(
        tokens=np.array([*prompt, *completion.tokens], np.int32),
        prompt_length=len(prompt),
        logprobs=np.array(completion.logprobs, np.float32),
        loss_runs=[length] if length else [],
        spans=[Span(length, version)] if length else [],
        reward=score[0],
        rewards=score[1],
        finish_reason=completion.finish_reason,
    )
