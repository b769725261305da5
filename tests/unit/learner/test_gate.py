"""The batch-zero gate: engines that say the same pass, any other is named by its worst token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from buffer.schema import Group
from learner.errors import Aborted
from learner.gate import SAMPLES, agreement, check
from learner.step import Trainer
from tests.unit.learner.groups import make_group
from tests.unit.learner.test_step import make_trainer


def told(trainer: Trainer, *, temperature: float = 1.0) -> list[Group]:
    """Three groups whose log-probabilities are the trainer's own."""
    groups = [make_group(position) for position in range(3)]
    for group in groups:
        group.temperature = temperature
        scores = trainer.score([sample.tokens for sample in group.samples], temperature)
        for sample, score in zip(group.samples, scores, strict=True):
            sample.logprobs = score[sample.prompt_length - 1 :].copy()
    return groups


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engines_that_say_the_same_pass(make_checkpoint: Callable, temperature: float) -> None:
    trainer = make_trainer(make_checkpoint()[0])
    groups = told(trainer, temperature=temperature)
    found = agreement(groups, 0, trainer.score)
    assert found.mean < 1e-6
    taken = [group.samples[number] for number in range(3) for group in groups][:SAMPLES]
    assert found.tokens == sum(sample.answer_length for sample in taken)
    check(groups, 0, trainer.score, 1e-5)


def test_the_worst_token_is_named(make_checkpoint: Callable, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(make_checkpoint()[0])
    groups = told(trainer)
    sample = groups[1].samples[0]
    place = sample.answer_length - 1
    sample.logprobs[place] -= 5.0
    found = agreement(groups, 0, trainer.score)
    assert found.mean == pytest.approx(5.0 / found.tokens, rel=1e-4)
    with pytest.raises(Aborted) as raised:
        check(groups, 0, trainer.score, 1e-3)
    text = str(raised.value)
    assert f"token {place} of the answer of sample 0 of group {groups[1].id} by actor-0" in text
    assert f"(id {sample.tokens[-1]})" in text
    assert "allowed 0.001 (objective.abort.mismatch)" in text
    check(groups, 0, trainer.score, 0.0)


def test_tokens_of_other_versions_and_masked_ones_do_not_count(make_checkpoint: Callable) -> None:
    trainer = make_trainer(make_checkpoint()[0])
    groups = told(trainer)
    other = make_group(7, versions=(0, 1))  # its first tokens are of version 0, wrong like all of its own
    wrong = sum(sample.spans[0].length for sample in other.samples)
    assert agreement([other], 0, trainer.score).tokens == wrong
    for sample in groups[0].samples:
        sample.loss_runs = [0, 1, sample.answer_length - 1]
        sample.logprobs[0] = -99.0
    assert agreement(groups, 0, trainer.score).mean < 1e-6
    assert agreement(groups, 5, trainer.score).tokens == 0


def test_nan_is_no_agreement(make_checkpoint: Callable) -> None:
    trainer = make_trainer(make_checkpoint()[0])
    groups = told(trainer)
    groups[0].samples[0].logprobs[:] = np.nan
    with pytest.raises(Aborted, match="nan over"):
        check(groups, 0, trainer.score, 0.5)
