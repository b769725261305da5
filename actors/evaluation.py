"""How well an engine's weights answer: K samples a question, by the run's environment and rewards.

    asked = await ask(engine, prompts, recipe, threshold=1.0, concurrency=8, show=print)
    figures(asked, samples=recipe.group_size)

Seeds are a function of the question, the sample and the turn, so that versions are compared on the same
draws, and an evaluation that is repeated comes out the same.
"""

from __future__ import annotations

import asyncio
import collections
import math
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from actors.environments.policy import Generator
from actors.errors import SampleError
from actors.rollout import Recipe, all_of, answers, request_seed
from buffer.schema import Prompt


class Asked(msgspec.Struct, frozen=True):
    """What became of a question's samples."""

    row: int
    """Of the data."""
    passed: int
    """Samples that passed."""
    rewards: list[float]
    """Of the samples that have a verdict."""
    tokens: list[int]
    """How many tokens the policy wrote in each of those."""
    truncated: int
    """Those that the token limit ended."""
    invalid: dict[str, int]
    """Samples without a verdict, by cause; they have not passed."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What an evaluation found."""

    questions: int
    """How many were asked."""
    samples: int
    """K, answers to each."""
    mean_at_k: float
    """Share of all answers that passed, which is pass@1."""
    standard_error: float | None
    """Of it, from the spread over the questions; null for a single one."""
    pass_at_k: dict[int, float]
    """k -> probability that one of k answers to a question passes, mean over the questions."""
    reward: float | None
    """Mean over the answers with a verdict; null if there are none."""
    answer_tokens: float | None
    """Mean tokens of an answer that the policy wrote."""
    truncated: float | None
    """Share of answers that the token limit ended."""
    invalid: dict[str, int]
    """Answers without a verdict, by cause."""


async def ask(
    engine: Generator,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    *,
    threshold: float,
    concurrency: int,
    show: Callable[[list[Asked]], None],
) -> list[Asked]:
    """Asks every question `recipe.group_size` times, `concurrency` at once; in their order.

    A sample passes with a reward of at least `threshold`. `show` is called with what is there after each.
    Raises `EngineError`, `LoadError`.
    """
    places, found = asyncio.Semaphore(concurrency), list[Asked]()

    async def one(prompt: Prompt) -> Asked:
        async with places:
            seed = partial(request_seed, recipe.run_seed, prompt.row, 0)
            made = await answers(engine, prompt, seed, recipe)
        scored = [sample for sample in made if not isinstance(sample, SampleError)]
        causes = collections.Counter[str](sample.cause for sample in made if isinstance(sample, SampleError))
        asked = Asked(
            row=prompt.row,
            passed=sum(verdict.value >= threshold for _, verdict in scored),
            rewards=[verdict.value for _, verdict in scored],
            tokens=[trajectory.trained for trajectory, _ in scored],
            truncated=sum(trajectory.finish_reason == "length" for trajectory, _ in scored),
            invalid=dict(causes),
        )
        found.append(asked)
        show(found)
        return asked

    return await all_of(one(prompt) for prompt in prompts)


def figures(asked: Sequence[Asked], samples: int) -> Figures:
    """The figures of at least one question with `samples` answers each."""
    shares = [one.passed / samples for one in asked]
    rewards = [value for one in asked for value in one.rewards]
    invalid = collections.Counter[str]()
    for one in asked:
        invalid.update(one.invalid)
    return Figures(
        questions=len(asked),
        samples=samples,
        mean_at_k=_mean(shares) or 0.0,
        standard_error=_standard_error(shares),
        pass_at_k={
            k: sum(pass_at(k, samples, one.passed) for one in asked) / len(asked) for k in counts(samples)
        },
        reward=_mean(rewards),
        answer_tokens=_mean([float(tokens) for one in asked for tokens in one.tokens]),
        truncated=sum(one.truncated for one in asked) / len(rewards) if rewards else None,
        invalid=dict(invalid),
    )


def pass_at(k: int, samples: int, passed: int) -> float:
    """Unbiased estimate that one of k answers passes, from `samples` answers, of which `passed` did.

    1 - C(n - c, k) / C(n, k): the share of the choices of k among n that hold one of the c (Chen et al. 2021,
    arXiv 2107.03374, equation 1), for 1 <= k <= n.

    >>> pass_at(1, 4, 1), pass_at(2, 4, 1), pass_at(4, 4, 1), pass_at(2, 4, 0)
    (0.25, 0.5, 1.0, 0.0)
    """
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def counts(samples: int) -> list[int]:
    """The k of pass@k: powers of 2 below K, and K.

    >>> counts(8), counts(6), counts(1)
    ([1, 2, 4, 8], [1, 2, 4, 6], [1])
    """
    return [*(1 << power for power in range((samples - 1).bit_length())), samples]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _standard_error(shares: Sequence[float]) -> float | None:
    if len(shares) < 2:
        return None
    mean = sum(shares) / len(shares)
    variance = sum((share - mean) ** 2 for share in shares) / (len(shares) - 1)
    return math.sqrt(variance / len(shares))
