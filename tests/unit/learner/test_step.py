"""One step: exactness, the objective end to end, and the supervised warm-up."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from buffer.schema import Span
from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig, SftConfig
from learner.errors import BatchError, LearnerError
from learner.model.optimizer import learning_rate
from learner.sft import warm_up
from learner.step import Trainer
from tests.unit.learner.groups import make_group

QUICK = OptimizerConfig(lr=1e-2, warmup_steps=0)


def make_trainer(
    folder: Path, optimizer: OptimizerConfig = QUICK, tokens: int = 64, **objective: str
) -> Trainer:
    model = ModelConfig(path=str(folder), micro_batch_tokens=tokens)
    return Trainer(folder, model, optimizer, ObjectiveConfig(**objective), seed=3)


def digest(trainer: Trainer) -> str:
    total = hashlib.sha256()
    for name, tensor in trainer.export().items():
        total.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def batch_of(step: int) -> list:
    return [make_group(step * 6 + index, versions=(max(0, step - 1),)) for index in range(6)]


def test_training_twice_gives_the_same_bits_whatever_the_order_of_arrival(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    digests = []
    for turn in (1, -1):
        trainer = make_trainer(folder)
        for step in range(3):
            trainer.train_step(batch_of(step)[::turn], step)
        digests.append(digest(trainer))
    assert digests[0] == digests[1]
    assert digests[0] != digest(make_trainer(folder))


def test_micro_batches_do_not_change_the_gradient(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    norms = []
    for tokens in (1, 64, 10_000):
        trainer = make_trainer(folder, tokens=tokens)
        norms.append([trainer.train_step(batch_of(step), step)["grad_norm"] for step in range(3)])
    np.testing.assert_allclose(norms[0], norms[2], rtol=1e-3)
    np.testing.assert_allclose(norms[1], norms[2], rtol=1e-3)


def test_one_step_equals_plain_torch_on_transformers(make_checkpoint: Callable) -> None:
    """GRPO with tis, its clip and AdamW, computed again sample by sample on the transformers model."""
    folder, theirs = make_checkpoint()
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=0, clip_grad=0.1)
    trainer = make_trainer(folder, optimizer)
    groups = batch_of(0)
    metrics = trainer.train_step(groups, 0)
    samples = [
        (sample, reward)
        for group in groups
        for sample, reward in zip(group.samples, (-1, 1, -1, 1), strict=True)
    ]
    loss = 0.0
    for sample, sign in samples:
        tokens = torch.tensor([sample.tokens.tolist()])
        logs = theirs(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        logs = logs[sample.prompt_length - 1 :]
        weight = (logs.detach() - torch.tensor(sample.logprobs)).exp().clamp(max=2)
        advantage = sign * 0.5 / (0.5 + 1e-5)
        loss = loss - (weight * (logs - logs.detach()).exp() * advantage).sum()
    loss = loss / sum(sample.answer_length for sample, _ in samples)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0).step()
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    expected = theirs.state_dict()
    for name, tensor in trainer.export().items():
        # Adam's first step is +-lr: its sign may differ where the gradient is all but zero.
        assert (tensor - expected[name]).abs().mean() < 1e-5, name


def test_weight_decay_shrinks_matrices_and_no_norm(make_checkpoint: Callable) -> None:
    folder, theirs = make_checkpoint()
    weights = []
    for decay in (0.0, 0.5):
        trainer = make_trainer(folder, OptimizerConfig(lr=1e-2, warmup_steps=0, weight_decay=decay))
        trainer.train_step(batch_of(0), 0)
        weights.append(trainer.export())
    for name, tensor in theirs.state_dict().items():
        shrunk = weights[0][name] - weights[1][name]
        expected = torch.zeros_like(tensor) if "norm" in name else 1e-2 * 0.5 * tensor
        torch.testing.assert_close(shrunk, expected, rtol=0, atol=1e-6, msg=name)


def test_learning_rate_zero_changes_no_bit(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    trainer = make_trainer(folder, OptimizerConfig(lr=0.0, weight_decay=0.1))
    before = digest(trainer)
    for step in range(2):
        trainer.train_step(batch_of(step), step)
    assert digest(trainer) == before
    assert trainer.version == 2


def test_on_policy_ratios_are_one(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    trainer = make_trainer(folder)
    groups = batch_of(0)
    samples = [sample for group in groups for sample in group.samples]
    scores = trainer.score([sample.tokens.tolist() for sample in samples])
    for sample, logprobs in zip(samples, scores, strict=True):
        sample.logprobs = logprobs[sample.prompt_length - 1 :]
    metrics = trainer.train_step(groups, 0)
    assert metrics["ratio_deviation_max"] < 1e-4
    assert metrics["ess"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["clip_fraction"] == metrics["masked"] == 0.0
    assert abs(metrics["kl_k1"]) < 1e-5


def test_metrics_count_what_was_trained(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    trainer = make_trainer(folder)
    trainer.train_step(batch_of(0), 0)
    trainer.train_step(batch_of(1), 1)
    groups = [*batch_of(2)[:3], *(make_group(30 + index, versions=(0, 2)) for index in range(3))]
    metrics = trainer.train_step(groups, 2)
    assert metrics["tokens"] == sum(s.answer_length for g in groups for s in g.samples)
    assert (metrics["groups"], metrics["samples"]) == (6.0, 24.0)
    assert metrics["reward_mean"] == 0.5
    assert metrics["staleness_mean"] == 1.5
    assert metrics["staleness_max"] == 2.0
    assert {f"kl_k3/{value}" for value in (0, 1, 2)} <= set(metrics)
    assert 0 < metrics["ess"] <= 1
    assert 0 < metrics["entropy"] < np.log(48)


def test_a_gradient_that_is_not_finite_skips_the_update(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    trainer = make_trainer(folder)
    groups = batch_of(0)
    before = digest(trainer)
    groups[0].samples[0].logprobs[:] = np.nan
    metrics = trainer.train_step(groups, 0)
    assert metrics["skipped"] == 1.0
    assert not np.isfinite(metrics["grad_norm"])
    assert digest(trainer) == before
    assert trainer.version == 1
    assert trainer.train_step(batch_of(1), 1)["skipped"] == 0.0
    assert digest(trainer) != before


def test_the_control_shuffles_advantages_by_seed_and_step(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    plain, control = make_trainer(folder), make_trainer(folder, control="shuffle_advantages")
    groups = batch_of(0)
    straight = np.concatenate(plain._advantages(groups, 0))
    shuffled = np.concatenate(control._advantages(groups, 0))
    assert sorted(straight) == sorted(shuffled)
    assert straight.tolist() != shuffled.tolist()
    assert shuffled.tolist() == np.concatenate(control._advantages(groups, 0)).tolist()
    assert shuffled.tolist() != np.concatenate(control._advantages(groups, 1)).tolist()


def test_wrong_batches_are_refused(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    trainer = make_trainer(folder)
    with pytest.raises(BatchError, match="step 4: the weights are version 0"):
        trainer.train_step(batch_of(0), 4)
    with pytest.raises(BatchError, match="got 0 groups"):
        trainer.train_step([], 0)


def test_a_snapshot_brings_everything_back(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    trainer = make_trainer(folder)
    trainer.train_step(batch_of(0), 0)
    snapshot = trainer.snapshot()
    digests = []
    for _ in range(2):
        trainer.train_step(batch_of(1), 1)
        digests.append(digest(trainer))
        trainer.restore(snapshot)
    assert digests[0] == digests[1]
    assert trainer.version == 1


def test_a_clip_that_cannot_act_is_warned_of(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint()
    model = ModelConfig(path=str(folder))
    with pytest.raises(UserWarning, match="no effect in mode `decoupled`"):  # warnings are errors here
        Trainer(folder, model, QUICK, ObjectiveConfig(clip_high=0.28))


def test_reward_goes_up(make_checkpoint: Callable) -> None:
    """Twenty on-policy steps on a one-token bandit: answer 7 is right."""
    folder, _ = make_checkpoint()
    trainer = make_trainer(folder, tokens=2048)
    prompts = [[1, 2, index] for index in range(8) for _ in range(16)]
    means = []
    for step in range(20):
        answers = trainer.generate(prompts, 1, eos_id=-1, seed=step)
        scores = trainer.score([p + a for p, a in zip(prompts, answers, strict=True)])
        groups = [make_group(8 * step + index, versions=(step,), size=16) for index in range(8)]
        samples = [sample for group in groups for sample in group.samples]
        for sample, prompt, answer, logs in zip(samples, prompts, answers, scores, strict=True):
            sample.tokens, sample.prompt_length = np.array(prompt + answer, np.int32), 3
            sample.logprobs, sample.loss_runs, sample.spans = logs[2:], [1], [Span(1, 0)]
            sample.reward = float(answer == [7])
        means.append(trainer.train_step(groups, step)["reward_mean"])
    assert np.mean(means[-3:]) > 0.5 > 0.2 > means[0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1.0, 1.0, 1.0, 1.0]), ("linear", [0.5, 1.0, 1.0, 0.5, 0.0])],
)
def test_learning_rate_schedules(schedule: str, expected: list[float]) -> None:
    decay = {} if schedule == "constant" else {"decay_steps": 4}
    config = OptimizerConfig(lr=1.0, warmup_steps=2, schedule=schedule, **decay)
    assert [learning_rate(config, step) for step in range(5)] == expected


def _copying_task() -> tuple:
    """Answer the prompt's only free token again, then the end token 0."""
    source = np.random.default_rng(0)
    examples = (([1, value], [value, 0]) for value in iter(lambda: int(source.integers(2, 40)), -1))
    held_out = [([1, value], str(value)) for value in range(2, 40)] * 8
    return examples, held_out


