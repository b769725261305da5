"""One lease to one scored group: G conversations about the leased prompt, their rewards, the record."""

from __future__ import annotations

import asyncio
import collections
import struct
import time
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
import xxhash

from actors.config import Sampling
from actors.environments import Environment
from actors.environments.policy import Batcher, Generator, Policy, Text
from actors.errors import ActorError, Cause, EngineError, RewardError, SampleError
from actors.rewards.pool import Verdict
from actors.trajectory import Trajectory, lay_out
from buffer.admission import Lease
from buffer.schema import Group, Prompt, Version
from weightsync.manifest import parse_label

T = TypeVar("T")

SAMPLES_MIN = 2
"""Fewer valid samples make no group: an advantage compares samples of one prompt."""


class Scorer(Protocol):
    """What scores: `actors.rewards.pool.RewardPool`."""

    async def score(self, text: str, answer: str, tokens: int) -> Verdict:
        """The verdict on a text against the gold answer. Raises `SampleError` if there is none."""
        ...


class Recipe(msgspec.Struct, frozen=True):
    """What turns any lease of a run into a group."""

    actor: str
    """Name of the actor, as groups carry it."""
    actor_epoch: int
    """Number of the epoch under which it joined."""
    run_seed: int
    """Seed of the run, see `request_seed`."""
    group_size: int
    """G, samples a group."""
    sampling: Sampling
    """Token limit of a whole answer, temperature and filters."""
    environment: Environment
    """Holds the conversations, all at the same time."""
    timeout_s: float
    """Seconds for one conversation."""
    rewards: Scorer
    """From the text of an answer to its verdict."""
    text: Text
    """Tokens to text and back."""
    invalid: collections.Counter[Cause]
    """Samples without a verdict so far, by cause; `rollout` counts here."""


def request_seed(run_seed: int, position: int, attempt: int, sample: int, turn: int = 0) -> int:
    """Seed of one turn, 31 bits: a function of what is sampled, never of who samples it or when."""
    numbers = struct.pack("<4q", run_seed, position, attempt, sample)
    if turn:
        numbers += struct.pack("<q", turn)
    return xxhash.xxh3_64_intdigest(numbers) & 0x7FFFFFFF


Scored = tuple[Trajectory, Verdict]
"""A sample and what it earns."""


async def answers(
    engine: Generator,
    prompt: Prompt,
    seed: Callable[[int, int], int],
    recipe: Recipe,
    generated: Callable[[], None] = lambda: None,
) -> list[Scored | SampleError]:
    """The G conversations about a prompt, each scored when it has ended, or why it is not.

    `seed` is that of (sample, turn); `generated` is called when the last conversation has ended, while
    samples are still being scored. Raises `EngineError`, and `LoadError` if the reward cannot be loaded at
    all.
    """
    batcher, talking = Batcher(engine), set(range(recipe.group_size))

    def ended(index: int) -> None:
        talking.discard(index)
        if not talking:
            generated()

    try:
        return await all_of(
            _sample(batcher, partial(seed, index), prompt, recipe, partial(ended, index))
            for index in range(recipe.group_size)
        )
    finally:
        await batcher.close()


async def rollout(
    engine: Generator, lease: Lease, recipe: Recipe, generated: Callable[[], None] = lambda: None
) -> Group:
    """Generates and scores the group of a lease; `generated` is that of `answers`.

    A sample whose environment or reward function failed is invalid and left out of the group, which then
    has fewer than G. Raises `EngineError` if the engine fails or returns what cannot be trained,
    `RewardError` if fewer than 2 samples are valid, `LoadError` if the reward cannot be loaded at all.
    """
    assert lease.prompt is not None
    prompt, started = lease.prompt, time.time()
    seed = partial(request_seed, recipe.run_seed, lease.position, lease.attempt)
    made = await answers(engine, prompt, seed, recipe, generated)
    valid = [sample for sample in made if not isinstance(sample, SampleError)]
    if len(valid) < SAMPLES_MIN:
        raise RewardError(_too_few(made, len(valid)))
    labels = dict.fromkeys(label for trajectory, _ in valid for _, label in trajectory.labels)
    numbers = {label: index for index, label in enumerate(labels)}
    return Group(
        lineage=int(lease.group.partition("-")[0]),
        position=lease.position,
        attempt=lease.attempt,
        row=prompt.row,
        actor=recipe.actor,
        actor_epoch=recipe.actor_epoch,
        temperature=recipe.sampling.temperature,
        versions=[Version(*_parse(label)) for label in labels],
        started=started,
        finished=time.time(),
        samples=[trajectory.sample(verdict.value, verdict.parts, numbers) for trajectory, verdict in valid],
    )


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order; the first error ends the others, which are over when it is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        left = [task for task in tasks if task.cancel()]
        await asyncio.gather(*left, return_exceptions=True)


async def _sample(
    batcher: Batcher,
    seed: Callable[[int], int],
    prompt: Prompt,
    recipe: Recipe,
    ended: Callable[[], None],
) -> Scored | SampleError:
    """One conversation and its verdict, or why it has none."""
    policy = Policy(batcher, seed, recipe.sampling, len(prompt.tokens), recipe.text)
    try:
        try:
            trajectory = await _converse(recipe, prompt, policy)
        except SampleError:
            ended()
            raise
        ended()  # but not if the engine failed: no other group is to begin on it
        text = recipe.text.decode(trajectory.final)
        verdict = await recipe.rewards.score(text, prompt.answer, trajectory.trained)
    except SampleError as error:
        recipe.invalid[error.cause] += 1
        return error
    if trajectory.award is not None:
        parts = {**verdict.parts, "environment": trajectory.award}
        verdict = Verdict(verdict.value + trajectory.award, parts)
    return trajectory, verdict


async def _converse(recipe: Recipe, prompt: Prompt, policy: Policy) -> Trajectory:
    """One run of the environment. Raises `SampleError` for whatever it does wrong."""
    try:
        async with asyncio.timeout(recipe.timeout_s) as limit:
            turns = await recipe.environment.run(prompt, policy)
    except ActorError:
        raise
    except Exception as error:
        if isinstance(error, TimeoutError) and limit.expired():
            error = TimeoutError(f"no end within rollout.environment.timeout_s ({recipe.timeout_s:g} s)")
        name = type(recipe.environment).__name__
        raise SampleError("environment", f"{name}: {type(error).__name__}: {error}") from error
    return lay_out(prompt.tokens, turns)


def _too_few(made: list[Scored | SampleError], valid: int) -> str:
    """Why a group is none, with the first reason in full."""
    errors = [sample for sample in made if isinstance(sample, SampleError)]
    causes = collections.Counter(error.cause for error in errors)
    told = ", ".join(f"{cause} {count}" for cause, count in causes.items())
    first = f"; the first: {errors[0]}" if errors else ""
    return f"{valid} of {len(made)} samples are valid, expected {SAMPLES_MIN} or more ({told}){first}"


def _parse(label: str) -> tuple[int, str]:
    try:
        return parse_label(label)
    except ValueError as error:
        raise EngineError(f"the engine serves weights nobody committed: {error}") from error
