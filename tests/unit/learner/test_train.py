"""The objective inside a step: mini-batches, masks, the reference model, what is dropped and reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from buffer.schema import Group, Sample
from learner.config import AbortConfig, KlConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.config.legal import LEGAL
from learner.errors import Aborted, ConfigError, ModelError
from learner.metrics import row_of
from learner.minibatch import less_divergence, scored, split
from learner.objective import Tokens
from learner.objective.losses import Surrogate
from learner.packing import MicroBatch, Row, pack, rows_of_groups
from learner.step import Trainer
from tests.unit.learner.groups import make_group
from tests.unit.learner.test_step import QUICK, batch_of, digest, make_trainer

SIGNS = (-1, 1, -1, 1)
"""Advantages of a group of `make_group`, up to std + 1e-5: its rewards alternate between 0 and 1."""
STILL = OptimizerConfig(lr=0.0)


def trainer_with(folder: Path, objective: ObjectiveConfig, optimizer: OptimizerConfig = QUICK) -> Trainer:
    return Trainer(folder, ModelConfig(path=str(folder), micro_batch_tokens=64), optimizer, objective, seed=3)


def logs_of(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    """Log-probabilities of the answer under a transformers model."""
    tokens = torch.tensor([sample.tokens.tolist()])
    logs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    return logs[sample.prompt_length - 1 :]


def plain_steps(
    model: torch.nn.Module,
    parts: list[list[Group]],
    lr: float,
    token_loss: Callable[[torch.Tensor, torch.Tensor, Sample, float], torch.Tensor],
) -> None:
    """AdamW steps on a transformers model, one a part, by `token_loss(log pi, log pi_p, sample, A)`."""
    with torch.no_grad():
        proximal = {id(s): logs_of(model, s) for part in parts for group in part for s in group.samples}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for part in parts:
        optimizer.zero_grad()
        samples = [(s, sign) for group in part for s, sign in zip(group.samples, SIGNS, strict=True)]
        total = sum(
            token_loss(logs_of(model, s), proximal[id(s)], s, sign * 0.5 / (0.5 + 1e-5)).sum()
            for s, sign in samples
        )
        (total / sum(s.answer_length for s, _ in samples)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def assert_equal_weights(trainer: Trainer, model: torch.nn.Module) -> None:
    expected = model.state_dict()
    for name, tensor in trainer.export().items():
        # Adam's first step is +-lr: its sign may differ where the gradient is all but zero.
        assert (tensor - expected[name]).abs().mean() < 1e-5, name


def test_mini_batches_share_one_proximal_policy(make_checkpoint: Callable) -> None:
    """Two optimizer steps: the ratio of the second is to the policy before the first, and is clipped."""
    folder, theirs = make_checkpoint()
    config = ObjectiveConfig(mini_batches=2, clip_low=0.02, clip_high=0.03)
    trainer = trainer_with(folder, config, OptimizerConfig(lr=1e-3, warmup_steps=0))
    groups = batch_of(0)
    metrics = trainer.train_step(groups, 0)

    def token_loss(logs: torch.Tensor, proximal: torch.Tensor, sample: Sample, a: float) -> torch.Tensor:
        weight = (proximal - torch.tensor(sample.logprobs)).exp().clamp(max=2)
        ratio = (logs - proximal).exp()
        return -weight * torch.minimum(ratio * a, ratio.clamp(0.98, 1.03) * a)

    plain_steps(theirs, [groups[:3], groups[3:]], 1e-3, token_loss)
    assert_equal_weights(trainer, theirs)
    assert metrics["clip_fraction"] > 0.1
    assert trainer.version == 1


def test_the_first_mini_batch_has_ratio_one_to_the_bit(make_checkpoint: Callable) -> None:
    """pi_p is scored in the micro-batches that are trained; a clip of 1e-7 would see any difference."""
    folder, _ = make_checkpoint()
    config = ObjectiveConfig(mini_batches=2, clip_low=1e-7, clip_high=1e-7)
    metrics = trainer_with(folder, config, STILL).train_step(batch_of(0), 0)
    assert metrics["clip_fraction"] == 0.0
    halves = [
        make_trainer(folder, STILL).train_step(batch_of(0)[part], 0) for part in (slice(3), slice(3, 6))
    ]
    assert metrics["loss"] == pytest.approx(sum(half["loss"] for half in halves) / 2, abs=1e-6)


def test_more_mini_batches_than_groups_skip_the_empty_ones(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    metrics = trainer_with(folder, ObjectiveConfig(mini_batches=5)).train_step(batch_of(0)[:2], 0)
    assert metrics["skipped"] == 3.0
    assert metrics["groups"] == 2.0


def test_a_failed_sample_leaves_no_trace(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    whole, broken = batch_of(0), batch_of(0)
    whole[1].samples.pop(2)
    broken[1].samples[2].finish_reason = "reward"
    broken[1].samples[2].reward = float("nan")
    broken[1].samples[2].logprobs[:] = np.nan
    digests = []
    for groups in (whole, broken):
        trainer = make_trainer(folder)
        trainer.train_step(groups, 0)
        digests.append(digest(trainer))
    assert digests[0] == digests[1]


def test_dropped_groups_are_named_and_counted(
    make_checkpoint: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = make_checkpoint()
    groups = batch_of(0)
    for sample in groups[4].samples[1:]:
        sample.finish_reason = "error"
    metrics = make_trainer(folder).train_step(groups, 0)
    assert (metrics["groups"], metrics["groups_dropped"], metrics["samples_invalid"]) == (5.0, 1.0, 3.0)
    assert f"group {groups[4].id} is dropped (reward): 1 of 4 samples are valid" in caplog.text


def test_a_batch_without_a_valid_group_changes_nothing(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    trainer = make_trainer(folder)
    trainer.train_step(batch_of(0), 0)  # so that the optimizer has momentum
    before, groups = digest(trainer), batch_of(1)
    for group in groups:
        for sample in group.samples:
            sample.finish_reason = "error"
    metrics = trainer.train_step(groups, 1)
    assert digest(trainer) == before
    assert (metrics["skipped"], metrics["tokens"], metrics["grad_norm"]) == (1.0, 0.0, None)
    assert trainer.version == 2


@pytest.mark.parametrize("row", LEGAL[:7], ids=lambda row: f"{row.loss}-{row.mode}")
def test_masked_tokens_are_never_looked_at(make_checkpoint: Callable, row: object) -> None:
    """Whatever the record says of tokens an environment wrote, nothing changes, for any loss."""
    folder, _ = make_checkpoint()
    config = ObjectiveConfig(
        loss=row.loss,
        mode=row.mode,
        mini_batches=row.mini_batches,
        correction="mis",
        mis_high=1e4,
        mis_low=1e-4,
        aggregation="sequence_mean",
        kl=KlConfig(coefficient=0.1),
        entropy=0.01,
    )
    digests, counted = set(), set()
    for junk in (-1.0, np.nan):
        groups = [make_group(index, versions=(0,), size=4) for index in range(4)]
        for group in groups:
            for sample in group.samples:
                n = sample.answer_length
                sample.loss_runs = [n // 2, n - n // 2]
                sample.logprobs[n // 2 :] = junk
        trainer = trainer_with(folder, config)
        metrics = trainer.train_step(groups, 0)
        assert metrics["skipped"] == 0.0
        counted.add(metrics["tokens"])
        digests.add(digest(trainer))
    assert len(digests) == 1
    assert counted == {sum(s.answer_length // 2 for group in groups for s in group.samples)}
    assert digests != {digest(trainer_with(folder, config))}


def test_kl_in_the_reward_is_free_at_the_reference_and_costs_away_from_it(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    config = ObjectiveConfig(kl=KlConfig(coefficient=0.7))
    plain, priced = make_trainer(folder), trainer_with(folder, config)
    first = priced.train_step(batch_of(0), 0)
    plain.train_step(batch_of(0), 0)
    assert digest(plain) == digest(priced)  # pi_p = ref: 0 to the bit
    assert first["kl_reference_k1"] == 0.0
    assert first["reward_shaped"] == first["reward_mean"]

    groups = batch_of(1)
    samples = [sample for group in groups for sample in group.samples]
    sequences = [sample.tokens.tolist() for sample in samples]
    now, before = priced.score(sequences), make_trainer(folder).score(sequences)
    spent = [
        (a - b)[sample.prompt_length - 1 :].sum() for a, b, sample in zip(now, before, samples, strict=True)
    ]
    metrics = priced.train_step(groups, 1)
    expected = np.mean([sample.reward - 0.7 * cost for sample, cost in zip(samples, spent, strict=True)])
    assert metrics["reward_shaped"] == pytest.approx(expected, abs=1e-5)
    assert metrics["reward_mean"] == 0.5
    assert abs(metrics["reward_shaped"] - 0.5) > 1e-3
    plain.train_step(groups, 1)
    assert digest(plain) != digest(priced)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_pulls_towards_the_reference(make_checkpoint: Callable, estimator: str) -> None:
    """One step equals plain torch with a second transformers model as the reference."""
    folder, theirs = make_checkpoint(seed=0)
    other, reference = make_checkpoint(seed=1)
    kl = KlConfig(coefficient=0.5, where="loss", estimator=estimator, reference=str(other))
    trainer = trainer_with(folder, ObjectiveConfig(kl=kl), OptimizerConfig(lr=1e-3, warmup_steps=0))
    groups = batch_of(0)
    metrics = trainer.train_step(groups, 0)

    def token_loss(logs: torch.Tensor, proximal: torch.Tensor, sample: Sample, a: float) -> torch.Tensor:
        weight = (proximal - torch.tensor(sample.logprobs)).exp().clamp(max=2)
        with torch.no_grad():
            far = logs_of(reference, sample)
        d = logs - far
        penalty = d.square() / 2 if estimator == "k2" else (-d).exp() - 1 + d
        return weight * (-a * (logs - proximal).exp() + 0.5 * penalty)

    plain_steps(theirs, [groups], 1e-3, token_loss)
    assert_equal_weights(trainer, theirs)
    assert metrics["kl_reference_k3"] > 0.01


def test_scoring_the_reference_leaves_the_weights_alone(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint(seed=0)
    other, _ = make_checkpoint(seed=1)
    trainer = trainer_with(folder, ObjectiveConfig(kl=KlConfig(coefficient=1.0, reference=str(other))), STILL)
    before = digest(trainer)
    assert before == digest(make_trainer(folder))
    assert trainer.train_step(batch_of(0), 0)["kl_reference_k1"] != 0.0
    assert digest(trainer) == before


def test_a_reference_that_cannot_be_known_is_asked_for(make_checkpoint: Callable, tmp_path: Path) -> None:
    folder, _ = make_checkpoint()
    trainer = trainer_with(folder, ObjectiveConfig(kl=KlConfig(coefficient=1.0)))
    trainer.version = 4  # as after a restore
    with pytest.raises(ConfigError, match="got none in a run that goes on at step 4"):
        trainer.train_step(batch_of(4), 4)
    with pytest.raises(ModelError):
        trainer_with(folder, ObjectiveConfig(kl=KlConfig(coefficient=1.0, reference=str(tmp_path))))


def test_the_entropy_bonus_raises_the_entropy(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    final = []
    for entropy in (0.0, 1.0):
        trainer = trainer_with(folder, ObjectiveConfig(entropy=entropy))
        found = [trainer.train_step(batch_of(0), step)["entropy"] for step in range(4)]
        final.append(found[-1])
    assert final[1] > final[0] + 0.01


def test_overlong_answers_are_trained_as_configured(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    groups = batch_of(0)
    groups[0].samples[1].finish_reason = "length"
    kept = trainer_with(folder, ObjectiveConfig()).train_step(groups, 0)
    masked = trainer_with(folder, ObjectiveConfig(overlong="mask")).train_step(groups, 0)
    length = groups[0].samples[1].answer_length
    assert kept["tokens"] - masked["tokens"] == length
    assert (kept["samples_masked"], masked["samples_masked"]) == (0.0, 1.0)
    config = ObjectiveConfig(overlong="penalty", overlong_length=9, overlong_ramp=9)
    priced = trainer_with(folder, config).train_step(groups, 0)
    lengths = [sample.answer_length for group in groups for sample in group.samples]
    assert priced["reward_shaped"] == pytest.approx(0.5 - np.mean(lengths) / 9)
    assert priced["reward_mean"] == 0.5


def halved(tokens: Tokens, anchor: torch.Tensor, config: ObjectiveConfig) -> Surrogate:
    """Half of plain GRPO."""
    losses = -0.5 * tokens.advantages * (tokens.logprobs - anchor).exp()
    return Surrogate(losses, torch.zeros_like(tokens.sample))


def test_a_loss_of_ones_own_trains(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    plain = make_trainer(folder).train_step(batch_of(0), 0)
    config = ObjectiveConfig(loss=f"{__name__}:halved")
    own = trainer_with(folder, config).train_step(batch_of(0), 0)
    assert own["grad_norm"] == pytest.approx(plain["grad_norm"] / 2, rel=1e-5)
    with pytest.raises(ConfigError, match="put the module on PYTHONPATH"):
        trainer_with(folder, ObjectiveConfig(loss="no_such_module:loss"))


def test_an_idle_setting_is_warned_of(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    with pytest.raises(UserWarning, match="mis_high has no effect with correction `tis`"):
        trainer_with(folder, ObjectiveConfig(mis_high=3.0))


def test_a_run_that_masks_everything_ends_before_the_next_step(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    config = ObjectiveConfig(correction="geo", abort=AbortConfig(steps=2))
    trainer = trainer_with(folder, config)
    for step in range(2):
        assert trainer.train_step(batch_of(step), step)["masked"] == 1.0
    with pytest.raises(Aborted, match="geo masked more than 50% of the tokens for 2 steps"):
        trainer.train_step(batch_of(2), 2)
    assert trainer.version == 2


def test_a_gradient_that_is_not_finite_is_logged_with_its_groups(
    make_checkpoint: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = make_checkpoint()
    groups = batch_of(0)
    groups[2].samples[0].logprobs[:] = np.nan
    assert make_trainer(folder).train_step(groups, 0)["skipped"] == 1.0
    assert "the update is skipped" in caplog.text
    assert groups[2].id in caplog.text


def test_every_figure_stands_in_the_table(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    groups = batch_of(0)
    for sample in groups[0].samples:
        sample.rewards = {"format": 1.0}
    config = ObjectiveConfig(correction="vtrace", kl=KlConfig(coefficient=0.1), mini_batches=2)
    metrics = trainer_with(folder, config).train_step(groups, 0)
    assert [name for name in metrics if row_of(name) is None] == []
    assert [name for name, value in metrics.items() if value is None] == ["mfu"], "it takes a GPU"
    assert {"reward/format", "kl_k3/0", "first_weight"} <= set(metrics)
    assert msgspec.json.encode(metrics)


def test_length_of_a_group_and_advantages_are_those_of_valid_samples(make_checkpoint: Callable) -> None:
    """A failed sample does not move the baseline of the others."""
    folder, _ = make_checkpoint()
    groups = batch_of(0)[:1]
    groups[0].samples[3].finish_reason = "reward"  # rewards left: 0, 1, 0
    metrics = trainer_with(folder, ObjectiveConfig(advantage="dr_grpo")).train_step(groups, 0)
    assert metrics["advantage_max"] == pytest.approx(2 / 3)


def test_each_sample_pays_for_its_own_tokens() -> None:
    """Packing reorders samples; here a policy whose log-ratio to the reference is a token's id / 100."""
    groups = batch_of(0)

    def packed(rows: list[Row]) -> list[MicroBatch]:
        return pack(rows, 40, count=10)  # the last of them empty

    rows = {group.id: rows_of_groups([group], [np.zeros(len(group.samples))], 0) for group in groups}
    minis = split(groups, rows, list(rows), 2, packed, list)
    minis = scored(minis, lambda batches: [batch.targets / 100 for batch in batches], "proximal")
    minis = scored(minis, lambda batches: [torch.zeros(len(batch.targets)) for batch in batches], "reference")
    priced = less_divergence(minis, ObjectiveConfig(kl=KlConfig(coefficient=2.0)))
    paid = [sample.reward for mini in priced for group in mini.groups for sample in group.samples]
    expected = [
        sample.reward - 2 * sample.tokens[sample.prompt_length :].sum() / 100
        for group in groups
        for sample in group.samples
    ]
    np.testing.assert_allclose(paid, expected, rtol=1e-6)
