"""Every combination is either in the table or refused with a reason that can be followed."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from learner.config import AbortConfig, KlConfig, ObjectiveConfig
from learner.config.legal import CORRECTIONS, LEGAL, LOSSES, MASKS, idle_settings, refusal
from learner.errors import ConfigError

EVERY = list(itertools.product((*LOSSES, "mine:loss"), ("decoupled", "bypass"), CORRECTIONS, (1, 2, 5)))


def is_listed(loss: str, mode: str, correction: str, mini_batches: int) -> bool:
    kind = "module:function" if ":" in loss else loss
    rows = [row for row in LEGAL if (row.loss, row.mode) == (kind, mode)]
    return any(correction in row.corrections and mini_batches >= row.mini_batches for row in rows)


def test_the_table_and_the_refusals_say_the_same() -> None:
    for combination in EVERY:
        assert (refusal(*combination) is None) == is_listed(*combination), combination


def test_the_rules_behind_the_table() -> None:
    """Written from the contract, not from the table."""
    for loss, mode, correction, mini_batches in EVERY:
        legal = True
        if mode == "bypass":
            legal = correction in MASKS
        elif loss == "topr" or (loss in ("gspo", "cispo") and mini_batches == 1):
            legal = False
        elif loss in ("gspo", "cispo"):
            legal = correction != "vtrace"
        assert is_listed(loss, mode, correction, mini_batches) == legal, (loss, mode, correction)


REASONS = [
    ({"mode": "bypass", "correction": "tis"}, "the weight would count twice"),
    ({"mode": "bypass", "correction": "vtrace"}, "the weight would count twice"),
    ({"mode": "bypass"}, "the weight would count twice"),
    ({"loss": "cispo"}, "where its own ratio pi / pi_p is 1 and does nothing; use mode `bypass`"),
    ({"loss": "topr"}, "hence already the correction; use mode `bypass`"),
    ({"loss": "topr", "mini_batches": 4}, "hence already the correction"),
    ({"loss": "cispo", "mini_batches": 2, "correction": "vtrace"}, "V-trace is defined for the plain"),
    ({"loss": "gspo", "mode": "bypass", "correction": "none"}, "one ratio an answer .*use `sequence_mean`"),
    ({"loss": "reinforce"}, "expected `ppo_clip`, `gspo`, `cispo`, `topr` or a function"),
    ({"loss": "mine:"}, "expected `ppo_clip`"),
    ({"correction": "mis", "level": "sequence"}, "only `tis` has both"),
    ({"correction": "geo", "geo_low": 1.2}, "expected low < 1 < high"),
    ({"aggregation": "sequence_sum"}, "expected the tokens to divide by"),
    ({"overlong": "penalty"}, "expected 0 < ramp <= length"),
    ({"overlong": "penalty", "overlong_length": 10, "overlong_ramp": 11}, "got 10 / 11"),
    ({"kl": {"in": "loss"}}, "whose expected gradient is 0"),
    ({"kl": {"estimator": "k3"}}, "only `k1` gives the gradient of"),
    ({"kl": {"where": "loss"}}, "unknown field `where`"),
    ({"cliplow": 0.1}, "unknown field `cliplow`"),
]


@pytest.mark.parametrize(("options", "reason"), REASONS, ids=lambda value: str(value)[:40])
def test_illegal_combinations_are_refused_with_the_reason(options: dict[str, object], reason: str) -> None:
    """By the decoder, as in a config file, so that the path of the section stands before it."""
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert(options, ObjectiveConfig)


def test_a_refusal_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="twice"):
        ObjectiveConfig(mode="bypass")
    with pytest.raises(ConfigError, match="expected gradient"):
        KlConfig(where="loss", estimator="k1")


def test_kl_is_written_with_in() -> None:
    config = msgspec.convert({"kl": {"in": "loss", "estimator": "k2"}}, ObjectiveConfig)
    assert config.kl.where == "loss"
    assert msgspec.to_builtins(config)["kl"]["in"] == "loss"


def test_defaults_leave_nothing_idle() -> None:
    assert idle_settings(ObjectiveConfig()) == []


IDLE = [
    (ObjectiveConfig(clip_high=0.28), ["clip_high has no effect in mode `decoupled` with one optimizer"]),
    (ObjectiveConfig(dual_clip=2.0, clip_low=0.1), ["clip_low has no", "dual_clip has no effect"]),
    (ObjectiveConfig(clip_high=0.28, mini_batches=2), []),
    (ObjectiveConfig(clip_high=0.28, mode="bypass", correction="none"), []),
    (
        ObjectiveConfig(loss="cispo", mode="bypass", correction="none", clip_high=0.3, cispo_cap=4.0),
        ["clip_high has no effect on loss `cispo`"],
    ),
    (ObjectiveConfig(gspo_low=1e-3, cispo_cap=4.0), ["gspo_low has no effect on loss", "cispo_cap has no"]),
    (ObjectiveConfig(mis_high=3.0), ["mis_high has no effect with correction `tis`"]),
    (ObjectiveConfig(correction="icepop", cap=3.0), ["cap has no effect with correction `icepop`"]),
    (ObjectiveConfig(mode="bypass", correction="mis", cap=3.0), ["cap has no effect in mode `bypass`"]),
    (
        ObjectiveConfig(
            mode="bypass",
            correction="mis",
            cap=3.0,
            kl=KlConfig(coefficient=0.1, where="loss", estimator="k2"),
        ),
        [],
    ),
    (ObjectiveConfig(sequence_constant=9), ["sequence_constant has no effect"]),
    (ObjectiveConfig(overlong_factor=2.0), ["overlong_factor has no effect with overlong `keep`"]),
    (
        ObjectiveConfig(kl=KlConfig(reference="model")),
        ["kl.reference has no effect while kl.coefficient is 0"],
    ),
    (ObjectiveConfig(kl=KlConfig(where="loss", estimator="k2")), ["kl.in has no", "kl.estimator has no"]),
    (ObjectiveConfig(loss="mine:loss", clip_high=0.5, cispo_cap=3.0), []),
    (ObjectiveConfig(abort=AbortConfig(masked=0.9)), []),
]


@pytest.mark.parametrize(("config", "said"), IDLE)
def test_a_setting_that_cannot_act_is_named(config: ObjectiveConfig, said: list[str]) -> None:
    found = idle_settings(config)
    assert len(found) == len(said)
    for sentence, start in zip(found, said, strict=True):
        assert sentence.startswith(f"objective.{start}")