def _right(answer: list[int], gold: str) -> float:
    return float(answer == [int(gold)])


@pytest.mark.parametrize("seed", [0, 1])
def test_warm_up_stops_inside_the_target(make_checkpoint: Callable, seed: int) -> None:
    folder, _ = make_checkpoint(seed=seed, std=0.02)
    trainer = make_trainer(folder, tokens=4096)
    examples, held_out = _copying_task()
    seen = []
    config = SftConfig(lr=5e-3, batch=64, measure_every=32, measure_prompts=256, max_answer_tokens=2)
    report = warm_up(trainer, examples, held_out, _right, config, seen.append, eos_id=0)
    assert 0.42 <= report.accuracy <= 0.48
    assert len(seen) > 1
    assert report.steps <= sum(32 for _ in seen)
    answers = trainer.generate([prompt for prompt, _ in held_out], 2, eos_id=0, seed=123)
    marks = [_right(answer, gold) for answer, (_, gold) in zip(answers, held_out, strict=True)]
    assert 0.35 < np.mean(marks) < 0.55
    assert trainer.version == 0


def test_warm_up_ends_below_the_target_when_its_steps_are_used_up(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint(std=0.02)
    examples, questions = _copying_task()
    config = SftConfig(lr=1e-6, batch=4, max_steps=3, measure_every=2, measure_prompts=8)
    report = warm_up(make_trainer(folder), examples, questions, _right, config, lambda _: None, eos_id=0)
    assert (report.steps, report.reached) == (3, False)
    assert report.accuracy < 0.42


def test_warm_up_takes_an_overshoot_back(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint(std=0.02)
    examples, questions = _copying_task()
    seen = []
    config = SftConfig(lr=5e-3, batch=64, measure_every=256, measure_prompts=256, max_answer_tokens=2)
    report = warm_up(
        make_trainer(folder, tokens=4096), examples, questions, _right, config, seen.append, eos_id=0
    )
    assert report.undone >= 1
    assert max(progress.accuracy for progress in seen) > 0.48
    assert report.reached
    assert 0.42 <= report.accuracy <= 0.48


def test_warm_up_says_when_the_demonstrations_end(make_checkpoint: Callable) -> None:
    folder, _ = make_checkpoint(std=0.02)
    examples, held_out = _copying_task()
    with pytest.raises(LearnerError, match="got 3 demonstrations, expected 256"):
        warm_up(
            make_trainer(folder),
            itertools.islice(examples, 3),
            held_out,
            _right,
            SftConfig(),
            lambda _: None,
            eos_id=0,
        )
