"""pass@k against all choices of k answers, and what becomes of the answers to a question."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import combinations
from math import isclose, sqrt

import pytest

from actors.config import EvaluationConfig, EvaluationSampling, Sampling, SamplingConfig
from actors.continuation import Completion
from actors.errors import EngineError
from actors.evaluation import Asked, ask, counts, figures, pass_at
from actors.rollout import request_seed
from buffer.schema import Prompt
from tests.unit.actors.scripted import Refusing, recipe

PROMPTS = [Prompt(row, [5, row], f"#### {row}") for row in (3, 8, 4)]


class Echo:
    """Answers with the prompt's last token and then the sample's number, the first prompt last."""

    def __init__(self, finish: str = "stop") -> None:
        self.asked: dict[int, list[int]] = {}
        self.under_way = self.most = 0
        self._finish = finish

    async def generate(self, prompt: list[int], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        self.asked[prompt[-1]] = list(seeds)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0.02 if prompt[-1] == 3 else 0.0)
        self.under_way -= 1
        tokens = [[prompt[-1]] if index % 2 == 0 else [prompt[-1], 9] for index in range(len(seeds))]
        return [Completion(one, [-0.5] * len(one), self._finish, [(len(one), "default")]) for one in tokens]  # type: ignore[arg-type]


async def asked_of(engine: Echo, **changes: object) -> list[Asked]:
    concurrency = int(changes.pop("concurrency", 8))  # type: ignore[call-overload]
    made_by = recipe(4, sampling=EvaluationSampling().of(SamplingConfig()), **changes)
    return await ask(
        engine, PROMPTS, made_by, threshold=1.0, concurrency=concurrency, show=lambda found: None
    )


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_choices_that_hold_a_passed_answer(samples: int) -> None:
    for passed in range(samples + 1):
        answers = [True] * passed + [False] * (samples - passed)
        for k in range(1, samples + 1):
            chosen = [any(choice) for choice in combinations(answers, k)]
            assert isclose(pass_at(k, samples, passed), sum(chosen) / len(chosen), abs_tol=1e-12)


def test_the_ks_are_powers_of_two_and_the_samples() -> None:
    assert [counts(samples) for samples in (1, 2, 3, 8, 12)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 12],
    ]


def test_figures_are_over_questions() -> None:
    found = figures(
        [
            Asked(0, 4, [1.0, 1.0, 1.0, 1.0], [2, 2, 2, 2], 0, {}),
            Asked(1, 1, [1.0, 0.5, 0.0], [6, 6, 6], 3, {"deadline": 1}),
        ],
        4,
    )
    assert (found.questions, found.samples) == (2, 4)
    assert found.mean_at_k == found.pass_at_k[1] == (1 + 1 / 4) / 2
    assert found.pass_at_k == {1: 0.625, 2: (1 + 1 / 2) / 2, 4: 1.0}
    assert found.standard_error == pytest.approx(sqrt(((3 / 8) ** 2 * 2 / 1) / 2))
    assert found.reward == pytest.approx(5.5 / 7)
    assert found.answer_tokens == pytest.approx(26 / 7)
    assert (found.truncated, found.invalid) == (3 / 7, {"deadline": 1})


def test_without_any_verdict_nothing_has_passed() -> None:
    found = figures([Asked(0, 0, [], [], 0, {"raised": 4})], 4)
    assert (found.mean_at_k, found.pass_at_k) == (0.0, {1: 0.0, 2: 0.0, 4: 0.0})
    assert (found.standard_error, found.reward, found.answer_tokens, found.truncated) == (None,) * 4


async def test_answers_pass_by_their_reward_in_the_order_of_the_questions() -> None:
    shown: list[int] = []
    made_by = recipe(4)
    found = await ask(
        Echo("length"),
        PROMPTS,
        made_by,
        threshold=1.0,
        concurrency=8,
        show=lambda so_far: shown.append(len(so_far)),
    )
    assert [(one.row, one.passed, one.tokens, one.truncated) for one in found] == [
        (row, 2, [1, 2, 1, 2], 4) for row in (3, 8, 4)
    ]
    assert found[0].rewards == [1.0, pytest.approx(0.1), 1.0, pytest.approx(0.1)]
    assert shown == [1, 2, 3]


async def test_the_threshold_decides() -> None:
    found = await ask(Echo(), PROMPTS, recipe(4), threshold=0.05, concurrency=8, show=lambda so_far: None)
    assert [one.passed for one in found] == [4, 4, 4]


async def test_an_answer_without_a_verdict_is_invalid_and_has_not_passed() -> None:
    found = await asked_of(Echo(), rewards=Refusing("8"))
    assert [(one.passed, one.invalid) for one in found] == [(4, {}), (0, {"deadline": 4}), (4, {})]
    assert figures(found, 4).mean_at_k == 8 / 12


async def test_seeds_depend_on_question_and_sample_not_on_order() -> None:
    first, second = Echo(), Echo()
    await asked_of(first)
    await asked_of(second, concurrency=1)
    assert first.asked == second.asked
    assert first.asked[8] == [request_seed(11, 8, 0, sample) for sample in range(4)]


async def test_so_many_questions_are_asked_at_once() -> None:
    engines = Echo(), Echo()
    await asked_of(engines[0], concurrency=2)
    await asked_of(engines[1], concurrency=1)
    assert [engine.most for engine in engines] == [2, 1]


async def test_an_engine_that_fails_ends_it() -> None:
    class Broken(Echo):
        async def generate(self, prompt: list[int], *rest: object) -> list[Completion]:
            if prompt[-1] == 8:
                raise EngineError("gone")
            await asyncio.sleep(60)
            raise AssertionError("not cancelled")

    with pytest.raises(EngineError, match="gone"):
        await asyncio.wait_for(asked_of(Broken()), 5)


def test_evaluation_draws_as_it_is_told_and_else_as_training_does() -> None:
    training = SamplingConfig(max_new_tokens=77, stop_token_ids=[4])
    drawn = EvaluationConfig().sampling.of(training)
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (0.6, 0.95, 20)
    assert (drawn.max_new_tokens, drawn.stop_token_ids) == (77, [4])
    assert EvaluationSampling(max_new_tokens=5).of(training).max_new_tokens == 5
