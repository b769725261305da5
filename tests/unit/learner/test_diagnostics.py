"""What a step reports, by hand and over two ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.config import ObjectiveConfig
from learner.config.legal import table as legal_table
from learner.diagnostics import Stopwatch, Tally, count_groups, count_tokens, summary
from learner.metrics import METRICS, Metrics, row_of, table
from learner.objective import Tokens, Totals, objective
from learner.record import RunRecord
from learner.samples import choose
from tests.unit.learner.groups import make_group

DOCS = Path(__file__).parents[3] / "docs/objectives.md"
U = np.array([0.5, 1.0, 4.0, 2.0])
"""pi_p / mu of four tokens in two samples of two."""
AGES = torch.tensor([0, 2, 2, 0])


def tally_of(
    config: ObjectiveConfig, u: np.ndarray = U, ages: torch.Tensor = AGES, reference: bool = False
) -> Tally:
    proximal = torch.tensor(np.log(u)) - 1.0
    logprobs = proximal + 0.01  # pi has moved on from pi_p, as in a second mini-batch
    tokens = Tokens(
        logprobs=logprobs.clone().requires_grad_(),
        proximal=proximal,
        behaviour=torch.full((len(u),), -1.0, dtype=torch.float64),
        advantages=torch.ones(len(u), dtype=torch.float64),
        sample=torch.arange(len(u)) // 2,
        reference=logprobs - 0.5 if reference else None,
    )
    tally = Tally()
    result = objective(tokens, Totals(float(len(u)), len(u) / 2), config)
    count_tokens(tally, tokens, result, torch.full((len(u),), 0.25), ages)
    return tally


def figures(config: ObjectiveConfig, **options: object) -> Metrics:
    return summary(tally_of(config, **options), config.correction == "vtrace")


def test_divergences_by_staleness() -> None:
    found = figures(ObjectiveConfig())
    d = np.log(U)
    k3 = U - 1 - d
    assert found["kl_k1"] == pytest.approx(-d.mean())
    assert found["kl_k3"] == pytest.approx(k3.mean())
    assert found["kl_k1/0"] == found["mismatch_k1"] == pytest.approx(-(d[0] + d[3]) / 2)
    assert found["kl_k3/2"] == pytest.approx((k3[1] + k3[2]) / 2)
    assert found["mismatch_k3"] == pytest.approx((k3[0] + k3[3]) / 2)
    assert "kl_k1/1" not in found
    assert found["ratio_deviation_max"] == pytest.approx(3.0)
    assert found["entropy"] == 0.25


def test_the_mismatch_is_null_without_fresh_tokens() -> None:
    found = figures(ObjectiveConfig(), ages=torch.tensor([1, 2, 2, 1]))
    assert found["mismatch_k1"] is None
    assert found["mismatch_k3"] is None
    assert found["kl_k1"] is not None


def test_effective_sample_size_of_weights_and_of_ratios() -> None:
    found = figures(ObjectiveConfig())  # weights 0.5, 1, 2, 2
    assert found["ess"] == pytest.approx(5.5**2 / (4 * 9.25))
    assert found["ess_raw"] == pytest.approx(7.5**2 / (4 * 21.25))
    assert found["weight_mean"] == pytest.approx(5.5 / 4)
    assert found["weight_truncated"] == 0.25
    assert found["masked"] == 0.0


def test_masked_tokens_count_in_denominators_and_in_the_share() -> None:
    found = figures(
        ObjectiveConfig(correction="icepop", icepop_low=0.4, icepop_high=3.0)
    )  # weights 0.5, 1, 0, 2
    assert found["masked"] == 0.25
    assert found["ess"] == pytest.approx(3.5**2 / (4 * 5.25))
    everything = figures(ObjectiveConfig(correction="geo"))
    assert everything["masked"] == 1.0
    assert everything["ess"] == 0.0


def test_clip_fractions_by_side() -> None:
    found = figures(ObjectiveConfig(mode="bypass", correction="none"))
    assert (found["clip_low"], found["clip_high"], found["clip_dual"]) == (0.0, 0.5, 0.0)
    assert found["clip_fraction"] == 0.5


def test_the_first_weight_is_vtraces_alone() -> None:
    assert figures(ObjectiveConfig())["first_weight"] is None
    # Products: 0.5 * 1 of the first sample, 1 * 1 of the second.
    assert figures(ObjectiveConfig(correction="vtrace"))["first_weight"] == pytest.approx(0.75)


def test_distance_to_the_reference() -> None:
    found = figures(ObjectiveConfig(), reference=True)
    assert found["kl_reference_k1"] == pytest.approx(0.5)
    assert found["kl_reference_k3"] == pytest.approx(math.exp(-0.5) - 1 + 0.5)
    assert figures(ObjectiveConfig())["kl_reference_k1"] is None


def test_percentiles_of_staleness() -> None:
    ages = torch.tensor([0] * 5 + [1] * 4 + [7])
    found = figures(ObjectiveConfig(), u=np.ones(10), ages=ages)
    spread = [found[f"token_staleness_{name}"] for name in ("mean", "p50", "p90", "max")]
    assert spread == [1.1, 0.0, 1.0, 7.0]


def test_figures_of_groups() -> None:
    config = ObjectiveConfig()
    groups = [make_group(0, versions=(1, 3)), make_group(1, versions=(3,)), make_group(2, versions=(2,))]
    for sample in groups[1].samples:
        sample.reward = 0.1
    groups[2].samples[0].finish_reason = "reward"
    groups[2].samples[1].finish_reason = "length"
    groups[0].samples[0].rewards = {"format": 0.5}
    groups[0].samples[1].rewards = {"format": 1.0, "correct": 1.0}
    for sample in groups[2].samples[2:]:
        sample.finish_reason = "error"
    chosen = choose(groups, config)
    tally = Tally()
    count_groups(tally, groups, chosen, chosen.groups, [np.array([1.0, -1.0, 0.0, 2.0]), np.zeros(4)], 3)
    found = summary(tally, False)
    assert (found["groups"], found["groups_dropped"], found["samples"]) == (2.0, 1.0, 8.0)
    assert (found["samples_invalid"], found["samples_masked"]) == (3.0, 0.0)
    rewards = [0.0, 1.0, 0.0, 1.0, *[0.1] * 4, 1.0]  # of the 9 valid samples
    assert found["reward_mean"] == pytest.approx(np.mean(rewards))
    assert found["reward_std"] == pytest.approx(np.std(rewards))
    assert found["reward_constant"] == pytest.approx(2 / 3)
    assert found["reward_shaped"] == pytest.approx(np.mean(rewards[:8]))
    assert (found["reward/format"], found["reward/correct"]) == (0.75, 1.0)
    values = [1.0, -1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    assert found["advantage_mean"] == pytest.approx(np.mean(values))
    assert found["advantage_std"] == pytest.approx(np.std(values))
    assert (found["advantage_max"], found["advantage_zero"]) == (2.0, 0.625)
    assert found["truncated"] == pytest.approx(1 / 9)
    lengths = [
        sample.answer_length for sample in [*groups[0].samples, *groups[1].samples, groups[2].samples[1]]
    ]
    assert (found["answer_length_mean"], found["answer_length_max"]) == (np.mean(lengths), max(lengths))
    spread = [found[f"staleness_{name}"] for name in ("mean", "p50", "p90", "max")]
    assert spread == [1.0, 1.0, 2.0, 2.0]


def test_nothing_to_train_reports_nulls() -> None:
    groups = [make_group(0, size=2)]
    groups[0].samples[0].finish_reason = groups[0].samples[1].finish_reason = "error"
    tally = Tally()
    count_groups(tally, groups, choose(groups, ObjectiveConfig()), [], [], 0)
    found = summary(tally, False)
    assert found["tokens"] == found["samples"] == 0.0
    for name in ("reward_mean", "ess", "masked", "kl_k1", "clip_fraction", "token_staleness_mean"):
        assert found[name] is None, name


def test_ranks_add_up_before_anything_is_divided() -> None:
    """Two ranks with different tokens and stalenesses equal one that holds them all."""
    config = ObjectiveConfig()
    parts = [tally_of(config, U[:2], torch.tensor([0, 1])), tally_of(config, U[2:], torch.tensor([1, 2]))]

    def merge(_: dict[str, float]) -> dict[str, float]:
        names = set(parts[0].sums) | set(parts[1].sums)
        return {name: sum(part.sums.get(name, 0.0) for part in parts) for name in names}

    def largest(_: list[float]) -> list[float]:
        return [max(pair) for pair in zip(*(part.maxima.values() for part in parts), strict=True)]

    merged = summary(parts[0].merged(merge, largest), False)
    whole = figures(config, ages=torch.tensor([0, 1, 1, 2]))
    for name, value in whole.items():
        assert merged[name] == pytest.approx(value), name


def test_the_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch("forward"):
            pass
    found = watch.seconds()
    assert 0 < found["seconds_forward"] <= found["seconds"]
    assert found["seconds_update"] == 0.0


def test_the_documentation_has_both_tables() -> None:
    text = DOCS.read_text()
    assert legal_table() in text
    assert text.endswith(table())


def test_names_are_found_in_the_table() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert row_of("kl_k3/2").name == "kl_k3/<s>"
    assert row_of("reward/format").name == "reward/<part>"
    assert row_of("kl_k3").name == "kl_k3"
    assert row_of("kl_k4") is None
    assert row_of("entropy/2") is None


class Board:
    """Stands in for the stream: remembers what is shown in Redis."""

    def __init__(self) -> None:
        self.redis, self.shown = self, {}

    def key(self, name: str) -> str:
        return name

    def hset(self, _: str, mapping: dict[str, object]) -> None:
        self.shown |= mapping


def test_a_null_is_null_in_the_file_and_a_number_in_redis(tmp_path: Path) -> None:
    """Redis takes no None, and its readers expect numbers."""
    board = Board()
    with RunRecord(tmp_path, board) as record:
        record.step({"mismatch_k1": None, "ess": 0.5, "step": 3})
    assert board.shown == {"mismatch_k1": "nan", "ess": "0.5", "step": 3}
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["mismatch_k1"] is None
