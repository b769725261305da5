"""Warnings when a condition begins, and the end of a run that throws its samples away."""

from __future__ import annotations

import logging

import pytest

from learner.config import AbortConfig, ObjectiveConfig
from learner.errors import Aborted
from learner.watch import Watch

ICEPOP = ObjectiveConfig(correction="icepop")


def see(watch: Watch, **metrics: float | None) -> None:
    watch.see(7, {"masked": 0.0, "first_weight": None, "token_staleness_mean": 0.0, **metrics})


def test_more_than_a_fifth_masked_is_warned_of_when_it_begins(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(ICEPOP)
    for masked in (0.2, 0.21, 0.5, 0.1, 0.3):
        see(watch, masked=masked)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "step 7: icepop masks 21% of the tokens" in caplog.messages[0]
    assert "widen objective.icepop_low / icepop_high" in caplog.messages[0]


def test_a_vanishing_first_weight_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(ObjectiveConfig(correction="vtrace"))
    for weight in (0.5, 0.1, 0.09, 0.05):
        see(watch, first_weight=weight)
    assert len(caplog.messages) == 1
    assert "mean weight of 0.090" in caplog.messages[0]


def test_a_step_without_tokens_is_no_condition(caplog: pytest.LogCaptureFixture) -> None:
    see(Watch(ICEPOP), masked=None, token_staleness_mean=None)
    assert caplog.messages == []


def test_masking_for_too_long_ends_the_run_with_a_remedy() -> None:
    watch = Watch(ObjectiveConfig(correction="geo", abort=AbortConfig(masked=0.4, steps=3)))
    for masked in (0.5, 0.5, 0.4, 0.5, 0.5):  # 0.4 is not beyond
        see(watch, masked=masked)
        watch.check()
    see(watch, masked=0.41)
    with pytest.raises(Aborted, match=r"geo masked more than 40% .* 3 steps in a row .*widen") as caught:
        watch.check()
    assert "\n" not in str(caught.value)


def test_staleness_for_too_long_ends_the_run_with_a_remedy() -> None:
    watch = Watch(ObjectiveConfig(abort=AbortConfig(staleness=1.5, steps=2)))
    for staleness in (1.6, 1.5, 1.6):
        see(watch, token_staleness_mean=staleness)
        watch.check()
    see(watch, token_staleness_mean=1.6)
    with pytest.raises(Aborted, match=r"more than 1.5 steps old .*lower stream.max_staleness"):
        watch.check()


def test_by_default_no_staleness_ends_a_run() -> None:
    watch = Watch(ObjectiveConfig(abort=AbortConfig(steps=1)))
    see(watch, token_staleness_mean=100.0)
    watch.check()
