"""Routing replay: tokens go where the engine sent them, also in what a backward pass computes again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from safetensors.torch import load_file, save_file

from buffer.schema import Group
from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.errors import BatchError, ConfigError
from learner.model.forward import target_logprobs
from learner.packing import Row, pack, row_of_tokens
from learner.step import Trainer
from tests.unit.learner.families import make_family
from tests.unit.learner.groups import any_experts, make_group, with_experts
from tests.unit.learner.test_bf16 import routed, sequences
from tests.unit.learner.test_step import digest

FAMILIES = ["qwen3_moe", "qwen3_next", "deepseek_v3", "moonlight"]
SMALL = OptimizerConfig(lr=1e-3, warmup_steps=0)


def make_trainer(folder: Path, *, replay: bool = True, **model: Any) -> Trainer:
    config = ModelConfig(path=str(folder), **{"micro_batch_tokens": 64, **model})
    return Trainer(folder, config, SMALL, ObjectiveConfig(routing_replay=replay), seed=3)


def sizes(trainer: Trainer) -> tuple[int, int, int]:
    shape = trainer._shape
    assert shape.experts is not None
    return len(shape.layers), shape.experts.chosen, shape.experts.count


def batch_of(trainer: Trainer, step: int = 0) -> list[Group]:
    groups = [make_group(step * 6 + index, versions=(step,)) for index in range(6)]
    return [with_experts(group, *sizes(trainer)) for group in groups]


def routed_rows(trainer: Trainer, lists: list[list[int]]) -> list[Row]:
    rows = [row_of_tokens(sequence, 1) for sequence in lists]
    return [
        replace(row, routed=any_experts(len(row.tokens) - 1, *sizes(trainer), seed=index))
        for index, row in enumerate(rows)
    ]


def logprobs(trainer: Trainer, rows: list[Row], budget: int = 2000) -> list[np.ndarray]:
    """Of each row, in their order."""
    found: dict[int, np.ndarray] = {}
    with torch.no_grad():
        for batch in pack(rows, budget):
            values = target_logprobs(trainer._parallel, batch, 256)[0]
            parts = values.split(torch.bincount(batch.sample).tolist())
            found |= {index: part.numpy() for index, part in zip(batch.rows, parts, strict=True)}
    return [found[index] for index in range(len(rows))]


@pytest.mark.parametrize("case", FAMILIES)
def test_every_token_goes_where_it_is_sent(case: str, tmp_path: Path) -> None:
    """transformers' model, forced to the same experts layer by layer and token by token, says the same."""
    theirs, trainer = make_family(case, tmp_path), make_trainer(tmp_path)
    rows = routed_rows(trainer, sequences()[:5])
    own = logprobs(make_trainer(tmp_path, replay=False), rows)
    experts = [index for index, layer in enumerate(trainer._shape.layers) if layer.experts]
    said, forced = [], list[torch.Tensor]()
    routed(theirs, lambda _own: forced.pop(0))
    for row in rows:
        forced += [torch.from_numpy(row.routed[:, layer].astype(np.int64)) for layer in experts]
        with torch.no_grad():
            logs = theirs(torch.from_numpy(row.tokens[None, :-1])).logits[0].float().log_softmax(-1)
        said.append(logs.gather(1, torch.from_numpy(row.tokens[1:, None])).squeeze(1).numpy())
    for budget in (2000, 100):
        for one, other in zip(logprobs(trainer, rows, budget), said, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    assert np.abs(np.concatenate(own) - np.concatenate(said)).mean() > 0.01


def test_the_order_of_experts_changes_nothing(tmp_path: Path) -> None:
    make_family("qwen3_moe", tmp_path)
    trainer = make_trainer(tmp_path)
    rows = routed_rows(trainer, sequences()[:5])
    turned = [replace(row, routed=row.routed[:, :, ::-1]) for row in rows]
    for one, other in zip(logprobs(trainer, rows), logprobs(trainer, turned), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("case", FAMILIES)
def test_without_gradients_a_model_says_the_same_to_the_last_bit(case: str, tmp_path: Path) -> None:
    make_family(case, tmp_path)
    trainer = make_trainer(tmp_path, replay=False)
    (batch,) = pack([row_of_tokens(sequence, 1) for sequence in sequences()], 2000)
    with_gradients = target_logprobs(trainer._parallel, batch, 256)[0]
    with torch.no_grad():
        assert torch.equal(target_logprobs(trainer._parallel, batch, 256)[0], with_gradients)


@pytest.mark.parametrize("case", ["qwen3_next", "deepseek_v3"])
def test_what_is_computed_again_chooses_the_same(case: str, tmp_path: Path) -> None:
    make_family(case, tmp_path)
    gradients = []
    for recompute in ("none", "selective", "full"):
        trainer = make_trainer(tmp_path, recompute=recompute)
        trainer.train_step(batch_of(trainer), 0)
        gradients.append([parameter.main_grad.clone() for parameter in trainer._model.parameters()])
        assert not any(
            module.router_replay.replay_backward_list
            for module in trainer._model.modules()
            if isinstance(module, TopKRouter)
        )
    for other in gradients[1:]:
        for got, expected in zip(other, gradients[0], strict=True):
            assert torch.allclose(got, expected, atol=1e-6 * float(expected.abs().max()) + 1e-9)


def noisy_routers(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose routers see things a little differently, as another engine's do."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensor += 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_replay_takes_the_mismatch_of_routers_away(tmp_path: Path) -> None:
    engine = make_family("qwen3_moe", tmp_path / "engine")
    learner = noisy_routers(tmp_path / "engine", tmp_path / "learner")
    rows, said, used = [], [], list[np.ndarray]()
    routed(engine, lambda own: (used.append(own.numpy()), own)[1])
    for sequence in sequences():
        used.clear()
        with torch.no_grad():
            logs = engine(torch.tensor([sequence[:-1]])).logits[0].log_softmax(-1)
        said.append(logs.gather(1, torch.tensor(sequence[1:])[:, None]).squeeze(1).numpy())
        rows.append(replace(row_of_tokens(sequence, 1), routed=np.stack(used, axis=1).astype(np.uint16)))
    means = {}
    for replay in (False, True):
        found = logprobs(make_trainer(learner, replay=replay), rows)
        means[replay] = np.abs(np.concatenate(found) - np.concatenate(said)).mean()
    assert means[True] < 0.5 * means[False], means


def test_without_choices_the_model_chooses(tmp_path: Path) -> None:
    make_family("qwen3_moe", tmp_path)
    plain, trainer = make_trainer(tmp_path, replay=False), make_trainer(tmp_path)
    lists = sequences()[:3]
    for _ in range(2):  # also after choices were replayed
        for one, other in zip(trainer.score(lists), plain.score(lists), strict=True):
            assert one.tolist() == other.tolist()
        logprobs(trainer, routed_rows(trainer, lists))


def test_training_replays_and_repeats(tmp_path: Path) -> None:
    make_family("qwen3_moe", tmp_path)
    digests = []
    for replay in (True, True, False):
        trainer = make_trainer(tmp_path, replay=replay)
        for step in range(2):
            trainer.train_step(batch_of(trainer, step), step)
        digests.append(digest(trainer))
    assert digests[0] == digests[1] != digests[2]


def changed(group: Group, **fields: Any) -> Group:
    first = msgspec.structs.replace(group.samples[0], **fields)
    return msgspec.structs.replace(group, samples=[first, *group.samples[1:]])


def test_choices_that_cannot_be_are_refused_by_name(tmp_path: Path) -> None:
    make_family("deepseek_v3", tmp_path)
    trainer = make_trainer(tmp_path)
    groups = batch_of(trainer)
    routed = groups[1].samples[0].routed
    layers, _, count = sizes(trainer)
    high, twice = routed.copy(), routed.copy()
    high[1, layers - 1, 0] = count
    twice[-1, layers - 1] = 0
    for wrong, says in (
        (None, "got none, expected"),
        (routed[1:], "fed tokens, layers, experts"),
        (high, rf"layer {layers - 1}: got expert {count}, expected 0 to {count - 1}"),
        (twice, f"layer {layers - 1}: got .*, expected different ones"),
    ):
        with pytest.raises(BatchError, match=f"{groups[1].id}, sample 0: .*{says}"):
            trainer.train_step([groups[0], changed(groups[1], routed=wrong)], 0)
    dense = routed.copy()
    dense[:, 0] = 0  # what an engine says of a layer without experts
    assert trainer.train_step([groups[0], changed(groups[1], routed=dense)], 0)["skipped"] == 0


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    make_family("qwen3", tmp_path)
    with pytest.raises(ConfigError, match=r"routing_replay.*qwen3.*set it to false"):
        make_trainer(tmp_path)
